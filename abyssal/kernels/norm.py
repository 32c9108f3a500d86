"""RMS normalisation of rows in one pass over memory (Triton), of a sum of two if asked. Forward only: training has
torch's own fusion. A programmatic dependent from Hopper on: what is launched before it may still be ending."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from abyssal.kernels.gate import dependent

WIDEST = 16384  # a program holds a whole row


@triton.jit
def _rms_norm(
    x, y, weight, total, out, n, stride_x, stride_y, eps,
    D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, SUM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, DP)
    mask = (row < n)[:, None] & (d < D)[None, :]
    dtype: tl.constexpr = x.dtype.element_ty
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    w = tl.load(weight + d, mask=d < D, other=0.0).to(dtype).to(tl.float32)
    v = tl.load(x + row[:, None] * stride_x + d[None, :], mask=mask, other=0.0).to(tl.float32)
    if SUM:
        v += tl.load(y + row[:, None] * stride_y + d[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(total + row[:, None] * D + d[None, :], v.to(dtype), mask=mask)
        v = v.to(dtype).to(tl.float32)
    v = (v * tl.rsqrt(tl.sum(v * v, 1) / D + eps)[:, None]).to(dtype).to(tl.float32)
    tl.store(out + row[:, None] * D + d[None, :], (v * w[None, :]).to(dtype), mask=mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As the operation, for D of at most WIDEST; `weight` contiguous."""
    return _launch(x, None, weight, eps)[1]


def add_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As the operation, for x and y of one shape and dtype."""
    return _launch(x, y, weight, eps)


def _launch(x: Tensor, y: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    D = x.shape[-1]
    flat = _rows(x)
    other = flat if y is None else _rows(y)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = out if y is None else torch.empty_like(out)
    n, DP = flat.shape[0], triton.next_power_of_2(D)
    if n:
        # Short rows share a program: 2048 numbers are 16 a thread.
        rows = max(2048 // DP, 1) if n >= 1024 else 1
        pdl = dependent(x)
        _rms_norm[(triton.cdiv(n, rows),)](
            flat, other, weight, total, out, n, flat.stride(0), other.stride(0), eps,
            D=D, DP=DP, ROWS=rows, SUM=y is not None, PDL=pdl, num_warps=4 if DP <= 4096 else 8, launch_pdl=pdl,
        )  # fmt: skip
    return total, out


def _rows(x: Tensor) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])  # a view wherever rows lie at one stride
    return flat if flat.stride(1) == 1 else flat.contiguous()
