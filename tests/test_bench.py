"""`abyssal bench ops`: on a CPU its shapes are tiny, and every path but the timing of graphs is the same."""

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from abyssal import cli
from abyssal.bench import cases_attention, cases_decode, cases_experts, run
from abyssal.bench.case import Calls, Case, NotInstalled, Prepared, relative_error, run_case
from abyssal.bench.measure import Ceilings, Clock, rotations
from abyssal.bench.run import bench_ops
from abyssal.bench.table import duration, notes

CPU = torch.device("cpu")
CEILINGS = Ceilings(bandwidth=1e9, wide=1e10, fp8=None)


def case(prepare: object, **more: object) -> Case:
    return Case("decode", "an operation", "1x1", 10.0, 4.0, prepare, limit=1e-3, **more)  # type: ignore[arg-type]


def calls(value: float) -> Calls:
    return [lambda: torch.full((2,), value)]


def broken() -> Calls:
    raise RuntimeError("no kernel\nand more")


def absent() -> Calls:
    raise NotInstalled("nowhere")


def prepared(ours: object = None, **peers: object) -> object:
    def check(output: object) -> float:
        return relative_error(output, torch.ones(2))  # type: ignore[arg-type]

    return lambda device: Prepared(ours or partial(calls, 1.0), peers, check)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What one whole run on the CPU printed and wrote."""
    folder = tmp_path_factory.mktemp("bench")
    files = ["--json", str(folder / "b.json"), "--picture", str(folder / "b.png")]
    result = CliRunner().invoke(cli.app, ["bench", "ops", "--device", "cpu", "--quick", *files])
    assert result.exit_code == 0, result.output
    assert (folder / "b.png").stat().st_size > 10_000
    return {"said": result.output, **json.loads((folder / "b.json").read_text())}


def test_every_operation_has_a_row_that_passed(report: dict[str, object]) -> None:
    rows = report["rows"]
    assert isinstance(rows, list)
    assert {row["group"] for row in rows} == set(run.GROUPS)
    for row in rows:
        assert row["ours"]["failure"] == "" and row["ours"]["seconds"] > 0, row
        assert row["ours"]["error"] < 5e-2 and row["share_of_roof"] > 0 and row["bytes"] > 0
        if row["best_peer"] is not None:
            theirs = row["peers"][row["best_peer"]]["seconds"]
            assert row["ratio"] == pytest.approx(row["ours"]["seconds"] / theirs)
            assert row["operation"] in str(report["said"])


def test_a_run_says_where_and_against_what(report: dict[str, object]) -> None:
    assert report["device"] and str(report["date"]).startswith("20")
    versions, ceilings = report["versions"], report["ceilings"]
    assert isinstance(versions, dict) and isinstance(ceilings, dict)
    assert versions["torch"] == torch.__version__ and {"FlashMLA", "FlashInfer", "liger-kernel"} <= set(versions)
    assert ceilings["bandwidth"] > 0 and ceilings["wide"] > 0
    for name, version in versions.items():
        if name in ("FlashMLA", "FlashInfer") and version is None:
            assert f"{name} is not installed" in str(report["said"])


def test_a_peer_that_fails_is_a_remark_and_one_that_is_wrong_is_not_the_best() -> None:
    peers = {"breaks": broken, "wrong": partial(calls, 1.1), "nan": partial(calls, math.nan), "absent": absent}
    row = run_case(case(prepared(None, right=partial(calls, 1.0), **peers)), CPU, Clock(CPU, 1e-4))
    assert not row.ours.failure and row.best == "right" and row.ratio is not None and row.ratio > 0
    assert row.peers["breaks"].failure == "RuntimeError: no kernel ... and more"
    assert "wrong: relative error 0.1" in row.peers["wrong"].failure and row.peers["wrong"].seconds is None
    assert "wrong: relative error nan" in row.peers["nan"].failure
    assert row.peers["absent"].failure == "not installed: nowhere"
    said = notes([row], {"Nobody": None})
    assert said[0] == "Nobody is not installed" and sum("1x1" in line for line in said) == 3


@pytest.mark.parametrize("ours", [broken, partial(calls, 2.0), partial(calls, math.nan)])
def test_our_failure_is_a_row_and_the_exit_code(ours: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    several = [case(prepared(ours, right=partial(calls, 1.0))), case(prepared())]
    monkeypatch.setattr(run, "_cases", lambda cuda: several)
    written = tmp_path / "b.json"
    result = CliRunner().invoke(cli.app, ["bench", "ops", "--device", "cpu", "--json", str(written)])
    assert result.exit_code == 1 and "failed: an operation, 1x1" in result.output
    first, second = json.loads(written.read_text())["rows"]
    assert first["ours"]["failure"] and first["ratio"] is None and first["peers"]["right"]["seconds"] > 0
    assert second["ours"]["seconds"] > 0


def test_an_interrupted_run_shows_and_keeps_what_it_has(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(device: torch.device) -> Prepared:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "_cases", lambda cuda: [case(prepared()), case(stop), case(prepared())])
    with pytest.raises(KeyboardInterrupt):
        bench_ops([], "cpu", json_path=tmp_path / "b.json", picture=tmp_path / "b.png")
    assert len(json.loads((tmp_path / "b.json").read_text())["rows"]) == 1 and (tmp_path / "b.png").is_file()
    assert capsys.readouterr().out.count("1x1") == 1


def test_inputs_that_fail_are_a_row() -> None:
    def no_room(device: torch.device) -> Prepared:
        raise MemoryError("no room")

    row = run_case(case(no_room), CPU, Clock(CPU, 1e-4))
    assert row.ours.failure == "inputs: MemoryError: no room" and row.best is None and row.ratio is None


@pytest.mark.parametrize(("only", "device"), [(["nothing"], "cpu"), ([], "tpu")])
def test_what_is_not_there_is_refused(only: list[str], device: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        bench_ops(only, device)


def test_only_chooses() -> None:
    report = bench_ops(["loss", "gate"], "cpu", console=Console(quiet=True))
    assert {row.case.group for row in report.rows} == {"loss", "gate"} and not report.failed


def test_the_roof_is_the_slower_of_bytes_and_arithmetic() -> None:
    row = run_case(case(prepared()), CPU, Clock(CPU, 1e-4))
    assert row.roof(CEILINGS) == pytest.approx(4e-9)  # 4 bytes at 1 GB/s; 10 FLOP at 10 GFLOP/s take 1 ns
    row.bytes = 0.5
    assert row.roof(CEILINGS) == pytest.approx(1e-9)


def test_the_issue_s_shapes_are_there() -> None:
    decode = [c for c in cases_decode.cases(True) if c.group == "decode"]
    assert len(decode) == 26 and len({c.shape for c in decode}) == 26
    # One sequence of 65536, 16 heads: 2·16·(576 + 512) FLOP and 1152 bytes a token.
    long = next(c for c in decode if c.shape == "H=16 1x65536")
    assert long.flops == 2 * 16 * 1088 * 65536 and long.bytes == 1152 * 65536 + 16 * 1088 * 2
    assert len(cases_attention.cases(True)) == 12
    documents = sum(n * n for n in cases_attention.DOCUMENTS)
    assert abs(cases_attention.LONG**2 / documents - 1) < 1e-3
    assert sum("SonicMoE" in c.note for c in cases_experts.cases(True)) == 4


@pytest.mark.parametrize(("seconds", "said"), [(2.0, "2 s"), (0.00123456, "1.23 ms"), (4.5e-6, "4.5 µs")])
def test_durations(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_rotations_outgrow_the_cache() -> None:
    cuda = torch.device("cuda")
    assert rotations(1 << 30, cuda) == 1 and rotations(1 << 20, cuda) == 96 and rotations(16 << 20, cuda) == 8
