"""Routed experts with block-scaled e4m3 weights: sorted, multiplied and summed on the device, unknown to the host.

The (token, choice) pairs are put in the order of their experts and cut into tiles of one expert each. How many tiles
there are is the device's to know: the grid is the most there can be, and programs without a tile return at once. A
weight tile is the left operand of each product, whatever the right one is: few tokens as they are, where reading the
weights is all that takes time, or many tokens in e4m3 with a scale a row and 128 columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from abyssal.kernels.fp8 import (
    BLOCK,
    FP8_MAX,
    hopper,
    quantize_rows,
    quantized_rows,
    store_quantized,
    weight_bytes,
    widen,
)

SORT_FEW = 2048  # choices up to which comparing each with each beats a sort


@triton.jit(do_not_specialize=["choices"])
def _sort_few(indices, order, counts, choices, experts, SIZE: tl.constexpr):
    """A choice's place is how many come before it: those of earlier experts, and earlier ones of the same."""
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    mine = tl.load(indices + i, mask=i < choices, other=experts)
    place, count = tl.zeros([SIZE], tl.int32), tl.zeros([SIZE], tl.int32)
    for start in range(0, choices, SIZE):
        j = start + tl.arange(0, SIZE)
        other = tl.load(indices + j, mask=j < choices, other=experts)
        before = (other[None, :] < mine[:, None]) | ((other[None, :] == mine[:, None]) & (j[None, :] < i[:, None]))
        place += tl.sum(before.to(tl.int32), 1)
        count += tl.sum((other[None, :] == i[:, None]).to(tl.int32), 1)
    tl.store(order + place, i, mask=i < choices)
    tl.store(counts + i, count, mask=i < experts)


@triton.jit(do_not_specialize=["slots"])
def _cut(counts, tiles, experts, slots, TILE: tl.constexpr, EXPERTS: tl.constexpr, SLOTS: tl.constexpr):
    """Counts `[E]` -> `tiles [3, slots]`: each tile's expert (-1 where there is no tile), first choice and end."""
    e, slot = tl.arange(0, EXPERTS), tl.arange(0, SLOTS)
    count = tl.load(counts + e, mask=e < experts, other=0).to(tl.int32)
    needed = tl.cdiv(count, TILE)
    place = tl.cumsum(needed, 0) - needed
    end = tl.cumsum(count, 0)
    tl.store(tiles + slot, -1, mask=(slot < slots) & (slot >= tl.sum(needed, 0)))
    for j in range(tl.max(needed, 0)):
        at = tiles + place + j
        first = end - count + j * TILE
        tl.store(at, e, mask=j < needed)
        tl.store(at + slots, first, mask=j < needed)
        tl.store(at + 2 * slots, tl.minimum(first + TILE, end), mask=j < needed)


@triton.jit
def _add_block(sums, w_at, w_here, w_scale, rows, rows_factor, DTYPE: tl.constexpr):
    """sums + w · rowsᵀ over 128 columns: e4m3 by e4m3, or the weight widened for rows that are as they were."""
    w = tl.load(w_at, mask=w_here, other=0.0, eviction_policy="evict_first")
    if tl.float8e4nv == DTYPE:
        return sums + tl.dot(w, rows) * (rows_factor * w_scale)[None, :]
    # A weight is one number of the three-part product that float32 rows make; bf16 and half take no notice.
    return sums + tl.dot(widen(w, DTYPE), rows, input_precision="tf32x3") * w_scale


