"""What a decoding step does between its projections and attention, in one launch (Triton): `latent_write`, and each
head's query taken into the latent space, q_nope W_UK.

Some programs are those of `latent_write`. Each other one takes a head, BC of the latent's columns and BT tokens; it
asks for its part of W_UK before it waits for the launch before (see experts_decode.py).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from abyssal.kernels.gate import dependent
from abyssal.kernels.latent_write import HEADS, Written, write_token

COLUMNS = 64  # of the latent a program


@triton.jit(do_not_specialize=["T", "products"])
def _absorb(
    kv, weight, cos, sin, rows, scales, ropes, slots, q, w_uk, out,
    stride_kv, stride_qt, stride_qh, stride_wh, stride_wn, eps, T, H, first, products,
    C: tl.constexpr, R: tl.constexpr, W: tl.constexpr, CP: tl.constexpr, RP: tl.constexpr,
    FP8: tl.constexpr, HEADS: tl.constexpr, SLOTS: tl.constexpr, PARTS: tl.constexpr,
    NP: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    if i < products:
        blocks: tl.constexpr = (C + BC - 1) // BC
        h = i // blocks % H
        c = i % blocks * BC + tl.arange(0, BC)
        t = i // blocks // H * BT + tl.arange(0, BT)
        n = tl.arange(0, NP)
        w = tl.load(
            w_uk + h.to(tl.int64) * stride_wh + n[:, None] * stride_wn + c[None, :],
            mask=(n < first)[:, None] & (c < C)[None, :], other=0.0,
        )  # fmt: skip
        if PDL:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        at = q + t.to(tl.int64)[:, None] * stride_qt + h * stride_qh + n[None, :]
        x = tl.load(at, mask=(t < T)[:, None] & (n < first)[None, :], other=0.0)
        y = tl.dot(x, w, input_precision="ieee").to(out.dtype.element_ty)
        place = (t.to(tl.int64) * H + h) * C
        tl.store(out + place[:, None] + c[None, :], y, mask=(t < T)[:, None] & (c < C)[None, :])
    else:
        if PDL:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        i -= products
        write_token(
            kv, weight, cos, sin, rows, scales, ropes, slots, q, stride_kv, stride_qt, stride_qh, eps, H, first,
            (i // PARTS).to(tl.int64), i % PARTS, C, R, W, CP, RP, FP8, HEADS, SLOTS,
        )  # fmt: skip


def absorb(
    q: Tensor, w_uk: Tensor, kv: Tensor, norm_weight: Tensor, eps: float, cos: Tensor | None, sin: Tensor | None,
    rows: Tensor, slots: Tensor | None,
) -> Tensor:  # fmt: skip
    """`[T, H, C]`; arguments as the operation's. Writes `rows`, and the rotary part of `q` in place."""
    T, H, _ = q.shape
    it = Written.of(kv, cos, sin, rows, slots)
    out = torch.empty(T, H, it.C, dtype=q.dtype, device=q.device)
    if T == 0:
        return out
    w_uk = w_uk if w_uk.stride(2) == 1 else w_uk.contiguous()
    N = w_uk.shape[1]
    BT = min(max(triton.next_power_of_2(T), 16), 64)
    products = triton.cdiv(it.C, COLUMNS) * H * triton.cdiv(T, BT)
    parts = 1 + (triton.cdiv(H, HEADS) if it.R else 0)
    pdl = dependent(q)
    _absorb[(products + T * parts,)](
        it.kv, norm_weight, it.cos, it.sin, rows, it.scales, it.ropes, it.slots, q, w_uk, out,
        it.kv.stride(0), q.stride(0), q.stride(1), w_uk.stride(0), w_uk.stride(1), eps, T, H, N, products,
        C=it.C, R=it.R, W=rows.shape[1], CP=it.CP, RP=it.RP, FP8=it.fp8, HEADS=HEADS, SLOTS=slots is not None,
        PARTS=parts, NP=max(triton.next_power_of_2(N), 16), BC=COLUMNS, BT=BT, PDL=pdl, num_warps=4, launch_pdl=pdl,
    )  # fmt: skip
    return out
