"""The trained studies' common part, and the study of balance: every number comes from a run that was made."""

import dataclasses
import json
import math
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from html_words import words
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from abyssal import cli
from abyssal.model.balance import Balance
from abyssal.study import trained
from abyssal.study.balance import Settings, study_balance
from abyssal.study.balance_claims import claims
from abyssal.study.balance_measure import Found, measured
from abyssal.study.balance_pictures import heat, smoothed
from abyssal.study.balance_tables import by_layer
from abyssal.study.output import load
from abyssal.study.result import Result
from abyssal.study.small import spent
from abyssal.study.specialise import by_chance, loads, mutual_information
from abyssal.study.texts import Texts, _key, library_texts, open_texts
from abyssal.study.trained import Plan, Trained, train_all
from abyssal.train.trainer import Trainer

QUICK = dataclasses.replace(Settings.quick(), steps=5)
SILENT = Console(quiet=True)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def result(work: Path) -> Result:
    return study_balance(QUICK, work, "abyssal study balance", SILENT)


def plan_of(chosen: Settings, folder: Path, *names: str) -> Plan:
    texts = open_texts(folder, chosen.data, chosen.text, chosen.vocab, chosen.sequence, chosen.held_out)
    variants = [v for v in chosen.variants() if not names or v.name in names]
    return Plan(variants, range(chosen.seeds), texts, chosen.training(), folder)


@pytest.fixture(scope="module")
def runs(result: Result, work: Path) -> dict[str, list[Trained]]:
    """Those that the study made, read back."""
    return train_all(plan_of(QUICK, work), SILENT)


def test_seconds_are_of_all_runs_and_of_what_came_after_them(
    result: Result, work: Path, runs: dict[str, list[Trained]], monkeypatch: pytest.MonkeyPatch
):
    """Of runs that were there already too, and of pictures; not of reading texts."""
    trained_in = sum(run.seconds for of_seeds in runs.values() for run in of_seeds)
    assert trained_in < result.seconds
    assert trained_in + 100 <= spent(runs, time.perf_counter() - 100) < trained_in + 101
    clock, late = time.perf_counter, [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + late[0])

    def slow(how: Callable[..., Any], seconds: float) -> Callable[..., Any]:
        def made(*of: Any, **more: Any) -> Any:
            late[0] += seconds
            return how(*of, **more)

        return made

    monkeypatch.setattr("abyssal.study.balance.heat", slow(heat, 1000.0))
    monkeypatch.setattr("abyssal.study.balance.by_layer", slow(by_layer, 2000.0))
    monkeypatch.setattr("abyssal.study.balance.measured", slow(measured, 10_000.0 / sum(map(len, runs.values()))))
    monkeypatch.setattr("abyssal.study.small.open_texts", slow(open_texts, 100_000.0))
    again = study_balance(QUICK, work, "", SILENT)
    assert trained_in + 13_000 < again.seconds < trained_in + 13_000 + 100


def test_other_code_makes_other_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for kind in ("a", "b"):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{kind}.txt").write_text(kind)
    made = _key(tmp_path / "data", 8_000, 300)
    assert _key(tmp_path / "data", 8_000, 300) == made != _key(tmp_path / "data", 8_001, 300)
    monkeypatch.setattr("abyssal.study.texts.code_digest", lambda *parts: f"other {parts}")
    assert _key(tmp_path / "data", 8_000, 300) != made


def hand_violation(counts: list[int]) -> float:
    return max(counts) / (sum(counts) / len(counts)) - 1


# ---- texts --------------------------------------------------------------------------------------------------------

SOURCE = '''"""A module that says something."""
import os

NAMES = {
''' + "".join(f"    'n{i}': {i},  # {i}\n" for i in range(16)) + '''}
LONG = ["%s" % 1, "a", "b"]

def f(x):
    """Doubles."""
    # why
    return 2 * x

class C:
    """Only says."""
'''  # fmt: skip


