"""silu(a) · b in one pass over memory, and its gradients in another (Triton); a and b may be halves of one product.

Training keeps a and b alone. Of halves of one product the gradients are halves of one tensor, for one product again.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from abyssal.kernels.gate import dependent

BLOCK = 1024  # columns a program


@triton.jit
def _gated(a, b, out, F, stride_a, stride_b, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    dtype: tl.constexpr = a.dtype.element_ty
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    u = tl.load(a + row * stride_a + f, mask=f < F, other=0.0).to(tl.float32)
    v = tl.load(b + row * stride_b + f, mask=f < F, other=0.0).to(tl.float32)
    act = (u / (1 + tl.exp(-u))).to(dtype).to(tl.float32)
    tl.store(out + row * F + f, (act * v).to(dtype), mask=f < F)


@triton.jit
def _gated_backward(a, b, d_out, da, db, F, stride_a, stride_b, stride_out, stride_d, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    dtype: tl.constexpr = a.dtype.element_ty
    u = tl.load(a + row * stride_a + f, mask=f < F, other=0.0).to(tl.float32)
    v = tl.load(b + row * stride_b + f, mask=f < F, other=0.0).to(tl.float32)
    g = tl.load(d_out + row * stride_out + f, mask=f < F, other=0.0).to(tl.float32)
    sigmoid = 1 / (1 + tl.exp(-u))
    act = (u * sigmoid).to(dtype).to(tl.float32)
    tl.store(da + row * stride_d + f, (g * v * sigmoid * (1 + u * (1 - sigmoid))).to(dtype), mask=f < F)
    tl.store(db + row * stride_d + f, (g * act).to(dtype), mask=f < F)


def gated(a: Tensor, b: Tensor) -> Tensor:
    """As the operation, for a and b of one shape and dtype. Without gradients."""
    F = a.shape[-1]
    out = torch.empty(a.shape, dtype=a.dtype, device=a.device)
    a, b = _rows(a), _rows(b)
    if out.numel():
        block = min(BLOCK, triton.next_power_of_2(F))
        pdl = dependent(a)
        _gated[(a.shape[0], triton.cdiv(F, block))](
            a, b, out, F, a.stride(0), b.stride(0), BLOCK=block, PDL=pdl, num_warps=4, launch_pdl=pdl
        )
    return out


def _gradients(a: Tensor, b: Tensor, d_out: Tensor, da: Tensor, db: Tensor) -> None:
    """Writes da and db, `[n, F]` whose rows lie at one stride."""
    F = a.shape[-1]
    a, b, d_out = _rows(a), _rows(b), _rows(d_out)
    if d_out.numel():
        block = min(BLOCK, triton.next_power_of_2(F))
        _gated_backward[(a.shape[0], triton.cdiv(F, block))](
            a, b, d_out, da, db, F, a.stride(0), b.stride(0), d_out.stride(0), da.stride(0), BLOCK=block, num_warps=4
        )


def _rows(x: Tensor) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


@torch.library.custom_op("abyssal::gated", mutates_args=())
def trained_gated(a: Tensor, b: Tensor) -> Tensor:
    """`gated`, differentiable."""
    return gated(a, b)


@trained_gated.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return torch.empty_like(a, memory_format=torch.contiguous_format)


@torch.library.custom_op("abyssal::gated_backward", mutates_args=())
def _backward(a: Tensor, b: Tensor, d_out: Tensor) -> tuple[Tensor, Tensor]:
    da, db = (torch.empty(a.shape, dtype=a.dtype, device=a.device) for _ in range(2))
    _gradients(a, b, d_out, da.view(-1, a.shape[-1]), db.view(-1, a.shape[-1]))
    return da, db


@_backward.register_fake
def _(a: Tensor, b: Tensor, d_out: Tensor) -> tuple[Tensor, Tensor]:
    return a.new_empty(a.shape), a.new_empty(a.shape)


@torch.library.custom_op("abyssal::gated_halves", mutates_args=())
def trained_gated_halves(ab: Tensor) -> Tensor:
    """`gated` of the halves of `[..., 2 F]`, differentiable."""
    return gated(*ab.chunk(2, -1))


@trained_gated_halves.register_fake
def _(ab: Tensor) -> Tensor:
    return ab.new_empty(*ab.shape[:-1], ab.shape[-1] // 2)


@torch.library.custom_op("abyssal::gated_halves_backward", mutates_args=())
def _halves_backward(ab: Tensor, d_out: Tensor) -> Tensor:
    d_ab = torch.empty(ab.shape, dtype=ab.dtype, device=ab.device)
    _gradients(*ab.chunk(2, -1), d_out, *d_ab.view(-1, ab.shape[-1]).chunk(2, -1))
    return d_ab


@_halves_backward.register_fake
def _(ab: Tensor, d_out: Tensor) -> Tensor:
    return ab.new_empty(ab.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _of_two(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor]:
    return _backward(*ctx.saved_tensors, d_out)


def _of_halves(ctx: Any, d_out: Tensor) -> Tensor:
    return _halves_backward(*ctx.saved_tensors, d_out)


trained_gated.register_autograd(_of_two, setup_context=_keep)
trained_gated_halves.register_autograd(_of_halves, setup_context=_keep)
