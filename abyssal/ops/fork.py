"""A tensor for several readers, whose gradients are added in one pass rather than one after the other."""

from typing import Any

import torch
from torch import Tensor

from abyssal.ops.device import capability


def fork(x: Tensor, readers: int, path: str | None = None) -> tuple[Tensor, ...]:
    """x itself, `readers` times: two to four.

    Paths: "reference" (autograd adds the gradients pair by pair), "triton" (on a GPU, in one pass, summed in float32).
    None chooses.
    """
    if path is None:
        narrow = x.dtype in (torch.bfloat16, torch.float16, torch.float32)
        learns = torch.is_grad_enabled() and x.requires_grad
        path = "triton" if learns and narrow and 2 < readers <= 4 and capability(x)[0] > 0 else "reference"
    if path == "triton":
        return _Fork.apply(x, readers)
    if path != "reference":
        raise ValueError(f"path: expected 'reference' or 'triton', got {path!r}")
    return (x,) * readers


class _Fork(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, readers: int) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(x.view_as(x) for _ in range(readers))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
        from abyssal.kernels.sums import sum_of

        there = [g for g in grads if g is not None]
        return (sum_of(there) if len(there) > 1 else there[0] if there else None), None
