"""Rotates pairs of numbers by their token's angles, in one pass over memory (Triton); the gradient is turned back.

What is rotated may be a slice of a larger tensor, and so may what is written: nothing wider than it is made.
`norm_rotate` is what training does to a token's latent and rotary key, which leave one product and get one gradient.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from abyssal.kernels.norm import norm_gradients, rms_norm_kept


@triton.jit
def turned(x, c, s, ROWS: tl.constexpr, RP: tl.constexpr):
    """Pairs (x[2i], x[2i+1]) of `[ROWS, RP]` by the angles of c and s `[ROWS, RP/2]`, all float32."""
    even, odd = tl.split(tl.reshape(x, (ROWS, RP // 2, 2)))
    return tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), (ROWS, RP))


@triton.jit
def _rotate(
    x, cos, sin, out, rows, heads, x_row, x_head, out_row, out_head, direction,
    R: tl.constexpr, RP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS rows, each a token's head."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    t, h = (row // heads)[:, None], (row % heads)[:, None]
    e, i = tl.arange(0, RP)[None, :], tl.arange(0, RP // 2)[None, :]
    inside = (row < rows)[:, None]
    value = tl.load(x + t * x_row + h * x_head + e, mask=inside & (e < R), other=0.0).to(tl.float32)
    c = tl.load(cos + t * (R // 2) + i, mask=inside & (i < R // 2), other=0.0).to(tl.float32)
    s = tl.load(sin + t * (R // 2) + i, mask=inside & (i < R // 2), other=0.0).to(tl.float32) * direction
    value = turned(value, c, s, ROWS, RP)
    tl.store(out + t * out_row + h * out_head + e, value.to(out.dtype.element_ty), mask=inside & (e < R))


def rotate_into(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, back: bool = False) -> Tensor:
    """Writes `x [T, H, R]` rotated, or turned back, to `out`, which may be x itself; `cos`, `sin` `[T, R/2]`. The last
    dimension of both is contiguous."""
    T, H, R = x.shape
    if x.numel():
        RP = triton.next_power_of_2(R)
        rows = max(2048 // RP, 1)
        _rotate[(triton.cdiv(T * H, rows),)](
            x, cos.contiguous(), sin.contiguous(), out, T * H, H, *x.stride()[:2], *out.stride()[:2],
            -1.0 if back else 1.0, R, RP, rows, num_warps=4,
        )  # fmt: skip
    return out


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    """`x [T, ..., R]` in one piece."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    heads = x[:, None] if x.ndim == 2 else x.flatten(1, -2)
    heads = heads if heads.stride(-1) == 1 else heads.contiguous()
    rotate_into(heads, cos, sin, out.view(heads.shape), back)
    return out


@torch.library.custom_op("abyssal::rotate", mutates_args=())
def rotate(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    """`x [T, ..., R]` rotated by the angles `[T, R/2]`, or turned back by them; differentiable in x."""
    return _rotated(x, cos, sin, back)


@rotate.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    return x.new_empty(x.shape)


def _keep_angles(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:3])
    ctx.back = inputs[3]


def _turned_back(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    return rotate(d_out, *ctx.saved_tensors, not ctx.back), None, None, None


rotate.register_autograd(_turned_back, setup_context=_keep_angles)


@torch.library.custom_op("abyssal::norm_rotate", mutates_args=())
def norm_rotate(kv: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The latent `[T, C]` normalised, the rotary key `[T, R]` rotated, of `kv [T, C + R]`; and 1 / rms."""
    C = weight.shape[0]
    latent, scale = rms_norm_kept(kv[:, :C], weight, eps)
    return latent, _rotated(kv[:, C:], cos, sin, False), scale


@norm_rotate.register_fake
def _(kv: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    T, C = kv.shape[0], weight.shape[0]
    return kv.new_empty(T, C), kv.new_empty(T, kv.shape[1] - C), kv.new_empty(T, dtype=torch.float32)


@torch.library.custom_op("abyssal::norm_rotate_backward", mutates_args=())
def _norm_rotate_backward(
    kv: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, scale: Tensor, d_latent: Tensor, d_rope: Tensor
) -> tuple[Tensor, Tensor]:
    C = weight.shape[0]
    d_kv = torch.empty(kv.shape, dtype=kv.dtype, device=kv.device)
    dw = norm_gradients(kv[:, :C], weight, scale, d_latent, None, d_kv[:, :C])
    d_rope = d_rope if d_rope.stride(-1) == 1 else d_rope.contiguous()
    rotate_into(d_rope[:, None], cos, sin, d_kv[:, None, C:], back=True)
    return d_kv, dw


@_norm_rotate_backward.register_fake
def _(
    kv: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, scale: Tensor, d_latent: Tensor, d_rope: Tensor
) -> tuple[Tensor, Tensor]:
    return kv.new_empty(kv.shape), torch.empty_like(weight)


def _keep_kv(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    kv, weight, _, cos, sin = inputs
    ctx.save_for_backward(kv, weight, cos, sin, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _norm_and_key(
    ctx: Any, d_latent: Tensor | None, d_rope: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # asked for once: recomputation does not allow more
    kv, weight = saved[:2]
    if d_latent is None:
        d_latent = kv.new_zeros(kv.shape[0], weight.shape[0])
    if d_rope is None:
        d_rope = kv.new_zeros(kv.shape[0], kv.shape[1] - weight.shape[0])
    return *_norm_rotate_backward(*saved, d_latent, d_rope), None, None, None


norm_rotate.register_autograd(_norm_and_key, setup_context=_keep_kv)
