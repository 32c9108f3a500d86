"""What is done with the rows of choices beside their products: sums over a token's rows, and zeros behind the last."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _sum_rows(
    first, second, place, plus, y, D, N, K: tl.constexpr, BLOCK: tl.constexpr, PLUS: tl.constexpr, TWO: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < D
    total = tl.zeros([BLOCK], tl.float32)
    if PLUS:
        total += tl.load(plus + token * D + columns, mask=inside, other=0.0).to(tl.float32)
    for k in tl.static_range(K):
        row = tl.load(place + token * K + k).to(tl.int64)
        here = inside & (row >= 0)
        if TWO:
            there = inside & (row >= N)
            here = here & (row < N)
            total += tl.load(second + (row - N) * D + columns, mask=there, other=0.0).to(tl.float32)
        total += tl.load(first + row * D + columns, mask=here, other=0.0).to(tl.float32)
    tl.store(y + token * D + columns, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _sum_parts(parts, place, out, N, C, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(place + at, mask=at < C, other=-1)
    total = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(PARTS):
        total += tl.load(parts + i * N + row, mask=row >= 0, other=0.0)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=at < C)


@triton.jit
def _clear(a, b, c, count, N, F, BLOCK: tl.constexpr):
    """Zeros in row `count + program`, where there is one."""
    row = tl.load(count).to(tl.int64) + tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, zeros = (columns < F) & (row < N), tl.zeros([BLOCK], a.dtype.element_ty)
    tl.store(a + row * F + columns, zeros, mask=inside)
    tl.store(b + row * F + columns, zeros, mask=inside)
    tl.store(c + row * F + columns, zeros, mask=inside)


def sum_rows(first: Tensor, place: Tensor, plus: Tensor | None = None, second: Tensor | None = None) -> Tensor:
    """`[T, D]`: each token's rows, `place [T, K]` of `first [N, D]`, and from N on of `second`; added in float32 in the
    order of its choices, to `plus [T, D]`. A place of -1 is none."""
    (tokens, chosen), (N, D) = place.shape, first.shape
    y = torch.empty(tokens, D, dtype=first.dtype, device=first.device)
    if not tokens:
        return y
    block = min(2048, triton.next_power_of_2(D))
    more, others = (first if t is None else t.contiguous() for t in (plus, second))
    _sum_rows[(tokens, triton.cdiv(D, block))](
        first.contiguous(), others, place.contiguous(), more, y, D, N, chosen, block, plus is not None,
        second is not None,
    )  # fmt: skip
    return y


def sum_parts(parts: Tensor, place: Tensor, dtype: torch.dtype) -> Tensor:
    """`[T·K]`: the sum of `parts [P, N]`, back in the order of the choices; 0 where there is none."""
    out = torch.empty(place.shape, dtype=dtype, device=place.device)
    blocks = triton.cdiv(place.numel(), 1024)
    _sum_parts[(blocks,)](parts, place, out, parts.shape[1], place.numel(), parts.shape[0], 1024)
    return out


def clear_behind(a: Tensor, b: Tensor, c: Tensor, count: Tensor, rows: int) -> None:
    """Zeros in the `rows` rows behind the first `count`, a tensor of one integer, of a, b and c `[N, F]`, so far as
    they are there."""
    N, F = a.shape
    block = min(2048, triton.next_power_of_2(F))
    _clear[(rows, triton.cdiv(F, block))](a, b, c, count, N, F, block)
