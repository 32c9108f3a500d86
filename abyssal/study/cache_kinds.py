"""Kinds of attention over one model's heads and layers, and what a token leaves behind under each.

Every kind is a configuration of its own, so that what it keeps is asked of the attention that would keep it
(`costs.cache_bytes`), and a cache of it can be allocated and written (`cache_measure.py`). The papers' letters:
n_h heads of d_h (here `v_head_dim`), n_g groups, l layers, a latent of d_c and a rotary key of d_h^R.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from abyssal.config import ModelConfig
from abyssal.costs import BF16, cache_bytes, fp8_cache_bytes
from abyssal.ops.latent_rows import GROUP, row_bytes

DEFAULT_GROUPS = 8


@dataclass(frozen=True)
class Kind:
    """One kind of attention. `packed`: its latents lie in FP8 rows; `mtp`: rows of the MTP modules are counted."""

    label: str
    formula: str  # elements a token, in the papers' letters
    config: ModelConfig
    packed: bool = False
    mtp: bool = False

    @property
    def elements(self) -> int:
        """Numbers a token leaves behind, in all layers."""
        return cache_bytes(self.config, 1, 1, mtp=self.mtp)

    def bytes(self, tokens: int = 1) -> int:
        """Bytes of so many tokens: bf16, or FP8 rows."""
        if self.packed:
            return fp8_cache_bytes(self.config, tokens, mtp=self.mtp)
        return cache_bytes(self.config, tokens, BF16, mtp=self.mtp)


def kinds(config: ModelConfig, groups: Sequence[int] | None = None) -> list[Kind]:
    """The model as it is configured first, then what it could have had. `groups` of GQA, None: 8, or the most that
    divide the heads. Raises ValueError where a number of groups does not divide them."""
    H = config.num_attention_heads
    if groups is None:
        groups = [max(g for g in range(1, min(DEFAULT_GROUPS, H) + 1) if H % g == 0)]
    wrong = [g for g in groups if g < 1 or H % g]
    if wrong:
        raise ValueError(f"groups: expected divisors of the {H} heads, got {wrong[0]}")
    own = Kind(f"{_name(config)}, as configured", _formula(config), config)
    found = [own, Kind("MHA", "2·n_h·d_h·l", grouped(config, "mha"))]
    for g in sorted(set(groups), reverse=True):
        found.append(Kind(f"GQA, {g} groups", "2·n_g·d_h·l", grouped(config, "gqa", g)))
    found.append(Kind("MQA", "2·d_h·l", grouped(config, "mqa")))
    if config.attention != "mla" or config.qk_rope_head_dim:
        found.append(Kind("MLA without the rotary key", "d_c·l", without_rotary_key(config)))
    if config.attention == "mla" and packs(config):
        row = row_bytes(config.kv_lora_rank, config.qk_rope_head_dim)
        found.append(Kind(f"{_name(config)}, FP8 rows of {row} bytes", own.formula, config, packed=True))
    if config.num_nextn_predict_layers:
        more = config.num_nextn_predict_layers
        label = f"{_name(config)} and {more} MTP module{'s' if more > 1 else ''}"
        found.append(Kind(label, own.formula.replace("·l", f"·(l + {more})"), config, mtp=True))
    return found


def grouped(config: ModelConfig, attention: str, groups: int | None = None) -> ModelConfig:
    """Keys and values of width d_h over the same heads and layers. Positions change nothing that is kept."""
    return config.replace(
        attention=attention, position="none", qk_rope_head_dim=0, qk_nope_head_dim=config.v_head_dim,
        num_key_value_heads=groups, q_lora_rank=None, model_type="abyssal",
    )  # fmt: skip


def without_rotary_key(config: ModelConfig) -> ModelConfig:
    """The latent alone."""
    return config.replace(attention="mla", position="none", qk_rope_head_dim=0, model_type="abyssal")


def packs(config: ModelConfig) -> bool:
    """Whether its latents go into FP8 rows."""
    return config.kv_lora_rank % GROUP == 0 and config.qk_rope_head_dim % 2 == 0


def equal_groups(kind: Kind) -> float:
    """Of the GQA, in bf16, that would keep as many bytes."""
    return kind.bytes() / cache_bytes(grouped(kind.config, "mqa"), 1, BF16)


def _name(c: ModelConfig) -> str:
    return c.attention.upper() if c.attention != "gqa" else f"GQA, {c.key_value_heads} groups"


def _formula(c: ModelConfig) -> str:
    if c.attention == "mla":
        return "(d_c + d_h^R)·l" if c.qk_rope_head_dim else "d_c·l"
    return {"mha": "n_h·(d_k + d_v)·l", "gqa": "n_g·(d_k + d_v)·l", "mqa": "(d_k + d_v)·l"}[c.attention]
