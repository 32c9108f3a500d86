"""The configuration: the family's files read, nothing lost, what we do not do refused by its name."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import abyssal
from abyssal.config import ConfigError, ModelConfig, Yarn, preset_names, yarn_mscale

PUBLIC = [
    "deepseek-v3",
    "deepseek-v2",
    "deepseek-v2-lite",
    "moonlight-16b-a3b",
    "kimi-k2",
    "joyai-llm-flash",
    "glm-4.7-flash",
]


def public(**changes: Any) -> dict[str, Any]:
    """A small public config.json, with keys that we do not read."""
    base = {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "vocab_size": 64, "hidden_size": 32,
        "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 4, "q_lora_rank": 12, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
        "v_head_dim": 8, "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 4,
        "topk_group": 2, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
        "topk_method": "noaux_tc", "norm_topk_prob": True, "hidden_act": "silu", "rope_theta": 10000,
        "rope_scaling": None, "max_position_embeddings": 256, "rms_norm_eps": 1e-06, "ep_size": 1,
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}, "torch_dtype": "bfloat16",
    }  # fmt: skip
    merged = {**base, **changes}
    return {k: v for k, v in merged.items() if v is not ...}


YARN = {
    "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
    "mscale": 0.707, "mscale_all_dim": 0.707,
}  # fmt: skip


# ---- presets ---------------------------------------------------------------------------------------------


def test_the_presets_are_seven_public_ones_and_four_of_ours() -> None:
    assert set(preset_names()) == {*PUBLIC, "tiny", "small", "stories", "reference-961m"}


@pytest.mark.parametrize(
    "name, facts",
    [
        ("deepseek-v3", (7168, 61, 128, 1536, 256, 8, 8, 4, 3, "sigmoid", 1, 2.5, 1e-6)),
        ("deepseek-v2", (5120, 60, 128, 1536, 160, 6, 8, 3, 1, "softmax", 0, 16.0, 1e-6)),
        ("deepseek-v2-lite", (2048, 27, 16, None, 64, 6, 1, 1, 1, "softmax", 0, 1.0, 1e-6)),
        ("moonlight-16b-a3b", (2048, 27, 16, None, 64, 6, 1, 1, 1, "sigmoid", 0, 2.446, 1e-5)),
        ("kimi-k2", (7168, 61, 64, 1536, 384, 8, 1, 1, 1, "sigmoid", 0, 2.827, 1e-6)),
        ("joyai-llm-flash", (2048, 40, 32, 1536, 256, 8, 1, 1, 1, "sigmoid", 1, 2.5, 1e-6)),
        ("glm-4.7-flash", (2048, 47, 20, 768, 64, 4, 1, 1, 1, "sigmoid", 1, 1.8, 1e-5)),
    ],
)
def test_the_public_presets_say_what_the_public_says(name: str, facts: tuple) -> None:
    c = ModelConfig.load(name)
    found = (
        c.hidden_size, c.num_hidden_layers, c.num_attention_heads, c.q_lora_rank, c.n_routed_experts,
        c.num_experts_per_tok, c.n_group, c.topk_group, c.first_k_dense_replace, c.scoring_func,
        c.num_nextn_predict_layers, c.routed_scaling_factor, c.rms_norm_eps,
    )  # fmt: skip
    assert found == facts
    assert c.is_public and c.router_bias == (c.scoring_func == "sigmoid")


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_is_written_back_word_for_word(name: str) -> None:
    from importlib import resources

    text = resources.files("abyssal").joinpath("presets", f"{name}.json").read_text()
    assert ModelConfig.load(name).to_dict() == json.loads(text)


# ---- reading ----------------------------------------------------------------------------------------------


def test_both_spellings_of_the_rotary_settings_are_one() -> None:
    rope = {**YARN, "rope_type": "yarn", "rope_theta": 50000.0}
    del rope["type"]
    old = public(rope_theta=50000, rope_scaling=YARN)
    new = public(rope_theta=..., rope_scaling=..., rope_parameters=rope)
    assert ModelConfig.from_dict(old) == ModelConfig.from_dict(new)
    assert ModelConfig.from_dict(old).rope_scaling == Yarn(40.0, 4096, 32.0, 1.0, 0.707, 0.707)
    assert ModelConfig.from_dict(old).rope_theta == 50000.0
    plain = public(rope_theta=..., rope_scaling=..., rope_parameters={"rope_type": "default", "rope_theta": 7.0})
    assert ModelConfig.from_dict(plain) == ModelConfig.from_dict(public(rope_theta=7.0))


def test_yarn_without_an_original_length_takes_the_models() -> None:
    scaling = {"type": "yarn", "factor": 2.0}
    assert ModelConfig.from_dict(public(rope_scaling=scaling)).rope_scaling == Yarn(2.0, 256)


@pytest.mark.parametrize(
    "model_type, scoring, method, norm",
    [
        ("deepseek_v3", "sigmoid", "noaux_tc", True),
        ("kimi_k2", "sigmoid", "noaux_tc", True),
        ("joyai_llm_flash", "sigmoid", "noaux_tc", True),
        ("glm4_moe_lite", "sigmoid", "noaux_tc", True),
        ("deepseek_v2", "softmax", "greedy", False),
    ],
)
def test_a_router_that_the_file_leaves_out_is_the_types_own(model_type, scoring, method, norm) -> None:
    """transformers writes neither `scoring_func` nor, for V3, `topk_method`."""
    config = ModelConfig.from_dict(public(model_type=model_type, scoring_func=..., topk_method=..., norm_topk_prob=...))
    assert (config.scoring_func, config.topk_method, config.norm_topk_prob) == (scoring, method, norm)


def test_dense_layers_are_read_from_either_key() -> None:
    kinds = ["dense", "dense", "sparse", "sparse"]
    listed = public(model_type="glm4_moe_lite", first_k_dense_replace=..., mlp_layer_types=kinds)
    assert ModelConfig.from_dict(listed).first_k_dense_replace == 2
    neither = public(model_type="glm4_moe_lite", first_k_dense_replace=...)
    assert ModelConfig.from_dict(neither).first_k_dense_replace == 1
    both = public(model_type="glm4_moe_lite", first_k_dense_replace=2, mlp_layer_types=kinds)
    assert ModelConfig.from_dict(both).first_k_dense_replace == 2


def test_null_stands_for_left_out() -> None:
    """V2-Lite's own file says null for its groups in some versions."""
    config = ModelConfig.from_dict(public(n_group=None, topk_group=None, q_lora_rank=None))
    assert (config.n_group, config.topk_group, config.q_lora_rank) == (1, 1, None)


