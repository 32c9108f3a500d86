"""transformers reads what we write and we read what it writes: the same logits, both ways."""

import json

import pytest
import torch

from abyssal.checkpoint import load, save
from abyssal.config import ModelConfig

transformers = pytest.importorskip("transformers")

TINY = ModelConfig.load("tiny").replace(num_nextn_predict_layers=0)
YARN = {"type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 16,
        "beta_fast": 32, "beta_slow": 1}  # fmt: skip


def public(**changes) -> ModelConfig:
    return ModelConfig.from_dict({**TINY.to_dict(), **changes})


V2 = {
    "model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"], "scoring_func": "softmax",
    "topk_method": "greedy", "norm_topk_prob": False, "q_lora_rank": None, "routed_scaling_factor": 1.0,
}  # fmt: skip
GLM = {
    "model_type": "glm4_moe_lite", "architectures": ["Glm4MoeLiteForCausalLM"], "rms_norm_eps": 1e-5,
    "mlp_layer_types": ["dense", "sparse", "sparse"],
}  # fmt: skip
CASES = {
    "v3": public(),
    "v3-yarn": public(rope_scaling=YARN),
    "v3-no-query-rank": public(q_lora_rank=None),
    "v3-with-mtp": ModelConfig.load("tiny"),
    "v2-lite": public(**V2),
    "glm": public(**GLM),
}


def theirs_of(folder):
    """Their model, and what they found amiss."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    return model.eval(), info


def check(ours, theirs) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(ours.config.vocab_size, (n,), generator=generator) for n in (40, 9)]
    with torch.no_grad():
        mine = ours(torch.cat(rows), [40, 9]).split([40, 9])
        for row, logits in zip(rows, mine):
            right = theirs(row[None]).logits[0]
            assert right.std() > 0.1
            torch.testing.assert_close(logits, right, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("most", [1 << 40, 100_000], ids=["one-file", "shards"])
@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_both_ways(make, tmp_path, config, most):
    ours = make(config)
    save(ours, tmp_path / "ours", most)
    theirs, info = theirs_of(tmp_path / "ours")
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert all(name.startswith("model.layers.3.") for name in info["unexpected_keys"])
    check(ours, theirs)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="200KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    if config.num_nextn_predict_layers:
        with pytest.warns(UserWarning, match="counts 1 MTP modules, the weights have 0"):
            again = load(tmp_path / "theirs")
    else:
        again = load(tmp_path / "theirs")
    check(again, theirs)
    again.save(tmp_path / "back")
    assert json.loads((tmp_path / "back/config.json").read_text()) == json.loads(
        (tmp_path / "theirs/config.json").read_text()
    )
    assert (tmp_path / "back/generation_config.json").exists()


def test_what_they_save_in_bfloat16(make, tmp_path, tensors_of, same_bits):
    """They round the router bias with the rest: we hold it in float32, and write back what was there."""
    make(TINY).save(tmp_path / "ours")
    theirs_of(tmp_path / "ours")[0].bfloat16().save_pretrained(tmp_path / "theirs")
    again = load(tmp_path / "theirs")
    assert again.embed.weight.dtype == torch.bfloat16 and again.gates()[0].bias.dtype == torch.float32
    again.save(tmp_path / "back")
    same_bits(tensors_of(tmp_path / "theirs"), tensors_of(tmp_path / "back"))
