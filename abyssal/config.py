"""The model's configuration: the keys of the public `config.json`, checked, and nothing lost.

One frozen dataclass serves the whole family that shares the architecture of DeepSeek-V2 and -V3. A key that
we do not know is kept and written back; a key that changes the arithmetic and that we do not implement is
refused by name.
"""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import ConfigDict, ValidationError, create_model

Attention = Literal["mla", "mha", "gqa", "mqa"]
Position = Literal["none", "integer", "binary", "sinusoidal", "rope", "decoupled"]

FP8_BLOCK = 128


class ConfigError(ValueError):
    """A configuration that is malformed, impossible, or asks for arithmetic that abyssal does not have."""


@dataclass(frozen=True)
class Yarn:
    """YaRN's stretching of the rotary frequencies (Peng et al. 2023, DeepSeek-V3 section 4.3)."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0


@dataclass(frozen=True)
class ModelConfig:
    """Fields bear the public keys' names; the letters of `model/__init__.py` stand beside them.

    Raises ConfigError, naming the field, for sizes that cannot be: see `_check`.
    """

    vocab_size: int
    hidden_size: int  # D
    intermediate_size: int  # width of a dense layer's MLP
    num_hidden_layers: int
    num_attention_heads: int  # H
    qk_nope_head_dim: int  # N
    v_head_dim: int  # V
    kv_lora_rank: int  # C
    qk_rope_head_dim: int  # R; 0 where there is no decoupled rotary key
    q_lora_rank: int | None = None  # None: queries are not compressed
    num_key_value_heads: int | None = None  # read by "gqa" alone; the latent has none
    moe_intermediate_size: int = 0  # F
    n_routed_experts: int | None = None  # E; None: every layer is dense
    n_shared_experts: int | None = None
    num_experts_per_tok: int = 1  # K
    n_group: int = 1
    topk_group: int = 1
    first_k_dense_replace: int = 0
    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid"
    topk_method: Literal["noaux_tc", "group_limited_greedy", "greedy"] = "noaux_tc"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    num_nextn_predict_layers: int = 0  # MTP modules
    rope_theta: float = 10000.0
    rope_scaling: Yarn | None = None
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    model_type: str = "deepseek_v3"
    fp8: bool = False  # weights are stored as e4m3 blocks of 128x128 with `weight_scale_inv`

    # Not public keys. A public checkpoint's tensors tell whether its MTP blocks have experts; the other two
    # select a rung of the ladder, which is saved as `model_type: abyssal`.
    mtp_moe: bool = True
    attention: Attention = "mla"
    position: Position = "decoupled"

    # The public JSON text this came from, so that what we do not read is not lost.
    source: str = field(default="{}", repr=False, compare=False)

    def __post_init__(self) -> None:
        _check(self)

    # ---- derived ----------------------------------------------------------------------------------------

    @property
    def has_experts(self) -> bool:
        return self.n_routed_experts is not None and self.first_k_dense_replace < self.num_hidden_layers

    @property
    def mtp_has_experts(self) -> bool:
        return self.n_routed_experts is not None and self.mtp_moe

    @property
    def router_bias(self) -> bool:
        """Auxiliary-loss-free balancing steers selection by a bias (`noaux_tc`); V2's gates have none."""
        return self.topk_method == "noaux_tc"

    @property
    def key_value_heads(self) -> int:
        """Heads of keys and values of the ladder's rungs; every head of the latent's expansion."""
        if self.attention == "mqa":
            return 1
        if self.attention == "gqa":
            return self.num_key_value_heads or self.num_attention_heads
        return self.num_attention_heads

    @property
    def rotary_width(self) -> int:
        """How many of a head's dimensions are rotated: R where the rotary key is decoupled, all of a key
        where it is coupled, 0 where positions are none or are added to the embeddings."""
        return {"decoupled": self.qk_rope_head_dim, "rope": self.qk_nope_head_dim}.get(self.position, 0)

    @property
    def softmax_scale(self) -> float:
        """1/sqrt(N + R), and YaRN's mscale(mscale_all_dim) squared on top of it."""
        scale = (self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5
        if self.rope_scaling is not None and self.rotary_width:
            scale *= yarn_mscale(self.rope_scaling.factor, self.rope_scaling.mscale_all_dim) ** 2
        return scale

    @property
    def is_public(self) -> bool:
        """Whether the public format can say it: latent attention with its decoupled rotary key."""
        return self.attention == "mla" and self.position == "decoupled" and self.model_type != "abyssal"

    # ---- in and out ---------------------------------------------------------------------------------------

    @classmethod
    def from_dict(cls, public: dict[str, Any], where: str = "config") -> Self:
        """Reads a public `config.json`. Raises ConfigError naming `where` and the key."""
        from abyssal.public_config import read_public

        try:
            typed = _TYPES.model_validate(read_public(public))
            fields = {name: getattr(typed, name) for name in typed.model_fields_set}
            return cls(**fields, source=json.dumps(public))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            raise ConfigError(f"{where}: {key}: {first['msg']}, got {first['input']!r}") from None
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads a preset by its name, a folder's `config.json`, or a JSON file."""
        if str(path) in preset_names():
            text = resources.files("abyssal").joinpath("presets", f"{path}.json").read_text()
            return cls.from_dict(json.loads(text), where=f"preset {path}")
        file = Path(path)
        file = file / "config.json" if file.is_dir() else file
        if not file.is_file():
            raise FileNotFoundError(
                f"{path}: neither a preset ({', '.join(preset_names())}) nor a folder with a config.json"
            )
        try:
            public = json.loads(file.read_text())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file}: not JSON: {error}") from None
        if not isinstance(public, dict):
            raise ConfigError(f"{file}: expected an object, got {type(public).__name__}")
        return cls.from_dict(public, where=str(file))

    def to_dict(self) -> dict[str, Any]:
        """The public `config.json`: every key this came with, spelled as it was, and what has changed since."""
        from abyssal.public_config import write_public

        return write_public(self)

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed and checked again."""
        unknown = changes.keys() - {f.name for f in dataclasses.fields(self)}
        if unknown:
            raise ConfigError(f"unknown field {sorted(unknown)[0]!r}")
        return dataclasses.replace(self, **changes)


def preset_names() -> list[str]:
    """Names of the configurations that come with the package."""
    files = resources.files("abyssal").joinpath("presets").iterdir()
    return sorted(f.name.removesuffix(".json") for f in files if f.name.endswith(".json"))


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention temperature, 0.1·m·ln(s) + 1."""
    return 1.0 if factor <= 1 or mscale == 0 else 0.1 * mscale * math.log(factor) + 1.0