def test_greedy_looks_at_no_groups() -> None:
    config = ModelConfig.from_dict(public(scoring_func="softmax", topk_method="greedy", n_group=4, topk_group=1))
    assert (config.n_group, config.topk_group) == (1, 1)
    grouped = config.replace(topk_method="group_limited_greedy")  # what the file says of groups meant nothing
    assert ModelConfig.from_dict(grouped.to_dict()) == grouped
    with pytest.raises(ConfigError, match="n_group: expected 1, as topk_method 'greedy' looks at no groups"):
        ModelConfig.load("tiny").replace(topk_method="greedy")


def test_transformers_name_for_the_mtp_modules_is_read() -> None:
    assert ModelConfig.from_dict(public(num_nextn_predict_layers=..., num_mtp_layers=2)).num_nextn_predict_layers == 2
    assert ModelConfig.from_dict(public(num_nextn_predict_layers=1)).num_nextn_predict_layers == 1


def test_fp8_is_read() -> None:
    block = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    assert ModelConfig.from_dict(public(quantization_config=block)).fp8
    assert not ModelConfig.from_dict(public(quantization_config=None)).fp8


def test_it_is_read_from_a_folder_a_file_or_a_name(tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(public()))
    assert ModelConfig.load(tmp_path) == ModelConfig.load(tmp_path / "config.json") == ModelConfig.from_dict(public())
    with pytest.raises(FileNotFoundError, match=r"neither a preset .*deepseek-v3.* nor a folder"):
        ModelConfig.load("deepseek-v5")


@pytest.mark.parametrize("text, message", [("{", "not JSON"), ("[1]", "expected an object, got list")])
def test_what_is_no_configuration_is_named_with_its_file(tmp_path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=f"config.json: {message}"):
        ModelConfig.load(tmp_path)


# ---- writing ----------------------------------------------------------------------------------------------


def test_nothing_is_lost_on_a_round_trip() -> None:
    """Unknown keys, their order, integers that are floats to us, and null."""
    before = public(rope_scaling=YARN, some_new_key={"a": [1, None]}, num_nextn_predict_layers=1)
    assert list(ModelConfig.from_dict(before).to_dict().items()) == list(before.items())
    assert json.dumps(ModelConfig.from_dict(before).to_dict()) == json.dumps(before)


