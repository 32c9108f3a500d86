"""What the training benchmark times: a shape, rows, FLOPs a token; and how a step is timed, ours and a peer's alike.

A worker is a process of its own that says its rows, one a line, on its standard output. So a failure, or memory that
does not suffice, is that row's alone, and its peak of memory as well.
"""

import json
import resource
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from abyssal.config import ModelConfig
from abyssal.costs import inspect

Later = Callable[[], float]  # a step's loss, once it is asked for

MARK = "ROW "
DENSE_BF16 = 989e12  # FLOP a second of a dense product on an H100 or H200, as their maker says


@dataclass(frozen=True)
class Shape:
    """What is trained, and how often."""

    model: str  # a preset's name, or a folder
    device: str
    sequence: int  # tokens of a sequence
    batch: int  # sequences of a microbatch
    accumulate: int  # microbatches of a step of the row that accumulates
    warm: int  # steps before the timed ones
    steps: int  # that are timed
    run: str = ""  # a file for `TrainConfig.read`
    settings: tuple[str, ...] = ()  # KEY=VALUE over it, for all of our rows

    @property
    def tokens(self) -> int:
        """Of a microbatch."""
        return self.sequence * self.batch

    def config(self, modules: int = 0) -> ModelConfig:
        """The model with so many MTP modules."""
        return ModelConfig.load(self.model).replace(num_nextn_predict_layers=modules)

    @staticmethod
    def parse(text: str) -> "Shape":
        plain = json.loads(text)
        return Shape(**{**plain, "settings": tuple(plain["settings"])})


@dataclass
class Row:
    """One way of training, timed or failed."""

    who: str  # abyssal, transformers, torchtitan
    name: str
    tokens: int = 0  # a step
    steps: int = 0  # that were timed
    step_ms: float | None = None  # the median
    memory_gib: float | None = None  # at its peak: allocated on the GPU; resident on a CPU
    loss: float | None = None  # of the last step, nats a token; on random tokens about ln(vocabulary)
    context: int = 0  # tokens of equal sequences that would cost as much attention; 0: the shape's
    failure: str = ""
    note: str = ""

    @property
    def tokens_per_second(self) -> float | None:
        return self.tokens / self.step_ms * 1e3 if self.step_ms else None

    def say(self) -> None:
        """To the process that started this one."""
        print(MARK + json.dumps(asdict(self)), flush=True)


class Flops(NamedTuple):
    """FLOPs a token, forward and backward, without the MTP modules and with one."""

    plain: int
    mtp: int

    @staticmethod
    def of(shape: Shape) -> "Flops":
        """6·P + 3·2·H·(N + R + V)·(L + 1)/2 a layer: P the parameters that multiply a token, the K chosen experts'
        and the head's among them, and not the embedding's, which are looked up; L the sequence's tokens, which see
        (L + 1)/2 of each other in the mean. It is `abyssal.costs`' count.
        """
        return Flops.at(shape, shape.sequence)

    @staticmethod
    def at(shape: Shape, context: int) -> "Flops":
        """Of sequences of `context` tokens."""
        one = inspect(shape.config(1), context).flops
        return Flops(one.training, one.training + one.training_mtp)


def alike(lengths: Iterable[int]) -> int:
    """The length L of equal sequences whose attention costs a token what these sequences' does: Σ n(n + 1) / Σ n is
    L + 1. Raises ValueError if there are none."""
    squares = total = 0
    for n in lengths:
        squares, total = squares + n * n, total + n
    if not total:
        raise ValueError("lengths: expected at least one token")
    return round(squares / total)


class Measured(NamedTuple):
    """Of the timed steps."""

    step_ms: float
    memory_gib: float | None  # None where it is nobody's, as the loader's
    loss: float | None


def timed(step: Callable[[int], Later], warm: int, steps: int, device: str) -> Measured:
    """`step(i)` for i from 0, `warm` times and then `steps` times.

    On a GPU the times are between events, so a step that leaves the host behind it is not waited for.
    """
    loss: Later = lambda: 0.0  # noqa: E731
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.reset_peak_memory_stats()  # before passes are captured: a replay allocates nothing
    for i in range(warm):
        loss = step(i)
    loss()
    marks = [_mark(cuda)]
    for i in range(warm, warm + steps):
        loss = step(i)
        marks.append(_mark(cuda))
    last = loss()
    took = median(a.elapsed_time(b) if cuda else (b - a) * 1e3 for a, b in zip(marks, marks[1:]))
    return Measured(took, _peak(cuda) / 2**30, last)


def _mark(cuda: bool) -> Any:
    """Now: an event in the GPU's stream, or seconds."""
    if not cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _peak(cuda: bool) -> int:
    """Bytes."""
    if cuda:
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def attempt(row: Row, measure: Callable[[Row], Measured]) -> Row:
    """Fills in the row, or says why not, and says it."""
    try:
        found = measure(row)
        row.step_ms, row.memory_gib, row.loss = found
    except ImportError as error:
        row.failure = f"not installed: {error}"
    except Exception as error:  # whatever a peer throws is its row's
        row.failure = reason(f"{type(error).__name__}: {error}")
    row.say()
    return row


def reason(text: str) -> str:
    """The first line of an error, of a length for a table."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0][:200] if lines else "no reason given"


def rows_of(output: str) -> list[Row]:
    """What a worker said."""
    return [Row(**json.loads(line[len(MARK) :])) for line in output.splitlines() if line.startswith(MARK)]


def keep(path: Path | None, plain: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(plain, indent=1) + "\n")
