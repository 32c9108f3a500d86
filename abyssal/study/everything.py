"""`abyssal study all`: every study in order, each saved as its own command saves it, and one page of all of them.

What a folder has already, made with the same settings by the same code, is taken and not made again. A study that
fails is told and named at the end; the others go on.
"""

import dataclasses
import hashlib
import json
import os
import platform
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from abyssal.files import write_file
from abyssal.source import code_digest
from abyssal.study.attention import Settings as AttentionSettings
from abyssal.study.attention import study_attention
from abyssal.study.balance import Settings as BalanceSettings
from abyssal.study.balance import study_balance
from abyssal.study.cache import QUICK_MODELS, QUICK_TOKENS, study_cache
from abyssal.study.cache import Settings as CacheSettings
from abyssal.study.experts import Settings as ExpertsSettings
from abyssal.study.experts import study_experts
from abyssal.study.output import load, save
from abyssal.study.page import duration, page
from abyssal.study.positions import Settings as PositionsSettings
from abyssal.study.positions import study_positions
from abyssal.study.prediction import Settings as PredictionSettings
from abyssal.study.prediction import study_prediction
from abyssal.study.result import Result

TITLE = "DeepSeek-V3's claims, made again in small"
INDEX, RECORD = "index.html", "studies.json"
KNOWN = 0.1  # of all the work that has to be done before the time left is told

Run = Callable[[Path, str, Console], Result]
"""The folder that keeps what it trains, the command that makes it alone, and where it tells of itself."""


@dataclass(frozen=True)
class Study:
    """One of them, ready to run."""

    name: str  # the verb's
    settings: Any  # a frozen dataclass: others make it another study
    run: Run
    work: float = 1.0  # seconds of a core that its default says it takes: only their ratios are used

    def made_by(self) -> dict[str, Any]:
        """What a result hangs on, as JSON has it."""
        settings = json.loads(json.dumps(dataclasses.asdict(self.settings), default=str))
        versions = {"torch": str(torch.__version__), "python": platform.python_version()}
        return {"settings": settings, "code": code_digest(), **versions}


def studies(quick: bool) -> list[Study]:
    """All of them, in their order, at the default size or the smallest."""
    cache = CacheSettings(models=QUICK_MODELS, tokens=QUICK_TOKENS) if quick else CacheSettings()
    attention = AttentionSettings.quick() if quick else AttentionSettings()
    positions = PositionsSettings.quick() if quick else PositionsSettings()
    experts = ExpertsSettings.quick() if quick else ExpertsSettings()
    balance = BalanceSettings.quick() if quick else BalanceSettings()
    prediction = PredictionSettings.quick() if quick else PredictionSettings()
    return [
        Study("cache", cache, lambda folder, command, console: study_cache(cache, command), 10),
        Study("attention", attention, lambda *to: study_attention(attention, *to), 590),
        Study("positions", positions, lambda *to: study_positions(positions, *to), 470),
        Study("experts", experts, lambda *to: study_experts(experts, *to), 450),
        Study("balance", balance, lambda *to: study_balance(balance, *to), 570),
        Study("prediction", prediction, lambda *to: study_prediction(prediction, *to), 360),
    ]


def chosen(every: Sequence[Study], only: str | None) -> list[Study]:
    """Those named, with commas between them, in their own order. Raises ValueError naming the option."""
    if only is None:
        return list(every)
    names = [name.strip() for name in only.split(",")]
    known = [study.name for study in every]
    for name in names:
        if name not in known:
            raise ValueError(f"--only: expected some of {', '.join(known)}, with commas between them, got {name!r}")
    return [study for study in every if study.name in names]


