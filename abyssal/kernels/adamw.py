"""An optimizer's passes over all parameters, each one launch over a table of addresses (Triton).

A program takes BLOCK numbers of one tensor: `owner` says of which, for every program, and `first` which is the tensor's
first program. Memory is the limit: a step reads a gradient, float32 masters and both moments, and writes what becomes
of them and the bfloat16 parameters, 28 bytes a number with a bfloat16 gradient, 30 with a float32 one. Whole blocks are
read without a mask, whose edge would keep loads narrow.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 4096, 4  # of 1024 to 8192 numbers and 4 or 8 warps the fastest on an H100, by up to 9 %


@triton.jit
def _at(addresses, i, dtype: tl.constexpr):
    return tl.multiple_of(tl.load(addresses + i).to(tl.pointer_type(dtype)), 16)


@triton.jit
def _block(owner, first, sizes, BLOCK: tl.constexpr):
    """The tensor of this program, the start of its block, and the tensor's size."""
    program = tl.program_id(0)
    i = tl.load(owner + program)
    return i, (program - tl.load(first + i)).to(tl.int64) * BLOCK, tl.load(sizes + i)


@triton.jit
def _squares_kernel(gradients, owner, first, sizes, out, NARROW: tl.constexpr, BLOCK: tl.constexpr):
    i, start, size = _block(owner, first, sizes, BLOCK)
    dtype: tl.constexpr = tl.bfloat16 if NARROW else tl.float32
    total = tl.zeros([BLOCK], tl.float32)
    if tl.load(gradients + i) != 0:
        at = start + tl.arange(0, BLOCK)
        g = _at(gradients, i, dtype)
        if start + BLOCK <= size:
            x = tl.load(g + at).to(tl.float32)
        else:
            x = tl.load(g + at, mask=at < size, other=0.0).to(tl.float32)
        total = x * x
    tl.store(out + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def _adamw(g, w, m, v, rate, root, decay, shrink, beta1, rest1, beta2, rest2, eps):
    g = g.to(tl.float32) * shrink
    w -= decay * w
    m = beta1 * m + rest1 * g
    v = beta2 * v + rest2 * g * g
    return w - tl.div_rn(rate * m, tl.sqrt_rn(v) * root + eps), m, v


@triton.jit
def _step_kernel(
    gradients, masters, firsts, seconds, copies, numbers, owner, first, sizes, scale, stopped, n, beta1, rest1, beta2,
    rest2, eps, NARROW: tl.constexpr, COPIED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`numbers [3, n]`, a tensor's: lr / (1 - β1^t), 1 / sqrt(1 - β2^t), lr · weight decay."""
    i, start, size = _block(owner, first, sizes, BLOCK)
    dtype: tl.constexpr = tl.bfloat16 if NARROW else tl.float32
    if (tl.load(gradients + i) != 0) & (tl.load(stopped) == 0.0):
        at = start + tl.arange(0, BLOCK)
        g, p = _at(gradients, i, dtype) + at, _at(copies, i, tl.bfloat16) + at
        w, m, v = _at(masters, i, tl.float32) + at, _at(firsts, i, tl.float32) + at, _at(seconds, i, tl.float32) + at
        rate, root, decay = tl.load(numbers + i), tl.load(numbers + n + i), tl.load(numbers + 2 * n + i)
        shrink = tl.div_rn(1.0, tl.load(scale))
        if start + BLOCK <= size:
            new_w, new_m, new_v = _adamw(
                tl.load(g), tl.load(w), tl.load(m), tl.load(v), rate, root, decay, shrink, beta1, rest1, beta2,
                rest2, eps,
            )  # fmt: skip
            tl.store(w, new_w)
            tl.store(m, new_m)
            tl.store(v, new_v)
            if COPIED:
                tl.store(p, new_w.to(tl.bfloat16))
        else:
            mask = at < size
            new_w, new_m, new_v = _adamw(
                tl.load(g, mask=mask, other=0.0), tl.load(w, mask=mask, other=0.0), tl.load(m, mask=mask, other=0.0),
                tl.load(v, mask=mask, other=0.0), rate, root, decay, shrink, beta1, rest1, beta2, rest2, eps,
            )  # fmt: skip
            tl.store(w, new_w, mask=mask)
            tl.store(m, new_m, mask=mask)
            tl.store(v, new_v, mask=mask)
            if COPIED:
                tl.store(p, new_w.to(tl.bfloat16), mask=mask)


@triton.jit
def _widen_kernel(total, part, n, ADD: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(part + at, mask=at < n, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(total + at, mask=at < n, other=0.0)
    tl.store(total + at, x, mask=at < n)


class Table:
    """Which program takes which numbers, of tensors of these sizes, on a device."""

    def __init__(self, sizes: list[int], device: torch.device) -> None:
        blocks = [-(-size // BLOCK) for size in sizes]
        counts = torch.tensor(blocks, dtype=torch.int64)
        self.count, self.blocks = len(sizes), blocks
        self.owner = torch.arange(len(sizes), dtype=torch.int32).repeat_interleave(counts).to(device)
        self.first = (counts.cumsum(0) - counts).to(torch.int32).to(device)
        self.sizes = torch.tensor(sizes, dtype=torch.int64).to(device)


def squares(table: Table, gradients: Tensor, narrow: bool) -> Tensor:
    """`[blocks]` float32: the sum of squares of every block of a table. `gradients [n]` int64: addresses, 0 for none,
    of bfloat16 numbers where `narrow`, else of float32."""
    out = torch.empty(sum(table.blocks), dtype=torch.float32, device=gradients.device)
    if len(out):
        _squares_kernel[(len(out),)](
            gradients, table.owner, table.first, table.sizes, out, NARROW=narrow, BLOCK=BLOCK, num_warps=WARPS
        )
    return out


def step(
    table: Table, gradients: Tensor, narrow: bool, kept: Tensor, numbers: Tensor, scale: Tensor, stopped: Tensor,
    betas: tuple[float, float], eps: float, copied: bool = True,
) -> None:  # fmt: skip
    """Steps every tensor that has a gradient, which is divided by `scale`; where `stopped` is not 0, none. `copied`:
    masters are rounded to parameters.

    `kept [4, n]` int64: addresses of masters, first and second moments, and parameters. `numbers` as in the kernel.
    """
    if table.owner.shape[0]:
        (beta1, beta2), (masters, firsts, seconds, copies) = betas, kept.unbind()
        _step_kernel[(table.owner.shape[0],)](
            gradients, masters, firsts, seconds, copies, numbers, table.owner, table.first, table.sizes, scale, stopped,
            table.count, beta1, 1 - beta1, beta2, 1 - beta2, eps, NARROW=narrow, COPIED=copied, BLOCK=BLOCK,
            num_warps=WARPS,
        )  # fmt: skip


def widen(total: Tensor, part: Tensor, add: bool) -> None:
    """total ← part, or total + part: float32, contiguous, and any float of the same shape, contiguous."""
    n = part.numel()
    if n:
        _widen_kernel[(triton.cdiv(n, BLOCK),)](total, part, n, ADD=add, BLOCK=BLOCK, num_warps=WARPS)
