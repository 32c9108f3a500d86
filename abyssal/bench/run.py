"""`abyssal bench ops`: gathers the cases, runs them under a progress bar, and reports."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from abyssal.bench import (
    cases_attention,
    cases_between,
    cases_decode,
    cases_experts,
    cases_fp8,
    cases_sample,
    peers,
    table,
)
from abyssal.bench.case import Case, Row, run_case
from abyssal.bench.machine import device_name, versions
from abyssal.bench.measure import Ceilings, Clock, ceilings

GROUPS = (
    "decode", "decode-fp8", "attention", "packing", "experts", "experts-decode", "gate", "write", "loss", "fp8",
    "sample",
)  # fmt: skip


@dataclass
class Report:
    """A run: what it ran on, its ceilings, its rows."""

    device: str
    date: str
    versions: dict[str, str | None]
    ceilings: Ceilings
    rows: list[Row]

    @property
    def failed(self) -> int:
        """How many of our own cases failed."""
        return sum(bool(row.ours.failure) for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON; times in seconds."""
        return {
            "device": self.device,
            "date": self.date,
            "versions": self.versions,
            "ceilings": vars(self.ceilings),
            "rows": [row.to_dict(self.ceilings) for row in self.rows],
        }


def bench_ops(
    only: Sequence[str] = (),
    device: str | None = None,
    quick: bool = False,
    json_path: Path | None = None,
    picture: Path | None = None,
    console: Console | None = None,
) -> Report:
    """Runs the cases of the groups in `only` (all of them where empty) and prints the table.

    `quick`: a few shapes of each operation, timed briefly, without the peers that torch.compile makes.
    `device` is "cuda" or "cpu", None: cuda where there is one. On a CPU the shapes are tiny: its figures say that the
    paths work, no more. What is written is written after every case, so that an interruption loses nothing.
    Raises ValueError for an unknown group or device.
    """
    unknown = [name for name in only if name not in GROUPS]
    if unknown:
        raise ValueError(f"only: expected some of {', '.join(GROUPS)}, got {', '.join(unknown)}")
    if device not in (None, "cpu", "cuda"):
        raise ValueError(f"device: expected cuda or cpu, got {device!r}")
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    cuda = place.type == "cuda"
    if cuda and not torch.cuda.is_available():
        raise ValueError("device: cuda is not available")
    # Into a file or a pipe, 80 columns would fold every cell.
    console = console or (Console() if sys.stdout.isatty() else Console(width=132))
    chosen = [c for c in _cases(cuda) if (not only or c.group in only) and (c.quick or not quick or not cuda)]
    clock = Clock(place, budget=(0.03 if quick else 0.1) if cuda else 0.01)
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        console=Console(stderr=True), transient=True,
    )  # fmt: skip
    with bar:
        task = bar.add_task("measuring the ceilings", total=len(chosen))
        found = ceilings(clock)
        named = device_name(place)
        report = Report(
            named, datetime.now(UTC).isoformat(timespec="seconds"), versions(cuda) | peers.versions(), found, []
        )
        try:
            for case in chosen:
                bar.update(task, description=f"{case.op}, {case.shape}")
                report.rows.append(run_case(case, place, clock, compile_peers=not quick))
                bar.advance(task)
                if not bar.console.is_terminal:
                    bar.console.print(table.line(report.rows[-1]), highlight=False, markup=False, soft_wrap=True)
                if json_path is not None:
                    json_path.write_text(json.dumps(report.to_dict(), indent=1) + "\n")
        finally:  # an interrupted run still shows what it has
            console.print(table.render(report.rows, found, peers.versions(), named))
            if picture is not None:
                from abyssal.bench.picture import draw

                draw(report.rows, found, named, picture)
    return report


def _cases(cuda: bool) -> list[Case]:
    rooms = (cases_decode, cases_attention, cases_experts, cases_between, cases_fp8, cases_sample)
    return [case for room in rooms for case in room.cases(cuda)]