def test_the_kinds_of_a_source_are_told_apart_by_its_syntax():
    found = dict(library_texts("a.py", SOURCE))
    assert found["prose"] == "A module that says something.\n\nDoubles.\n\nOnly says."
    assert found["tables"].startswith("NAMES = {\n    'n0': 0,  # 0\n") and found["tables"].endswith("}\n")
    assert found["code"].startswith("import os\nLONG = ") and "return 2 * x" in found["code"]
    assert not any(word in found["code"] for word in ("Doubles", "says", "why", "NAMES"))
    compile(found["code"], "a.py", "exec")
    assert list(library_texts("b.py", "print 'old'")) == []


def test_held_out_texts_are_whole_sequences_that_nothing_is_trained_on(work: Path, result: Result):
    texts = open_texts(work, None, QUICK.text, QUICK.vocab, QUICK.sequence, QUICK.held_out)
    assert texts.kinds == ["code", "prose", "tables"]
    assert texts.fingerprint == result.numbers["texts"]["sha256"]
    folder = texts.tokens.folder.parent
    trained_on = (folder / "train.jsonl").read_text("utf-8").splitlines()
    for kind, batches in texts.held_out.items():
        assert len(batches) == QUICK.held_out
        lines = [x["text"] for x in map(json.loads, trained_on) if x["kind"] == kind]
        assert len(lines) == texts.about[kind]["documents"]
        assert sum(len(x.encode()) for x in lines) == texts.about[kind]["bytes"] <= QUICK.text + 512
        for batch in batches:
            assert batch.lengths == [QUICK.sequence] == [len(batch.tokens)]
            assert not any(texts.tokenizer.decode(batch.tokens.tolist()) in line for line in lines)


def drawn(letters: str, seed: int) -> str:
    return "".join(random.Random(seed).choices(letters + " ", k=400))


def test_a_folders_entries_are_kinds(tmp_path: Path):
    data = tmp_path / "data"
    (data / "letters").mkdir(parents=True)
    for i in range(10):
        (data / "letters" / f"{i}.txt").write_text(drawn("abcdefghijklmnop", i))
    lines = [json.dumps({"text": drawn("0123456789", i)}) for i in range(9)]
    (data / "digits.jsonl").write_text("\n".join(lines))
    texts = open_texts(tmp_path / "work", data, 100_000, 300, 16, 4)
    assert texts.kinds == ["digits", "letters"] and texts.about["letters"]["documents"] == 9
    assert [len(x) for x in texts.held_out.values()] == [4, 4]
    (data / "letters" / "0.txt").write_text(drawn("qrstuvwxyz", 0))
    other = open_texts(tmp_path / "work", data, 100_000, 300, 16, 4)
    assert other.fingerprint != texts.fingerprint
    # What is trained on is not held out, though it be another document.
    (data / "letters" / "7.txt").write_text((data / "letters" / "0.txt").read_text())
    with pytest.raises(ValueError, match="kind letters has no held-out document of 16 tokens"):
        open_texts(tmp_path / "work", data, 100_000, 300, 16, 4)
    (data / "letters" / "7.txt").unlink()
    with pytest.raises(ValueError, match="kind digits has no held-out document of 4096 tokens"):
        open_texts(tmp_path / "work", data, 100_000, 300, 4096, 4)
    (data / "digits.jsonl").unlink()
    with pytest.raises(ValueError, match="--data: expected two or more kinds of text"):
        open_texts(tmp_path / "work", data, 100_000, 300, 16, 4)


# ---- numbers ------------------------------------------------------------------------------------------------------


def test_every_token_picks_its_experts_in_every_layer(runs: dict[str, list[Trained]]):
    for of_seeds in runs.values():
        for run in of_seeds:
            for of_kind in run.counts.values():
                sums = {sum(gate) for sequence in of_kind for gate in sequence}
                assert sums == {QUICK.sequence * QUICK.chosen}
                assert [len(sequence) for sequence in of_kind] == [QUICK.layers - 1] * QUICK.held_out


