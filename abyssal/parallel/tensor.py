"""Tensor parallel with sequence parallel: heads and inner widths are divided over `tp`, and between them the tokens.

Between attentions and MLPs a rank has a piece of the tokens, and embedding, norms, gates, routed experts, head and loss
work on that alone. Attention and MLPs gather all tokens' inputs, do their share of the heads or of the inner width,
and sum what comes out, of which each rank keeps its own tokens (Korthikanti et al. 2022). Every rank holds whole what
all heads share: the maps down to the latents and their norms.
"""

from functools import partial
from typing import Any, cast

import torch.distributed as dist
from torch import Tensor, nn

from abyssal.config import ModelConfig
from abyssal.model.attention import GroupedAttention
from abyssal.model.experts import MoE, Routing
from abyssal.model.latent import LatentAttention
from abyssal.model.layers import MLP, Linear
from abyssal.model.transformer import Transformer
from abyssal.parallel.mesh import Mesh
from abyssal.parallel.rows import gathered, scattered_sum
from abyssal.parallel.shard import Split, Splits


def check(config: ModelConfig, tp: int) -> None:
    """Raises ValueError naming the field that `tp` ranks cannot divide."""

    def need(key: str, size: int) -> None:
        if size % tp:
            raise ValueError(f"mesh tp={tp}: {key}: expected a multiple of {tp}, got {size}")

    if tp == 1:
        return
    if config.position in ("integer", "binary", "sinusoidal"):
        # They are added to the embeddings of a rank's tokens, whose places only attention knows.
        raise ValueError(f"mesh tp={tp}: position: expected none, rope or decoupled, got {config.position!r}")
    need("num_attention_heads", config.num_attention_heads)
    if config.attention == "gqa":
        need("num_key_value_heads", config.key_value_heads)
    dense = not config.has_experts or config.first_k_dense_replace > 0
    if dense or (config.num_nextn_predict_layers and not config.mtp_has_experts):
        need("intermediate_size", config.intermediate_size)
    if config.n_routed_experts is not None and config.n_shared_experts:
        need("n_shared_experts · moe_intermediate_size", config.n_shared_experts * config.moe_intermediate_size)


class SpreadMLP(MLP):
    """An MLP with one rank's share of the inner width."""

    group: dist.ProcessGroup

    def forward(self, x: Tensor) -> Tensor:
        """`[T/tp, D]` -> `[T/tp, D]`."""
        return _exchanged(super().forward, self.group, x)


def spread_tensor(model: Transformer, mesh: Mesh) -> Splits:
    """Leaves this rank its share of a whole model's heads and inner widths; attention and MLPs exchange tokens.

    Raises ValueError naming the field that cannot be divided.
    """
    check(model.config, mesh.shape.tp)
    group, place, ranks = mesh.group("tp"), mesh.place("tp"), mesh.shape.tp
    splits: Splits = {}

    def divide(dim: int, *maps: Linear) -> None:
        for m in maps:
            m.weight = nn.Parameter(m.weight.detach().chunk(ranks, dim)[place].clone())
            splits[m] = Split("tp", {"weight": dim})

    for module in model.modules():
        if isinstance(module, LatentAttention | GroupedAttention):
            divide(0, *_by_head(module))
            divide(1, module.wo)
            module.config = _share(module.config, ranks)
            module.__dict__["forward"] = partial(_exchanged, module.forward, group)
        elif isinstance(module, MLP):
            divide(0, module.w1, module.w3)
            divide(1, module.w2)
            # A class of its own tells whatever would compute an MLP in one piece, or read its weights, not to.
            module.__class__ = SpreadMLP
            cast(SpreadMLP, module).group = group
        elif type(module) is MoE and module.shared_experts is not None:
            module.__dict__["forward"] = partial(_moe, module)
    return splits


def _by_head(attention: LatentAttention | GroupedAttention) -> list[Linear]:
    """The maps whose rows are heads, one behind the other."""
    if isinstance(attention, LatentAttention):
        return [attention.wq_b if attention.compressed else attention.wq, attention.wkv_b]
    if attention.config.attention == "mqa":  # all queries read the one head of keys
        return [attention.wq]
    return [attention.wq, attention.wk, attention.wv]


def _share(config: ModelConfig, ranks: int) -> ModelConfig:
    """What an attention with one rank's heads reads of its configuration."""
    heads = config.num_key_value_heads
    own = heads // ranks if config.attention == "gqa" and heads is not None else heads
    return config.replace(num_attention_heads=config.num_attention_heads // ranks, num_key_value_heads=own)


def _exchanged(inner: Any, group: dist.ProcessGroup, x: Tensor, *others: Any) -> Tensor:
    """`inner` of all ranks' tokens, summed over the ranks: `[T/tp, D]` -> `[T/tp, D]`."""
    return scattered_sum(inner(gathered(x, group), *others), group)


def _moe(moe: MoE, x: Tensor) -> tuple[Tensor, Routing]:
    """`MoE.forward` where routed and shared experts do not see the same tokens."""
    assert moe.shared_experts is not None
    routing = moe.gate(x)
    return moe.experts(x, routing) + moe.shared_experts(x), routing