CHANGES: list[dict[str, Any]] = [
    {"hidden_size": 40},
    {"num_hidden_layers": 6},
    {"first_k_dense_replace": 3},
    {"rope_theta": 123.0},
    {"rope_scaling": Yarn(4.0, 64, mscale=0.5, mscale_all_dim=0.25)},
    {"rope_theta": 5.0, "rope_scaling": Yarn(4.0, 64)},
    {"rope_scaling": None},
    {"num_nextn_predict_layers": 2},
    {"fp8": True},
    {"fp8": False},
    {"n_routed_experts": None},
    {"q_lora_rank": None},
    {"scoring_func": "softmax", "topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1},
    {"scoring_func": "softmax", "topk_method": "greedy", "n_group": 1, "topk_group": 1},
    {"num_nextn_predict_layers": 1, "mtp_moe": False},
    {"model_type": "deepseek_v2"},
    {"model_type": "glm4_moe_lite"},
    {"tie_word_embeddings": True, "rms_norm_eps": 1e-5, "routed_scaling_factor": 1.0},
]
SOURCES = {
    "V3": public(rope_scaling=YARN, num_nextn_predict_layers=1),
    "V2 as transformers writes it": public(
        model_type="deepseek_v2", scoring_func=..., topk_method="greedy", norm_topk_prob=False, rope_scaling=...,
        rope_theta=..., rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, n_group=None, topk_group=None,
    ),
    "GLM as transformers writes it": public(
        model_type="glm4_moe_lite", first_k_dense_replace=..., mlp_layer_types=["dense"] * 2 + ["sparse"] * 2,
        scoring_func=..., topk_method=..., rope_scaling=..., rope_theta=...,
        rope_parameters={**YARN, "rope_type": "yarn", "rope_theta": 10000.0}, num_mtp_layers=1,
    ),
    "FP8": public(
        quantization_config={"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
        num_nextn_predict_layers=1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: "-".join(c))
@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_what_is_replaced_is_written_and_read_back(source: dict, change: dict) -> None:
    config = ModelConfig.from_dict(source).replace(**change)
    written = json.loads(json.dumps(config.to_dict()))
    assert ModelConfig.from_dict(written) == config
    assert written["auto_map"] == source["auto_map"]  # and what we do not read stays


RUNGS = [
    {"attention": a, "position": p}
    for a in ("mla", "mha", "gqa", "mqa")
    for p in ("none", "integer", "binary", "sinusoidal", "rope")
]


@pytest.mark.parametrize("rung", RUNGS, ids=lambda r: "-".join(r.values()))
@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_a_rung_of_the_ladder_is_saved_as_abyssal_and_read_back(source: dict, rung: dict) -> None:
    """Of a V2 file too, which leaves out what its type means by itself."""
    config = ModelConfig.from_dict(source).replace(**rung, qk_rope_head_dim=0, num_key_value_heads=2)
    assert not config.is_public
    written = json.loads(json.dumps(config.to_dict()))
    assert written["model_type"] == "abyssal"
    again = ModelConfig.from_dict(written)
    assert again == config.replace(model_type="abyssal")
    assert again.to_dict() == written


def test_a_rung_made_public_again_says_nothing_of_the_ladder() -> None:
    rung = ModelConfig.from_dict(public()).replace(attention="mqa", position="rope", qk_rope_head_dim=0)
    back = ModelConfig.from_dict(rung.to_dict()).replace(
        attention="mla", position="decoupled", qk_rope_head_dim=4, model_type="deepseek_v3"
    )
    assert ModelConfig.from_dict(back.to_dict()) == back
    assert not {"attention", "position"} & back.to_dict().keys()


def test_a_configuration_made_from_nothing_is_a_public_file() -> None:
    sizes = {k: v for k, v in public().items() if k in ModelConfig.__dataclass_fields__ and k != "rope_theta"}
    for change in ({}, {"rope_scaling": Yarn(4.0, 64)}, {"model_type": "deepseek_v2"}, {"fp8": True}):
        config = ModelConfig(**{**sizes, **change})
        written = json.loads(json.dumps(config.to_dict()))
        assert ModelConfig.from_dict(written) == config
        expected = {"deepseek_v3": "DeepseekV3ForCausalLM", "deepseek_v2": "DeepseekV2ForCausalLM"}
        assert written["architectures"] == [expected[config.model_type]]


def test_replace_checks_again() -> None:
    config = ModelConfig.from_dict(public())
    assert config.replace(hidden_size=40).hidden_size == 40 and config.hidden_size == 32
    with pytest.raises(ConfigError, match="unknown field 'hidden'"):
        config.replace(hidden=3)
    with pytest.raises(ConfigError, match="num_experts_per_tok: expected 1 to n_routed_experts \\(8\\), got 9"):
        config.replace(num_experts_per_tok=9)


# ---- refused ----------------------------------------------------------------------------------------------

REFUSED: list[tuple[dict[str, Any], str]] = [
    # what changes the arithmetic and is not ours
    ({"model_type": "deepseek_v32"}, "model_type: expected one of .*deepseek_v3.*, got 'deepseek_v32'"),
    ({"model_type": "llama"}, "model_type: .*got 'llama'"),
    ({"model_type": ...}, "model_type: .*got None"),
    ({"moe_layer_freq": 2}, "moe_layer_freq: abyssal implements 1 alone, got 2"),
    ({"attention_bias": True}, "attention_bias: abyssal implements False alone, got True"),
    ({"mlp_bias": True}, "mlp_bias: abyssal implements False alone"),
    ({"hidden_act": "gelu"}, "hidden_act: abyssal implements 'silu' alone, got 'gelu'"),
    ({"scoring_func": "sqrtsoftplus"}, "scoring_func: .*got 'sqrtsoftplus'"),
    ({"topk_method": "hash"}, "topk_method: .*got 'hash'"),
    ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling.type: .*got 'linear'"),
    ({"rope_parameters": {"rope_type": "llama3"}}, "rope_parameters.rope_type: .*got 'llama3'"),
    ({"rope_scaling": {**YARN, "attention_factor": 1.2}}, "rope_scaling.attention_factor"),
    ({"rope_scaling": {**YARN, "truncate": False}}, "rope_scaling.truncate"),
    ({"rope_scaling": {**YARN, "low_freq_factor": 1}}, "rope_scaling.low_freq_factor"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: abyssal implements 1 alone"),
    ({"rope_interleave": False}, "rope_interleave: abyssal implements True alone"),
    ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "quantization_config: .*128x128 alone, got .*awq"),
    ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}}, "quantization_config: .*64"),
    ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    ({"quantization_config": {"quant_method": "fp8", "fmt": "e5m2", "weight_block_size": [128, 128]}}, "e5m2"),
    ({"quantization_config": "fp8"}, "quantization_config: .*got \"fp8\""),
    ({"attention": "mha"}, "attention: only a configuration of model_type 'abyssal'"),
    ({"position": "none"}, "position: only a configuration of model_type 'abyssal'"),
    # impossible
    ({"qk_rope_head_dim": 5}, "qk_rope_head_dim: expected an even width, got 5"),
    ({"qk_rope_head_dim": 0}, "qk_rope_head_dim: expected a positive number"),
    ({"num_experts_per_tok": 9}, r"num_experts_per_tok: expected 1 to n_routed_experts \(8\), got 9"),
    ({"num_experts_per_tok": 0}, "num_experts_per_tok: .*got 0"),
    ({"num_experts_per_tok": 5}, "num_experts_per_tok: expected at most the 4 experts of topk_group groups, got 5"),
    ({"n_group": 3}, r"n_group: expected a divisor of n_routed_experts \(8\), got 3"),
    ({"n_group": 0}, "n_group: "),
    ({"n_group": 8}, "n_group: expected groups of two experts or more"),
    ({"topk_group": 5}, r"topk_group: expected 1 to n_group \(4\), got 5"),
    ({"topk_group": 0}, "topk_group: "),
    ({"n_routed_experts": 0}, "n_routed_experts: expected a positive number or null, got 0"),
    ({"n_shared_experts": -1}, "n_shared_experts: expected 0 or more, got -1"),
    ({"moe_intermediate_size": ...}, "moe_intermediate_size: missing"),
    ({"first_k_dense_replace": -1}, "first_k_dense_replace: expected 0 or more, got -1"),
    ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers: expected 0 or more, got -1"),
    ({"q_lora_rank": 0}, "q_lora_rank: expected a positive number or null, got 0"),
    ({"num_key_value_heads": 0}, "num_key_value_heads: expected a positive number, got 0"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps: "),
    ({"rope_theta": float("inf")}, "rope_theta: expected a finite number"),
    ({"routed_scaling_factor": float("nan")}, "routed_scaling_factor: expected a finite number"),
    ({"rope_scaling": {**YARN, "factor": 0}}, "rope_scaling: expected a positive factor"),
    ({"rope_scaling": {**YARN, "factor": float("nan")}}, "rope_scaling.factor: expected a number, got nan"),
    ({"rope_scaling": {**YARN, "beta_fast": 0}}, "rope_scaling: expected a positive factor, original length and beta"),
    ({"rope_scaling": {**YARN, "original_max_position_embeddings": -4}}, "rope_scaling: expected a positive factor"),
    *(
        ({key: value}, f"{key}: expected a positive number, got {value}")
        for key in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "qk_nope_head_dim", "v_head_dim", "kv_lora_rank", "max_position_embeddings",
        )
        for value in (-8, 0)
    ),
    # malformed
    *(({key: ...}, f"{key}: missing") for key in ("vocab_size", "hidden_size", "kv_lora_rank", "qk_rope_head_dim")),
    ({"hidden_size": "32"}, "hidden_size: .*valid integer, got '32'"),
    ({"hidden_size": 32.0}, "hidden_size: .*valid integer"),
    ({"num_hidden_layers": True}, "num_hidden_layers: .*valid integer, got True"),
    ({"hidden_size": None}, "hidden_size: .*got None"),
    ({"tie_word_embeddings": "no"}, "tie_word_embeddings: "),
    ({"rope_theta": "10000"}, "rope_theta: "),
    ({"rope_scaling": "yarn"}, "rope_scaling: expected an object or null, got 'yarn'"),
    ({"rope_scaling": {**YARN, "factor": "40"}}, "rope_scaling.factor: expected a number, got '40'"),
    ({"rope_scaling": {**YARN, "factor": None}}, "rope_scaling.factor: missing"),
    ({"mlp_layer_types": ["sparse", "dense", "sparse", "sparse"]}, "mlp_layer_types: expected 'dense' layers first"),
    ({"mlp_layer_types": ["dense", "sparse"]}, "mlp_layer_types: "),
    ({"mlp_layer_types": 3}, "mlp_layer_types: expected 'dense' layers first"),
    ({"mlp_layer_types": ["dense"] * 2 + ["sparse"] * 2}, "mlp_layer_types: has 2 dense layers, first_k.* says 1"),
]  # fmt: skip


