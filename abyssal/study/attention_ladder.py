"""The rungs of the ladder: one small model under six kinds of attention, its MLPs as wide as equal parameters ask.

Widths stand to each other as DeepSeek-V2's: a head of d_h, a latent of 4·d_h, a rotary key of d_h/2. So latent
attention keeps what GQA with 2.25 groups would.
"""

from dataclasses import dataclass
from typing import Any

from abyssal.config import ModelConfig
from abyssal.costs import BF16, cache_bytes, inspect

TOLERANCE = 0.005  # of the parameters
BASE = "mha"  # whose parameters the others' are made equal to


@dataclass(frozen=True)
class Rung:
    """One kind of attention in a model of its own."""

    name: str
    label: str
    model: ModelConfig
    attention: int  # parameters of all layers' attention
    parameters: int  # of the model

    @property
    def elements(self) -> int:
        """What a token leaves behind in all layers."""
        return cache_bytes(self.model, 1, 1)

    @property
    def bytes(self) -> int:
        """The same in bf16."""
        return cache_bytes(self.model, 1, BF16)


def ladder(width: int, heads: int, groups: int, layers: int, vocab: int, longest: int) -> list[Rung]:
    """MHA, GQA, MQA and three of MLA, with parameters that agree within half a percent.

    Raises ValueError naming the setting where the widths cannot be.
    """
    if width % heads or width // heads % 4:
        raise ValueError(f"heads: expected as many as divide width {width} into multiples of 4, got {heads}")
    if heads % groups:
        raise ValueError(f"groups: expected a divisor of the {heads} heads, got {groups}")
    head = width // heads
    base = ModelConfig.load("tiny").replace(
        vocab_size=vocab, hidden_size=width, intermediate_size=width * 5 // 2, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=None, q_lora_rank=None, kv_lora_rank=4 * head,
        qk_nope_head_dim=head, qk_rope_head_dim=0, v_head_dim=head, n_routed_experts=None, first_k_dense_replace=0,
        n_group=1, topk_group=1, num_nextn_predict_layers=0, max_position_embeddings=longest, model_type="abyssal",
        attention=BASE, position="rope",
    )  # fmt: skip
    grouped = "group" if groups == 1 else "groups"
    kinds: list[tuple[str, str, dict[str, Any]]] = [
        (BASE, "MHA", {}),
        ("gqa", f"GQA, {groups} {grouped}", {"attention": "gqa", "num_key_value_heads": groups}),
        ("mqa", "MQA", {"attention": "mqa"}),
        ("bare", "MLA, no rotary key", {"attention": "mla", "position": "none"}),
        ("mla", "MLA, decoupled RoPE", {"attention": "mla", "position": "decoupled", "qk_rope_head_dim": head // 2}),
        ("coupled", "MLA, coupled RoPE", {"attention": "mla"}),
    ]
    target = inspect(base, 1).parameters.total
    return [_rung(name, label, equal(base.replace(**changes), target)) for name, label, changes in kinds]


def equal(config: ModelConfig, target: int) -> ModelConfig:
    """`config` with the width of its MLPs that brings its parameters nearest to `target`: they grow by the same number
    with each unit of it. Raises ValueError where none is within half a percent."""
    here = config.intermediate_size
    now = inspect(config, 1).parameters.total
    unit = inspect(config.replace(intermediate_size=here + 1), 1).parameters.total - now
    solved = config.replace(intermediate_size=max(here + round((target - now) / unit), 1))
    found = inspect(solved, 1).parameters.total
    if abs(found - target) > TOLERANCE * target:
        beside = f"{config.attention} of {config.num_attention_heads}"
        raise ValueError(
            f"heads: no MLP beside {beside} makes {target:,} parameters within {TOLERANCE:.1%}; "
            f"the nearest, of width {solved.intermediate_size}, makes {found:,}"
        )
    return solved


def _rung(name: str, label: str, model: ModelConfig) -> Rung:
    parameters = inspect(model, 1).parameters
    return Rung(name, label, model, parameters.attention, parameters.total)
