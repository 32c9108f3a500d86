"""Study 1: the papers' rows to the digit, and caches that are as large as was predicted."""

import json
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from abyssal import cli
from abyssal.config import ModelConfig, preset_names
from abyssal.costs import fp8_cache_bytes, inspect
from abyssal.model.cache import Cache
from abyssal.model.transformer import Transformer
from abyssal.study.cache import Settings, study_cache
from abyssal.study.cache_claims import claims
from abyssal.study.cache_fit import fit, size, weights
from abyssal.study.cache_kinds import Kind, equal_groups, grouped, kinds, without_rotary_key
from abyssal.study.cache_measure import ROOM, Measured, measure, measure_engine, model_of, resident, rows_written
from abyssal.study.cache_papers import rows
from abyssal.study.output import load
from abyssal.study.verdicts import verdicts


def labelled(found: list[Kind]) -> dict[str, Kind]:
    return {kind.label: kind for kind in found}


def rung(**changes: object) -> ModelConfig:
    return ModelConfig.load("tiny").replace(model_type="abyssal", qk_rope_head_dim=0, **changes)


# ---- the papers ---------------------------------------------------------------------------------------------------


def test_deepseek_v2s_table_at_any_of_its_letters():
    """2·n_h·d_h·l, 2·n_g·d_h·l, 2·d_h·l and (d_c + d_h^R)·l = 9/2·d_h·l, at shapes of our own."""
    n_h, d_h, l = 12, 40, 7
    config = ModelConfig.load("deepseek-v2").replace(
        num_attention_heads=n_h, v_head_dim=d_h, num_hidden_layers=l, kv_lora_rank=4 * d_h, qk_rope_head_dim=d_h // 2
    )
    found = labelled(kinds(config, groups=(2, 3, 6)))
    assert found["MHA"].elements == 2 * n_h * d_h * l
    for n_g in (2, 3, 6):
        assert found[f"GQA, {n_g} groups"].elements == 2 * n_g * d_h * l
    assert found["MQA"].elements == 2 * d_h * l
    assert found["MLA, as configured"].elements == (4 * d_h + d_h // 2) * l == 9 * d_h * l // 2
    assert found["MLA without the rotary key"].elements == 4 * d_h * l
    assert equal_groups(found["MLA, as configured"]) == 2.25


def test_every_figure_of_the_papers_comes_out_to_the_digit():
    said = {(row.what, row.said): row for row in rows()}
    assert all(row.said == row.counted for row in said.values())
    # By hand, so that neither column is believed.
    exactly = {row.said: row.exactly for row in said.values()}
    assert {said: exactly[said] for said in ("110.6K", "15.6K", "860.2K", "34.6K")} == {
        "110.6K": 110_592, "15.6K": 15_552, "860.2K": 860_160, "34.6K": 34_560
    }  # fmt: skip
    assert exactly["64"] == 64 and exactly["57"] == 2 * 128 * 128 / 576
    assert exactly["2.25"] == 2.25
    assert exactly["93.3%"] == 1 - (6 * 576 * 60) / (16 * 2 * 8 * 128 * 95)
    assert (exactly["70.272 KB"], exactly["327.680 KB"], exactly["516.096 KB"]) == (70_272, 327_680, 516_096)
    assert [row.exactly for row in rows()[:5]] == [1_966_080, 122_880, 15_360, 34_560, 34_560]


def test_a_figure_that_does_not_come_out_is_told(monkeypatch: pytest.MonkeyPatch):
    wrong = [rows()[0]._replace(said="1,966,081")]
    monkeypatch.setattr("abyssal.study.cache.rows", lambda: wrong)
    result = study_cache(Settings(models=("tiny",), tokens=4))
    assert "NOT SO. Figures, to the digit: 0 of 1 agree; MHA: " in result.not_shown[0]
    assert "it says 1,966,081, counted 1,966,080" in result.not_shown[0]
    assert result.grids[0].rows[0][-1] == "NO"
    assert [claim["verdict"] for claim in result.numbers["claims"]] == ["NOT SO", "shown"]


def test_one_wrong_figure_or_one_wrong_cache_is_not_so():
    right = rows()
    caches = [Measured(f"cache {i}", 4, 100, 100, 4, True) for i in range(3)]
    said = claims(right, caches)
    assert len(said) == 1 + len({row.where for row in right}) and all(claim.holds for claim in said)
    assert sum(claim.numbers["of"] for claim in said) == len(right) + 3
    for i, row in enumerate(right):
        wrong = claims([*right[:i], row._replace(said="7"), *right[i + 1 :]], caches)
        assert [(c.where, c.verdict) for c in wrong if not c.holds] == [(row.where, "NOT SO")]
        assert any(f"{row.what}: it says 7, counted {row.counted}" in c.found for c in wrong)
    for i, cache in enumerate(caches):
        own = claims(right, [*caches[:i], cache._replace(found=101), *caches[i + 1 :]])
        assert [c.verdict for c in own] == ["shown"] * (len(own) - 1) + ["NOT SO"]
        assert own[-1].found == f"2 of 3 agree; cache {i}: predicted 100, measured 101"


def test_a_wrong_cache_is_told_as_not_shown(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("abyssal.study.cache.measure", lambda *of: measure(*of)._replace(found=1))
    result = study_cache(Settings(models=("tiny",), tokens=4))
    assert "has the bytes predicted" in result.not_shown[0] and ", NOT SO. Caches, to the byte: " in result.not_shown[0]
    assert not any("has the bytes predicted" in line for line in result.shown)
    assert [verdict.kind for verdict in verdicts(result)][-1] == "not so"


def test_deepseek_v3():
    found = labelled(kinds(ModelConfig.load("deepseek-v3")))
    bytes_a_token = {label: kind.bytes() for label, kind in found.items()}
    assert bytes_a_token == {
        "MLA, as configured": 70_272, "MHA": 3_997_696, "GQA, 8 groups": 249_856, "MQA": 31_232,
        "MLA without the rotary key": 62_464, "MLA, FP8 rows of 656 bytes": 656 * 61, "MLA and 1 MTP module": 71_424,
    }  # fmt: skip
    assert found["MHA"].bytes() / found["MLA without the rotary key"].bytes() == 64
    assert round(found["MHA"].bytes() / found["MLA, as configured"].bytes()) == 57
    assert found["MLA, FP8 rows of 656 bytes"].elements == 35_136


# ---- counting -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", preset_names())
def test_the_kinds_are_what_inspect_counts(name: str):
    config = ModelConfig.load(name)
    compared, found = inspect(config, 1).cache.compared, labelled(kinds(config))
    assert found["MLA, as configured"].bytes() == inspect(config, 1).cache.bytes_per_token
    for label, rung in (("MHA", "mha"), ("MQA", "mqa"), ("MLA without the rotary key", "latent")):
        assert found[label].elements == compared[rung].elements_per_token
    if config.num_attention_heads % 8 == 0:
        assert found["GQA, 8 groups"].elements == compared["gqa8"].elements_per_token


def test_groups_are_by_default_the_most_that_divide_the_heads():
    assert "GQA, 5 groups" in labelled(kinds(ModelConfig.load("glm-4.7-flash")))  # 20 heads
    with pytest.raises(ValueError, match="groups: expected divisors of the 20 heads, got 8"):
        kinds(ModelConfig.load("glm-4.7-flash"), (5, 8))


def test_latents_that_go_into_no_fp8_rows_have_no_such_row():
    assert not any(kind.packed for kind in kinds(ModelConfig.load("tiny")))
    with pytest.raises(ValueError, match="packed rows: expected latents in groups of 128"):
        fp8_cache_bytes(ModelConfig.load("tiny"), 1)
    with pytest.raises(ValueError, match="FP8 rows are of latents, and attention is 'mha'"):
        fp8_cache_bytes(grouped(ModelConfig.load("deepseek-v3"), "mha"), 1)


def test_rungs_of_the_ladder_say_what_they_are():
    found = kinds(rung(attention="gqa", position="rope", num_key_value_heads=2, qk_nope_head_dim=10))
    assert (found[0].label, found[0].elements) == ("GQA, 2 groups, as configured", 3 * 2 * (10 + 16))
    coupled = kinds(rung(position="rope"))
    assert (coupled[0].label, coupled[0].formula, coupled[0].elements) == ("MLA, as configured", "d_c·l", 3 * 24)
    assert not any(kind.label == "MLA without the rotary key" for kind in coupled)


# ---- what fits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, expected",
    [
        ("80GB", 80 * 10**9),
        ("141GiB", 141 * 2**30),
        ("1.5tb", 15 * 10**11),
        (" 2 MiB ", 2**21),
        ("123", 123),
        ("7B", 7),
    ],
)
def test_sizes(text: str, expected: int):
    assert size(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0GB", "80 GBs", "1e3", "nan", "80GB 4"])
def test_what_is_no_size_is_refused(text: str):
    with pytest.raises(ValueError, match="memory: expected a size such as 80GB"):
        size(text)


@given(memory=st.integers(-10, 10**8), n=st.integers(1, 5000), packed=st.booleans())
@settings(max_examples=60, deadline=None)
def test_one_token_more_does_not_fit(memory: int, n: int, packed: bool):
    kind = labelled(kinds(ModelConfig.load("deepseek-v2-lite")))["MLA, FP8 rows of 656 bytes" if packed else "MHA"]
    found = fit(kind, memory, (n,), (n,))
    for most, times in ((found.tokens, 1), (found.batches[n], n), (found.contexts[n], n)):
        assert most == 0 or kind.bytes(most * times) <= memory
        assert kind.bytes((most + 1) * times) > memory


def test_weights_are_those_stored():
    config = ModelConfig.load("deepseek-v3")
    counted = inspect(config, 1).weights
    copies = 2 * 129_280 * 7168 * 2  # of embedding and head, that a file has and a memory has not
    assert weights(config, "fp8") == ("FP8", counted.fp8, counted.fp8_mtp - copies)
    assert weights(config) == ("bf16", counted.bf16, counted.bf16_mtp - copies)
    assert weights(config.replace(fp8=True)) == weights(config, "fp8")


def test_weights_take_their_part_of_the_memory():
    plain = json.loads(study_cache(Settings(models=("tiny",), memory="1MB", tokens=4)).to_json())
    tiny = plain["numbers"]["models"]["tiny"]
    own, last = tiny["kinds"][0], tiny["kinds"][-1]
    assert last["attention"] == "MLA and 1 MTP module"
    stored = tiny["weights"]["bytes"]
    model, biases = Transformer(ModelConfig.load("tiny")), 3 * 16
    assert stored + tiny["weights"]["mtp_bytes"] == 2 * sum(p.numel() for p in model.parameters()) + 4 * biases
    assert last["fits_beside_weights"]["tokens"] > 0
    assert own["fits"]["tokens"] == 1_000_000 // 192
    assert own["fits_beside_weights"]["tokens"] == (1_000_000 - stored) // 192 > 0
    assert last["fits_beside_weights"]["tokens"] == (1_000_000 - stored - tiny["weights"]["mtp_bytes"]) // 256
    small = study_cache(Settings(models=("tiny",), memory="1KB", tokens=4))
    assert json.loads(small.to_json())["numbers"]["models"]["tiny"]["kinds"][0]["fits_beside_weights"] is None


# ---- measured -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny", "deepseek-v3"])
def test_caches_have_the_bytes_predicted_and_every_row_is_written(name: str):
    for kind in kinds(ModelConfig.load(name)):
        if not kind.mtp:
            found = measure(kind, tokens=3)
            assert (found.found, found.written) == (found.predicted, 3), kind.label
            assert found.predicted == 3 * kind.bytes() and found.whole == (name == "tiny")


@pytest.mark.parametrize(
    "config, elements",
    [
        (rung(position="rope"), 24),
        (rung(position="none"), 24),
        (rung(attention="mha", position="rope"), 4 * 32),
        (rung(attention="gqa", position="binary", num_key_value_heads=2, qk_nope_head_dim=10), 2 * 26),
        (rung(attention="mqa", position="integer"), 32),
    ],
)
def test_every_rung_of_the_ladder_is_measured(config: ModelConfig, elements: int):
    found = measure(kinds(config)[0], tokens=5)
    assert found.found == found.predicted == 5 * 3 * elements * 2
    assert found.written == 5


@pytest.mark.parametrize("R", [0, 64])
def test_fp8_rows_are_measured(R: int):
    config = ModelConfig.load("deepseek-v2-lite")
    config = config if R else without_rotary_key(config)
    kind = next(kind for kind in kinds(config) if kind.packed)
    found = measure(kind, tokens=4)
    assert found.found == found.predicted == 4 * 27 * (512 + 16 + 2 * R)
    assert found.written == 4


def test_the_engines_pool():
    """Whole pages, one of them idle, the MTP module's rows among them; the last token of a text leaves no row."""
    tiny = measure_engine(ModelConfig.load("tiny"), tokens=70)
    assert tiny.label == "the engine's pool, with the MTP modules'" and tiny.whole
    assert tiny.tokens % 64 == 0 and tiny.tokens >= 70 + 64
    assert tiny.found == tiny.predicted == tiny.tokens * 4 * 32 * 2
    assert tiny.written >= 69
    lite = measure_engine(ModelConfig.load("deepseek-v2-lite"), tokens=5, packed=True)
    assert lite.found == lite.predicted == lite.tokens * 27 * 656
    assert lite.written == 4 and not lite.whole
    with pytest.raises(ValueError, match="FP8 rows: expected latents in groups of 128, got 24"):
        measure_engine(ModelConfig.load("tiny"), tokens=5, packed=True)


def test_a_cache_that_would_not_fit_is_shorter():
    mha = labelled(kinds(ModelConfig.load("deepseek-v3")))["MHA"]
    assert ROOM // mha.bytes() < 1000  # so that this test can fail
    assert measure(mha, tokens=1).tokens == 1
    model, whole = model_of(mha.config, seed=0)
    assert not whole and len(model.layers) == 61 and len(model.leaves()) == 61


def test_measuring_sees_what_is_there():
    """Tensors over one storage are one; a row of zeros was not written, one of a negative zero was."""
    rows_, other = torch.zeros(4, 3), torch.zeros(4, 3)
    cache = Cache([{"a": rows_[:, :2]}, {"b": rows_[:, 2:], "c": other}], 4)
    assert resident(cache) == 2 * 4 * 3 * 4
    assert rows_written(cache) == 0
    rows_[1:] = 1.0
    other[2:] = -0.0
    assert rows_written(cache) == 2
    assert rows_written(cache, skip=3) == 1


# ---- the command --------------------------------------------------------------------------------------------------


def test_the_command_writes_everything(tmp_path: Path):
    out = tmp_path / "deep" / "out"
    arguments = ["study", "cache", "tiny", "small", "--tokens", "4", "--memory", "1GiB", "--groups", "2,4"]
    arguments += ["--out", str(out), "--json", str(tmp_path / "n.json"), "--picture", str(tmp_path / "p.png")]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 0, done.output
    files = {path.name for path in out.iterdir()}
    assert files == {"cache.json", "cache.html", "cache.png", "cache-2.png"}
    assert (tmp_path / "n.json").read_bytes() == (out / "cache.json").read_bytes()
    assert (tmp_path / "p.png").read_bytes() == (out / "cache.png").read_bytes()
    assert (tmp_path / "p-2.png").read_bytes().startswith(b"\x89PNG")
    result = load(out, "cache")
    assert all(x["exact"] for model in result.numbers["models"].values() for x in model["measured"])
    assert result.numbers["memory"] == 2**30 and result.seeds == (0,) and result.seconds > 0
    for text in ("small: what a token leaves behind", "GQA, 2 groups", "Not shown: ", "seed 0"):
        assert text in done.output
    html = (out / "cache.html").read_text("utf-8")
    assert "http://" not in html and "https://" not in html and "<script" not in html
    assert html.count("data:image/png;base64,") == 2 and html.count("<table>") == len(result.grids)
    assert result.not_shown and "takes training" in result.not_shown[0]


def test_a_checkpoints_folder_will_do(tmp_path: Path):
    config = ModelConfig.load("tiny").replace(num_hidden_layers=2)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config.to_dict()))
    result = study_cache(Settings(models=(str(tmp_path),), tokens=4))  # a run's folder: the model within it
    assert result.numbers["models"][str(tmp_path)]["kinds"][0]["elements_per_token"] == 2 * 32


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nothing"], "nothing: neither a preset"),
        (["tiny", "--memory", "much"], "memory: expected a size such as 80GB"),
        (["tiny", "--groups", "3"], "groups: expected divisors of the 4 heads, got 3 (tiny)"),
        (["tiny", "--groups", "0"], "--groups: expected positive numbers with commas"),
        (["tiny", "--context", "1k"], "--context: expected positive numbers with commas"),
        (["tiny", "--batch", "-1"], "--batch: expected positive numbers with commas"),
        (["tiny", "--tokens", "1"], "tokens: expected 2 to 1024, got 1"),
        (["tiny", "--tokens", "600"], "tokens: expected at most the 512 of tiny"),
        (["tiny", "--weights", "int4"], "weights: expected bf16 or fp8, got 'int4'"),
        (["tiny", "--json", "no/such/folder/a.json"], "--json: no/such/folder is no folder"),
        (["tiny", "--picture", "a.jpg"], "--picture: expected a name that ends in .png"),
        (["tiny", "--out", __file__], "--out: expected a folder"),
    ],
)
def test_errors_are_one_line_and_come_before_any_work(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("abyssal.study.cache.measure", None)  # would be called
    monkeypatch.setattr(sys, "argv", ["abyssal", "study", "cache", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