@pytest.mark.parametrize("change, message", REFUSED, ids=lambda p: json.dumps(p, default=str) if p is dict else None)
def test_it_is_refused_by_name(change: dict, message: str) -> None:
    ModelConfig.from_dict(public())  # which is fine
    with pytest.raises(ConfigError, match="^here: .*" + message):
        ModelConfig.from_dict(public(**change), where="here")


LADDER_REFUSED = [
    ({"attention": "gqa", "position": "rope", "num_key_value_heads": 3}, "num_key_value_heads: expected a divisor of"),
    ({"attention": "gqa", "position": "rope", "num_key_value_heads": None}, "num_key_value_heads: expected a divisor"),
    ({"attention": "mha", "qk_rope_head_dim": 4}, "position: .*mha has no decoupled rotary key, got 'decoupled'"),
    ({"position": "rope", "qk_rope_head_dim": 4}, "qk_rope_head_dim: expected 0, as position is 'rope', got 4"),
    ({"position": "rope", "qk_nope_head_dim": 7}, "qk_nope_head_dim: expected an even width, got 7"),
    ({"position": "alibi"}, "position: .*got 'alibi'"),
    ({"attention": "nsa"}, "attention: .*got 'nsa'"),
]


@pytest.mark.parametrize("change, message", LADDER_REFUSED)
def test_an_impossible_rung_is_refused(change: dict, message: str) -> None:
    base = public(model_type="abyssal", qk_rope_head_dim=0)
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_dict({**base, **change})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 300) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=400, derandomize=True, deadline=None)
@given(st.sampled_from([*public(), "rope_parameters", "quantization_config", "mlp_layer_types"]), JSON)
def test_whatever_a_key_holds_it_is_read_or_refused(key: str, value: Any) -> None:
    """Never another exception; and what is read is written back as it was."""
    source = public(**{key: value})
    try:
        config = ModelConfig.from_dict(source)
    except ConfigError:
        return
    assert json.dumps(config.to_dict()) == json.dumps(source)


@settings(max_examples=300, derandomize=True, deadline=None)
@given(st.sampled_from(list(YARN)), JSON, st.booleans())
def test_whatever_a_rotary_setting_holds_it_is_read_or_refused(key: str, value: Any, modern: bool) -> None:
    source = public(**{"rope_parameters" if modern else "rope_scaling": {**YARN, key: value}})
    try:
        config = ModelConfig.from_dict(source)
    except ConfigError:
        return
    assert json.dumps(config.to_dict()) == json.dumps(source)


def test_mscale_is_yarns() -> None:
    assert yarn_mscale(1.0, 1.0) == yarn_mscale(0.5, 1.0) == yarn_mscale(40.0, 0.0) == 1.0
    assert yarn_mscale(40.0, 1.0) == pytest.approx(1.3688879454)


def test_a_configuration_is_frozen_and_hashable() -> None:
    config = abyssal.ModelConfig.from_dict(public())
    with pytest.raises(AttributeError):
        config.hidden_size = 3
    assert hash(config) == hash(ModelConfig.from_dict(public()))
