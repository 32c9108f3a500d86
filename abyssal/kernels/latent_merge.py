"""Merging what ranges left of a sequence: the second launch of latent decoding (Triton).

Parts are added in their order, the same at every run. For one token W_UV is applied in the same launch. Both are
programmatic dependents: they find which parts are theirs while the attending launch still runs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from abyssal.kernels.gate import dependent

LN2 = tl.constexpr(0.6931471805599453)
AT_ONCE = tl.constexpr(16)  # parts that are read at a time
VALUES = 16  # a program, where W_UV is applied while merging
ALONE = 32  # ranges a sequence is split into at most, where they may depend on its own length alone


@triton.jit
def tiles_of_all(cu_q, context_lens, S, row, H: tl.constexpr, S_PAD: tl.constexpr, BN: tl.constexpr):
    """[S_PAD]: how many tiles each sequence has; none where its queries and heads do not reach up to `row`."""
    s = tl.arange(0, S_PAD)
    queries = tl.load(cu_q + s + 1, mask=s < S, other=0) - tl.load(cu_q + s, mask=s < S, other=0)
    lens = tl.load(context_lens + s, mask=s < S, other=0)
    return tl.where(queries * H > row, (lens + BN - 1) // BN, 0)


@triton.jit
def own_share(n, SPLITS: tl.constexpr):
    """Tiles a range where each sequence of n is split by its own length alone: at least 8, at most SPLITS ranges."""
    return tl.maximum((n + SPLITS - 1) // SPLITS, 8)


@triton.jit
def _parts(
    cu_q, context_lens, t, h, S, P,
    H: tl.constexpr, S_PAD: tl.constexpr, BLOCKS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """Of query t and head h: its row among its sequence's, and the first and last range that its sequence lies in,
    counted within the sequence where ranges are its own; `base`: what its own ranges begin at."""
    i = tl.arange(0, S_PAD)
    if S_PAD == 1:
        s = 0
    else:
        s = tl.sum(((tl.load(cu_q + i + 1, mask=i < S, other=2**31 - 1) <= t) & (i < S)).to(tl.int32))
    row = (t - tl.load(cu_q + s)) * H + h
    if SPLITS > 0:
        own = (tl.load(context_lens + s) + BN - 1) // BN
        first, last = 0, (own - 1) // own_share(own, SPLITS)
    elif S_PAD == 1:
        own = (tl.load(context_lens) + BN - 1) // BN
        first, last = 0, (own - 1) // tl.maximum((own + P - 1) // P, 1)
    else:
        n = tiles_of_all(cu_q, context_lens, S, row // BM * BM, H, S_PAD, BN)
        chunk = tl.maximum((tl.sum(n) + P - 1) // P, 1)
        begin = tl.sum(tl.where(i < s, n, 0))
        first, last = begin // chunk, (begin + tl.sum(tl.where(i == s, n, 0)) - 1) // chunk
    return row, first, last, s * SPLITS


@triton.jit
def _place(p, first, row, base, BLOCKS: tl.constexpr, BM: tl.constexpr, SPLITS: tl.constexpr):
    """Where range p left a row of its part."""
    slot = base + p if SPLITS > 0 else 2 * p + tl.where(p == first, 1, 0)
    return slot.to(tl.int64) * (BLOCKS * BM) + row


@triton.jit
def _merged(
    part, part_lse, row, first, last, base, c,
    C: tl.constexpr, BLOCKS: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Columns c of a row, its parts added in their order, and the logarithm of the softmax's denominator to base 2.

    AT_ONCE parts are asked for at a time, each as a row of its own: no thread waits for another.
    """
    wide: tl.constexpr = part.dtype.element_ty
    top = tl.full([], float("-inf"), wide)
    weight = tl.full([], 0.0, wide)
    acc = tl.zeros([BC], wide)
    for k in tl.range(first, last + 1, AT_ONCE):
        larger = top
        for i in tl.static_range(AT_ONCE):
            at = _place(k + i, first, row, base, BLOCKS, BM, SPLITS)
            larger = tl.maximum(larger, tl.load(part_lse + at, mask=k + i <= last, other=float("-inf")))
        fade = tl.exp2(top - larger)
        weight *= fade
        acc *= fade
        for i in tl.static_range(AT_ONCE):
            at = _place(k + i, first, row, base, BLOCKS, BM, SPLITS)
            share = tl.exp2(tl.load(part_lse + at, mask=k + i <= last, other=float("-inf")) - larger)
            weight += share
            acc += share * tl.load(part + at * C + c, mask=(c < C) & (k + i <= last), other=0.0)
        top = larger
    return acc / weight, top + tl.log2(weight)


