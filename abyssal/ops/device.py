"""What a tensor's device can run: paths are chosen by it."""

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor


def capability(x: Tensor) -> tuple[int, int]:
    """The compute capability of the NVIDIA GPU that `x` lies on, (9, 0) for Hopper.

    (0, 0) where kernels of `abyssal.kernels` cannot run: another kind of device, no Triton, or a device that is not
    there (fake tensors may name one).
    """
    return _capability(x.device.index) if x.device.type == "cuda" else (0, 0)


@torch.compiler.assume_constant_result  # a graph is compiled for one device
def _capability(index: int | None) -> tuple[int, int]:
    return _asked(index)


@cache
def _asked(index: int | None) -> tuple[int, int]:
    missing = find_spec("triton") is None or torch.version.hip is not None or not torch.cuda.is_available()
    return (0, 0) if missing else torch.cuda.get_device_capability(index)
