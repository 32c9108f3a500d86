"""How long something takes beside something else, and what it computes and writes."""

import time
from collections.abc import Callable, Sequence
from statistics import quantiles
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode


class Time(NamedTuple):
    """Milliseconds: the median of several, and the quartiles."""

    ms: float
    low: float
    high: float

    def text(self) -> str:
        return f"{self.ms:.3g}"


class Work(NamedTuple):
    """What a function does: FLOPs of its products, and bytes of the tensors that it makes."""

    flops: int
    made: int


@torch.inference_mode()
def times(functions: Sequence[Callable[[], object]], rounds: int) -> list[Time]:
    """Each function's, measured in turns, so that what disturbs the machine disturbs them alike. One call before that
    is not counted."""
    found: list[list[float]] = [[] for _ in functions]
    for turn in range(rounds + 1):
        for function, into in zip(functions, found):
            begun = time.perf_counter()
            function()
            if turn:
                into.append(1000 * (time.perf_counter() - begun))
    made = []
    for each in found:
        low, middle, high = quantiles(each, n=4, method="inclusive")
        made.append(Time(middle, low, high))
    return made


@torch.inference_mode()
def work(function: Callable[[], object]) -> Work:
    """By watching it once."""
    with FlopCounterMode(display=False) as flops, _Made() as made:
        function()
    return Work(int(flops.get_total_flops()), made.bytes)


class _Made(TorchDispatchMode):
    """Adds up the outputs that are no views of inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:  # fmt: skip
        out = func(*args, **(kwargs or {}))
        before = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs or {}))}
        self.bytes += sum(t.nbytes for t in _tensors(out) if t.untyped_storage().data_ptr() not in before)
        return out


def _tensors(of: Any) -> list[Tensor]:
    if isinstance(of, Tensor):
        return [of]
    if isinstance(of, dict):
        return _tensors(list(of.values()))
    return [t for x in of for t in _tensors(x)] if isinstance(of, tuple | list) else []