@triton.jit(do_not_specialize=["S", "P"])
def _merge(
    cu_q, context_lens, out, lse, part, part_lse, S, P,
    H: tl.constexpr, C: tl.constexpr, S_PAD: tl.constexpr, BLOCKS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BC: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One query of one head and BC columns a program, where a sequence's tiles lay in more than one range."""
    t, h = tl.program_id(0) // H, tl.program_id(0) % H
    row, first, last, base = _parts(cu_q, context_lens, t, h, S, P, H, S_PAD, BLOCKS, BM, BN, SPLITS)
    if PDL:
        # Every program waits, also those with nothing to merge: who comes next must find the attending launch ended.
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if first < last:
        c = tl.program_id(1) * BC + tl.arange(0, BC)
        acc, sums = _merged(part, part_lse, row, first, last, base, c, C, BLOCKS, BM, BC, SPLITS)
        where = (t.to(tl.int64) * H + h) * C + c
        tl.store(out + where, acc.to(out.dtype.element_ty), mask=c < C)
        if tl.program_id(1) == 0:
            tl.store(lse + t * H + h, sums * LN2)


@triton.jit(do_not_specialize=["S", "P"])
def _merge_values(
    cu_q, context_lens, out, lse, part, part_lse, w_uv, y, S, P, stride_h, stride_v,
    H: tl.constexpr, C: tl.constexpr, V: tl.constexpr, S_PAD: tl.constexpr, BLOCKS: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, CP: tl.constexpr, BV: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One query of one head, merged, and BV of its values: W_UV times the merged row, which is rounded as `_merge`
    rounds it."""
    t, h = tl.program_id(0) // H, tl.program_id(0) % H
    v, c = tl.program_id(1) * BV + tl.arange(0, BV), tl.arange(0, CP)
    w = tl.load(
        w_uv + h.to(tl.int64) * stride_h + v[:, None] * stride_v + c[None, :],
        mask=(v < V)[:, None] & (c < C)[None, :], other=0.0,
    )  # fmt: skip
    row, first, last, base = _parts(cu_q, context_lens, t, h, S, P, H, S_PAD, BLOCKS, BM, BN, SPLITS)
    where = t.to(tl.int64) * H + h
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if first < last:
        acc, sums = _merged(part, part_lse, row, first, last, base, c, C, BLOCKS, BM, CP, SPLITS)
        if tl.program_id(1) == 0:
            tl.store(lse + where, sums * LN2)
    else:
        acc = tl.load(out + where * C + c, mask=c < C, other=0.0).to(part.dtype.element_ty)
    acc = acc.to(out.dtype.element_ty).to(tl.float32)
    total = tl.sum(w.to(tl.float32) * acc[None, :], 1)
    tl.store(y + where * V + v, total.to(y.dtype.element_ty), mask=v < V)


def merge(
    cu_q: Tensor, context_lens: Tensor, out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor,
    P: int, blocks: int, BM: int, BN: int, splits: int = 0, w_uv: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Fills `out` and `lse` where a sequence's tiles lay in several of the P ranges, of which each sequence has
    `splits` of its own where that is not 0. Returns `out`, or with `w_uv` its values `[T, H, V]`; `out` may then be
    left as it was."""
    T, H, C = out.shape
    S = context_lens.shape[0]
    same = {
        # One sequence needs no search for its own, whose sums over lanes take longer than all else.
        "H": H, "C": C, "S_PAD": 1 if S == 1 else max(triton.next_power_of_2(S), 128), "BLOCKS": blocks, "BM": BM,
        "BN": BN, "SPLITS": splits, "PDL": dependent(out), "launch_pdl": dependent(out),
    }  # fmt: skip
    if w_uv is not None:
        V, w_uv = w_uv.shape[1], w_uv if w_uv.stride(2) == 1 else w_uv.contiguous()
        y = torch.empty(T, H, V, dtype=out.dtype, device=out.device)
        _merge_values[(T * H, triton.cdiv(V, VALUES))](
            cu_q, context_lens, out, lse, part, part_lse, w_uv, y, S, P, w_uv.stride(0), w_uv.stride(1),
            V=V, CP=triton.next_power_of_2(C), BV=VALUES, num_warps=8, **same,
        )  # fmt: skip
        return y
    # Few rows are cut finely, to be merged by many programs; of many, most have nothing to merge and should cost
    # little.
    columns = min(triton.next_power_of_2(C), 128 if T * H <= 256 else 512)
    _merge[(T * H, triton.cdiv(C, columns))](
        cu_q, context_lens, out, lse, part, part_lse, S, P, BC=columns, num_warps=4, **same
    )
    return out
