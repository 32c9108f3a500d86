"""What a decoding step does between its projections, in one launch: norm of the latent, rotation, write (Triton).

A token's first program normalises its latent, rotates its rotary key and writes the row to its slot of the cache, in
the cache's format; its other programs rotate its queries where they lie. Rounds where the separate operations round.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from abyssal.kernels.gate import dependent

HEADS = 8  # query heads a program rotates


@triton.jit
def _rotated(x, cos, sin, ROWS: tl.constexpr, RP: tl.constexpr):
    """Pairs (x[2i], x[2i+1]) of `[ROWS, RP]` by angles `[1, RP/2]`, all float32."""
    even, odd = tl.split(tl.reshape(x, (ROWS, RP // 2, 2)))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (ROWS, RP))


@triton.jit
def _scale_of(largest):
    """The smallest power of two that brings `largest` to 448 or less, from 2^-100 to 2^7, by float32's bits."""
    bits = (largest / 448.0).to(tl.int32, bitcast=True)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.int32)
    exponent = tl.minimum(tl.maximum(exponent, 27), 134)
    scale = (exponent << 23).to(tl.float32, bitcast=True)
    return tl.where(largest == largest, scale, float("nan"))


@triton.jit
def write_token(
    kv, weight, cos, sin, rows, scales, ropes, slots, q,
    stride_kv, stride_qt, stride_qh, eps, H, first, t, part,
    C: tl.constexpr, R: tl.constexpr, W: tl.constexpr, CP: tl.constexpr, RP: tl.constexpr,
    FP8: tl.constexpr, HEADS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Token t's row (part 0), or HEADS of its queries, rotated."""
    i, e = tl.arange(0, RP // 2), tl.arange(0, RP)
    if R > 0:
        c_wide = tl.load(cos + t * (R // 2) + i, mask=i < R // 2, other=0.0).to(tl.float32)[None, :]
        s_wide = tl.load(sin + t * (R // 2) + i, mask=i < R // 2, other=0.0).to(tl.float32)[None, :]
    dtype: tl.constexpr = kv.dtype.element_ty
    if part == 0:
        c = tl.arange(0, CP)
        x = tl.load(kv + t * stride_kv + c, mask=c < C, other=0.0).to(tl.float32)
        x = (x * tl.rsqrt(tl.sum(x * x) / C + eps)).to(dtype).to(tl.float32)
        x = (x * tl.load(weight + c, mask=c < C, other=0.0).to(dtype).to(tl.float32)).to(dtype)
        slot = t
        if SLOTS:
            slot = tl.load(slots + t).to(tl.int64)
        if FP8:
            groups = tl.reshape(x.to(tl.float32), (CP // 128, 128))
            scale = _scale_of(tl.max(tl.abs(groups), 1))
            # A power of two's reciprocal is exact.
            scaled = tl.minimum(tl.maximum(groups * (1.0 / scale)[:, None], -448.0), 448.0)
            bytes = tl.reshape(scaled.to(tl.float8e4nv), (CP,)).to(tl.uint8, bitcast=True)
            tl.store(rows + slot * W + c, bytes, mask=c < C)
            g = tl.arange(0, CP // 128)
            tl.store(scales + slot * (W // 4) + C // 4 + g, scale, mask=g < C // 128)
        else:
            tl.store(rows + slot * W + c, x, mask=c < C)
        if R > 0:
            k = tl.load(kv + t * stride_kv + C + e, mask=e < R, other=0.0).to(tl.float32)
            k = _rotated(k[None, :], c_wide, s_wide, 1, RP).to(dtype)
            if FP8:
                tl.store(ropes + slot * (W // 2) + (C + C // 32) // 2 + e[None, :], k, mask=(e < R)[None, :])
            else:
                tl.store(rows + slot * W + C + e[None, :], k, mask=(e < R)[None, :])
    elif R > 0:
        h = (part - 1) * HEADS + tl.arange(0, HEADS)
        at = q + t * stride_qt + first + h[:, None] * stride_qh + e[None, :]
        mask = (h < H)[:, None] & (e < R)[None, :]
        pairs = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        tl.store(at, _rotated(pairs, c_wide, s_wide, HEADS, RP).to(q.dtype.element_ty), mask=mask)


@triton.jit
def _write(
    kv, weight, cos, sin, rows, scales, ropes, slots, q,
    stride_kv, stride_qt, stride_qh, eps, H, first,
    C: tl.constexpr, R: tl.constexpr, W: tl.constexpr, CP: tl.constexpr, RP: tl.constexpr,
    FP8: tl.constexpr, HEADS: tl.constexpr, SLOTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    write_token(
        kv, weight, cos, sin, rows, scales, ropes, slots, q, stride_kv, stride_qt, stride_qh, eps, H, first,
        tl.program_id(0).to(tl.int64), tl.program_id(1), C, R, W, CP, RP, FP8, HEADS, SLOTS,
    )  # fmt: skip


class Written(NamedTuple):
    """What the kernels are told of what is written: views, and widths rounded up to powers of two."""

    kv: Tensor
    cos: Tensor
    sin: Tensor
    scales: Tensor
    ropes: Tensor
    slots: Tensor
    fp8: bool
    C: int
    R: int
    CP: int
    RP: int

    @staticmethod
    def of(kv: Tensor, cos: Tensor | None, sin: Tensor | None, rows: Tensor, slots: Tensor | None) -> "Written":
        R = 0 if cos is None else 2 * cos.shape[1]
        C, fp8 = kv.shape[1] - R, rows.dtype == torch.uint8
        kv = kv if kv.stride(1) == 1 else kv.contiguous()
        return Written(
            kv, kv if cos is None else cos.contiguous(), kv if sin is None else sin.contiguous(),
            rows.view(torch.float32) if fp8 else rows, rows.view(torch.bfloat16) if fp8 else rows,
            kv if slots is None else slots, fp8, C, R,
            max(triton.next_power_of_2(C), 128 if fp8 else 1), max(triton.next_power_of_2(R), 2),
        )  # fmt: skip


def latent_write(
    kv: Tensor,
    norm_weight: Tensor,
    eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
    rows: Tensor,
    slots: Tensor | None,
    q: Tensor | None,
) -> None:
    """Arguments as the operation's; writes `rows`, and `q` in place."""
    T, it = kv.shape[0], Written.of(kv, cos, sin, rows, slots)
    if T == 0:
        return
    H = 0 if q is None or not it.R else q.shape[1]
    if q is None:
        q = it.kv
    pdl = dependent(kv)
    _write[(T, 1 + triton.cdiv(H, HEADS))](
        it.kv, norm_weight, it.cos, it.sin, rows, it.scales, it.ropes, it.slots, q,
        it.kv.stride(0), q.stride(0), q.stride(1), eps, H, q.shape[-1] - it.R,
        C=it.C, R=it.R, W=rows.shape[1], CP=it.CP, RP=it.RP, FP8=it.fp8, HEADS=HEADS, SLOTS=slots is not None,
        PDL=pdl, num_warps=4, launch_pdl=pdl,
    )  # fmt: skip
