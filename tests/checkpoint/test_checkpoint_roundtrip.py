"""Load then save, bit for bit; and what is converted on the way where a conversion is asked for."""

import json
import warnings
from pathlib import Path

import pytest
import torch

from abyssal.checkpoint import load, save
from abyssal.config import ModelConfig, Yarn

TINY = ModelConfig.load("tiny")
V2 = ModelConfig.from_dict(
    {**TINY.to_dict(), "model_type": "deepseek_v2", "scoring_func": "softmax", "topk_method": "group_limited_greedy",
     "q_lora_rank": None, "norm_topk_prob": False, "num_nextn_predict_layers": 0}
)  # fmt: skip
LADDER = TINY.replace(model_type="abyssal", attention="gqa", position="rope", qk_rope_head_dim=0, num_key_value_heads=2)
TOKENS, LENGTHS = torch.arange(3, 27), [7, 17]

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "config",
    [
        TINY,
        TINY.replace(mtp_moe=False),
        TINY.replace(num_nextn_predict_layers=2),
        TINY.replace(num_nextn_predict_layers=0),
        TINY.replace(n_shared_experts=None, q_lora_rank=None),
        TINY.replace(tie_word_embeddings=True),
        TINY.replace(n_routed_experts=None),
        TINY.replace(rope_scaling=Yarn(4.0, 128, mscale=1.0, mscale_all_dim=1.0)),
        V2,
        LADDER,
        TINY.replace(model_type="abyssal", position="rope", qk_rope_head_dim=0),
    ],
    ids=["moe-mtp", "dense-mtp", "two-mtp", "no-mtp", "plain", "tied", "dense", "yarn", "v2", "gqa", "coupled"],
)
def test_load_then_save_is_bit_for_bit(make, tensors_of, same_bits, tmp_path, config, dtype):
    model = make(config, dtype=dtype)
    model.save(tmp_path / "a")
    again = load(tmp_path / "a")
    assert again.config == config
    same_bits(model.state_dict(), again.state_dict())
    assert all(gate.bias is None or gate.bias.dtype == torch.float32 for gate in again.gates())
    again.save(tmp_path / "b")
    same_bits(tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b"))
    assert (tmp_path / "a/config.json").read_bytes() == (tmp_path / "b/config.json").read_bytes()
    with torch.no_grad():
        assert torch.equal(model(TOKENS, LENGTHS), again(TOKENS, LENGTHS))
        for one, other in zip(model.predict(TOKENS, LENGTHS), again.predict(TOKENS, LENGTHS), strict=True):
            assert torch.equal(one, other)


def test_shards_and_their_index(make, tensors_of, same_bits, tmp_path):
    model = make()
    save(model, tmp_path / "one")
    save(model, tmp_path / "many", max_shard_bytes=100_000)
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    files = sorted(f.name for f in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 10 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert set(index["weight_map"].values()) == set(files)
    assert list(index["weight_map"]) == sorted(index["weight_map"])
    stored = tensors_of(tmp_path / "many")
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in stored.values())
    assert index["weight_map"].keys() == stored.keys()
    for f in (tmp_path / "many").glob("*.safetensors"):
        assert f.stat().st_size < 110_000 + 8_000 or len([v for v in index["weight_map"].values() if v == f.name]) == 1
    same_bits(stored, tensors_of(tmp_path / "one"))
    same_bits(load(tmp_path / "many").state_dict(), model.state_dict())


def test_mtp_as_deepseek_stores_it(make, tensors_of, tmp_path):
    make().save(tmp_path)
    stored = tensors_of(tmp_path)
    layer = "model.layers.3."
    beside_block = {n.removeprefix(layer) for n in stored if n.startswith(layer)} - {
        n.removeprefix("model.layers.2.") for n in stored if n.startswith("model.layers.2.")
    }
    assert beside_block == {
        "enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight", "shared_head.head.weight",
        "embed_tokens.weight",
    }  # fmt: skip
    assert torch.equal(stored[layer + "shared_head.head.weight"], stored["lm_head.weight"])
    assert torch.equal(stored[layer + "embed_tokens.weight"], stored["model.embed_tokens.weight"])


def test_only_the_copies_that_were_stored_are_written_back(make, tensors_of, same_bits, write, tmp_path):
    make().save(tmp_path / "a")
    stored = tensors_of(tmp_path / "a")
    del stored["model.layers.3.embed_tokens.weight"]
    write(tmp_path / "b", config_of(tmp_path / "a"), stored)
    load(tmp_path / "b").save(tmp_path / "c")
    same_bits(stored, tensors_of(tmp_path / "c"))

    tied = TINY.replace(tie_word_embeddings=True)
    make(tied).save(tmp_path / "d")
    stored = tensors_of(tmp_path / "d")
    assert "lm_head.weight" not in stored
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    write(tmp_path / "e", config_of(tmp_path / "d"), stored)
    model = load(tmp_path / "e")
    assert model.head.weight is model.embed.weight
    model.save(tmp_path / "f")
    same_bits(stored, tensors_of(tmp_path / "f"))


def test_a_shard_that_the_index_forgets_holds_the_mtp_layer(make, tensors_of, same_bits, write, tmp_path):
    from safetensors.torch import save_file

    model = make(TINY.replace(mtp_moe=False))
    model.save(tmp_path / "a")
    stored = tensors_of(tmp_path / "a")
    mtp = {n: t for n, t in stored.items() if n.startswith("model.layers.3.")}
    main = {n: t for n, t in stored.items() if n not in mtp}
    folder = tmp_path / "b"
    folder.mkdir()
    save_file(main, folder / "model-00001-of-00001.safetensors")
    save_file(mtp, folder / "mtp.safetensors")
    index = {"weight_map": dict.fromkeys(main, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config_of(tmp_path / "a")))
    again = load(folder)
    assert not again.config.mtp_moe
    same_bits(again.state_dict(), model.state_dict())


@pytest.mark.parametrize("counted", [0, 1, 2, None])
def test_config_that_miscounts_the_mtp_modules(make, tensors_of, same_bits, write, tmp_path, counted):
    model = make(TINY.replace(num_nextn_predict_layers=1 if counted != 1 else 0))
    model.save(tmp_path / "a")
    config = config_of(tmp_path / "a")
    config["num_nextn_predict_layers"] = counted
    if counted is None:
        del config["num_nextn_predict_layers"]
    write(tmp_path / "b", config, tensors_of(tmp_path / "a"))
    with pytest.warns(UserWarning, match=f"counts {counted or 0} MTP modules, the weights have {len(model.mtp)}"):
        again = load(tmp_path / "b")
    assert len(again.mtp) == len(model.mtp) == again.config.num_nextn_predict_layers
    again.save(tmp_path / "c")
    assert config_of(tmp_path / "c") == config
    same_bits(tensors_of(tmp_path / "b"), tensors_of(tmp_path / "c"))


@pytest.mark.parametrize(
    "rotary",
    [
        {"rope_theta": 5e4, "rope_scaling": None},
        {"rope_theta": 50000, "rope_scaling": {"type": "yarn", "factor": 4, "mscale": 1, "mscale_all_dim": 1.0,
                                               "original_max_position_embeddings": 128}},
        {"rope_parameters": {"rope_theta": 5e4, "rope_type": "default"}},
        {"rope_parameters": {"rope_theta": 5e4, "rope_type": "yarn", "factor": 4.0, "beta_fast": 32,
                             "original_max_position_embeddings": 128}},
    ],
)  # fmt: skip
def test_every_key_of_the_configuration_comes_back(make, tensors_of, write, tmp_path, rotary):
    make().save(tmp_path / "a")
    config = {k: v for k, v in config_of(tmp_path / "a").items() if not k.startswith("rope_")}
    config |= rotary | {
        "auto_map": {"AutoModel": "modeling_x.X"}, "ünknown": [1, {"a": None}], "num_experts_per_tok": 4,
        "dtype": "float32", "ep_size": 1, "tiny_number": 1e-20,
    }  # fmt: skip
    write(tmp_path / "b", config, tensors_of(tmp_path / "a"))
    load(tmp_path / "b").save(tmp_path / "c")
    back = config_of(tmp_path / "c")
    assert back == config and list(back) == list(config)
    assert {k: type(v) for k, v in back.items()} == {k: type(v) for k, v in config.items()}


def test_the_dtype_that_config_states_follows_a_conversion(make, tmp_path):
    make().save(tmp_path / "a")
    assert config_of(tmp_path / "a")["torch_dtype"] == "float32"
    load(tmp_path / "a", torch.bfloat16).save(tmp_path / "b")
    assert config_of(tmp_path / "b") == config_of(tmp_path / "a") | {"torch_dtype": "bfloat16"}


def test_router_bias_stays_float32(make, tensors_of, tmp_path):
    model = make()
    biases = [gate.bias.clone() for gate in model.gates()]
    assert not torch.equal(biases[0], biases[0].bfloat16().float())
    model.to(torch.bfloat16).save(tmp_path / "a")
    again = load(tmp_path / "a", dtype=torch.bfloat16).to(torch.bfloat16)
    for gate, bias in zip(again.gates(), biases, strict=True):
        assert gate.bias.dtype == torch.float32 and torch.equal(gate.bias, bias)
    again.save(tmp_path / "b")
    stored = tensors_of(tmp_path / "b")
    assert stored["model.layers.1.mlp.gate.weight"].dtype == torch.bfloat16
    assert torch.equal(stored["model.layers.1.mlp.gate.e_score_correction_bias"], biases[0])


def test_bias_stored_narrower_is_written_so_until_it_moves(make, tensors_of, same_bits, write, tmp_path):
    make(dtype=torch.bfloat16).save(tmp_path / "a")
    stored = tensors_of(tmp_path / "a")
    names = [n for n in stored if n.endswith("e_score_correction_bias")]
    stored |= {n: stored[n].bfloat16() for n in names}
    model = load(write(tmp_path / "b", config_of(tmp_path / "a"), stored))
    assert all(gate.bias.dtype == torch.float32 for gate in model.gates())
    model.save(tmp_path / "c")
    same_bits(stored, tensors_of(tmp_path / "c"))
    model.gates()[0].bias += 1e-4
    model.save(tmp_path / "d")
    moved = tensors_of(tmp_path / "d")
    assert moved[names[0]].dtype == torch.float32 and moved[names[1]].dtype == torch.bfloat16
    assert torch.equal(moved[names[0]], model.gates()[0].bias)


def test_mixed_dtypes_are_kept_and_experts_must_agree(make, tensors_of, same_bits, write, tmp_path):
    make(dtype=torch.bfloat16).save(tmp_path / "a")
    stored = tensors_of(tmp_path / "a")
    stored["model.norm.weight"] = stored["model.norm.weight"].float()
    stored["model.layers.1.mlp.gate.weight"] = stored["model.layers.1.mlp.gate.weight"].float()
    model = load(write(tmp_path / "b", config_of(tmp_path / "a"), stored))
    assert model.norm.weight.dtype == torch.float32 and model.embed.weight.dtype == torch.bfloat16
    model.save(tmp_path / "c")
    same_bits(stored, tensors_of(tmp_path / "c"))

    odd = "model.layers.2.mlp.experts.5.up_proj.weight"
    stored[odd] = stored[odd].float()
    write(tmp_path / "b", config_of(tmp_path / "a"), stored)
    with pytest.raises(ValueError, match=r"experts\.5\.up_proj\.weight: is float32, other experts bfloat16"):
        load(tmp_path / "b")
    assert load(tmp_path / "b", torch.float32).layers[2].ffn.experts.w3.dtype == torch.float32


def test_constants_of_old_checkpoints_are_carried(make, tensors_of, same_bits, write, tmp_path):
    make().save(tmp_path / "a")
    stored = tensors_of(tmp_path / "a")
    for l in range(3):
        stored[f"model.layers.{l}.self_attn.rotary_emb.inv_freq"] = 1e4 ** -(torch.arange(0, 8, 2) / 8)
    load(write(tmp_path / "b", config_of(tmp_path / "a"), stored)).save(tmp_path / "c")
    same_bits(stored, tensors_of(tmp_path / "c"))


# ---- FP8 ----------------------------------------------------------------------------------------------------

WIDE = TINY.replace(
    hidden_size=200, intermediate_size=300, moe_intermediate_size=136, kv_lora_rank=130, q_lora_rank=128
)


@pytest.fixture
def fp8_folder(make, tensors_of, write, to_fp8, tmp_path):
    make(WIDE, dtype=torch.bfloat16).save(tmp_path / "plain")
    config = config_of(tmp_path / "plain") | {"quantization_config": FP8}
    return write(tmp_path / "fp8", config, to_fp8(tensors_of(tmp_path / "plain")))


def slowly(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    out = torch.empty(weight.shape)
    for i, row in enumerate(weight.float().tolist()):
        for j, value in enumerate(row):
            out[i, j] = value * float(scale[i // 128, j // 128])
    return out


def test_fp8_is_dequantised_over_ragged_blocks(fp8_folder, tensors_of):
    stored = tensors_of(fp8_folder)
    model, wide = load(fp8_folder), load(fp8_folder, torch.float32)
    for name, which in {
        "model.layers.0.self_attn.kv_a_proj_with_mqa": lambda m: m.layers[0].attn.wkv_a.weight,
        "model.layers.0.mlp.down_proj": lambda m: m.layers[0].ffn.w2.weight,
        "model.layers.1.mlp.experts.7.gate_proj": lambda m: m.layers[1].ffn.experts.w1[7],
        "model.layers.2.mlp.experts.15.down_proj": lambda m: m.layers[2].ffn.experts.w2[15],
        "model.layers.3.eh_proj": lambda m: m.mtp[0].eh_proj.weight,
    }.items():
        weight, scale = stored[name + ".weight"], stored[name + ".weight_scale_inv"]
        assert weight.dtype == torch.float8_e4m3fn and (weight.shape[0] % 128 or weight.shape[1] % 128)
        right = slowly(weight, scale)
        assert torch.equal(which(wide), right), name
        assert which(model).dtype == torch.bfloat16 and torch.equal(which(model), right.bfloat16()), name


def test_fp8_blocks_are_kept_bit_for_bit(fp8_folder, tensors_of, same_bits, tmp_path):
    model = load(fp8_folder, keep_fp8=True)
    assert model.layers[0].attn.wo.weight.dtype == torch.float8_e4m3fn
    assert model.layers[1].ffn.experts.w2_scale.shape == (16, 2, 2)
    save(model, tmp_path / "back", max_shard_bytes=400_000)
    same_bits(tensors_of(fp8_folder), tensors_of(tmp_path / "back"))
    assert config_of(tmp_path / "back") == config_of(fp8_folder)
    with torch.no_grad():
        held, plain = load(fp8_folder, torch.float32, keep_fp8=True), load(fp8_folder, torch.float32)
        assert held.layers[0].attn.wo.weight.dtype == torch.float8_e4m3fn
        assert torch.equal(held(TOKENS, LENGTHS), plain(TOKENS, LENGTHS))
        held.to(torch.bfloat16).save(tmp_path / "moved")
        moved = tensors_of(tmp_path / "moved")
        assert moved["model.layers.0.mlp.up_proj.weight_scale_inv"].dtype == torch.float32


def test_dequantised_is_saved_without_quantization_config_and_says_so(fp8_folder, tensors_of, tmp_path):
    model = load(fp8_folder)
    with pytest.warns(UserWarning, match="dequantised: saved without quantization_config"):
        model.save(tmp_path / "out")
    expected = config_of(fp8_folder)
    del expected["quantization_config"]
    assert config_of(tmp_path / "out") == expected
    assert not any(n.endswith("_scale_inv") for n in tensors_of(tmp_path / "out"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(tmp_path / "out").save(tmp_path / "again")


# ---- beside the weights ---------------------------------------------------------------------------------------


def test_companions_are_copied_but_never_code_or_pickles(make, tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    make().save(a)
    kept = {
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "chat_template.jinja",
        "tiktoken.model",
    }
    for name in [*kept, "modeling_deepseek.py", "training_args.bin", "x.pkl", ".hidden.json", "rng.pth"]:
        (a / name).write_bytes(b"\x00\xff" + name.encode())
    load(a).save(b)
    assert {f.name for f in b.iterdir()} == kept | {"config.json", "model.safetensors"}
    assert all((b / name).read_bytes() == (a / name).read_bytes() for name in kept)


def test_hub_id_fetches_no_code(make, tmp_path, monkeypatch, same_bits):
    from fnmatch import fnmatch

    model = make()
    model.save(tmp_path / "blobs")
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in (tmp_path / "blobs").iterdir():
        (snapshot / file.name).symlink_to(Path("..") / "blobs" / file.name)

    def fetch(name, allow_patterns, ignore_patterns):
        assert name == "owner/some-Model_1.5"
        wanted = ["config.json", "model-00001-of-00002.safetensors", "tiktoken.model", "chat_template.jinja"]
        refused = ["modeling_x.py", "pytorch_model.bin", "original/x.safetensors", "a.pt", "tool.sh"]
        for file in wanted + refused:
            allowed = any(fnmatch(file, p) for p in allow_patterns)
            allowed &= not any(fnmatch(file, p) for p in ignore_patterns)
            assert allowed == (file in wanted), file
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    same_bits(load("owner/some-Model_1.5").state_dict(), model.state_dict())