def test_maxvio_is_that_of_the_counts(runs: dict[str, list[Trained]], result: Result):
    for name, of_seeds in runs.items():
        for run, told in zip(of_seeds, result.numbers["variants"][name]["runs"], strict=True):
            for gate in range(QUICK.layers - 1):
                sequences = [sequence[gate] for of_kind in run.counts.values() for sequence in of_kind]
                together = [sum(column) for column in zip(*sequences)]
                assert told["violation_by_layer"][gate] == pytest.approx(hand_violation(together))
            each = [hand_violation(g) for of_kind in run.counts.values() for s in of_kind for g in s]
            assert told["violation_of_sequence"] == pytest.approx(sum(each) / len(each))
            assert told["violation"] == pytest.approx(sum(told["violation_by_layer"]) / (QUICK.layers - 1))


def test_a_runs_curve_is_that_of_its_steps(work: Path, runs: dict[str, list[Trained]], monkeypatch: pytest.MonkeyPatch):
    """The same settings through the Trainer, with the counts of each step seen before they are dropped."""
    seen: list[list[list[int]]] = []
    update = Balance.update

    def watched(self: Balance, speed: float) -> torch.Tensor:
        seen.append(self.counts.tolist())
        return update(self, speed)

    monkeypatch.setattr(Balance, "update", watched)
    plan = plan_of(QUICK, work, "free")
    trainer = Trainer(plan.config(plan.variants[0], 1), plan.variants[0].model, plan.texts.tokens)
    with trainer.stream() as stream:
        losses = [trainer.step(microbatches).main_loss for microbatches in stream]
    run = runs["free"][1]
    assert run.loss == pytest.approx(losses, rel=1e-4) and len(run.loss) == QUICK.steps
    assert all(sum(gate) == QUICK.batch * QUICK.chosen for step in seen for gate in step)
    by_hand = [[hand_violation(gate) for gate in step] for step in seen]
    assert run.violation[0] == pytest.approx(by_hand[0]) and len(run.violation) == len(by_hand)
    assert [check.step for check in run.checks] == [2, 3, 4, 5]
    assert run.tokens == QUICK.steps * QUICK.batch


def test_only_the_bias_balances_without_a_loss(runs: dict[str, list[Trained]]):
    for name, of_seeds in runs.items():
        for run in of_seeds:
            moved = [float(gate.bias.abs().max()) for gate in run.model().gates() if gate.bias is not None]
            assert len(moved) == QUICK.layers - 1
            if name in ("free", "both"):
                assert all(0 < x <= QUICK.steps * QUICK.speed + 1e-6 for x in moved)
            else:
                assert moved == [0.0] * len(moved)
    first = {name: of_seeds[0].loss for name, of_seeds in runs.items()}
    assert len({x[0] for x in first.values()}) == 1  # the same weights and the same text
    assert len({tuple(x) for x in first.values()}) == 5  # and then every variant goes its way


def test_the_models_kept_are_those_measured(runs: dict[str, list[Trained]], work: Path):
    from abyssal.model.objective import Measured, Microbatch

    run, texts = runs["both"][0], plan_of(QUICK, work).texts
    model = run.model()
    with torch.no_grad():
        for kind, batches in texts.held_out.items():
            counts = torch.stack([Measured.of(model, Microbatch.of(batch, 0)).counts for batch in batches])
            other = (counts - torch.tensor(run.counts[kind])).abs().sum()
            assert int(other) <= 4  # a near-tie may fall otherwise


# ---- specialisation -----------------------------------------------------------------------------------------------


def test_mutual_information_by_hand():
    apart = torch.tensor([[[8, 0]], [[0, 8]]])  # two kinds, a gate, two experts
    alike = torch.tensor([[[6, 2]], [[60, 20]]])
    half = torch.tensor([[[4, 4]], [[0, 8]]])
    assert mutual_information(apart).tolist() == [1.0]
    assert mutual_information(alike).tolist() == pytest.approx([0.0], abs=1e-12)
    entropy = -(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75))
    assert mutual_information(half).tolist() == pytest.approx([entropy - 0.5])
    assert loads(half).tolist() == [[[1.0, 1.0]], [[0.0, 2.0]]]


