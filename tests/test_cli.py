"""The command line from end to end: train a tiny model, generate from it, and be told what is wrong."""

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from abyssal import LLM, Sampling, cli
from abyssal.engine.request import Piece


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 30 steps on a few sentences."""
    folder = tmp_path_factory.mktemp("cli")
    text = folder / "text"
    text.mkdir()
    for i in range(12):
        (text / f"{i}.txt").write_text(" ".join(f"def f{w % 7}(x): return x + {w % 5}\n" for w in range(60)))
    out = folder / "run"
    settings = [f"data={text}", f"out={out}", "steps=30", "batch_tokens=512", "lr=0.005", "save_every=30"]
    result = CliRunner().invoke(cli.app, ["train", "tiny", *settings])
    assert result.exit_code == 0, result.output
    assert "curves.png" in result.output and (out / "curves.png").is_file()
    return out


def generated(*arguments: str) -> dict[str, object]:
    result = CliRunner().invoke(cli.app, ["generate", *arguments, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_generate_prints_what_it_cost(run: Path) -> None:
    said = generated(str(run), "--prompt", "def ", "--max-tokens", "40", "--temperature", "0")
    assert isinstance(said["text"], str) and said["text"]
    assert isinstance(said["tokens"], list) and 0 < len(said["tokens"]) <= 40
    assert isinstance(said["tokens_per_second"], float) and said["tokens_per_second"] > 0
    assert isinstance(said["acceptance"], float) and 0 <= said["acceptance"] <= 1
    # 3 layers and the MTP module's, 24 + 8 numbers a token against 2 · 4 · 16, in float32, of two pages of 64:
    # its own, and that of idle rows.
    assert said["cache_bytes"] == 4 * 32 * 4 * 128
    assert said["mha_cache_bytes"] == 4 * 128 * 4 * 128


def test_speculation_does_not_change_greedy_text(run: Path) -> None:
    settings = ["--prompt", "def f1", "--max-tokens", "48", "--temperature", "0", "--ignore-eos"]
    with_drafts, without = generated(str(run), *settings), generated(str(run), *settings, "--no-speculation")
    assert with_drafts["text"] == without["text"] and with_drafts["tokens"] == without["tokens"]
    assert without["acceptance"] is None


def test_greedy_text_is_that_of_transformers(run: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = run / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = tokenizer("def ", return_tensors="pt").input_ids
    theirs = model.generate(ids, max_new_tokens=40, do_sample=False)[0, ids.shape[1] :].tolist()
    ours = generated(str(run), "--prompt", "def ", "--max-tokens", "40", "--temperature", "0")
    end = tokenizer.eos_token_id
    assert ours["tokens"] == (theirs[: theirs.index(end)] if end in theirs else theirs)
    assert ours["text"] == tokenizer.decode(ours["tokens"], skip_special_tokens=True)


def test_text_and_costs_for_people(run: Path) -> None:
    arguments = ["generate", str(run), "--prompt", "def ", "--prompt", "x", "--max-tokens", "5", "--seed", "1"]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0
    assert "--- 0: def" in result.output and "--- 1: x" in result.output
    assert "bytes allocated" in result.output and "MHA would take" in result.output


def test_prompts_of_a_file_are_its_lines(run: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts").write_text("def \u2028x\n\ndef é\r\n", "utf-8")
    arguments = ["generate", str(run), "--prompt-file", str(tmp_path / "prompts"), "--max-tokens", "2", "--json"]
    lines = [line for line in CliRunner().invoke(cli.app, arguments).stdout.split("\n") if line]
    assert len(lines) == 2


def test_of_several_prompts_one_that_fails_is_told(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stream(self: LLM, prompts: list[str], sampling: Sampling) -> Iterator[Piece]:
        for piece in real(self, prompts, sampling):
            if piece.output is not None and piece.index == 0:
                broken = dataclasses.replace(piece.output, finish="error", error="the logits are not finite")
                piece = dataclasses.replace(piece, output=broken)
            yield piece

    real = LLM.stream
    monkeypatch.setattr(LLM, "stream", stream)
    arguments = ["generate", str(run), "--prompt", "def ", "--prompt", "x", "--max-tokens", "2"]
    result = CliRunner().invoke(cli.app, arguments)
    assert "--- 1: x" in result.output and "prompt 0: the logits are not finite" in str(result.exception)


def test_chat(run: Path) -> None:
    arguments = ["chat", str(run), "--max-tokens", "8", "--seed", "1"]
    result = CliRunner().invoke(cli.app, arguments, input="def f\nx\n\n")
    assert result.exit_code == 0, result.output
    assert result.output.count("tokens/s") == 2


def test_inspect_json() -> None:
    result = CliRunner().invoke(cli.app, ["inspect", "deepseek-v3", "--json"])
    costs = json.loads(result.stdout)
    assert costs["parameters"]["total"] == 671026419200
    assert costs["parameters"]["activated"] == 37552297472
    assert costs["parameters"]["mtp"] == 13463426304
    assert costs["cache"]["bytes_per_token"] == 70272


def test_inspect_draws_a_picture(tmp_path: Path) -> None:
    picture = tmp_path / "costs.png"
    result = CliRunner().invoke(cli.app, ["inspect", "tiny", "--picture", str(picture)])
    assert result.exit_code == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["inspect", "nothing"], "neither a preset"),
        (["generate", "nowhere/at/all", "--prompt", "x"], "expected a folder, or a hub id"),
        (["generate", "nowhere/at/all"], "prompt: expected --prompt TEXT or --prompt-file FILE"),
        (["generate", "x", "--prompt", "x", "--temperature", "-1"], "temperature: expected"),
        (["generate", "x", "--prompt", "x", "--dtype", "int4"], "dtype: expected float32"),
        (["train", "tiny", "stepz=3"], "stepz"),
        (["train", "tiny", "model.hidden_size=0"], "hidden_size: expected a positive number"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["abyssal", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