# The types of the fields, checked strictly: "8" is not an 8, and 1.0 is not a 1.
_TYPES = create_model(
    "ModelFields",
    __config__=ConfigDict(strict=True, extra="forbid", arbitrary_types_allowed=True),
    **{
        f.name: (f.type, ... if f.default is dataclasses.MISSING else f.default)
        for f in dataclasses.fields(ModelConfig)
    },
)  # type: ignore[call-overload]


def _check(c: ModelConfig) -> None:
    def need(condition: bool, key: str, expected: str) -> None:
        if not condition:
            raise ConfigError(f"{key}: expected {expected}, got {getattr(c, key)!r}")

    positive = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads qk_nope_head_dim "
        "v_head_dim kv_lora_rank max_position_embeddings rope_theta rms_norm_eps"
    )
    for key in positive.split():
        need(getattr(c, key) > 0, key, "a positive number")
    for key in ["rope_theta", "rms_norm_eps", "routed_scaling_factor", "initializer_range"]:
        need(math.isfinite(getattr(c, key)), key, "a finite number")  # JSON as Python reads it has NaN and Infinity
    for key in ["qk_rope_head_dim", "first_k_dense_replace", "num_nextn_predict_layers", "initializer_range"]:
        need(getattr(c, key) >= 0, key, "0 or more")
    need(c.q_lora_rank is None or c.q_lora_rank > 0, "q_lora_rank", "a positive number or null")
    need(c.num_key_value_heads is None or c.num_key_value_heads > 0, "num_key_value_heads", "a positive number")

    if c.n_routed_experts is not None:
        experts, chosen = c.n_routed_experts, c.num_experts_per_tok
        need(experts > 0, "n_routed_experts", "a positive number or null")
        need(c.moe_intermediate_size > 0, "moe_intermediate_size", "a positive number")
        need(0 < chosen <= experts, "num_experts_per_tok", f"1 to n_routed_experts ({experts})")
        need((c.n_shared_experts or 0) >= 0, "n_shared_experts", "0 or more")
        need(
            c.n_group > 0 and experts % c.n_group == 0,
            "n_group",
            f"a divisor of n_routed_experts ({experts})",
        )
        need(0 < c.topk_group <= c.n_group, "topk_group", f"1 to n_group ({c.n_group})")
        need(c.topk_method != "greedy" or c.n_group == 1, "n_group", "1, as topk_method 'greedy' looks at no groups")
        within = experts // c.n_group * c.topk_group
        need(chosen <= within, "num_experts_per_tok", f"at most the {within} experts of topk_group groups")
        alone = c.n_group > 1 and c.router_bias and experts == c.n_group
        need(not alone, "n_group", "groups of two experts or more (noaux_tc sums a group's best two)")
    if c.attention == "gqa":
        divides = c.num_key_value_heads is not None and c.num_attention_heads % c.num_key_value_heads == 0
        need(divides, "num_key_value_heads", f"a divisor of num_attention_heads ({c.num_attention_heads})")
    if c.position == "decoupled":
        need(c.attention == "mla", "position", f"another: {c.attention} has no decoupled rotary key")
        need(c.qk_rope_head_dim > 0, "qk_rope_head_dim", "a positive number (position is decoupled)")
    else:
        need(c.qk_rope_head_dim == 0, "qk_rope_head_dim", f"0, as position is {c.position!r}")
    need(
        c.rotary_width % 2 == 0,
        "qk_rope_head_dim" if c.qk_rope_head_dim else "qk_nope_head_dim",
        "an even width",
    )
    if c.rope_scaling is not None:
        yarn = c.rope_scaling
        lengths = (yarn.factor, yarn.original_max_position_embeddings, yarn.beta_fast, yarn.beta_slow)
        if min(lengths) <= 0:
            raise ConfigError(f"rope_scaling: expected a positive factor, original length and betas, got {yarn}")
