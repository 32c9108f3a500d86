"""transformers is the oracle: the same folder, the same logits, the same greedy tokens, the same gradients."""

from pathlib import Path

import pytest
import torch
from tiny import greedy

import abyssal

transformers = pytest.importorskip("transformers")

_SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 20, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 18, "kv_lora_rank": 14, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4, "v_head_dim": 10, "n_routed_experts": 12, "n_shared_experts": 2, "num_experts_per_tok": 4,
    "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5, "rope_theta": 10000.0,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "num_nextn_predict_layers": 0, "tie_word_embeddings": False,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
_V3 = {
    **_SIZES, "model_type": "deepseek_v3", "scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True,
}  # fmt: skip
_V2 = {
    **_SIZES, "model_type": "deepseek_v2", "scoring_func": "softmax", "topk_method": "group_limited_greedy",
    "norm_topk_prob": False, "routed_scaling_factor": 16.0,
}  # fmt: skip


def _yarn(mscale: float) -> dict:
    return {
        "rope_scaling": {
            "type": "yarn", "factor": 8, "original_max_position_embeddings": 16, "beta_fast": 32, "beta_slow": 1,
            "mscale": mscale, "mscale_all_dim": mscale,
        }
    }  # fmt: skip


FAMILY = {
    "V3": _V3,
    "V3 with YaRN, mscale 1": {**_V3, **_yarn(1.0), "qk_rope_head_dim": 8},
    "V3 with YaRN, mscale 0.707": {**_V3, **_yarn(0.707), "qk_rope_head_dim": 8},
    "V3 tied": {**_V3, "tie_word_embeddings": True},
    "V2": _V2,
    "V2-Lite": {
        **_V2, **_yarn(0.707), "q_lora_rank": None, "topk_method": "greedy", "n_group": 1, "topk_group": 1,
        "routed_scaling_factor": 1.0,
    },
    "Moonlight": {
        **_V3, "q_lora_rank": None, "n_group": 1, "topk_group": 1, "rms_norm_eps": 1e-5, "rope_theta": 50000.0,
        "routed_scaling_factor": 2.446,
    },
    "GLM-4.7-Flash": {
        **_V3, "model_type": "glm4_moe_lite", "num_attention_heads": 20, "num_key_value_heads": 20,
        "qk_nope_head_dim": 6, "v_head_dim": 8, "n_group": 1, "topk_group": 1, "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0, "routed_scaling_factor": 1.8, "n_shared_experts": 1, "first_k_dense_replace": 2,
        "mlp_layer_types": ["dense", "dense", "sparse"],
    },
}  # fmt: skip


@torch.no_grad()
def _theirs(public: dict):
    """Random weights that keep a signal's size; router biases of both signs, as large as scores differ."""
    torch.manual_seed(7)
    config = transformers.AutoConfig.for_model(**public)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    for name, p in model.named_parameters():
        noise = torch.randn_like(p)
        p.copy_(1 + 0.3 * noise if p.ndim == 1 else noise if "embed" in name else noise / p.shape[-1] ** 0.5)
    for name, b in model.named_buffers():
        if "e_score_correction_bias" in name:
            b.copy_(0.3 * torch.randn_like(b) - 0.5)
    return model


@pytest.fixture(scope="module", params=FAMILY, ids=lambda name: name.replace(" ", "-"))
def pair(request, tmp_path_factory):
    """transformers' model, and ours loaded from the folder that it saved."""
    public = FAMILY[request.param]
    theirs = _theirs(public)
    folder = tmp_path_factory.mktemp("model")
    theirs.save_pretrained(folder)
    return public, theirs, abyssal.load(folder), folder


def test_both_spellings_of_the_configuration_are_read_alike(pair) -> None:
    public, _, ours, _ = pair
    assert ours.config == abyssal.ModelConfig.from_dict(public)


def test_logits_agree(pair) -> None:
    _, theirs, ours, _ = pair
    first = torch.randint(0, 97, (70,), generator=torch.Generator().manual_seed(1))
    second = torch.randint(0, 97, (33,), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = torch.cat([theirs(t[None]).logits[0] for t in (first, second)])
        logits = ours(torch.cat((first, second)), [70, 33])
    assert logits.dtype == torch.float32
    assert expected.std() > 0.5  # or the tolerance would mean nothing
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("path", ["absorbed", "expanded", None])
def test_32_greedy_tokens_agree_token_by_token_from_the_cache(pair, path) -> None:
    """Two prompts decoded side by side, one of them already past YaRN's original window of 16."""
    _, theirs, ours, _ = pair
    prompts = [torch.randint(0, 97, (n,), generator=torch.Generator().manual_seed(n)) for n in (5, 24)]
    expected = [
        theirs.generate(p[None], max_new_tokens=32, do_sample=False, pad_token_id=0)[0, len(p) :].tolist()
        for p in prompts
    ]
    assert greedy(ours, prompts, 32, path) == expected


def test_gradients_agree_for_every_parameter(pair, tmp_path: Path) -> None:
    """Their gradients are saved as if they were weights and loaded by our table of names."""
    _, theirs, ours, _ = pair
    tokens = torch.randint(0, 97, (41,), generator=torch.Generator().manual_seed(3))
    theirs.zero_grad()
    torch.nn.functional.cross_entropy(theirs(tokens[None]).logits[0, :-1], tokens[1:]).backward()
    ours.zero_grad()
    torch.nn.functional.cross_entropy(ours(tokens, [41])[:-1], tokens[1:]).backward()

    weights = {name: p.data for name, p in theirs.named_parameters()}
    for p in theirs.parameters():
        p.data = p.grad
    theirs.save_pretrained(tmp_path)
    for name, p in theirs.named_parameters():
        p.data = weights[name]
    expected = dict(abyssal.load(tmp_path).named_parameters())
    for name, p in ours.named_parameters():
        assert expected[name].norm() > 0, name
        assert (p.grad - expected[name]).norm() < 1e-4 * expected[name].norm(), name


def test_what_we_save_they_load(pair, tmp_path: Path) -> None:
    _, theirs, ours, _ = pair
    ours.save(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for (name, a), b in zip(theirs.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
