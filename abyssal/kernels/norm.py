"""RMS normalisation of rows in one pass over memory, of a sum of two if asked, and its gradients in another (Triton).

Forward, a programmatic dependent from Hopper on: what is launched before it may still be ending. Training keeps the
rows and 1 / rms of each. Backward, a program walks over rows and adds up its part of the weight's gradient in
registers; a second launch adds the parts in their order, so that results repeat bit by bit.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from abyssal.kernels.gate import dependent

WIDEST = 16384  # a program holds a whole row


@triton.jit
def _rms_norm(
    x, y, weight, total, out, scale, n, stride_x, stride_y, eps,
    D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, SUM: tl.constexpr, KEEP: tl.constexpr, PDL: tl.constexpr,
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
    rms = tl.rsqrt(tl.sum(v * v, 1) / D + eps)
    if KEEP:
        tl.store(scale + row, rms, mask=row < n)
    v = (v * rms[:, None]).to(dtype).to(tl.float32)
    tl.store(out + row[:, None] * D + d[None, :], (v * w[None, :]).to(dtype), mask=mask)


@triton.jit
def _rms_norm_backward(
    x, weight, scale, d_out, d_total, dx, parts, n, stride_x, stride_out, stride_total, stride_dx,
    D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """With v = x · scale: dx = scale · (g - v · mean(g v)), g = d_out · weight; and d_total on top of it."""
    d = tl.arange(0, DP)
    dtype: tl.constexpr = x.dtype.element_ty
    w = tl.load(weight + d, mask=d < D, other=0.0).to(dtype).to(tl.float32)[None, :]
    dw = tl.zeros([ROWS, DP], tl.float32)
    for start in range(tl.program_id(0) * ROWS, n, tl.num_programs(0) * ROWS):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)
        mask = (row < n)[:, None] & (d < D)[None, :]
        rms = tl.load(scale + row, mask=row < n, other=0.0)[:, None]
        v = tl.load(x + row[:, None] * stride_x + d[None, :], mask=mask, other=0.0).to(tl.float32) * rms
        g = tl.load(d_out + row[:, None] * stride_out + d[None, :], mask=mask, other=0.0).to(tl.float32)
        dw += g * v.to(dtype).to(tl.float32)
        g *= w
        g = (g - v * (tl.sum(g * v, 1) / D)[:, None]) * rms
        if SUM:
            g += tl.load(d_total + row[:, None] * stride_total + d[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(dx + row[:, None] * stride_dx + d[None, :], g.to(dx.dtype.element_ty), mask=mask)
    tl.store(parts + tl.program_id(0) * D + d, tl.sum(dw, 0), mask=d < D)


@triton.jit
def _sum_parts(parts, out, P, D, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    d = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, P, ROWS):
        p = start + tl.arange(0, ROWS)
        total += tl.load(parts + p[:, None] * D + d[None, :], mask=(p < P)[:, None] & (d < D)[None, :], other=0.0)
    tl.store(out + d, tl.sum(total, 0).to(out.dtype.element_ty), mask=d < D)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As the operation, for D of at most WIDEST; `weight` contiguous. Without gradients."""
    return _launch(x, None, weight, eps, keep=False)[1]


def add_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As the operation, for x and y of one shape and dtype. Without gradients."""
    return _launch(x, y, weight, eps, keep=False)[:2]


def rms_norm_kept(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`rms_norm`, and what `norm_gradients` needs: 1 / rms of each row."""
    return _launch(x, None, weight, eps, keep=True)[1:]


