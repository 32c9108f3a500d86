"""`abyssal bench train`: what is counted, what a row says of a failure, and a run on the CPU."""

import json
import math
import random
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from abyssal import cli
from abyssal.bench import train, train_ours, train_peer
from abyssal.bench.train_ours import uneven
from abyssal.bench.train_report import TrainReport
from abyssal.bench.train_rows import DENSE_BF16, Flops, Measured, Row, Shape, alike, attempt, rows_of, timed
from abyssal.costs import inspect
from abyssal.train.config import TrainConfig

REFERENCE = Shape("reference-961m", "cuda", sequence=2048, batch=16, accumulate=32, warm=4, steps=20)
TINY = Shape("tiny", "cpu", sequence=64, batch=2, accumulate=2, warm=1, steps=2)


def report(*rows: Row, shape: Shape = REFERENCE, device: str = "NVIDIA H100 80GB HBM3") -> TrainReport:
    return TrainReport(device, "2026-01-01", {}, shape, Flops.of(shape), 1, list(rows))


def row(name: str, step_ms: float, who: str = "abyssal", tokens: int = 32768, memory: float = 40.0) -> Row:
    return Row(who, name, tokens, 20, step_ms, memory, 10.4)


# ---- arithmetic ---------------------------------------------------------------------------------------------------


def test_the_reference_is_the_shape_of_the_targets() -> None:
    parameters = inspect(REFERENCE.config()).parameters
    assert parameters.total == 960_763_360 and REFERENCE.tokens == 32768
    assert parameters.activated - parameters.embedding == 266_606_048


def test_flops_of_the_reference_are_those_by_hand() -> None:
    attention = 1024 * 16 * 192 + 1024 * (256 + 64) + 256 * 16 * 256 + 16 * 128 * 1024
    experts = 1024 * 32 + (4 + 1) * 3 * 1024 * 512
    block = attention + experts
    multiplied = 16 * attention + 3 * 1024 * 2816 + 15 * experts + 1024 * 32768
    scores = 3 * 2 * 16 * (192 + 128) * 2049 // 2  # a layer: a token sees 1024.5 in the mean
    flops = Flops.of(REFERENCE)
    assert flops.plain == 6 * multiplied + 16 * scores == 2_102_968_320
    # An MTP module: a block with experts, its projection of two states into one, and the head once more.
    assert flops.mtp - flops.plain == 6 * (block + 2 * 1024 * 1024 + 1024 * 32768) + scores


def test_mfu_is_that_of_the_peers_table() -> None:
    """170,000 tokens/s are 36% of an H100, transformers' 138,000 are 29.3% and torchtitan's 112,500 23.9%."""
    for rate, share in ((170_000, 0.36), (138_000, 0.293), (112_500, 0.239)):
        taken = row("base", 32768 / rate * 1e3)
        assert report().mfu(taken) == pytest.approx(share, abs=2e-3)
        assert report().mfu(taken) == pytest.approx(rate * 2_102_968_320 / DENSE_BF16)
    assert report().mfu(row("loader alone", 1.0)) is None and report(shape=TINY).mfu(row("base", 1.0)) is None


@given(st.lists(st.integers(1, 4096), min_size=1, max_size=40))
def test_documents_count_as_equal_sequences_of_as_much_attention(lengths: list[int]) -> None:
    exactly = sum(n * (n + 1) for n in lengths) / sum(lengths) - 1
    assert abs(alike(lengths) - exactly) <= 0.5 + 1e-9 and alike([lengths[0]] * 3) == lengths[0]


def test_nothing_has_no_length() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        alike([])


def test_packed_documents_are_counted_with_less_arithmetic() -> None:
    packed = replace(row("packed", 200.0), context=512)
    found = report(row("base", 200.0), packed)
    by_hand = found.flops.plain - 16 * 3 * 2 * 16 * 320 * (2048 - 512) // 2
    assert found.arithmetic(packed) == by_hand
    assert found.to_dict()["rows"][1]["flops_a_token"] == by_hand


@given(st.integers(0, 1000), st.sampled_from([(2048, 16), (128, 4), (8, 3)]))
def test_uneven_documents_have_exactly_the_tokens_of_even_ones(seed: int, sizes: tuple[int, int]) -> None:
    shape = replace(REFERENCE, sequence=sizes[0], batch=sizes[1])
    lengths = uneven(shape, random.Random(seed))
    assert sum(lengths) == shape.tokens and min(lengths) >= 1 and max(lengths) <= shape.sequence