@triton.jit(do_not_specialize=["slots", "h_scale_stride"])
def _gate_up(
    x, x_scale, w1, s1, w3, s3, order, tiles, h, h_scale, slots, chosen, D, F, x_stride, x_scale_stride, h_stride,
    h_scale_stride, TILE: tl.constexpr, ROWS: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """silu(w1 x) · (w3 x) for a tile's choices and ROWS of the weights."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    FP8: tl.constexpr = tl.float8e4nv == DTYPE
    slot, n_tile = tl.program_id(1), tl.program_id(0)
    expert = tl.load(tiles + slot).to(tl.int64)
    if expert >= 0:
        choice = tl.load(tiles + slots + slot) + tl.arange(0, TILE)
        here = choice < tl.load(tiles + 2 * slots + slot)
        token = (tl.load(order + choice, mask=here, other=0) // chosen).to(tl.int64)
        n = n_tile * ROWS + tl.arange(0, ROWS)
        k = tl.arange(0, BLOCK)
        blocks = tl.cdiv(D, BLOCK)
        scale_at = expert * tl.cdiv(F, BLOCK) * blocks + n_tile * ROWS // BLOCK * blocks
        w_at = (expert * F + n.to(tl.int64))[:, None] * D + k[None, :]
        x_at = x + token[None, :] * x_stride + k[:, None]
        gate, up = tl.zeros([ROWS, TILE], tl.float32), tl.zeros([ROWS, TILE], tl.float32)
        for b in tl.range(blocks, num_stages=STAGES):
            w_here = (n < F)[:, None]
            if not EVEN:
                w_here = w_here & (k + b * BLOCK < D)[None, :]
            if FP8:
                rows = tl.load(x_at + b * BLOCK)  # padded with zeros to whole blocks
                factor = tl.load(x_scale + b * x_scale_stride + token)
            else:
                x_here = here[None, :] if EVEN else here[None, :] & (k + b * BLOCK < D)[:, None]
                rows = tl.load(x_at + b * BLOCK, mask=x_here, other=0.0)
                factor = 1.0
            at = w_at + b * BLOCK
            gate = _add_block(gate, w1 + at, w_here, tl.load(s1 + scale_at + b), rows, factor, DTYPE)
            up = _add_block(up, w3 + at, w_here, tl.load(s3 + scale_at + b), rows, factor, DTYPE)
        hidden = gate / (1.0 + tl.exp(-gate)) * up
        if FP8:  # ROWS is BLOCK: the tile holds what shares a scale
            scale = tl.maximum(tl.max(tl.abs(hidden), 0), 1e-12) / FP8_MAX
            tl.store(h_scale + n_tile * h_scale_stride + choice, scale, mask=here)
            hidden = hidden / scale[None, :]
        at = h + choice.to(tl.int64)[None, :] * h_stride + n[:, None]
        tl.store(at, hidden.to(DTYPE), mask=here[None, :] & (n < h_stride)[:, None])


@triton.jit(do_not_specialize=["slots", "h_scale_stride"])
def _down(
    h, h_scale, w2, s2, order, tiles, y, slots, D, F, h_stride, h_scale_stride,
    TILE: tl.constexpr, ROWS: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """w2 h for a tile's choices and ROWS of the weight; each choice's row where it was."""
    DTYPE: tl.constexpr = h.dtype.element_ty
    FP8: tl.constexpr = tl.float8e4nv == DTYPE
    slot, n_tile = tl.program_id(1), tl.program_id(0)
    expert = tl.load(tiles + slot).to(tl.int64)
    if expert >= 0:
        choice = tl.load(tiles + slots + slot) + tl.arange(0, TILE)
        here = choice < tl.load(tiles + 2 * slots + slot)
        n = n_tile * ROWS + tl.arange(0, ROWS)
        k = tl.arange(0, BLOCK)
        blocks = tl.cdiv(F, BLOCK)
        scale_at = expert * tl.cdiv(D, BLOCK) * blocks + n_tile * ROWS // BLOCK * blocks
        w_at = (expert * D + n.to(tl.int64))[:, None] * F + k[None, :]
        h_at = h + choice.to(tl.int64)[None, :] * h_stride + k[:, None]
        sums = tl.zeros([ROWS, TILE], tl.float32)
        for b in tl.range(blocks, num_stages=STAGES):
            w_here = (n < D)[:, None]
            if not EVEN:
                w_here = w_here & (k + b * BLOCK < F)[None, :]
            if FP8:
                rows = tl.load(h_at + b * BLOCK)  # the buffer ends with a spare tile
                factor = tl.load(h_scale + b * h_scale_stride + choice, mask=here, other=0.0)
            else:
                x_here = here[None, :] if EVEN else here[None, :] & (k + b * BLOCK < F)[:, None]
                rows = tl.load(h_at + b * BLOCK, mask=x_here, other=0.0)
                factor = 1.0
            sums = _add_block(sums, w2 + w_at + b * BLOCK, w_here, tl.load(s2 + scale_at + b), rows, factor, DTYPE)
        back = tl.load(order + choice, mask=here, other=0).to(tl.int64)
        at = y + back[None, :] * D + n[:, None]
        tl.store(at, sums.to(y.dtype.element_ty), mask=here[None, :] & (n < D)[:, None])


@triton.jit(do_not_specialize=["tokens", "h_scale_stride"])
def _swiglu(gate, up, h, h_scale, tokens, F, h_stride, h_scale_stride, TOKENS: tl.constexpr):
    """silu(gate) · up in e4m3, for the down product."""
    t, block = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.program_id(1)
    f = block * BLOCK + tl.arange(0, BLOCK)
    here, at = (t < tokens)[:, None] & (f < F)[None, :], t.to(tl.int64)[:, None] * F + f[None, :]
    a = tl.load(gate + at, mask=here, other=0.0).to(tl.float32)
    b = tl.load(up + at, mask=here, other=0.0).to(tl.float32)
    store_quantized(a / (1.0 + tl.exp(-a)) * b, h, h_scale, t, block, tokens, h_stride, h_scale_stride)


@triton.jit
def _sum_choices(y, weights, out, D, CHOSEN: tl.constexpr, SIZE: tl.constexpr):
    token, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    total = tl.zeros([SIZE], tl.float32)
    for k in tl.static_range(CHOSEN):
        gate = tl.load(weights + token * CHOSEN + k).to(tl.float32)
        total += gate * tl.load(y + (token * CHOSEN + k) * D + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(out + token * D + d, total.to(out.dtype.element_ty), mask=d < D)


def _sorted(indices: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """The choices in the order of their experts, `[T·K]`, and each expert's count, `[E]`."""
    choices = indices.numel()
    if choices > SORT_FEW:
        flat = indices.flatten()
        counts = torch.zeros(experts, dtype=torch.int64, device=flat.device)
        return flat.argsort(stable=True), counts.scatter_add_(0, flat, torch.ones_like(flat))
    order, counts = (torch.empty(n, dtype=torch.int32, device=indices.device) for n in (choices, experts))
    _sort_few[(triton.cdiv(max(choices, experts), 32),)](indices, order, counts, choices, experts, SIZE=32, num_warps=4)
    return order, counts


def experts(
    x: Tensor, w1: Tensor, s1: Tensor, w2: Tensor, s2: Tensor, w3: Tensor, s3: Tensor, indices: Tensor,
    weights: Tensor, *, fp8: bool, tuning: tuple[int, ...] | None = None,
) -> Tensor:  # fmt: skip
    """As `ops.fp8_linear.fp8_experts`; `fp8`: whether rows are rounded to e4m3 as the weights are."""
    (T, D), E, K = x.shape, w1.shape[0], indices.shape[1]
    choices = T * K
    order, counts = _sorted(indices.contiguous(), E)
    if fp8 and not tuning and choices >= 64 * E and hopper(w1) and hopper(w2) and hopper(w3):
        y = _large(x, w1, s1, w2, s2, w3, s3, order, counts, K)
    else:
        tuning = tuning or _tuning(choices, E, fp8, x.dtype)
        y = _tiled(x, w1, s1, w2, s2, w3, s3, order, counts, K, fp8, *tuning)
    out = torch.empty_like(x)
    _sum_choices[(T, triton.cdiv(D, 1024))](y, weights.contiguous(), out, D, CHOSEN=K, SIZE=1024, num_warps=4)
    return out


def _tiles(counts: Tensor, choices: int, size: int) -> Tensor:
    """`[3, slots]`: the expert (or -1), first choice and end of each tile, for as many tiles as there can be."""
    experts = len(counts)
    slots = choices // size + min(experts, choices)
    tiles = torch.empty(3, slots, dtype=torch.int32, device=counts.device)
    _cut[(1,)](counts, tiles, experts, slots, TILE=size, EXPERTS=triton.next_power_of_2(experts),
               SLOTS=triton.next_power_of_2(slots), num_warps=8)  # fmt: skip
    return tiles


def _tiled(
    x: Tensor, w1: Tensor, s1: Tensor, w2: Tensor, s2: Tensor, w3: Tensor, s3: Tensor, order: Tensor, counts: Tensor,
    chosen: int, fp8: bool, tile: int, rows: int, warps: int, stages: int,
) -> Tensor:  # fmt: skip
    """`[T·K, D]`, each choice's output, with gate, up and their product in one kernel."""
    choices, (F, D), device = len(order), w1.shape[1:], x.device
    tiles = _tiles(counts, choices, tile)
    if fp8:
        left, left_scale = quantize_rows(x)
        h, h_scale = quantized_rows(choices + tile, F, device)  # rows are read in whole tiles
    else:
        left = left_scale = x
        h = h_scale = torch.empty(choices, F, dtype=x.dtype, device=device)
        w1, w2, w3 = weight_bytes(w1), weight_bytes(w2), weight_bytes(w3)
    _gate_up[(triton.cdiv(F, rows), tiles.shape[1])](
        left, left_scale, w1, s1, w3, s3, order, tiles, h, h_scale, tiles.shape[1], chosen, D, F, left.stride(0),
        left_scale.stride(0), h.stride(0), h_scale.stride(0),
        TILE=tile, ROWS=rows, EVEN=D % BLOCK.value == 0, STAGES=stages, num_warps=warps,
    )  # fmt: skip
    y = torch.empty(choices, D, dtype=x.dtype, device=device)
    _down[(triton.cdiv(D, rows), tiles.shape[1])](
        h, h_scale, w2, s2, order, tiles, y, tiles.shape[1], D, F, h.stride(0), h_scale.stride(0),
        TILE=tile, ROWS=rows, EVEN=F % BLOCK.value == 0, STAGES=stages, num_warps=warps,
    )  # fmt: skip
    return y


def _large(
    x: Tensor, w1: Tensor, s1: Tensor, w2: Tensor, s2: Tensor, w3: Tensor, s3: Tensor, order: Tensor, counts: Tensor,
    chosen: int,
) -> Tensor:  # fmt: skip
    """The same for many choices an expert, where the rate of the products is all: a product at a time."""
    from abyssal.kernels.fp8_hopper import TOKENS, scaled_product

    tiles = _tiles(counts, len(order), TOKENS)
    rows = quantize_rows(x, order, chosen)
    gate, up = (scaled_product(*rows, w, s, x.dtype, tiles) for w, s in ((w1, s1), (w3, s3)))
    h, h_scale = quantized_rows(len(order), w1.shape[1], x.device)
    _swiglu[(triton.cdiv(len(order), 32), h_scale.shape[0])](
        gate, up, h, h_scale, len(order), w1.shape[1], h.stride(0), h_scale.stride(0), TOKENS=32, num_warps=4
    )
    return scaled_product(h, h_scale, w2, s2, x.dtype, tiles, order)


def _tuning(choices: int, experts: int, fp8: bool, dtype: torch.dtype) -> tuple[int, ...]:
    """Choices in a tile, the weight's rows in a tile, warps, stages; measured on an H100."""
    if fp8:  # 128 rows, whose scale goes with the product in e4m3
        return max(16, min(64, triton.next_power_of_2(choices // experts + 1))), 128, 8, 3
    if dtype == torch.float32:
        return 16, 64, 4, 2
    return (16, 32, 4, 4) if choices <= 16 else (16, 32, 2, 6)
