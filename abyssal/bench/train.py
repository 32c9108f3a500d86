"""`abyssal bench train`: steps of our Trainer, and of transformers and torchtitan at the same shape, in one run."""

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from abyssal.bench import train_ours, train_peer
from abyssal.bench.machine import device_name, versions
from abyssal.bench.train_report import PEERS, REFERENCE, TrainReport
from abyssal.bench.train_rows import Flops, Row, Shape, keep, reason, rows_of
from abyssal.config import ModelConfig
from abyssal.data import Tokenizer, prepare
from abyssal.data.sources import documents

LIMIT_S = 420  # of a process


class Job(NamedTuple):
    """A process, and the row that stands for it should it say none."""

    who: str
    name: str

    def command(self, shape: Shape) -> list[str]:
        own = ["abyssal.bench.train_ours"] if self.who == "abyssal" else ["abyssal.bench.train_peer", self.who]
        return [sys.executable, "-m", *own, self.name, json.dumps(asdict(shape))]


def bench_train(
    model: str | None = None,
    device: str | None = None,
    batch: int | None = None,
    sequence: int | None = None,
    steps: int | None = None,
    only: str | None = None,
    peers: bool = True,
    quick: bool = False,
    settings: tuple[str, ...] = (),
    json_path: Path | None = None,
    picture: Path | None = None,
    console: Console | None = None,
) -> TrainReport:
    """`model` is a preset or a folder; `only` names rows or peers, with commas; `quick` leaves all but one row of ours
    and one of transformers out; `settings` are KEY=VALUE of TrainConfig for our rows.

    Raises ValueError if `only` names nothing or there is no such device; FileNotFoundError, ConfigError for the model.
    """
    console = console or Console(stderr=True)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    gpu = device.startswith("cuda")
    if gpu and not torch.cuda.is_available():
        raise ValueError("device: cuda is not available")
    chosen = jobs(gpu, peers, quick, only)
    with tempfile.TemporaryDirectory(prefix="abyssal-bench-") as made:
        folder = Path(made)
        shape = Shape(
            model=model or (REFERENCE if gpu else "tiny"), device=device, sequence=sequence or (2048 if gpu else 128),
            batch=batch or (16 if gpu else 4), accumulate=32 if gpu else 4, warm=4 if gpu else 2,
            steps=steps or (20 if gpu else 10), run=str(folder / "run.json"), settings=settings,
        )  # fmt: skip
        found = versions(gpu) | {peer: train_peer.version(peer) for peer in train_peer.MODES}
        today = datetime.now(UTC).strftime("%Y-%m-%d")
        named = device_name(device)
        report = TrainReport(named, today, found, shape, Flops.of(shape), _parameters(shape.config()))
        if any(job.who == "abyssal" for job in chosen):
            console.print("making tokens of Python's standard library", style="dim")
            _corpus(folder, shape)
        try:
            for job in chosen:
                console.print(f"{job.who}, {job.name}", style="dim", highlight=False)
                for row in _run(job, shape):
                    report.rows.append(row)
                    console.print(f"  {line(row)}", style="dim", highlight=False, markup=False, soft_wrap=True)
                report.rows.sort(key=lambda row: ("abyssal", *PEERS).index(row.who))
                keep(json_path, report.to_dict())
        finally:  # an interrupted run still shows what it has
            Console(width=None if sys.stdout.isatty() else 150).print(render(report))
            if picture is not None and report.rows:
                from abyssal.bench.train_picture import draw

                draw(report, picture)
    return report


def jobs(gpu: bool, peers: bool, quick: bool, only: str | None) -> list[Job]:
    """What there is to run. Raises ValueError if `only` chooses none."""
    ours = ["base"] if quick else train_ours.variants()
    modes = train_peer.QUICK if quick else train_peer.MODES if gpu else train_peer.CPU
    every = [Job("abyssal", name) for name in ours]
    every += [Job(peer, mode) for peer, names in modes.items() for mode in names if peers]
    every.sort(key=lambda job: job.name.startswith("recompute"))  # last, lest a run that is cut short lack a peer
    words = [word.strip() for word in (only or "").split(",") if word.strip()]
    chosen = [job for job in every if not words or any(word in f"{job.who} {job.name}" for word in words)]
    if not chosen:
        raise ValueError(f"only: expected a part of {', '.join(f'{who} {name}' for who, name in every)}, got {only!r}")
    return chosen