def test_uneven_documents_are_log_uniform() -> None:
    lengths = uneven(replace(REFERENCE, batch=4000), random.Random(0))
    below = sum(n < math.sqrt(16 * 2048) for n in lengths) / len(lengths)
    assert 0.47 < below < 0.53


# ---- rows ---------------------------------------------------------------------------------------------------------


def test_warm_up_is_not_timed_and_the_last_loss_is_read() -> None:
    asked: list[int] = []

    def step(i: int) -> object:
        asked.append(i)
        return lambda: float(i)

    found = timed(step, 2, 3, "cpu")  # type: ignore[arg-type]
    assert asked == [0, 1, 2, 3, 4] and found.loss == 4.0 and found.memory_gib is not None and found.memory_gib > 0.01


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ImportError("No module named 'torchtitan'"), "not installed: No module named 'torchtitan'"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried\nto allocate"),
            "OutOfMemoryError: CUDA out of memory. Tried",
        ),
    ],
)
def test_what_a_row_fails_of_is_said_by_the_row(
    error: Exception, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(row: Row) -> Measured:
        raise error

    attempt(Row("torchtitan", "compiled"), fail)
    attempt(Row("torchtitan", "eager"), lambda row: Measured(1.0, 2.0, 3.0))
    first, second = rows_of("noise\n" + capsys.readouterr().out)
    assert first.failure == said and first.step_ms is None and first.tokens_per_second is None
    assert second.failure == "" and (second.step_ms, second.memory_gib, second.loss) == (1.0, 2.0, 3.0)


def test_a_process_that_dies_or_hangs_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def runs(code: str) -> list[Row]:
        monkeypatch.setattr(train.Job, "command", lambda job, shape: [train.sys.executable, "-c", code])
        return train._run(train.Job("transformers", "eager"), TINY)

    died = runs("import sys; print('x'); print('why', file=sys.stderr); sys.exit(3)")
    assert [r.failure for r in died] == ["ended with 3: why"] and died[0].name == "eager"
    partly = runs(f"import sys; print('ROW ' + {json.dumps(json.dumps(asdict(row('eager', 1.0))))}); sys.exit(3)")
    assert partly[0].step_ms == 1.0 and partly[1].name == "eager, the rest" and partly[1].failure
    assert runs("pass")[0].failure == "the process said nothing"
    monkeypatch.setattr(train, "LIMIT_S", 0.2)
    assert runs("import time; time.sleep(60)")[0].failure == "took over 0.2 s"


def test_only_chooses_and_refuses_what_there_is_not() -> None:
    assert train.jobs(True, True, False, "titan") == [("torchtitan", "compiled"), ("torchtitan", "eager")]
    assert train.jobs(True, False, False, "mtp, base") == [("abyssal", "base"), ("abyssal", "mtp")]
    assert [job.who for job in train.jobs(False, True, True, None)] == ["abyssal", "transformers"]
    with pytest.raises(ValueError, match="only: expected a part of abyssal base"):
        train.jobs(True, True, False, "megatron")
    assert ("torchtitan", "compiled") not in train.jobs(False, True, False, None)


def test_what_follows_is_against_the_base_row_and_what_is_asked() -> None:
    mtp = 1.02 * Flops.of(REFERENCE).mtp / Flops.of(REFERENCE).plain
    found = report(
        row("base", 180.0), row("mtp", 180.0 * mtp), row("packed", 198.0),
        row("accumulated", 5760.0, tokens=32 * 32768), row("recompute block", 216.0, memory=25.0),
        row("compiled", 240.0, "transformers"),
        row("eager", 400.0, "transformers"), Row("torchtitan", "compiled", failure="not installed"),
    )  # fmt: skip
    claims = {claim.what.split(",")[0]: claim for claim in found.claims()}
    assert claims["tokens/s"].met and claims["tokens/s"].found == "182,044" and claims["peak memory"].met
    assert claims["times transformers"].found == "1.33" and "times torchtitan" not in claims
    beyond = next(claim for name, claim in claims.items() if name.startswith("MTP"))
    assert beyond.found == "+2.0%" and beyond.met
    assert claims["a token in packed documents"].found == "+10.0%" and not claims["a token in packed documents"].met
    assert claims["a token in a step of 1"].found == "+0.0%" and claims["a token in a step of 1"].met
    assert claims["a token with recompute block"].met is None
    assert "saves 15.0 GiB" in claims["a token with recompute block"].what


def test_nothing_is_asked_of_another_device_or_shape() -> None:
    rows = row("base", 180.0), row("packed", 300.0)
    for found in (report(*rows, device="a laptop"), report(*rows, shape=replace(REFERENCE, model="tiny"))):
        assert [claim.met for claim in found.claims()] == [None]


# ---- the workers, and the whole -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> Shape:
    """With a token set and a run's settings on disk."""
    folder = tmp_path_factory.mktemp("bench")
    shape = replace(TINY, run=str(folder / "run.json"))
    train._corpus(folder, shape)
    return shape


def test_every_variant_is_one_that_the_trainer_takes(shape: Shape) -> None:
    for variant in train_ours.variants():
        if variant != "fp8":  # it needs a GPU
            trainer = train_ours.build(shape, variant)
            assert len(trainer.model.mtp) == (variant == "mtp")
            assert trainer.config.accumulate == (2 if variant == "accumulated" else 1)
            assert trainer.config.recompute == (variant.split()[1] if variant.startswith("recompute") else "none")


def test_our_rows_are_timed_steps_of_a_model_that_trains(shape: Shape, capsys: pytest.CaptureFixture[str]) -> None:
    train_ours.run(shape, "base")
    train_ours.run(shape, "accumulated")
    rows = rows_of(capsys.readouterr().out)
    assert [r.name for r in rows] == [
        "base", "packed", "documents in memory", "documents from disk", "loader alone", "accumulated",
    ]  # fmt: skip
    for r in rows:
        assert not r.failure and r.step_ms and r.tokens == shape.tokens * (2 if r.name == "accumulated" else 1)
        if r.name != "loader alone":
            assert r.loss is not None and 0 < r.loss < 1.5 * math.log(512)
    assert 0 < rows[1].context < shape.sequence and rows[0].context == 0


def test_transformers_row_is_of_the_same_model(shape: Shape) -> None:
    pytest.importorskip("transformers")
    found = train_peer.run(shape, "transformers", "eager")
    assert not found.failure and found.step_ms and found.tokens == shape.tokens
    assert found.loss is not None and abs(found.loss - math.log(512)) < 0.5  # of random tokens


def test_torchtitan_on_a_cpu_says_why_not(shape: Shape) -> None:
    assert "GPU" in train_peer.run(shape, "torchtitan", "compiled").failure


def test_settings_reach_the_trainer(shape: Shape) -> None:
    trainer = train_ours.build(replace(shape, settings=("optimizer=muon",)), "base")
    assert trainer.config.optimizer == "muon" and isinstance(trainer.config, TrainConfig)
    same = Shape.parse(json.dumps(asdict(replace(shape, settings=("clip=2.0",)))))
    assert same == replace(shape, settings=("clip=2.0",))


@pytest.mark.slow
def test_a_run_on_the_cpu_prints_writes_and_draws(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    files = ["--json", str(tmp_path / "t.json"), "--picture", str(tmp_path / "t.png")]
    run = partial(CliRunner().invoke, cli.app)
    result = run(["bench", "train", "tiny", "--device", "cpu", "--quick", "--steps", "2", *files])
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "t.json").read_text())
    assert {"device", "date", "versions", "shape", "flops_a_token", "rows", "claims", "parameters"} <= set(written)
    assert [r["who"] for r in written["rows"]] == ["abyssal"] * 5 + ["transformers"]
    assert all(r["tokens_per_second"] > 0 and r["mfu"] is None and not r["failure"] for r in written["rows"])
    assert written["shape"]["steps"] == 2 and written["versions"]["transformers"]
    assert "times transformers" in result.output and (tmp_path / "t.png").stat().st_size > 10_000


def test_a_model_that_there_is_not_is_refused() -> None:
    result = CliRunner().invoke(cli.app, ["bench", "train", "nowhere", "--device", "cpu"])
    assert isinstance(result.exception, FileNotFoundError) and "nowhere" in str(result.exception)
