"""Adds up to four tensors of one shape in one pass over memory (Triton): the gradients of what several read."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048


@triton.jit
def _sum(a, b, c, d, out, n, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    total = tl.load(a + at, mask=mask).to(tl.float32) + tl.load(b + at, mask=mask).to(tl.float32)
    if COUNT > 2:
        total += tl.load(c + at, mask=mask).to(tl.float32)
    if COUNT > 3:
        total += tl.load(d + at, mask=mask).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=mask)


@torch.library.custom_op("abyssal::sum", mutates_args=())
def sum_of(tensors: list[Tensor]) -> Tensor:
    """Two to four tensors of one shape and dtype of at most 32 bits, added in float32 and rounded once."""
    flat = [t.contiguous() for t in tensors]
    out = torch.empty_like(flat[0])
    if out.numel():
        parts = [flat[min(i, len(flat) - 1)] for i in range(4)]
        _sum[(triton.cdiv(out.numel(), BLOCK),)](*parts, out, out.numel(), len(flat), BLOCK, num_warps=4)
    return out


@sum_of.register_fake
def _(tensors: list[Tensor]) -> Tensor:
    return tensors[0].new_empty(tensors[0].shape)
