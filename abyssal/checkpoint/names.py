"""The one table of names: every public tensor, and the place in the model where it lives."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from abyssal.config import ModelConfig
from abyssal.model.experts import Experts
from abyssal.model.layers import Linear
from abyssal.model.transformer import Transformer

_MLP = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}

_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn.wq": "self_attn.q_proj",
    "attn.wq_a": "self_attn.q_a_proj",
    "attn.q_norm": "self_attn.q_a_layernorm",
    "attn.wq_b": "self_attn.q_b_proj",
    "attn.wkv_a": "self_attn.kv_a_proj_with_mqa",
    "attn.kv_norm": "self_attn.kv_a_layernorm",
    "attn.wkv_b": "self_attn.kv_b_proj",
    "attn.wk": "self_attn.k_proj",
    "attn.wv": "self_attn.v_proj",
    "attn.wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn.gate": "mlp.gate",
    "ffn.experts": "mlp.experts",
    **{f"ffn.{w}": f"mlp.{public}" for w, public in _MLP.items()},
    **{f"ffn.shared_experts.{w}": f"mlp.shared_experts.{public}" for w, public in _MLP.items()},
}

_MODULE = {"enorm": "enorm", "hnorm": "hnorm", "eh_proj": "eh_proj", "norm": "shared_head.norm"}

# Rotary frequencies follow from the configuration, but some checkpoints store them beside the weights.
_CONSTANT = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")

SCALE_SUFFIX = "_scale_inv"


class Slot(NamedTuple):
    """Where a public tensor lives: an attribute of a module, or one expert's slice of it."""

    module: nn.Module
    attribute: str
    expert: int | None = None

    @property
    def tensor(self) -> Tensor:
        whole: Tensor = getattr(self.module, self.attribute)
        return whole.detach() if self.expert is None else whole.detach()[self.expert]

    @property
    def scale(self) -> "Slot | None":
        """Where the scales of this weight's FP8 blocks live; None where a weight is never FP8."""
        if isinstance(self.module, Experts):
            return Slot(self.module, f"{self.attribute}_scale", self.expert)
        return Slot(self.module, "scale") if isinstance(self.module, Linear) else None

    @property
    def is_bias(self) -> bool:
        """Whether this is a router's bias, float32 whatever the rest is."""
        return self.attribute == "bias"

    def place(self, whole: Tensor) -> None:
        """Puts `whole`, all experts of it, where this slot points. FP8 values are not trained."""
        if self.attribute in self.module._parameters:
            whole = nn.Parameter(whole, requires_grad=whole.dtype != torch.float8_e4m3fn)
        setattr(self.module, self.attribute, whole)


def table(model: Transformer) -> dict[str, Slot]:
    """Public name -> Slot for every weight and router bias, once each, in the order of the model.

    FP8 scales are not in it: a weight's scale is called as the weight with SCALE_SUFFIX, and lives in its `scale`.
    """
    slots = {"model.embed_tokens.weight": Slot(model.embed, "weight")}
    for l, block in enumerate(model.layers):
        slots |= _block(block, f"model.layers.{l}")
    slots["model.norm.weight"] = Slot(model.norm, "weight")
    if not model.config.tie_word_embeddings:
        slots["lm_head.weight"] = Slot(model.head, "weight")
    for d, module in enumerate(model.mtp):
        prefix = mtp_prefix(model.config, d)
        for ours, public in _MODULE.items():
            slots[f"{prefix}.{public}.weight"] = Slot(module.get_submodule(ours), "weight")
        slots |= _block(module.get_submodule("block"), prefix)
    return slots


def _block(block: nn.Module, prefix: str) -> dict[str, Slot]:
    return {
        f"{prefix}.{_BLOCK[ours]}.{name}": slot
        for ours, module in block.named_modules()
        if module._parameters
        for name, slot in _own(module)
    }


def _own(module: nn.Module) -> Iterator[tuple[str, Slot]]:
    if isinstance(module, Experts):
        for e in range(module.w1.shape[0]):
            for ours, public in _MLP.items():
                yield f"{e}.{public}.weight", Slot(module, ours, e)
        return
    yield "weight", Slot(module, "weight")
    if module._buffers.get("bias") is not None:
        yield "e_score_correction_bias", Slot(module, "bias")


def mtp_prefix(config: ModelConfig, d: int) -> str:
    """Where MTP module d, from 0, is stored: as a layer after the main model's."""
    return f"model.layers.{config.num_hidden_layers + d}"


def copies(config: ModelConfig) -> dict[str, str]:
    """Names that repeat a tensor of the main model -> the name of what they repeat. A checkpoint may hold them:
    every MTP module's embedding and head, and the head where it is tied to the embedding."""
    embed, head = "model.embed_tokens.weight", "lm_head.weight"
    repeated = {}
    if config.tie_word_embeddings:
        repeated[head] = embed
        head = embed
    for d in range(config.num_nextn_predict_layers):
        repeated[f"{mtp_prefix(config, d)}.embed_tokens.weight"] = embed
        repeated[f"{mtp_prefix(config, d)}.shared_head.head.weight"] = head
    return repeated


def is_constant(name: str) -> bool:
    """Whether the tensor follows from the configuration: carried from load to save, never used."""
    return _CONSTANT.fullmatch(name) is not None


@dataclass(frozen=True)
class Stored:
    """What a checkpoint had that the model itself does not say, so that a save writes back what was read.

    `load` leaves it as `model.stored`; a model that was not loaded has None, and is saved as DeepSeek saves:
    router biases in float32, every MTP module with its copies of embedding and head.
    """

    folder: Path
    config: ModelConfig  # as config.json states it, whatever modules were found
    dtype: torch.dtype  # of the embedding
    copies: frozenset[str] = frozenset()
    narrow: dict[str, torch.dtype] = field(default_factory=dict)  # biases and scales not stored in float32
    constants: dict[str, Tensor] = field(default_factory=dict)
