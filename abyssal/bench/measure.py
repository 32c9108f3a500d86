"""Time, and the two ceilings that times are held against."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

L2_BYTES = 128 << 20  # more than any cache that would serve a repeated read


@dataclass
class Ceilings:
    """What the device reaches at most, measured: bytes read a second, FLOP a second in bf16 (float32 on a CPU)."""

    bandwidth: float
    wide: float
    fp8: float | None

    def rate(self, kind: str) -> float:
        return self.fp8 if kind == "fp8" and self.fp8 else self.wide


class Clock:
    """Medians, of `budget` seconds of repetition each."""

    def __init__(self, device: torch.device, budget: float) -> None:
        self.device, self.budget = device, budget
        self._flush = torch.empty(L2_BYTES * 2, dtype=torch.uint8, device=device) if device.type == "cuda" else None

    def call_by_call(self, calls: Sequence[Callable[[], Any]]) -> float:
        """Seconds of one call that fills the device: each between two events, the L2 overwritten before it."""
        for call in calls[:2]:
            call()
        spent = self._once(calls[0])
        count = min(max(int(self.budget / max(spent, 1e-7)), 5), 50)
        return median(self._once(calls[i % len(calls)]) for i in range(count))

    def graph(self, calls: Sequence[Callable[[], Any]]) -> float:
        """Seconds of one small call: one CUDA graph holds them all, one a set of inputs, and is replayed."""
        if self.device.type != "cuda":
            return self.call_by_call(calls)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in calls:  # all of them: a peer may plan in its first call
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        repeats = max(1, 16 // len(calls))
        with torch.cuda.graph(graph):
            for _ in range(repeats):
                for call in calls:
                    call()
        graph.replay()
        spent = self._once(graph.replay, flush=False)
        count = min(max(int(self.budget / max(spent, 1e-7)), 7), 50)
        seconds = median(self._once(graph.replay, flush=False) for _ in range(count)) / (repeats * len(calls))
        graph.reset()
        return seconds

    def _once(self, call: Callable[[], Any], flush: bool = True) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        if flush and self._flush is not None:
            self._flush.zero_()
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start_event.record()
        call()
        end_event.record()
        end_event.synchronize()
        return start_event.elapsed_time(end_event) / 1e3


def ceilings(clock: Clock) -> Ceilings:
    """The better of a large copy and a large sum; a large product in bf16, and one in FP8 where there is one."""
    cuda = clock.device.type == "cuda"
    count, side, dtype = (1 << 29, 8192, torch.bfloat16) if cuda else (1 << 22, 512, torch.float32)
    bandwidth = _bandwidth(clock, count)
    a, b = (torch.randn(side, side, device=clock.device, dtype=dtype) for _ in range(2))
    wide = 2 * side**3 / clock.call_by_call([lambda: a @ b])
    fp8 = None
    if cuda and torch.cuda.get_device_capability(clock.device) >= (8, 9):
        x, y = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).T
        one = torch.ones((), device=clock.device)

        def product() -> torch.Tensor:
            return torch._scaled_mm(x, y, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)

        fp8 = 2 * side**3 / clock.call_by_call([product])
    return Ceilings(bandwidth, wide, fp8)


def _bandwidth(clock: Clock, count: int) -> float:
    source = torch.randn(count, device=clock.device, dtype=torch.float32)
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / clock.call_by_call([lambda: target.copy_(source)])
    read = source.nbytes / clock.call_by_call([source.sum])
    return max(copied, read)


def rotations(bytes_a_set: float, device: torch.device, most: int = 96) -> int:
    """How many sets of inputs it takes that none is still in the L2 when its turn comes again."""
    return min(max(-(-L2_BYTES // max(int(bytes_a_set), 1)), 1), most) if device.type == "cuda" else 2
