"""The experts for a few tokens: every weight of a touched expert is read once, and reading is all that takes time.

Two launches. `_up_kernel`: a program takes BF of an expert's F columns for all tokens that chose it, and leaves
weight * silu(w1 x) * (w3 x). `_down_kernel`: a program takes BD of D rows of w2; the last program to arrive at a block
of D sums each token's choices, in their order, so that results repeat bitwise. Shared experts are further choices,
made by every token.

Tokens stand in the columns of the products and weights in the rows: 16 columns cost the tensor cores nothing worth
counting beside the reading. Each program finds the tokens of its expert itself, among at most a few thousand choices,
so nothing is sorted in a launch of its own.

Both launches are programmatic dependents: they start while the kernel before them ends, ask L2 for their first
weights, and only then wait. A prefetch to L2 is safe whatever the kernel before is still writing.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from abyssal.kernels.fp8 import weight_bytes, widen
from abyssal.kernels.gate import dependent

SCALE_BLOCK = tl.constexpr(128)
SMS = 132  # of an H100
PICKED = 32768  # numbers compared at a time to pick an expert's tokens: choices times tokens of a product


class Tile(NamedTuple):
    """How a launch cuts its work: rows of a weight a program, columns a step, steps in flight, and how many columns
    are asked of L2 before the kernel waits."""

    rows: int
    step: int
    stages: int
    warps: int
    ahead: int = 256


@triton.jit
def _prefetch(at, ROWS: tl.constexpr, COLS: tl.constexpr, stride, WIDTH: tl.constexpr):
    """Asks L2 for the first COLS values of ROWS rows, a line of 128 bytes (WIDTH values) at a time."""
    lines = at + tl.arange(0, ROWS)[:, None] * stride + tl.arange(0, COLS // WIDTH)[None, :] * WIDTH
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [lines.to(tl.int64)], tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _expert(indices, slot, CHOICES: tl.constexpr, BY_EXPERT: tl.constexpr, CACHE: tl.constexpr):
    """The expert of a slot: slots are experts, or, where there are fewer choices than experts, choices. Of the
    choices that fell on one expert the first does the work of all; the others' slots get -1."""
    if BY_EXPERT:
        return slot
    else:
        j = tl.arange(0, CHOICES)
        expert = tl.load(indices + slot, cache_modifier=CACHE).to(tl.int32)
        before = tl.load(indices + j, mask=j < slot, other=-1, cache_modifier=CACHE).to(tl.int32)
        return tl.where(tl.sum((before == expert).to(tl.int32)) == 0, expert, -1)


@triton.jit
def _rank(indices, expert, choices, CHOICES: tl.constexpr, CACHE: tl.constexpr):
    """Each choice's place among those that fell on `expert` (`[CHOICES]`, -1 elsewhere), and how many did."""
    j = tl.arange(0, CHOICES)
    all_of_them = tl.load(indices + j, mask=j < choices, other=-1, cache_modifier=CACHE).to(tl.int32)
    mine = (all_of_them == expert).to(tl.int32)
    return tl.where(mine == 1, tl.cumsum(mine) - 1, -1), tl.sum(mine)


@triton.jit
def _pick(rank, start, CHOICES: tl.constexpr, N: tl.constexpr):
    """`[N]`: the choices of places start to start + N; 0, which can be read, past the last."""
    j = tl.arange(0, CHOICES)
    here = rank[None, :] == start + tl.arange(0, N)[:, None]
    return tl.sum(tl.where(here, j[None, :], 0), 1)


@triton.jit
def _scaled_dot(w, x, acc, scale, SCALED: tl.constexpr):
    """acc + w x; a weight of e4m3 is widened exactly, and its block's scale falls on the product."""
    if SCALED:
        return acc + tl.dot(widen(w, x.dtype), x, input_precision="ieee") * scale
    else:
        return tl.dot(w, x, acc, input_precision="ieee")


