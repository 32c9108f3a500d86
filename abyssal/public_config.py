"""The public `config.json` of DeepSeek-V2, -V3 and their kin: their keys, their defaults, what we refuse.

`read_public` turns the JSON into ModelConfig's fields; `write_public` turns a ModelConfig into the JSON it came
from, with what has changed since.
"""

import dataclasses
import json
import math
from typing import Any

from abyssal.config import FP8_BLOCK, ConfigError, ModelConfig, Yarn

# What a file that leaves a key out means by it, as the family's own code has it.
_SIGMOID_ROUTER = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True}
_SOFTMAX_ROUTER = {"scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "deepseek_v3": _SIGMOID_ROUTER,
    "kimi_k2": _SIGMOID_ROUTER,
    "joyai_llm_flash": _SIGMOID_ROUTER,
    "glm4_moe_lite": {**_SIGMOID_ROUTER, "first_k_dense_replace": 1},
    "deepseek_v2": _SOFTMAX_ROUTER,
    "abyssal": _SIGMOID_ROUTER,
}

# Keys that change the arithmetic, with the one value that we implement.
_FIXED: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "moe_layer_freq": 1,
    "rope_interleave": True,
    "attention_dropout": 0,
    "partial_rotary_factor": 1,
}

# What other programs look for in a file that we write from nothing.
_ARCHITECTURES = {"deepseek_v3": "DeepseekV3ForCausalLM", "deepseek_v2": "DeepseekV2ForCausalLM"}

_REQUIRED = [
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank"),
]

# And of a model with experts: other programs fill these in with V3's own sizes, where we should have to guess.
_REQUIRED_WITH_EXPERTS = ["moe_intermediate_size", "num_experts_per_tok", "routed_scaling_factor"]

# Fields whose public spelling is not their own name.
_SPELLED_APART = {"rope_theta", "rope_scaling", "fp8", "first_k_dense_replace", "num_nextn_predict_layers"}
_FIELDS = {f.name for f in dataclasses.fields(ModelConfig)} - {"source"}


def read_public(public: dict[str, Any]) -> dict[str, Any]:
    """ModelConfig's fields from a public configuration. Raises ConfigError naming the key."""
    model_type = public.get("model_type")
    if not isinstance(model_type, str) or model_type not in _DEFAULTS:
        raise ConfigError(f"model_type: expected one of {', '.join(_DEFAULTS)}, got {model_type!r}")
    for key, value in _FIXED.items():
        if public.get(key) is not None and public[key] != value:
            raise ConfigError(f"{key}: abyssal implements {value!r} alone, got {public[key]!r}")
    routed = public.get("n_routed_experts") is not None
    grouped = model_type == "deepseek_v3" and routed
    for key in [
        *_REQUIRED,
        *(_REQUIRED_WITH_EXPERTS if routed else ()),
        *(("n_group", "topk_group", "first_k_dense_replace") if grouped else ()),
    ]:
        if key not in public:
            raise ConfigError(f"{key}: missing")

    given = {k: v for k, v in public.items() if k in _FIELDS - _SPELLED_APART}
    fields = {**_DEFAULTS[model_type], **given, **_rotary(public), "fp8": _is_fp8(public)}
    if "first_k_dense_replace" in public or "mlp_layer_types" in public:
        fields["first_k_dense_replace"] = _dense_layers(public)
    for key in ("num_nextn_predict_layers", "num_mtp_layers"):  # transformers writes the second
        if public.get(key) is not None:
            fields["num_nextn_predict_layers"] = public[key]
            break
    for key in (
        "n_group",
        "topk_group",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "first_k_dense_replace",
    ):
        if fields.get(key, 0) is None:  # null stands for "as if absent"
            del fields[key]
    if model_type != "abyssal":
        for key in ("attention", "position"):
            if key in public:
                raise ConfigError(f"{key}: only a configuration of model_type 'abyssal' may select it")
    for key in ("rope_theta", "rms_norm_eps", "routed_scaling_factor", "initializer_range"):
        if type(fields.get(key)) is int:  # JSON does not tell 10000 from 10000.0
            fields[key] = float(fields[key])
    if fields.get("topk_method") == "greedy":  # greedy looks at no groups, whatever n_group says
        fields["n_group"] = fields["topk_group"] = 1
    return fields


def read_rope_scaling(settings: dict[str, Any]) -> Yarn | None:
    """`rope_scaling` alone, in which `type` may be left out. Raises ConfigError naming the key."""
    typed = settings if {"type", "rope_type"} & settings.keys() else {"type": "yarn", **settings}
    scaling: Yarn | None = _rotary({"rope_scaling": typed})["rope_scaling"]
    return scaling


