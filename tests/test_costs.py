import io
import json
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from abyssal.config import ModelConfig, preset_names
from abyssal.costs import cache_bytes, inspect, mha_cache_bytes
from abyssal.model.cache import Cache
from abyssal.model.transformer import Transformer

# reference.md's table: parameters, activated a token, cache bytes a token.
PUBLISHED = {
    "deepseek-v3": (671_026_419_200, 37_552_297_472, 70_272),
    "deepseek-v2": (235_741_434_880, 21_375_800_320, 69_120),
    "deepseek-v2-lite": (15_706_484_224, 2_661_150_208, 31_104),
    "moonlight-16b-a3b": (15_960_110_208, 2_914_776_192, 31_104),
    "kimi-k2": (1_026_408_232_448, 32_861_500_928, 70_272),
    "joyai-llm-flash": (48_942_542_592, 3_304_320_768, 46_080),
    "glm-4.7-flash": (29_943_393_920, 3_896_766_080, 54_144),
}


def meta(config: ModelConfig) -> Transformer:
    with torch.device("meta"):
        return Transformer(config)


def stored(module: torch.nn.Module) -> int:
    return sum(t.numel() for t in (*module.parameters(), *module.buffers()))


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_cost_what_is_published(name):
    costs = inspect(ModelConfig.load(name))
    parameters = costs.parameters
    assert (parameters.total, parameters.activated, costs.cache.bytes_per_token) == PUBLISHED[name]


@pytest.mark.parametrize("name", preset_names())
def test_counts_agree_with_the_model_itself(name):
    config = ModelConfig.load(name)
    model, parameters = meta(config), inspect(config).parameters
    assert parameters.total == stored(model) - stored(model.mtp)
    copies = 2 * config.vocab_size * config.hidden_size
    assert parameters.mtp == stored(model.mtp) + config.num_nextn_predict_layers * copies
    parts = ["embedding", "head", "attention", "dense_mlps", "routed_experts", "shared_experts", "routers", "norms"]
    assert sum(getattr(parameters, part) for part in parts) == parameters.total


def test_deepseek_v3():
    costs = inspect(ModelConfig.load("deepseek-v3"))
    parameters, cache = costs.parameters, costs.cache
    assert parameters.mtp == 13_463_426_304
    assert parameters.embedding == parameters.head == 129_280 * 7168
    assert parameters.attention == 61 * (
        7168 * 1536 + 1536 * 128 * 192 + 7168 * 576 + 512 * 128 * 256 + 128 * 128 * 7168
    )  # fmt: skip
    assert parameters.dense_mlps == 3 * 3 * 7168 * 18432
    assert parameters.routed_experts == 58 * 256 * 3 * 7168 * 2048
    assert parameters.shared_experts == 58 * 3 * 7168 * 2048
    assert parameters.routers == 58 * (256 * 7168 + 256)
    assert parameters.norms == 61 * (2 * 7168 + 1536 + 512) + 7168

    assert (cache.elements_per_token, cache.bytes_per_token, cache.bytes_per_token_mtp) == (35_136, 70_272, 1152)
    assert round(cache.mha_ratio) == 57
    assert cache.compared["latent"].mha_ratio == 64.0
    elements = {name: rung.elements_per_token / 61 for name, rung in cache.compared.items()}
    assert elements == {
        "mha": 2 * 128 * 128, "expanded": 128 * 320, "gqa8": 2 * 8 * 128, "mqa": 2 * 128, "latent": 512,
    }  # fmt: skip
    assert cache.compared["mha"].ratio == cache.mha_ratio
    assert cache.compared["mqa"].bytes_per_token == 61 * 2 * 128 * 2


@pytest.mark.parametrize(
    "layers, heads, mha, mla", [(27, 16, 110_592, 15_552), (60, 56, 860_160, 34_560)], ids=["small", "large"]
)
def test_deepseek_v2s_ablation(layers, heads, mha, mla):
    """DeepSeek-V2, table 9: 110.6K and 15.6K, 860.2K and 34.6K elements a token."""
    shape = ModelConfig.load("deepseek-v2").replace(num_hidden_layers=layers, num_attention_heads=heads)
    cache = inspect(shape).cache
    assert (cache.compared["mha"].elements_per_token, cache.elements_per_token) == (mha, mla)


@pytest.mark.parametrize("name, gflops", [("deepseek-v2", 155), ("deepseek-v3", 250)])
def test_training_flops_are_deepseeks(name, gflops):
    """ "Insights into DeepSeek-V3" (2025), table 2: training cost a token at sequences of 4096."""
    assert round(inspect(ModelConfig.load(name), context=4096).flops.training / 1e9) == gflops