@triton.jit
def _up_tile(
    x, w1, w3, s1, s3, hidden, row, token, weight, live, f0, stride, zero,
    D: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, BK: tl.constexpr, N: tl.constexpr,
    SCALED: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """hidden[row, f0:f0 + BF] for N rows, whose tokens are `token` and gate values `weight`."""
    f = f0 + tl.arange(0, BF)
    k = tl.arange(0, BK)
    at = tl.minimum(f, F - 1)[:, None] * D + k[None, :]
    x_at = x + token[None, :] * D + k[:, None]
    a = tl.zeros([BF, N], tl.float32)
    b = tl.zeros([BF, N], tl.float32)
    scale1 = 1.0
    scale3 = 1.0
    # The compiler unrolls a loop of known length whole: tens of KB of instructions for each program to fetch.
    for k0 in tl.range(0, D + zero if PDL else D, BK, num_stages=STAGES):
        if D % BK == 0:
            x_k = tl.load(x_at + k0)
            w1_k = tl.load(w1 + at + k0, eviction_policy="evict_first")
            w3_k = tl.load(w3 + at + k0, eviction_policy="evict_first")
        else:
            inside = k < D - k0
            x_k = tl.load(x_at + k0, mask=inside[:, None], other=0.0)
            w1_k = tl.load(w1 + at + k0, mask=inside[None, :], other=0.0)
            w3_k = tl.load(w3 + at + k0, mask=inside[None, :], other=0.0)
        if SCALED:
            block = (f0 // SCALE_BLOCK) * stride + k0 // SCALE_BLOCK
            scale1 = tl.load(s1 + block)
            scale3 = tl.load(s3 + block)
        a = _scaled_dot(w1_k, x_k, a, scale1, SCALED)
        b = _scaled_dot(w3_k, x_k, b, scale3, SCALED)
    h = a / (1 + tl.exp(-a)) * b * weight[None, :]
    tl.store(
        hidden + row[None, :] * F + f[:, None],
        h.to(hidden.dtype.element_ty),
        mask=live[None, :] & (f[:, None] < F),
    )


@triton.jit
def _up_chosen(
    x, w1, w3, s1, s3, hidden, weights, rank, start, count, f0, stride, zero,
    D: tl.constexpr, F: tl.constexpr, K: tl.constexpr, KS: tl.constexpr, CHOICES: tl.constexpr,
    BF: tl.constexpr, BK: tl.constexpr, N: tl.constexpr, SCALED: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    choice = _pick(rank, start, CHOICES, N)
    token = choice // K
    weight = tl.load(weights + choice).to(tl.float32)
    live = start + tl.arange(0, N) < count
    row = token * KS + choice % K
    _up_tile(
        x, w1, w3, s1, s3, hidden, row, token, weight, live, f0, stride, zero, D, F, BF, BK, N, SCALED, STAGES, PDL
    )  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def _up_kernel(
    x, w1, w3, w1_scale, w3_scale, shared1, shared3, shared1_scale, shared3_scale, indices, weights, hidden, arrivals,
    T, D: tl.constexpr, F: tl.constexpr, K: tl.constexpr, SHARED: tl.constexpr,
    CHOICES: tl.constexpr, BY_EXPERT: tl.constexpr, TOKENS: tl.constexpr, MOST: tl.constexpr,
    BF: tl.constexpr, BK: tl.constexpr, SCALED: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr,
    WIDTH: tl.constexpr, BLOCKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    KS: tl.constexpr = K + SHARED
    HALF: tl.constexpr = BK // 2  # Wide blocks of tokens take room from the weights' stages.
    MORE: tl.constexpr = STAGES + 1
    SOON: tl.constexpr = min(AHEAD, 256)
    blocks = tl.cdiv(F, BF)
    slot = tl.program_id(0) // blocks
    f0 = tl.program_id(0) % blocks * BF
    stride = tl.cdiv(D, SCALE_BLOCK)
    scales = stride * tl.cdiv(F, SCALE_BLOCK)
    zero = T >> 30
    if PDL and AHEAD > 0 and slot < SHARED and f0 + BF <= F:
        _prefetch(shared1 + (slot * F + f0) * D, BF, AHEAD, D, WIDTH)
        _prefetch(shared3 + (slot * F + f0) * D, BF, AHEAD, D, WIDTH)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if tl.program_id(0) == 0:
        tl.store(arrivals + tl.arange(0, BLOCKS), tl.zeros([BLOCKS], tl.int32))
    if SHARED > 0 and slot < SHARED:
        # The shared experts' F_SHARED columns are cut as if each were a routed expert's F.
        first = slot * F
        t0 = 0
        while t0 < T:
            token = t0 + tl.arange(0, TOKENS)
            live = token < T
            token = tl.where(live, token, 0)
            _up_tile(
                x, shared1 + first * D, shared3 + first * D, shared1_scale + first // SCALE_BLOCK * stride,
                shared3_scale + first // SCALE_BLOCK * stride, hidden, token * KS + K + slot, token,
                tl.full([TOKENS], 1.0, tl.float32), live, f0, stride, zero, D, F, BF, BK if TOKENS == 16 else HALF,
                TOKENS, SCALED, STAGES if TOKENS == 16 else MORE, PDL,
            )  # fmt: skip
            t0 += TOKENS
    else:
        expert = _expert(indices, slot - SHARED, CHOICES, BY_EXPERT, "")
        if expert >= 0:
            offset = expert.to(tl.int64) * (F * D)
            at1 = w1 + offset
            at3 = w3 + offset
            if PDL and AHEAD > 0 and f0 + BF <= F:
                _prefetch(at1 + f0 * D, BF, SOON, D, WIDTH)
                _prefetch(at3 + f0 * D, BF, SOON, D, WIDTH)
            rank, count = _rank(indices, expert, T * K, CHOICES, "")
            s1 = w1_scale + expert * scales
            s3 = w3_scale + expert * scales
            start = 0
            while start < count:
                if MOST > 32 and count - start > 32:
                    _up_chosen(
                        x, at1, at3, s1, s3, hidden, weights, rank, start, count, f0, stride, zero, D, F, K, KS,
                        CHOICES, BF, HALF, 64, SCALED, MORE, PDL,
                    )  # fmt: skip
                    start += 64
                elif MOST > 16 and count - start > 16:
                    _up_chosen(
                        x, at1, at3, s1, s3, hidden, weights, rank, start, count, f0, stride, zero, D, F, K, KS,
                        CHOICES, BF, HALF, 32, SCALED, MORE, PDL,
                    )  # fmt: skip
                    start += 32
                else:
                    _up_chosen(
                        x, at1, at3, s1, s3, hidden, weights, rank, start, count, f0, stride, zero, D, F, K, KS,
                        CHOICES, BF, BK, 16, SCALED, STAGES, PDL,
                    )  # fmt: skip
                    start += 16


@triton.jit
def _down_tile(
    hidden, w2, s2, partial, row, live, d0, stride, zero,
    D: tl.constexpr, F: tl.constexpr, ROW: tl.constexpr,
    BD: tl.constexpr, BK: tl.constexpr, N: tl.constexpr, SCALED: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """partial[row, d0:d0 + BD] for N rows. `F` columns of w2, whose rows lie ROW apart."""
    d = d0 + tl.arange(0, BD)
    k = tl.arange(0, BK)
    at = tl.minimum(d, D - 1)[:, None] * ROW + k[None, :]
    h_at = hidden + row[None, :] * F + k[:, None]
    acc = tl.zeros([BD, N], tl.float32)
    scale2 = 1.0
    for k0 in tl.range(0, F + zero if PDL else F, BK, num_stages=STAGES):
        if F % BK == 0:
            h_k = tl.load(h_at + k0)
            w2_k = tl.load(w2 + at + k0, eviction_policy="evict_first")
        else:
            inside = k < F - k0
            h_k = tl.load(h_at + k0, mask=inside[:, None], other=0.0)
            w2_k = tl.load(w2 + at + k0, mask=inside[None, :], other=0.0)
        if SCALED:
            scale2 = tl.load(s2 + (d0 // SCALE_BLOCK) * stride + k0 // SCALE_BLOCK)
        acc = _scaled_dot(w2_k, h_k, acc, scale2, SCALED)
    tl.store(partial + row[None, :] * D + d[:, None], acc, mask=live[None, :] & (d[:, None] < D))


@triton.jit
def _down_chosen(
    hidden, w2, s2, partial, rank, start, count, d0, stride, zero,
    D: tl.constexpr, F: tl.constexpr, K: tl.constexpr, KS: tl.constexpr, CHOICES: tl.constexpr,
    BD: tl.constexpr, BK: tl.constexpr, N: tl.constexpr, SCALED: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    choice = _pick(rank, start, CHOICES, N)
    live = start + tl.arange(0, N) < count
    row = choice // K * KS + choice % K
    _down_tile(hidden, w2, s2, partial, row, live, d0, stride, zero, D, F, F, BD, BK, N, SCALED, STAGES, PDL)


@triton.jit(do_not_specialize=["T", "slots"])
def _down_kernel(
    hidden, w2, w2_scale, shared2, shared2_scale, indices, partial, arrivals, y,
    T, slots, D: tl.constexpr, F: tl.constexpr, K: tl.constexpr, SHARED: tl.constexpr,
    CHOICES: tl.constexpr, BY_EXPERT: tl.constexpr, TOKENS: tl.constexpr, MOST: tl.constexpr,
    BD: tl.constexpr, BK: tl.constexpr, SCALED: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr,
    WIDTH: tl.constexpr, TB: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    KS: tl.constexpr = K + SHARED
    HALF: tl.constexpr = BK // 2
    MORE: tl.constexpr = STAGES + 1
    slot = tl.program_id(0) % slots
    block = tl.program_id(0) // slots
    d0 = block * BD
    stride = tl.cdiv(F, SCALE_BLOCK)
    scales = stride * tl.cdiv(D, SCALE_BLOCK)
    zero = T >> 30
    expert = -1
    rank = tl.full([CHOICES], -1, tl.int32)
    count = 0
    # The gate's choices were there before _up_kernel began, so they may be read before it ends: from L2, since what
    # an L1 holds is known to be fresh only after the wait.
    if SHARED > 0 and slot < SHARED:
        if PDL and AHEAD > 0 and d0 + BD <= D:
            _prefetch(shared2 + d0.to(tl.int64) * (SHARED * F) + slot * F, BD, AHEAD, SHARED * F, WIDTH)
    else:
        expert = _expert(indices, slot - SHARED, CHOICES, BY_EXPERT, ".cg")
        if expert >= 0:
            if PDL and AHEAD > 0 and d0 + BD <= D:
                _prefetch(w2 + (expert.to(tl.int64) * D + d0) * F, BD, AHEAD, F, WIDTH)
            rank, count = _rank(indices, expert, T * K, CHOICES, ".cg")
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if SHARED > 0 and slot < SHARED:
        t0 = 0
        while t0 < T:
            token = t0 + tl.arange(0, TOKENS)
            live = token < T
            row = tl.where(live, token, 0) * KS + K + slot
            _down_tile(
                hidden, shared2 + slot * F, shared2_scale + slot * F // SCALE_BLOCK, partial, row, live, d0,
                tl.cdiv(SHARED * F, SCALE_BLOCK), zero, D, F, SHARED * F, BD, BK if TOKENS == 16 else HALF, TOKENS,
                SCALED, STAGES if TOKENS == 16 else MORE, PDL,
            )  # fmt: skip
            t0 += TOKENS
    else:
        at2 = w2 + tl.maximum(expert, 0).to(tl.int64) * (D * F)
        s2 = w2_scale + expert * scales
        start = 0
        while start < count:
            if MOST > 32 and count - start > 32:
                _down_chosen(
                    hidden, at2, s2, partial, rank, start, count, d0, stride, zero, D, F, K, KS, CHOICES, BD, HALF, 64,
                    SCALED, MORE, PDL,
                )  # fmt: skip
                start += 64
            elif MOST > 16 and count - start > 16:
                _down_chosen(
                    hidden, at2, s2, partial, rank, start, count, d0, stride, zero, D, F, K, KS, CHOICES, BD, HALF, 32,
                    SCALED, MORE, PDL,
                )  # fmt: skip
                start += 32
            else:
                _down_chosen(
                    hidden, at2, s2, partial, rank, start, count, d0, stride, zero, D, F, K, KS, CHOICES, BD, BK, 16,
                    SCALED, STAGES, PDL,
                )  # fmt: skip
                start += 16
    # All of this program's partial rows must be written before its arrival is seen.
    tl.debug_barrier()
    if tl.atomic_add(arrivals + block, 1, sem="acq_rel") == slots - 1:
        d = d0 + tl.arange(0, BD)
        t0 = 0
        while t0 < T:
            t = t0 + tl.arange(0, TB)
            inside = (t[:, None] < T) & (d[None, :] < D)
            at = partial + t[:, None] * KS * D + d[None, :]
            total = tl.zeros([TB, BD], tl.float32)
            for k in tl.static_range(KS):
                # Past L1: other programs wrote these.
                total += tl.load(at + k * D, mask=inside, other=0.0, cache_modifier=".cg")
            tl.store(y + t[:, None] * D + d[None, :], total.to(y.dtype.element_ty), mask=inside)
            t0 += TB


def tiles(tokens: int, slots: int, F: int, scaled: bool) -> tuple[Tile, Tile]:
    """Cuts of the two launches, measured on an H100 (docs/kernels.md): two programs an SM, unless a third avoids a
    second wave of few. Only a single token's launches are short enough for asking ahead to show."""
    if scaled:
        return Tile(32, 128, 6, 2, 0), Tile(64, 128, 4, 4, 0)
    ahead = 256 if tokens == 1 else 0
    third = 2 * SMS < slots * triton.cdiv(F, 64) <= 3 * SMS
    return Tile(64, 128, 2 if third else 3, 4, ahead), Tile(64, 128, 4, 4, ahead)


def experts_decode(
    x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, indices: Tensor, weights: Tensor,
    scales: tuple[Tensor, Tensor, Tensor] | None = None, cut: tuple[Tile, Tile] | None = None,
) -> Tensor:  # fmt: skip
    """`[T, D]`: Σ_k weights[t, k] · w2(silu(w1 x_t) · w3 x_t) with the weights of expert indices[t, k]; no gradients.

    `x [T, D]`, `w1`, `w3` `[E, F, D]`, `w2 [E, D, F]`, `indices [T, K]` of integers in [0, E), `weights [T, K]` of any
    float dtype. Meant for T <= 256, right for any. Weights are of x's dtype, or e4m3 with `scales`, those of w1, w2 and
    w3: `[E, F/128, D/128]`, `[E, D/128, F/128]`, `[E, F/128, D/128]` float32.
    """
    return moe_decode(x, w1, w2, w3, indices, weights, scales=scales, cut=cut)


def moe_decode(
    x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, indices: Tensor, weights: Tensor,
    shared_w1: Tensor | None = None, shared_w2: Tensor | None = None, shared_w3: Tensor | None = None,
    scales: tuple[Tensor, Tensor, Tensor] | None = None, shared_scales: tuple[Tensor, Tensor, Tensor] | None = None,
    cut: tuple[Tile, Tile] | None = None, pdl: bool | None = None,
) -> Tensor:  # fmt: skip
    """`[T, D]`: `experts_decode` plus the shared experts, `shared_w2(silu(shared_w1 x) · shared_w3 x)`, in the same
    launches (DeepSeek-V3, equation 12). `shared_w1`, `shared_w3` `[F', D]`, `shared_w2 [D, F']`, F' a multiple of F.

    Raises ValueError where F' is no multiple of F, where a weight is not contiguous, where weights and scales do not
    go together, or where FP8 weights are not whole blocks of 128.
    """
    (T, D), (E, F, _), K = x.shape, w1.shape, indices.shape[1]
    F_shared = 0 if shared_w1 is None else shared_w1.shape[0]
    if F_shared % F:
        raise ValueError(f"shared_w1: expected a multiple of the {F} columns of a routed expert, got {F_shared}")
    scaled = scales is not None
    if scaled != (w1.element_size() == 1) or (F_shared and scaled != (shared_scales is not None)):
        raise ValueError("scales: expected with e4m3 weights, routed and shared, and only with them")
    if scaled and (D % 128 or F % 128):
        raise ValueError(f"scales: expected widths of whole blocks of 128, got D = {D} and F = {F}")
    for name, w in {"w1": w1, "w2": w2, "w3": w3, "shared_w1": shared_w1, "shared_w2": shared_w2}.items():
        if w is not None and not w.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous weight, got strides {w.stride()}")
    x, indices, weights = x.contiguous(), indices.contiguous(), weights.contiguous()
    y = torch.empty_like(x)
    if not T:
        return y
    shared = F_shared // F
    routed = min(E, T * K)
    up, down = cut or tiles(T, routed + shared, F, scaled)
    tokens = max(16, triton.next_power_of_2(min(T, 64)))
    choices = max(16, triton.next_power_of_2(T * K))
    hidden = x.new_empty(T * (K + shared), F)
    partial = x.new_empty(T * (K + shared), D, dtype=torch.float32)
    blocks = triton.cdiv(D, down.rows)
    arrivals = torch.empty(triton.next_power_of_2(blocks), dtype=torch.int32, device=x.device)
    s1, s2, s3 = scales or (x, x, x)
    z1, z2, z3 = shared_scales or (s1, s2, s3)
    v1, v2, v3 = (w1, w2, w3) if shared_w1 is None else (shared_w1, shared_w2, shared_w3)
    if scaled:
        w1, w2, w3, v1, v2, v3 = (weight_bytes(w) for w in (w1, w2, w3, v1, v2, v3))
    pdl = dependent(x) if pdl is None else pdl
    width = 128 // w1.element_size()
    same = {
        "D": D, "F": F, "K": K, "SHARED": shared, "BY_EXPERT": routed == E,
        "TOKENS": tokens, "MOST": min(tokens, max(PICKED // choices, 16)), "CHOICES": choices, "SCALED": scaled,
        "WIDTH": width, "PDL": pdl, "launch_pdl": pdl,
    }  # fmt: skip
    _up_kernel[((routed + shared) * triton.cdiv(F, up.rows),)](
        x, w1, w3, s1, s3, v1, v3, z1, z3, indices, weights, hidden, arrivals, T,
        BF=up.rows, BK=up.step, STAGES=up.stages, AHEAD=_ahead(up, D, width),
        BLOCKS=arrivals.numel(), num_warps=up.warps, **same,
    )  # fmt: skip
    _down_kernel[((routed + shared) * blocks,)](
        hidden, w2, s2, v2, z2, indices, partial, arrivals, y, T, routed + shared,
        BD=down.rows, BK=down.step, STAGES=down.stages, AHEAD=_ahead(down, F, width),
        TB=max(1, min(triton.next_power_of_2(T), 1024 // down.rows)), num_warps=down.warps, **same,
    )  # fmt: skip
    return y


def _ahead(tile: Tile, columns: int, width: int) -> int:
    """Whole lines, a power of two of them, within a row."""
    lines = min(tile.ahead, columns) // width
    return width * (1 << lines.bit_length() - 1) if lines else 0
