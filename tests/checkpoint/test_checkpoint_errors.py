"""Every error, by what it says; and that it comes before a tensor is read."""

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

import abyssal.checkpoint.reader as reader
from abyssal.checkpoint import CheckpointError, load, save
from abyssal.config import ConfigError

BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.fixture
def saved(make, tensors_of, tmp_path):
    make().save(tmp_path / "saved")
    return json.loads((tmp_path / "saved/config.json").read_text()), tensors_of(tmp_path / "saved")


@pytest.fixture
def refused(write, saved, tmp_path, monkeypatch):
    """That a change to a good folder is refused with these words, and before any tensor is read."""

    def check(change, *words, early=True, **options):
        config, tensors = dict(saved[0]), dict(saved[1])
        change(config, tensors)
        folder = write(tmp_path / "bad", config, tensors)
        with monkeypatch.context() as patch:
            if early:
                patch.setattr(reader, "_fill", lambda *_: pytest.fail("read a tensor first"))
            with pytest.raises(CheckpointError) as caught:
                load(folder, **options)
        for word in words:
            assert word in str(caught.value), str(caught.value)

    return check


def test_missing(refused):
    refused(lambda c, t: t.pop("model.norm.weight"), "bad", "model.norm.weight: missing, expected [64]")
    refused(lambda c, t: t.pop(BIAS), BIAS + ": missing, expected [16]")
    refused(lambda c, t: t.pop(EXPERT), EXPERT + ": missing, expected [32, 64]")
    refused(lambda c, t: t.pop("model.layers.3.enorm.weight"), "model.layers.3.enorm.weight: missing")
    refused(lambda c, t: t.pop("lm_head.weight"), "lm_head.weight: missing, expected [512, 64]")


def test_unknown(refused):
    refused(
        lambda c, t: t.update({"model.layers.0.mlp.surprise": torch.zeros(2)}),
        "model.safetensors: model.layers.0.mlp.surprise: unknown",
    )
    refused(lambda c, t: t.update({BIAS + "2": torch.zeros(2)}), BIAS + "2: unknown")
    refused(lambda c, t: c.update(num_hidden_layers=1), "model.layers.1.enorm.weight: missing", "and ", " more")
    refused(
        lambda c, t: t.update({"model.norm.weight_scale_inv": torch.zeros(1, 1)}),
        "model.norm.weight_scale_inv: unknown",
    )


def test_a_layer_too_many_that_is_no_mtp_module(refused):
    def change(config, tensors):
        config["num_nextn_predict_layers"] = 0
        del tensors["model.layers.3.eh_proj.weight"]

    refused(change, "model.layers.3.enorm.weight: unknown")


def test_misshapen(refused):
    refused(
        lambda c, t: t.update({EXPERT: torch.zeros(64, 32)}),
        f"model.safetensors: {EXPERT}: expected [32, 64], got [64, 32]",
    )
    refused(lambda c, t: c.update(vocab_size=511), "model.embed_tokens.weight: expected [511, 64], got [512, 64]")
    refused(lambda c, t: t.update({BIAS: torch.zeros(15)}), BIAS + ": expected [16], got [15]")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    refused(lambda c, t: t.update({name: torch.zeros(8)}), name + ": expected [4], got [8]")


def test_integers(refused):
    refused(
        lambda c, t: t.update({"lm_head.weight": torch.zeros(512, 64, dtype=torch.int8)}),
        "lm_head.weight: expected a float dtype, got I8",
    )
    refused(
        lambda c, t: t.update({BIAS: t[BIAS].to(torch.float8_e5m2)}), BIAS + ": expected a float dtype, got F8_E5M2"
    )


def quantised(to_fp8):
    def change(config, tensors):
        new = to_fp8(tensors)
        tensors.clear()
        tensors.update(new)
        config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}

    return change


def test_fp8_scales(refused, to_fp8):
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    fp8 = quantised(to_fp8)

    def and_then(more):
        return lambda c, t: (fp8(c, t), more(c, t))

    refused(and_then(lambda c, t: t.pop(name + "_scale_inv")), name + "_scale_inv: missing, expected [1, 1]")
    refused(
        and_then(lambda c, t: t.update({name + "_scale_inv": torch.ones(1, 2)})),
        name + "_scale_inv: expected [1, 1], got [1, 2]",
    )
    refused(and_then(lambda c, t: c.pop("quantization_config")), "is FP8, and config.json has no quantization_config")
    for wide in ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight", "model.layers.1.mlp.gate.weight"):
        refused(
            and_then(lambda c, t, n=wide: t.update({n: t[n].to(torch.float8_e4m3fn)})),
            wide + ": expected a float dtype wider than FP8",
        )
    bad = torch.full((1, 1), float("inf"))
    refused(and_then(lambda c, t: t.update({name + "_scale_inv": bad})), name + "_scale_inv: NaN or inf", early=False)

    def unlike(config, tensors):
        fp8(config, tensors)
        tensors[EXPERT] = tensors[EXPERT].float()
        del tensors[EXPERT + "_scale_inv"]

    refused(unlike, EXPERT + ": is float32, other experts float8_e4m3fn: load with keep_fp8=False", keep_fp8=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_not_finite(refused, dtype, value):
    def change(config, tensors):
        for name in tensors:
            tensors[name] = tensors[name].to(dtype)
        tensors[EXPERT] = tensors[EXPERT].clone()
        tensors[EXPERT][5, 7] = value

    refused(change, "model.safetensors", EXPERT + ": NaN or infinity, first at [5, 7]", early=False)


@pytest.mark.parametrize("bits", [0x7F, 0xFF])
@pytest.mark.parametrize("keep", [True, False])
def test_not_finite_fp8(refused, to_fp8, bits, keep):
    fp8 = quantised(to_fp8)

    def change(config, tensors):
        fp8(config, tensors)
        tensors[EXPERT].view(torch.uint8)[5, 7] = bits

    refused(change, EXPERT + ": NaN or infinity, first at [5, 7]", early=False, keep_fp8=keep)


def test_overflow_of_the_dtype_asked_for(refused):
    refused(
        lambda c, t: t.update({EXPERT: t[EXPERT] * 1e8}),
        EXPERT + ": overflows torch.float16",
        early=False,
        dtype=torch.float16,
    )


@pytest.mark.parametrize("name", ["embed_tokens", "shared_head.head"])
def test_copies_that_differ(refused, name):
    def change(config, tensors):
        tensors[f"model.layers.3.{name}.weight"] = tensors[f"model.layers.3.{name}.weight"] + 1

    refused(change, f"model.layers.3.{name}.weight: differs from ", early=False)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_never_read(saved, tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(saved[0]))
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(CheckpointError, match=f"found {name}: pickles can run code and are never read"):
        load(tmp_path)


def test_no_weights_no_config_no_folder(saved, write, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(saved[0]))
    with pytest.raises(CheckpointError, match=r"no weights: expected model\.safetensors, or shards with"):
        load(tmp_path)
    folder = write(tmp_path / "b", *saved)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"b/config\.json: missing"):
        load(folder)
    for path in (tmp_path / "nowhere", "../../nowhere", folder / "model.safetensors", "a/b/c"):
        with pytest.raises(CheckpointError, match="expected a folder, or a hub id"):
            load(path)