def _launch(x: Tensor, y: Tensor | None, weight: Tensor, eps: float, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The sum (the norm itself where there is none), the norm, and 1 / rms of each row, float32."""
    D = x.shape[-1]
    flat = _rows(x)
    other = flat if y is None else _rows(y)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = out if y is None else torch.empty_like(out)
    n, DP = flat.shape[0], triton.next_power_of_2(D)
    scale = torch.empty(n if keep else 0, dtype=torch.float32, device=x.device)
    if n:
        # Short rows share a program: 2048 numbers are 16 a thread.
        rows = max(2048 // DP, 1) if n >= 1024 else 1
        pdl = dependent(x)
        _rms_norm[(triton.cdiv(n, rows),)](
            flat, other, weight, total, out, scale, n, flat.stride(0), other.stride(0), eps,
            D=D, DP=DP, ROWS=rows, SUM=y is not None, KEEP=keep, PDL=pdl, num_warps=4 if DP <= 4096 else 8,
            launch_pdl=pdl,
        )  # fmt: skip
    return total, out, scale


def norm_gradients(
    x: Tensor, weight: Tensor, scale: Tensor, d_out: Tensor, d_total: Tensor | None, dx: Tensor
) -> Tensor:
    """Writes dx, and returns the weight's gradient. `x` is what was normalised, dx `[n, D]` with rows at any stride;
    `d_total` is added to it."""
    D = x.shape[-1]
    x, d_out = _rows(x), _rows(d_out)
    more = d_out if d_total is None else _rows(d_total)
    n, DP = x.shape[0], triton.next_power_of_2(D)
    if not n:
        return torch.zeros_like(weight)
    rows = max(4096 // DP, 1)
    programs = min(triton.cdiv(n, rows), 4 * _processors(x.device))
    parts = torch.empty(programs, D, dtype=torch.float32, device=x.device)
    _rms_norm_backward[(programs,)](
        x, weight, scale, d_out, more, dx, parts, n, x.stride(0), d_out.stride(0), more.stride(0), dx.stride(0),
        D=D, DP=DP, ROWS=rows, SUM=d_total is not None, num_warps=8 if DP <= 8192 else 16,
    )  # fmt: skip
    dw = torch.empty(D, dtype=weight.dtype, device=x.device)
    _sum_parts[(triton.cdiv(D, 16),)](parts, dw, programs, D, ROWS=128, COLUMNS=16)
    return dw


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _rows(x: Tensor) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])  # a view wherever rows lie at one stride
    return flat if flat.stride(1) == 1 else flat.contiguous()


@torch.library.custom_op("abyssal::rms_norm", mutates_args=())
def trained_rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm, differentiable, and 1 / rms of each row."""
    return rms_norm_kept(x, weight, eps)


@trained_rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _like(x), x.new_empty(x.shape[:-1].numel(), dtype=torch.float32)


@torch.library.custom_op("abyssal::add_norm", mutates_args=())
def trained_add_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The sum and its norm, differentiable, and 1 / rms of each row."""
    return _launch(x, y, weight, eps, keep=True)


@trained_add_norm.register_fake
def _(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return _like(x), _like(x), x.new_empty(x.shape[:-1].numel(), dtype=torch.float32)


@torch.library.custom_op("abyssal::norm_backward", mutates_args=())
def _backward(x: Tensor, weight: Tensor, scale: Tensor, d_out: Tensor, d_total: Tensor | None) -> tuple[Tensor, Tensor]:
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return dx, norm_gradients(x, weight, scale, d_out, d_total, dx.view(-1, x.shape[-1]))


@_backward.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor, d_out: Tensor, d_total: Tensor | None) -> tuple[Tensor, Tensor]:
    return _like(x), torch.empty_like(weight)


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _keep_rows(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _keep_total(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[0], inputs[2], output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _of_rows(ctx: Any, d_out: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if d_out is None:
        return None, None, None
    return *_backward(*ctx.saved_tensors, d_out, None), None


def _of_total(ctx: Any, d_total: Tensor | None, d_out: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if d_out is None:
        return d_total, d_total, None, None
    dx, dw = _backward(*ctx.saved_tensors, d_out, d_total)
    return dx, dx, dw, None


trained_rms_norm.register_autograd(_of_rows, setup_context=_keep_rows)
trained_add_norm.register_autograd(_of_total, setup_context=_keep_total)


class NormBeside(torch.autograd.Function):
    """x itself and its norm: what comes back for x is added in the norm's own pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        out, scale = trained_rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        ctx.set_materialize_grads(False)
        return x.view_as(x), out

    @staticmethod
    def backward(ctx: Any, d_x: Tensor | None, d_out: Tensor | None) -> tuple[Tensor | None, ...]:
        if d_out is None:
            return d_x, None, None
        return *_backward(*ctx.saved_tensors, d_out, d_x), None
