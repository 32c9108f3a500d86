"""Rows exchanged between the ranks of a group, with gradients: each is the other's way back."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Their names before and since torch 2.13.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@torch.compiler.disable
def gathered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Every rank's rows, one rank's behind the other's: `[T, ...]` -> `[ranks·T, ...]`, of as many rows on each. A
    row's gradient is the sum of those that the ranks have for it."""
    out: Tensor = _Gathered.apply(x, group)
    return out


@torch.compiler.disable
def scattered_sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Of the sum of all ranks' x, this rank's rows: `[ranks·T, ...]` -> `[T, ...]`."""
    out: Tensor = _ScatteredSum.apply(x, group)
    return out


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _gather(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _scatter(gradient, ctx.group), None


class _ScatteredSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _scatter(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _gather(gradient, ctx.group), None


def _gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    out = x.new_empty(x.shape[0] * group.size(), *x.shape[1:])
    _all_gather(out, x.contiguous(), group=group)
    return out


def _scatter(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    out = x.new_empty(x.shape[0] // group.size(), *x.shape[1:])
    _reduce_scatter(out, x.contiguous(), group=group)
    return out