def test_a_model_type_that_we_lack_and_impossible_sizes(saved, write, tmp_path):
    for change, words in (
        ({"model_type": "llama"}, "config.json: model_type: .*got 'llama'"),
        ({"model_type": "deepseek_v32"}, "got 'deepseek_v32'"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim: expected an even width"),
        ({"num_experts_per_tok": 17}, "num_experts_per_tok"),
        ({"n_group": 3}, "n_group: expected a divisor"),
        ({"hidden_size": -64}, "hidden_size: expected a positive number"),
    ):
        with pytest.raises(ConfigError, match=words):
            load(write(tmp_path / "b", saved[0] | change, saved[1]))
    (tmp_path / "b/config.json").write_text("{")
    with pytest.raises(ConfigError, match="not JSON"):
        load(tmp_path / "b")


def test_damaged_files(saved, write, tmp_path):
    folder = write(tmp_path / "b", *saved)
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for content in (
        whole[:-1], whole[: len(whole) // 2], whole[:100], whole[:7], b"", whole + b"x", b"garbage" * 100,
        struct.pack("<Q", 1 << 62) + whole[8:], struct.pack("<Q", 16) + b'{"a": nonsense}!',
    ):  # fmt: skip
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"b/model\.safetensors: truncated, or not a safetensors file"):
            load(folder)


@pytest.fixture
def sharded(saved, tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    config, tensors = saved
    (folder / "config.json").write_text(json.dumps(config))
    names = sorted(tensors)
    half = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in half.items():
        save_file({n: tensors[n] for n in part}, folder / file)
    index = {"metadata": {}, "weight_map": {n: file for file, part in half.items() for n in part}}

    def write_index(**changes):
        new = {"metadata": {}, "weight_map": index["weight_map"] | changes}
        (folder / "model.safetensors.index.json").write_text(json.dumps(new))
        return folder

    return write_index


def test_index(sharded):
    load(sharded())
    folder = sharded(**{EXPERT: "c.safetensors"})
    with pytest.raises(CheckpointError, match=rf"{EXPERT}: names 'c\.safetensors', which is absent"):
        load(folder)
    secret = folder.parent / "x.safetensors"
    save_file({"a": torch.zeros(1)}, secret)
    for name in ("../x.safetensors", str(secret), "..", "sub/../../x.safetensors", "..\\x.safetensors", ""):
        sharded(**{EXPERT: name})
        with pytest.raises(CheckpointError, match=r"index\.json: .* leaves the folder"):
            load(folder)
    sharded(**{EXPERT: "pytorch_model.bin"})
    with pytest.raises(CheckpointError, match="pickles are never read"):
        load(folder)
    sharded(ghost="a.safetensors")
    with pytest.raises(CheckpointError, match=r"ghost: expected in a\.safetensors, which does not have it"):
        load(folder)
    for content in ("[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "{"):
        (folder / "model.safetensors.index.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json: "):
            load(folder)


def test_the_same_tensor_in_two_files(sharded, saved):
    folder = sharded()
    save_file({EXPERT: saved[1][EXPERT]}, folder / "c.safetensors")
    with pytest.raises(CheckpointError, match=rf"c\.safetensors: {EXPERT}: stands in [ab]\.safetensors as well"):
        load(folder)


@pytest.mark.filterwarnings("ignore:Complex modules")
def test_arguments(make, tmp_path):
    make().save(tmp_path)
    for dtype in (torch.int8, torch.float8_e4m3fn):
        with pytest.raises(ValueError, match="dtype: expected one of"):
            load(tmp_path, dtype)
    with pytest.raises(ValueError, match="max_shard_bytes: expected a positive number"):
        save(make(), tmp_path, max_shard_bytes=0)
    with pytest.raises(CheckpointError, match=r"expected a floating dtype, got torch\.complex64"):
        save(make(dtype=torch.complex64), tmp_path / "c")
    assert not list((tmp_path / "c").iterdir())
