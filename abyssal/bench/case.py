"""What a benchmark case is, and how one is run: check first, then time, and lose nothing to a failure."""

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from abyssal.bench.measure import Ceilings, Clock

Output = Tensor | Sequence[Tensor]
Call = Callable[[], Output]
Calls = Sequence[Call]  # one a rotated set of inputs


class NotInstalled(Exception):
    """A peer whose package is not there."""


@dataclass
class Prepared:
    """A case's inputs, in the shape of calls upon them."""

    ours: Callable[[], Calls]
    peers: dict[str, Callable[[], Calls]]
    check: Callable[[Output], float]  # relative error of an output of the first call
    bytes: float | None = None  # where it depends on the data drawn, as in routing


@dataclass
class Case:
    """One row of the table. `bytes` and `flops` are the least that must be moved and computed, counted once."""

    group: str  # what --only names
    op: str
    shape: str
    flops: float
    bytes: float
    prepare: Callable[[torch.device], Prepared]
    limit: float  # largest relative error that passes
    small: bool = False  # timed within one CUDA graph over rotated inputs; else call by call with the L2 cleared
    rate: str = "wide"  # whose ceiling it has: "wide" (bf16) or "fp8"
    quick: bool = False  # also part of --quick
    note: str = ""


@dataclass
class Timing:
    seconds: float | None = None
    error: float | None = None
    failure: str = ""


@dataclass
class Row:
    case: Case
    bytes: float
    ours: Timing
    peers: dict[str, Timing] = field(default_factory=dict)
    wall: float = 0.0  # what the case took, compiling and checking included

    @property
    def best(self) -> str | None:
        """The fastest peer whose output passed."""
        timed = {name: t.seconds for name, t in self.peers.items() if t.seconds is not None}
        return min(timed, key=lambda name: timed[name]) if timed else None

    @property
    def ratio(self) -> float | None:
        """Our time over the best peer's: below 1 we are faster."""
        theirs = self.peers[self.best].seconds if self.best is not None else None
        return self.ours.seconds / theirs if self.ours.seconds and theirs else None

    def roof(self, ceilings: Ceilings) -> float:
        """The least seconds the device could take."""
        return max(self.bytes / ceilings.bandwidth, self.case.flops / ceilings.rate(self.case.rate))

    def to_dict(self, ceilings: Ceilings) -> dict[str, Any]:
        """Plain numbers for JSON, times in seconds."""
        roof = self.roof(ceilings)
        return {
            "group": self.case.group,
            "operation": self.case.op,
            "shape": self.case.shape,
            "bytes": self.bytes,
            "flops": self.case.flops,
            "roof_seconds": roof,
            "ours": vars(self.ours),
            "share_of_roof": roof / self.ours.seconds if self.ours.seconds else None,
            "peers": {name: vars(t) for name, t in self.peers.items()},
            "best_peer": self.best,
            "ratio": self.ratio,
            "note": self.case.note,
            "wall_seconds": self.wall,
        }


def run_case(case: Case, device: torch.device, clock: Clock, compile_peers: bool = True) -> Row:
    """Prepares, checks and times one case. Whatever fails is said in the row; nothing is raised but interrupts.

    Without `compile_peers` those that torch.compile makes, at ten seconds each, are left out.
    """
    start = time.perf_counter()
    try:
        prepared = case.prepare(device)
    except Exception as error:
        _free(device)
        return Row(case, case.bytes, Timing(failure=f"inputs: {_said(error)}"))
    row = Row(case, prepared.bytes if prepared.bytes is not None else case.bytes, Timing())
    row.ours = _timed(prepared.ours, prepared.check, case, clock)
    for name, make in prepared.peers.items():
        if name.endswith("compiled") and not compile_peers:
            continue
        row.peers[name] = _timed(make, prepared.check, case, clock)
    del prepared
    _free(device)
    row.wall = time.perf_counter() - start
    return row


def relative_error(output: Output, reference: Output) -> float:
    """The largest ‖out − ref‖ / ‖ref‖ of the tensors, in float32; NaN where either holds one."""
    outs = [output] if isinstance(output, Tensor) else list(output)
    refs = [reference] if isinstance(reference, Tensor) else list(reference)
    worst = 0.0
    for out, ref in zip(outs, refs, strict=True):
        wide = ref.float()
        norm = torch.linalg.vector_norm(wide)
        error = (torch.linalg.vector_norm(out.reshape(wide.shape).float() - wide) / norm.clamp(min=1e-30)).item()
        worst = error if math.isnan(error) else max(worst, error)
        if math.isnan(worst):
            break
    return worst


def _timed(make: Callable[[], Calls], check: Callable[[Output], float], case: Case, clock: Clock) -> Timing:
    timing = Timing()
    try:
        calls = make()
        timing.error = check(calls[0]())
        if not timing.error <= case.limit:  # NaN too
            raise ValueError(f"wrong: relative error {timing.error:.2g}, at most {case.limit:.2g} expected")
        timing.seconds = clock.graph(calls) if case.small else clock.call_by_call(calls)
    except NotInstalled as error:
        timing.failure = f"not installed: {error}"
    except Exception as error:
        timing.failure = _said(error)
        torch._dynamo.reset()
    return timing


def _said(error: Exception) -> str:
    """Its kind, and the first and the last line of what it says: compilers put the place first and the cause last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: " + " ... ".join(line[:160] for line in dict.fromkeys(lines[:1] + lines[-1:]))


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