def test_flops_by_hand():
    costs = inspect(ModelConfig.load("deepseek-v3"), context=1000)
    flops, parameters = costs.flops, costs.parameters
    biases = 58 * 256
    matrices = parameters.activated - parameters.embedding - parameters.norms - biases
    # Position t of 1..1000 attends to t tokens.
    attended = sum(range(1, 1001)) / 1000
    assert flops.training == 6 * matrices + 3 * 61 * 2 * 128 * 320 * attended
    assert flops.decoding == flops.decoding_absorbed == 2 * matrices + 61 * 2 * 128 * (576 + 512) * 1000
    expansion = 61 * 2 * 512 * 128 * 256
    assert flops.decoding_expanded == 2 * matrices + 61 * 2 * 128 * 320 * 1000 + 999 * expansion

    experts = 9 * 3 * 7168 * 2048 + 256 * 7168
    module = 2 * 7168 * 7168 + parameters.attention // 61 + experts + parameters.head
    assert flops.training_mtp == 6 * module + 3 * 2 * 128 * 320 * attended
    assert flops.decoding_mtp == 2 * module + 2 * 128 * (576 + 512) * 1000
    # Nothing is before the first token: the two paths differ by the width of their products alone.
    first = inspect(ModelConfig.load("deepseek-v3"), context=1).flops
    assert first.decoding == first.decoding_expanded < first.decoding_absorbed


def test_weight_bytes_are_those_of_the_public_files():
    """deepseek-ai/DeepSeek-V3 is 688,586,727,753 bytes of safetensors. Its headers take the rest: some 130 bytes for
    each of 91,991 tensors."""
    weights = inspect(ModelConfig.load("deepseek-v3")).weights
    headers = 688_586_727_753 - weights.fp8 - weights.fp8_mtp
    assert 110 * 91_991 < headers < 150 * 91_991