def _rotary(public: dict[str, Any]) -> dict[str, Any]:
    """Both spellings: `rope_theta` with `rope_scaling` (the public checkpoints), `rope_parameters` (transformers 5)."""
    key = "rope_parameters" if public.get("rope_parameters") is not None else "rope_scaling"
    settings = public.get(key) or {}
    if not isinstance(settings, dict):
        raise ConfigError(f"{key}: expected an object or null, got {settings!r}")
    fields: dict[str, Any] = {"rope_scaling": None}
    theta = settings.get("rope_theta", public.get("rope_theta"))
    if theta is not None:
        fields["rope_theta"] = theta
    kind = settings.get("rope_type", settings.get("type", "default"))
    if kind == "yarn":
        wanted = {f.name for f in dataclasses.fields(Yarn)}
        known = wanted | {"type", "rope_type", "rope_theta", "partial_rotary_factor"}
        known |= {"original_max_position_embeddings", "finetuned", "attention_factor", "truncate"}
        for name in settings.keys() - known:
            raise ConfigError(f"{key}.{name}: not a setting of YaRN that abyssal implements")
        if settings.get("attention_factor") is not None:
            raise ConfigError(f"{key}.attention_factor: abyssal derives it from mscale, got a value")
        if settings.get("truncate", True) is not True:
            raise ConfigError(f"{key}.truncate: abyssal implements true alone")
        values = {k: v for k, v in settings.items() if k in wanted and v is not None}
        values.setdefault("original_max_position_embeddings", public.get("max_position_embeddings"))
        for name, value in values.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ConfigError(f"{key}.{name}: expected a number, got {value!r}")
        if "factor" not in values:
            raise ConfigError(f"{key}.factor: missing")
        whole = "original_max_position_embeddings"
        numbers: dict[str, Any] = {k: int(v) if k == whole else float(v) for k, v in values.items()}
        fields["rope_scaling"] = Yarn(**numbers)
    elif kind != "default":
        raise ConfigError(
            f"{key}.{'rope_type' if 'rope_type' in settings else 'type'}: "
            f"abyssal implements 'default' and 'yarn', got {kind!r}"
        )
    if settings.get("partial_rotary_factor", 1) != 1:
        raise ConfigError(f"{key}.partial_rotary_factor: abyssal implements 1 alone")
    return fields


def _dense_layers(public: dict[str, Any]) -> Any:
    """`first_k_dense_replace`, or the same said layer by layer in `mlp_layer_types`."""
    first, kinds = public.get("first_k_dense_replace"), public.get("mlp_layer_types")
    if kinds is None:
        return first
    kinds = kinds if isinstance(kinds, list) else []
    dense = kinds.index("sparse") if "sparse" in kinds else len(kinds)
    if kinds != ["dense"] * dense + ["sparse"] * (len(kinds) - dense) or len(kinds) != public["num_hidden_layers"]:
        raise ConfigError("mlp_layer_types: expected 'dense' layers first and 'sparse' after, one a layer")
    if first is not None and first != dense and "mlp_layer_types" in public:
        raise ConfigError(f"mlp_layer_types: has {dense} dense layers, first_k_dense_replace says {first!r}")
    return dense


def _is_fp8(public: dict[str, Any]) -> bool:
    settings = public.get("quantization_config")
    if settings is None:
        return False
    block = [FP8_BLOCK, FP8_BLOCK]
    found = settings if isinstance(settings, dict) else {}
    fp8 = found.get("quant_method") == "fp8" and found.get("fmt", "e4m3") == "e4m3"
    if not fp8 or found.get("weight_block_size") != block:
        raise ConfigError(
            f"quantization_config: abyssal reads fp8 (e4m3) in blocks of 128x128 alone, got {json.dumps(settings)}"
        )
    return True


def write_public(config: ModelConfig) -> dict[str, Any]:
    """The JSON that `config` came from, each field that has changed since written over it."""
    public: dict[str, Any] = json.loads(config.source)
    now = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name != "source"}
    model_type = config.model_type if config.is_public else "abyssal"
    now["model_type"] = model_type
    if model_type != "abyssal":
        for key in ("attention", "position"):
            del now[key]
            public.pop(key, None)
        if "mtp_moe" not in public and now["mtp_moe"]:
            del now["mtp_moe"]
    # A key that is left out means what the new type means by it.
    before = read_public({**public, "model_type": model_type}) if public else {}
    before["model_type"] = public.get("model_type")

    absent = object()
    defaults = {f.name: f.default for f in dataclasses.fields(ModelConfig)}
    changed = {
        name: value for name, value in now.items()
        if value != before.get(name, defaults[name] if public else absent)
    }  # fmt: skip
    if "topk_method" in changed:  # what was written of groups may have meant nothing
        changed |= {name: now[name] for name in ("n_group", "topk_group")}
    for name in ("rope_theta", "rope_scaling"):
        if name in changed:
            _write_rotary(public, name, changed.pop(name))
    fp8 = changed.pop("fp8", None)
    if fp8 is False:
        public.pop("quantization_config", None)
    elif fp8:
        public["quantization_config"] = {
            "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
            "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
        }  # fmt: skip
    resized = "first_k_dense_replace" in changed or "num_hidden_layers" in changed
    if resized and public.pop("mlp_layer_types", None) is not None:
        changed["first_k_dense_replace"] = config.first_k_dense_replace
    if "num_nextn_predict_layers" in changed:
        public.pop("num_mtp_layers", None)
    public.update(changed)
    if config.source == "{}" and model_type in _ARCHITECTURES:
        public["architectures"] = [_ARCHITECTURES[model_type]]
    return public


def _write_rotary(public: dict[str, Any], name: str, value: Any) -> None:
    """Keeps to the spelling that the file has."""
    plain = isinstance(value, Yarn)
    settings = {"type": "yarn", **dataclasses.asdict(value)} if plain else value
    if public.get("rope_parameters") is None:
        public[name] = settings
        return
    rotary = dict(public["rope_parameters"])
    if name == "rope_theta":
        rotary["rope_theta"] = value
    else:
        rotary = {
            "rope_theta": rotary.get("rope_theta", public.get("rope_theta", 10000.0)),
            "rope_type": "default",
        }
        if plain:
            rotary |= {**dataclasses.asdict(value), "rope_type": "yarn"}
    public["rope_parameters"] = rotary