@given(st.integers(2, 4), st.integers(1, 5), st.integers(1, 8), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_mutual_information_is_between_nothing_and_all(kinds: int, sequences: int, experts: int, seed: int):
    counts = torch.randint(0, 9, (kinds, sequences, 2, experts), generator=torch.Generator().manual_seed(seed))
    counts[..., 0] += 1
    found = mutual_information(counts.sum(1))
    assert bool((found > -1e-9).all()) and bool((found <= math.log2(min(kinds, experts)) + 1e-9).all())


def test_what_chance_leaves_is_less_than_what_there_is():
    counts = torch.zeros(2, 8, 1, 2, dtype=torch.int64)
    counts[0, ..., 0], counts[1, ..., 1] = 16, 16
    assert mutual_information(counts.sum(1)).tolist() == [1.0]
    assert 0 < float(by_chance(counts)) < 0.2
    assert torch.equal(by_chance(counts), by_chance(counts))


# ---- verdicts -----------------------------------------------------------------------------------------------------


def made(bits: float, violation: float = 0.1, within: float = 0.5, information: float = 0.1) -> Found:
    return Found(bits, violation, [violation], violation, within, information, [information], 0.0, [])


def judged(**of: list[Found]) -> dict[str, str]:
    base = [made(2.0), made(2.1), made(2.2)]
    names = ("none", "auxiliary", "sequence", "free", "both")
    return {c.says: c.verdict for c in claims({name: of.get(name, base) for name in names}, dict(zip(names, names)))}


def test_verdicts_follow_the_numbers():
    """The same claims are shown, reversed or left open by other numbers alone."""
    equal = judged()
    costs, better = (
        "A loss over the batch costs no more than the bias",
        "With the bias the model predicts better than with the loss",
    )
    assert equal[costs] == "shown" and equal[better] == "not resolved"
    worse = judged(auxiliary=[made(2.1), made(2.2001), made(2.2999)])
    assert worse[costs] == "NOT SO" and worse[better] == "shown"
    best = judged(auxiliary=[made(1.9), made(2.0001), made(2.0999)])
    assert best[costs] == "shown" and best[better] == "NOT SO: the reverse"
    noisy = judged(auxiliary=[made(2.2), made(2.0), made(2.2)])
    assert noisy[costs] == noisy[better] == "not resolved"


def test_the_result_says_all_claims_once_and_its_size(result: Result, runs: dict[str, list[Trained]]):
    plain = result.numbers["claims"]
    shown = [c for c in plain if c["verdict"] == "shown"]
    assert len(shown) == len(result.shown) and len(plain) == 9
    told = " ".join(result.not_shown)
    for claim in plain:
        assert (claim["says"] in told) == (claim["verdict"] != "shown")
    numbers = {"Where nothing": ("violation", "none", "free"), "Balancing every": ("bits_per_byte", "sequence", "free")}
    for says, (number, *pair) in numbers.items():
        left, right = ([r[number] for r in result.numbers["variants"][name]["runs"]] for name in pair)
        apart = [a - b for a, b in zip(left, right)]
        claim = next(c for c in plain if c["says"].startswith(says))
        assert claim["numbers"]["difference"] == pytest.approx(sum(apart) / len(apart))
    assert f"{QUICK.steps * QUICK.batch:,} tokens" in told and "were not searched for" in told
    assert "fell from" in told  # so short a run has learnt nothing, and it says so
    for name, of_seeds in runs.items():
        assert [measured(run).information for run in of_seeds] == pytest.approx(
            [r["information"] for r in result.numbers["variants"][name]["runs"]]
        )


def test_curves_are_means_of_stretches():
    values = torch.arange(14.0).reshape(2, 7).numpy()
    at, smooth = smoothed(values, 3)
    assert at.tolist() == [4, 7] and smooth.tolist() == [[2.0, 5.0], [9.0, 12.0]]


# ---- interrupted, and the command ---------------------------------------------------------------------------------


def test_an_interrupted_study_goes_on_where_it_was(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The texts are shared; the runs are other ones, in a folder of their own."""
    plan = dataclasses.replace(plan_of(QUICK, work, "none", "free"), folder=tmp_path)
    began: list[int] = []
    measure, step = trained.measure, Trainer.step

    def stopping(trainer: Trainer, texts: Texts) -> object:
        if len(began) == 2:
            raise KeyboardInterrupt
        return measure(trainer, texts)

    def counted(self: Trainer, microbatches: list) -> object:
        began.extend([1] if self.done == 0 else [])
        return step(self, microbatches)

    monkeypatch.setattr(Trainer, "step", counted)
    monkeypatch.setattr(trained, "measure", stopping)
    console = Console(record=True, width=200, file=open("/dev/null", "w"))  # noqa: SIM115
    with pytest.raises(KeyboardInterrupt):
        train_all(plan, console)
    assert "1 of 4 runs are whole and kept in" in console.export_text()
    first = {path: path.read_bytes() for path in tmp_path.glob("*/run.json")}
    assert len(first) == 1
    monkeypatch.setattr(trained, "measure", measure)
    began.clear()
    found = train_all(plan, console)
    assert len(began) == 3 and "1 of 4 runs are in" in console.export_text()
    assert all(path.read_bytes() == data for path, data in first.items())
    assert {name: [run.seed for run in x] for name, x in found.items()} == {"none": [0, 1], "free": [0, 1]}
    began.clear()
    assert train_all(plan, SILENT) == found and not began
    more = dataclasses.replace(plan, settings={**plan.settings, "lr": 0.001}, seeds=[0])
    assert train_all(more, SILENT)["none"][0] != found["none"][0] and len(began) == 2  # other settings, other runs


def test_the_command_writes_everything(work: Path, result: Result, tmp_path: Path):
    """With the runs that are there already: it trains none."""
    arguments = ["study", "balance", "--quick", "--steps", str(QUICK.steps), "--work", str(work)]
    done = CliRunner().invoke(cli.app, [*arguments, "--out", str(tmp_path / "out"), "--json", str(tmp_path / "n.json")])
    assert done.exit_code == 0, done.output
    assert "10 of 10 runs are in" in done.output
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"balance.json", "balance.html", "balance.png", "balance-2.png"}
    read = load(tmp_path / "out", "balance")
    assert read.numbers == result.numbers and read.seeds == (0, 1) and len(read.grids) == 6
    assert (tmp_path / "n.json").read_bytes() == (tmp_path / "out" / "balance.json").read_bytes()
    html = (tmp_path / "out" / "balance.html").read_text("utf-8")
    assert html.count("data:image/png;base64,") == 2 and "http" not in words(html) and "perplexity 9.50" in html
    assert all(p.png.startswith(b"\x89PNG") for p in read.pictures)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--seeds", "1"], "seeds: expected two or more, there is no spread of 1"),
        (["--steps", "3"], "steps: expected 4 or more, got 3"),
        (["--layers", "1"], "layers: expected 2 or more, got 1"),
        (["--alpha", "0"], "alpha: expected a positive number, got 0.0"),
        (["--speed", "nan"], "speed: expected a positive number, got nan"),
        (["--chosen", "9"], "num_experts_per_tok: expected 1 to n_routed_experts (8), got 9"),
        (["--device", "abacus"], "device: 'abacus' cannot be used"),
        (["--data", "no/such/folder"], "--data: no/such/folder is no folder"),
        (["--json", "no/such/folder/a.json"], "--json: no/such/folder is no folder"),
    ],
)
def test_errors_are_one_line_and_come_before_any_work(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    monkeypatch.setattr("abyssal.study.small.train_all", None)  # would be called
    work = tmp_path / "work"
    monkeypatch.setattr(sys, "argv", ["abyssal", "study", "balance", "--quick", "--work", str(work), *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and not work.exists()