def test_weight_bytes_by_hand():
    """The tiny preset: every block is ragged."""
    config = ModelConfig.load("tiny").replace(num_nextn_predict_layers=0)
    costs, model = inspect(config), meta(config)
    biases = sum(gate.bias.numel() for gate in model.gates())
    assert costs.weights.bf16 == 2 * costs.parameters.total + 2 * biases

    plain = quantised = scales = 0
    for name, p in model.named_parameters():
        if p.ndim > 1 and name.startswith("layers.") and ".gate." not in name:
            quantised += p.numel()
            scales += (p.shape[0] if p.ndim == 3 else 1) * -(-p.shape[-2] // 128) * -(-p.shape[-1] // 128)
        else:
            plain += p.numel()
    assert costs.weights.fp8 == quantised + 4 * scales + 2 * plain + 4 * biases
    assert costs.weights.bf16_mtp == costs.weights.fp8_mtp == 0


@pytest.mark.parametrize("name", ["tiny", "deepseek-v3"])
def test_mtp_weight_bytes(name):
    """The joining projection stays bf16, and the copies of embedding and head are counted."""
    config = ModelConfig.load(name)
    weights, model = inspect(config).weights, meta(config)
    copies = 2 * 2 * config.vocab_size * config.hidden_size
    assert weights.bf16_mtp == copies + sum(
        t.numel() * (4 if path.endswith("gate.bias") else 2)
        for path, t in (*model.mtp.named_parameters(), *model.mtp.named_buffers())
    )
    assert copies + 2 * model.mtp[0].eh_proj.weight.numel() < weights.fp8_mtp < weights.bf16_mtp


def rung(**changes) -> ModelConfig:
    return ModelConfig.load("tiny").replace(model_type="abyssal", qk_rope_head_dim=0, **changes)


@pytest.mark.parametrize(
    "config, elements, absorbs",
    [
        (ModelConfig.load("tiny"), 24 + 8, True),
        (rung(position="none"), 24, True),
        (rung(position="sinusoidal"), 24, True),
        (rung(position="rope"), 24, False),
        (rung(attention="mha", position="rope"), 4 * (16 + 16), False),
        (rung(attention="gqa", position="binary", num_key_value_heads=2), 2 * (16 + 16), False),
        (rung(attention="mqa", position="integer"), 16 + 16, False),
    ],
)
def test_every_rung_of_the_ladder(config, elements, absorbs):
    costs = inspect(config, context=64)
    assert costs.parameters.total + costs.parameters.mtp == stored(meta(config)) + 2 * 512 * 64
    assert costs.cache.elements_per_token == 3 * elements
    assert costs.cache.bytes_per_token_mtp == 2 * elements
    assert (costs.flops.decoding_absorbed is not None) == absorbs
    assert costs.flops.decoding <= costs.flops.decoding_expanded
    if config.attention != "mla":
        matrices = costs.flops.decoding - 3 * 2 * 4 * (16 + 16) * 64
        assert costs.flops.training == 3 * matrices + 3 * 3 * 4 * (16 + 16) * 65


def test_dense_only():
    config = ModelConfig.load("tiny").replace(n_routed_experts=None, num_nextn_predict_layers=0)
    parameters = inspect(config).parameters
    assert parameters.activated == parameters.total
    assert parameters.routed_experts == parameters.shared_experts == parameters.routers == parameters.mtp == 0


def test_dense_mtp():
    config = ModelConfig.load("joyai-llm-flash")
    experts, dense = inspect(config.replace(mtp_moe=True)), inspect(config)
    mlp = 3 * 2048 * 7168
    moe = 257 * 3 * 2048 * 768 + 256 * 2048 + 256
    assert experts.parameters.mtp - dense.parameters.mtp == moe - mlp
    assert experts.parameters.total == dense.parameters.total


def test_a_tied_head_is_one_matrix_and_still_multiplies():
    config = ModelConfig.load("tiny")
    apart, tied = inspect(config), inspect(config.replace(tie_word_embeddings=True))
    assert tied.parameters.head == 0
    assert apart.parameters.total - tied.parameters.total == config.vocab_size * config.hidden_size
    assert apart.flops == tied.flops


@given(
    layers=st.integers(1, 4), dense=st.integers(0, 4), heads=st.integers(1, 5), experts=st.integers(1, 6),
    shared=st.integers(0, 2), modules=st.integers(0, 2), q_rank=st.none() | st.integers(1, 40),
    bias=st.booleans(), mtp_moe=st.booleans(),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_any_configuration_by_formula(layers, dense, heads, experts, shared, modules, q_rank, bias, mtp_moe):
    D, F, I, C, N, R, V, vocab = 48, 20, 72, 24, 10, 6, 14, 97
    chosen = (experts + 1) // 2
    config = ModelConfig(
        vocab_size=vocab, hidden_size=D, intermediate_size=I, num_hidden_layers=layers, num_attention_heads=heads,
        qk_nope_head_dim=N, v_head_dim=V, kv_lora_rank=C, qk_rope_head_dim=R, q_lora_rank=q_rank,
        moe_intermediate_size=F, n_routed_experts=experts, n_shared_experts=shared, num_experts_per_tok=chosen,
        first_k_dense_replace=dense, topk_method="noaux_tc" if bias else "greedy",
        num_nextn_predict_layers=modules, mtp_moe=mtp_moe,
    )  # fmt: skip
    queries = D * q_rank + q_rank + q_rank * heads * (N + R) if q_rank else D * heads * (N + R)
    attention = queries + D * (C + R) + C + C * heads * (N + V) + heads * V * D
    block = attention + 2 * D
    router = experts * (D + bias)
    mlp, moe = 3 * D * I, (experts + shared) * 3 * D * F + router
    sparse = max(layers - dense, 0)
    parameters = inspect(config).parameters
    assert parameters.total == 2 * vocab * D + D + layers * block + (layers - sparse) * mlp + sparse * moe
    assert parameters.total - parameters.activated == sparse * (experts - chosen) * 3 * D * F
    module = block + 3 * D + 2 * D * D + (moe if mtp_moe else mlp)
    assert parameters.mtp == modules * (module + 2 * vocab * D)


@pytest.mark.parametrize("mtp", [False, True])
def test_cache_bytes_are_those_allocated(mtp):
    for config in (ModelConfig.load("tiny"), rung(attention="gqa", position="rope", num_key_value_heads=2)):
        leaves = meta(config).leaves()
        leaves = leaves if mtp else leaves[: config.num_hidden_layers]
        allocated = Cache.allocate(leaves, pages=3, page_size=7, dtype=torch.float32)
        assert cache_bytes(config, 21, 4, mtp=mtp) == allocated.bytes
        assert mha_cache_bytes(config, 21, 4, mtp=mtp) == 21 * 4 * (3 + mtp) * 2 * 4 * 16


def test_json_has_the_promised_keys():
    costs = json.loads(json.dumps(inspect(ModelConfig.load("deepseek-v3")).to_dict()))
    assert costs["parameters"]["total"] == 671_026_419_200
    assert costs["parameters"]["activated"] == 37_552_297_472
    assert costs["parameters"]["mtp"] == 13_463_426_304
    assert costs["cache"]["bytes_per_token"] == 70_272


@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v2-lite"])
def test_the_tables_say_it(name):
    page = io.StringIO()
    Console(file=page, width=80).print(inspect(ModelConfig.load(name), context=512).render())
    text = page.getvalue()
    total, activated, cache = PUBLISHED[name]
    assert all(f"{n:,}" in text for n in (total, activated, cache))
    assert "context 512" in text
    assert ("13,463,426,304" in text) == (name == "deepseek-v3")
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text


def test_a_trillion_parameters_are_counted_at_once():
    start = time.perf_counter()
    inspect(ModelConfig.load("kimi-k2"))
    assert time.perf_counter() - start < 3


def test_a_context_of_nothing_is_refused():
    with pytest.raises(ValueError, match="context: expected 1 token or more, got 0"):
        inspect(ModelConfig.load("tiny"), context=0)