def run_all(
    every: Sequence[Study], wanted: Sequence[Study], out: Path, work: Path, quick: bool, console: Console
) -> dict[str, str]:
    """Runs those wanted that `out` lacks, saves each, and writes the page of all that `out` then has. Returns why some
    failed, by name."""
    out.mkdir(parents=True, exist_ok=True)
    failed: dict[str, str] = {}
    progress = _Progress([study.work for study in wanted if kept(out, study) is None])
    for number, study in enumerate(wanted, 1):
        title = f"study {number} of {len(wanted)}, {study.name}"
        if kept(out, study) is not None:
            _tell(console, f"{title}: is in {out} already, made with the same settings by the same code")
            continue
        other = ", in place of one of other settings or other code" if (out / f"{study.name}.json").exists() else ""
        _tell(console, f"{title}{other}{progress.left()}")
        began = time.perf_counter()
        try:
            result = study.run(work / f"study-{study.name}", alone(study, quick), console)
            save(result, out)
            seconds = time.perf_counter() - began
            _note(out, study, seconds)
            _tell(console, f"{title}: {duration(seconds)}")
        except KeyboardInterrupt:
            write_index(every, out, failed, console)
            there = sum(kept(out, own) is not None for own in wanted)
            _tell(console, f"{there} of {len(wanted)} studies are kept in {out}: the same command goes on")
            raise
        except Exception as error:  # that study's alone: the others are as good as before
            failed[study.name] = f"{type(error).__name__}: {error}"
            if os.environ.get("ABYSSAL_TRACEBACK"):
                traceback.print_exc()
            _tell(console, f"{title}: FAILED: {failed[study.name]}", "red")
        progress.done(study.work)
    write_index(every, out, failed, console)
    _tell(console, f"all: {progress.spent()}")
    return failed


def alone(study: Study, quick: bool) -> str:
    """The command that makes one of them by itself."""
    return f"abyssal study {study.name}{' --quick' if quick else ''}"


def write_index(every: Sequence[Study], out: Path, failed: Mapping[str, str], console: Console) -> Path:
    """One page of all the studies that the folder has, made with these settings by this code. Tells which others it
    has: they are left off the page."""
    found = {study.name: kept(out, study) for study in every if study.name not in failed}
    others = [name for name, result in found.items() if result is None and (out / f"{name}.json").exists()]
    if others:
        told = f"left off the page: {', '.join(others)}, which {out} has of other settings or other code"
        _tell(console, told, "yellow")
    results = [result for result in found.values() if result is not None]
    write_file(out / INDEX, page(results, TITLE, failed).encode())
    return out / INDEX


# ---- what a folder has ----------------------------------------------------------------------------------------------


def kept(out: Path, study: Study) -> Result | None:
    """What the folder has of a study: made with these settings by this code, whole, and not changed since."""
    record = _records(out).get(study.name)
    if record is None or record["made_by"] != study.made_by():
        return None
    try:
        return load(out, study.name) if _digest(out / f"{study.name}.json") == record["sha256"] else None
    except FileNotFoundError:
        return None


def _note(out: Path, study: Study, seconds: float) -> None:
    """`seconds`: what the command took for it. A result has what it takes where nothing is trained yet."""
    made = {"made_by": study.made_by(), "sha256": _digest(out / f"{study.name}.json"), "seconds": seconds}
    records = {**_records(out), study.name: made}
    write_file(out / RECORD, (json.dumps(records, indent=1) + "\n").encode())


def _records(out: Path) -> dict[str, Any]:
    path = out / RECORD
    try:
        found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path}: malformed: {error}") from None
    return found


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ---- telling --------------------------------------------------------------------------------------------------------


class _Progress:
    """How long it may still take: as the work that is done went."""

    def __init__(self, works: Sequence[float]) -> None:
        self.total, self.made, self.began = sum(works), 0.0, time.perf_counter()

    def done(self, work: float) -> None:
        self.made += work

    def spent(self) -> str:
        return duration(time.perf_counter() - self.began)

    def left(self) -> str:
        if self.made < KNOWN * self.total or not self.made:
            return "; the time left is not known yet"
        seconds = (time.perf_counter() - self.began) / self.made * (self.total - self.made)
        return f"; about {duration(seconds)} left for all"


def _tell(console: Console, text: str, style: str = "bold") -> None:
    console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)