def _run(job: Job, shape: Shape) -> list[Row]:
    """A job's rows; one that failed where the process said none."""
    try:
        done = subprocess.run(job.command(shape), capture_output=True, text=True, timeout=LIMIT_S, check=False)
        output, why = done.stdout, f"ended with {done.returncode}: {_last(done.stderr)}" if done.returncode else ""
    except subprocess.TimeoutExpired as error:
        said: Any = error.stdout or b""
        output, why = said if isinstance(said, str) else said.decode(errors="replace"), f"took over {LIMIT_S} s"
    rows = rows_of(output)
    if why or not rows:
        name = f"{job.name}, the rest" if rows else job.name
        rows.append(Row(job.who, name, failure=why or "the process said nothing"))
    return rows


def _last(text: str) -> str:
    """The last line of an error's traceback, which says what it was."""
    return reason("\n".join(text.strip().splitlines()[-1:]))


def _corpus(folder: Path, shape: Shape) -> None:
    """A token set on disk, and the settings of a run on it. What the tokens say does not matter to a loader."""
    most = 8_000_000 if shape.device.startswith("cuda") else 400_000
    texts, total = [], 0
    for document in documents(None, lambda name, why: None):
        texts.append(document.text)
        total += len(document.text)
        if total > most / 16:
            break
    size = min(1024, shape.config().vocab_size)
    prepare(None, Tokenizer.train(texts, size), folder / "tokens", max_bytes=most, progress=False)
    run = {
        "model": shape.model, "data": str(folder / "tokens"), "out": str(folder / "out"), "steps": 10_000,
        "batch_tokens": shape.tokens, "sequence": shape.sequence, "lr": 1e-4, "decay_fraction": 0.0,
        "device": shape.device,
    }  # fmt: skip
    Path(shape.run).write_text(json.dumps(run))


def _parameters(config: ModelConfig) -> int:
    from abyssal.costs import inspect

    return inspect(config).parameters.total


# ---- for people ---------------------------------------------------------------------------------------------------


def line(row: Row) -> str:
    """A row in a line, for a log."""
    if not row.step_ms:
        return f"{row.who}, {row.name}: {row.failure}"
    memory = f", {row.memory_gib:.1f} GiB" if row.memory_gib else ""
    loss = f", loss {row.loss:.3f}" if row.loss is not None else ""
    return f"{row.name}: {row.tokens_per_second:,.0f} tokens/s, {row.step_ms:.1f} ms{memory}{loss}"


def render(report: TrainReport) -> Group:
    """The rows, what follows from them, and what failed."""
    s = report.shape
    title = (
        f"{s.model}, {report.parameters / 1e6:,.1f}M parameters, {s.batch} × {s.sequence} tokens, on {report.device}"
    )
    rows = Table(title=f"{title}, {report.date}", title_justify="left", title_style="bold")
    for name in ("", "tokens/s", "abyssal is ×", "step ms", "MFU", "GiB", ""):
        rows.add_column(name, justify="right" if name else "left", overflow="fold")
    base, before = report.row("base"), ""
    for row in report.rows:
        if row.who != before:
            rows.add_section()
            before = row.who
        rate, mfu = row.tokens_per_second, report.mfu(row)
        ours = base.tokens_per_second if base is not None and row.who != "abyssal" else None
        rows.add_row(
            f"{row.who} {row.name}",
            f"{rate:,.0f}" if rate else Text("failed", "red"),
            f"{ours / rate:.2f}" if ours and rate else "",
            f"{row.step_ms:,.1f}" if row.step_ms else "",
            f"{mfu:.1%}" if mfu else "",
            f"{row.memory_gib:.1f}" if row.memory_gib else "",
            Text(row.failure or row.note, "red" if row.failure else "dim"),
        )
    claims = Table(title="What follows", title_justify="left", title_style="bold")
    for name in ("", "found", "asked", ""):
        claims.add_column(name, justify="left" if not name else "right")
    for what, found, asked, met in report.claims():
        claims.add_row(
            what, found, asked, "" if met is None else Text("met", "green") if met else Text("missed", "red")
        )
    said = f"{report.flops.plain / 1e9:.4g} GFLOP a token, {report.flops.mtp / 1e9:.4g} with MTP. " + ", ".join(
        f"{name} {found or 'not installed'}"
        for name, found in report.versions.items()
        if found or name in train_peer.MODES
    )
    return Group(rows, claims, Text(said, "dim"))
