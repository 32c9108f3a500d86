"""What a tensor's device can run: paths are chosen by it."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

# Of tensors that have no values, see `assumed`; of all others nobody reads it.
_ASSUMED: ContextVar[tuple[int, int] | None] = ContextVar("assumed", default=None)


@contextmanager
def assumed(generation: tuple[int, int]) -> Iterator[None]:
    """Within this, fake tensors count as lying on a GPU of compute capability `generation`, wherever they are: what a
    step would allocate there can be walked through on a machine that has none. Tensors with values are not touched."""
    token = _ASSUMED.set(generation)
    try:
        yield
    finally:
        _ASSUMED.reset(token)


def sent(x: Tensor, device: torch.device) -> Tensor:
    """`x`, on its way to `device`. From the CPU it goes by pinned memory: from other memory a copy to a GPU would first
    wait for all that the GPU has yet to do."""
    pinned = device.type == "cuda" and x.device.type == "cpu"
    return (x.pin_memory() if pinned else x).to(device, non_blocking=True)


def capability(x: Tensor) -> tuple[int, int]:
    """The compute capability of the NVIDIA GPU that `x` lies on, (9, 0) for Hopper.

    (0, 0) where kernels of `abyssal.kernels` cannot run: another kind of device, no Triton, or a device that is not
    there (fake tensors may name one).
    """
    ghost = _assumed_of(x)
    if ghost is not None:
        return ghost
    return _capability(x.device.index) if x.device.type == "cuda" else (0, 0)


def on_cpu(x: Tensor) -> bool:
    """Whether `x` lies on the CPU."""
    return x.device.type == "cpu" and _assumed_of(x) is None


def _assumed_of(x: Tensor) -> tuple[int, int] | None:
    if torch.compiler.is_compiling():
        return None
    generation = _ASSUMED.get()
    if generation is None:
        return None
    from torch._subclasses.fake_tensor import FakeTensor

    return generation if isinstance(x, FakeTensor) else None


@torch.compiler.assume_constant_result  # a graph is compiled for one device
def _capability(index: int | None) -> tuple[int, int]:
    return _asked(index)


@cache
def _asked(index: int | None) -> tuple[int, int]:
    missing = find_spec("triton") is None or torch.version.hip is not None or not torch.cuda.is_available()
    return (0, 0) if missing else torch.cuda.get_device_capability(index)
