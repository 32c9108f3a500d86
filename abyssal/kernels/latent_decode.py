"""Absorbed attention over a paged cache, for any head count, widths, page size and dtype (Triton).

One launch attends, a second merges (`latent_merge.py`). The work of a launch is the list of all sequences' tiles of BN
cached rows, laid end to end and cut into as many equal ranges as the device runs programs. Where a range begins and
ends follows from `context_lens` in the kernel itself, so a captured CUDA graph may be replayed at any lengths. A range
may end inside a sequence: what it has so far goes to memory in float32 with its log-sum-exp, and the second launch adds
up the parts of each sequence. A program has at most two such parts (one of the sequence that its range begins in, one
of the sequence that it ends in), so the parts' memory is fixed too.

Heads and query tokens are the rows of one matrix, BM of them a program: they share the cached rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from abyssal.kernels.latent_merge import ALONE, LN2, merge, own_share, tiles_of_all

LOG2E = 1.4426950408889634

# 2^120: what bf16's wider exponent takes from an e4m3 number whose bits are moved into place.
REBIAS = tl.constexpr(2.0**120)

# Four e4m3 bytes and four bf16 factors -> four bf16 numbers. A byte's exponent and mantissa, shifted down by four
# bits from the upper half of a bf16, are that bf16's lowest exponent bits and highest mantissa bits; the factor
# carries the two formats' difference of bias. Subnormals come out right: the product is exact.
E4M3_TO_BF16: tl.constexpr = tl.constexpr("""{
.reg .b32 a, b, x, y, z;
mov.b32 z, 0x80008000;
prmt.b32 a, $2, 0, 0x1404;
prmt.b32 b, $2, 0, 0x3424;
shr.u32 x, a, 4;
shr.u32 y, b, 4;
and.b32 x, x, 0x07f007f0;
and.b32 y, y, 0x07f007f0;
lop3.b32 x, a, 0x80008000, x, 0xea;
lop3.b32 y, b, 0x80008000, y, 0xea;
fma.rn.bf16x2 $0, x, $3, z;
fma.rn.bf16x2 $1, y, $4, z;
}""")


@triton.jit
def _dequantise(bytes, scale, CP: tl.constexpr, BN: tl.constexpr, dtype: tl.constexpr, ASM: tl.constexpr):
    """[BN, CP] of dtype from e4m3 bytes and [BN, CP / 128] float32 scales."""
    if ASM and dtype == tl.bfloat16:
        factor = (scale * REBIAS).to(tl.bfloat16)
        factor = tl.broadcast_to(factor[:, :, None], (BN, CP // 128, 128)).reshape(BN, CP)
        return tl.inline_asm_elementwise(
            E4M3_TO_BF16, "=r,=r,r,r,r", [bytes, factor], dtype=tl.bfloat16, is_pure=True, pack=4
        )
    factor = tl.broadcast_to(scale[:, :, None], (BN, CP // 128, 128)).reshape(BN, CP)
    return (bytes.to(tl.float8e4nv, bitcast=True).to(tl.float32) * factor).to(dtype)


@triton.jit(do_not_specialize=["S", "P", "pages", "page_size"])
def _attend(
    q_latent, q_rope, rows, scales, ropes, cu_q, block_table, context_lens, out, lse, part, part_lse,
    S, P, pages, page_size, stride_qt, stride_qh, stride_rt, stride_rh, scale,
    H: tl.constexpr, C: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
    CP: tl.constexpr, RP: tl.constexpr, S_PAD: tl.constexpr, BLOCKS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
    FP8: tl.constexpr, ALIGNED: tl.constexpr, ASM: tl.constexpr, PRECISION: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    block, p = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS
    if SPLITS > 0:
        s, begin = p // SPLITS, 0
        own = (tl.load(context_lens + s) + BN - 1) // BN
        chunk = own_share(own, SPLITS)
        tile = p % SPLITS * chunk
        reached = (tl.load(cu_q + s + 1) - tl.load(cu_q + s)) * H > block * BM
        last = tl.where(reached, tl.minimum(tile + chunk, own), 0)
    else:
        n = tiles_of_all(cu_q, context_lens, S, block * BM, H, S_PAD, BN)
        total = tl.sum(n)
        chunk = tl.maximum((total + P - 1) // P, 1)
        tile, last = p * chunk, tl.minimum(p * chunk + chunk, total)
        s = tl.sum((tl.cumsum(n) <= tile).to(tl.int32))
        begin = tl.sum(tl.where(tl.arange(0, S_PAD) < s, n, 0))  # the first tile of sequence s

    r = block * BM + tl.arange(0, BM)
    j, h = r // H, r % H
    c, e = tl.arange(0, CP), tl.arange(0, RP)
    dtype: tl.constexpr = q_latent.dtype.element_ty
    wide: tl.constexpr = tl.float64 if dtype == tl.float64 else tl.float32

    while tile < last:
        q0 = tl.load(cu_q + s)
        queries = tl.load(cu_q + s + 1) - q0
        length = tl.load(context_lens + s)
        tiles = tl.where(queries * H > block * BM, (length + BN - 1) // BN, 0)
        stop = tl.minimum(begin + tiles, last)
        if tile < stop:
            live = j < queries
            token = (q0 + j).to(tl.int64)
            q = tl.load(
                q_latent + (token * stride_qt + h * stride_qh)[:, None] + c[None, :],
                mask=live[:, None] & (c < C)[None, :],
                other=0.0,
            )
            if R > 0:
                qr = tl.load(
                    q_rope + (token * stride_rt + h * stride_rh)[:, None] + e[None, :],
                    mask=live[:, None] & (e < R)[None, :],
                    other=0.0,
                )
            limit = tl.where(live, length - (queries - 1 - j), 0)  # how many rows of the context a query sees
            m = tl.full([BM], float("-inf"), wide)
            weights = tl.zeros([BM, BN], wide)
            acc = tl.zeros([BM, CP], wide)
            for i in tl.range(tile - begin, stop - begin, num_stages=STAGES):
                t = i * BN + tl.arange(0, BN)
                inside = t < length
                if ALIGNED:
                    page = tl.load(block_table + s * pages + (i * BN) // page_size).to(tl.int64)
                    row = page * page_size + (i * BN) % page_size + tl.arange(0, BN)
                else:
                    page = tl.load(block_table + s * pages + t // page_size, mask=inside, other=0).to(tl.int64)
                    row = page * page_size + t % page_size
                seen = inside[:, None] & (c < C)[None, :]
                if FP8:
                    bytes = tl.load(rows + row[:, None] * W + c[None, :], mask=seen, other=0)
                    g = tl.arange(0, CP // 128)
                    factor = tl.load(
                        scales + row[:, None] * (W // 4) + C // 4 + g[None, :],
                        mask=inside[:, None] & (g < C // 128)[None, :],
                        other=0.0,
                    )
                    k = _dequantise(bytes, factor, CP, BN, dtype, ASM)
                    if R > 0:
                        kr = tl.load(
                            ropes + row[:, None] * (W // 2) + (C + C // 32) // 2 + e[None, :],
                            mask=inside[:, None] & (e < R)[None, :],
                            other=0.0,
                        ).to(dtype)
                else:
                    k = tl.load(rows + row[:, None] * W + c[None, :], mask=seen, other=0.0)
                    if R > 0:
                        kr = tl.load(
                            rows + row[:, None] * W + C + e[None, :],
                            mask=inside[:, None] & (e < R)[None, :],
                            other=0.0,
                        )
                x = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=wide)
                if R > 0:
                    x = tl.dot(qr, tl.trans(kr), x, input_precision=PRECISION, out_dtype=wide)
                x = tl.where(t[None, :] < limit[:, None], x * scale, float("-inf"))
                larger = tl.maximum(m, tl.max(x, 1))
                base = tl.where(larger == float("-inf"), 0.0, larger)  # a row that has seen nothing yet
                fade = tl.exp2(m - base)
                x = tl.exp2(x - base[:, None])
                weights = weights * fade[:, None] + x
                acc = tl.dot(x.to(dtype), k, acc * fade[:, None], input_precision=PRECISION, out_dtype=wide)
                m = larger
            l = tl.sum(weights, 1)
            acc = acc * (1.0 / tl.where(l > 0, l, 1.0))[:, None]
            sums = tl.where(l > 0, m + tl.log2(l), float("-inf"))
            if (tile == begin) & (stop == begin + tiles):
                place = token * H + h
                tl.store(out + place[:, None] * C + c[None, :], acc.to(dtype), mask=live[:, None] & (c < C)[None, :])
                tl.store(lse + place, sums * LN2, mask=live)
            else:
                slot = p if SPLITS > 0 else 2 * p + (tile == begin).to(tl.int32)
                place = slot.to(tl.int64) * (BLOCKS * BM) + r
                tl.store(part + place[:, None] * C + c[None, :], acc, mask=live[:, None] & (c < C)[None, :])
                tl.store(part_lse + place, sums, mask=live)
        tile = tl.maximum(tile, stop)
        begin += tiles
        s += 1


def latent_decode(
    q_latent: Tensor,
    q_rope: Tensor,
    rows: Tensor,
    cu_q: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    page_size: int,
    max_q: int,
    scale: float,
    tiling: dict[str, int] | None = None,
    alone: bool = False,
    w_uv: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`[T, H, C]` in q_latent's dtype and the log-sum-exps `[T, H]` float32; arguments as the operation's.

    `rows` are of q_latent's dtype or uint8, packed e4m3 (`ops/latent_rows.py`). No sequence brings more than `max_q`
    queries. `alone`: a sequence is split by its own length, whatever else is in the batch, so that its results are
    the same bits beside any others. With `w_uv [H, V, C]` the result is `[T, H, V]`, taken out of the latent space
    while it is merged.
    `tiling` overrides BM, BN, STAGES, warps, fill (programs a multiprocessor).
    """
    T, H, C = q_latent.shape
    R, S = q_rope.shape[-1], context_lens.shape[0]
    fp8 = rows.dtype == torch.uint8
    out = torch.empty(T, H, C, dtype=q_latent.dtype, device=q_latent.device)
    wide = torch.promote_types(q_latent.dtype, torch.float32)
    lse = torch.empty(T, H, dtype=wide, device=q_latent.device)
    if not (T and S and H):
        return out, lse
    use = _tiling(q_latent.dtype, fp8, H * max_q, q_latent.device) | (tiling or {})
    BM, BN = use["BM"], use["BN"]
    blocks = triton.cdiv(max_q * H, BM)
    splits = ALONE if alone else 0
    P = S * splits if alone else max(processors(q_latent.device) * use["fill"] // blocks, 1)
    parts = P if alone else 2 * P
    part = torch.empty(parts * blocks * BM, C, dtype=wide, device=q_latent.device)
    part_lse = torch.empty(parts * blocks * BM, dtype=wide, device=q_latent.device)
    q_latent, q_rope = (q if q.stride(-1) == 1 else q.contiguous() for q in (q_latent, q_rope))
    scales = ropes = rows
    if fp8:
        scales = rows.view(torch.float32)
        ropes = rows.view(torch.bfloat16)
    _attend[(P * blocks,)](
        q_latent, q_rope, rows, scales, ropes, cu_q, block_table, context_lens, out, lse, part, part_lse,
        S, P, block_table.stride(0), page_size,
        q_latent.stride(0), q_latent.stride(1), q_rope.stride(0), q_rope.stride(1), scale * LOG2E,
        R=R, W=rows.shape[1], CP=max(triton.next_power_of_2(C), 16), RP=max(triton.next_power_of_2(R), 16),
        STAGES=use["STAGES"], FP8=fp8, ALIGNED=page_size % BN == 0,
        ASM=rows.device.type == "cuda", PRECISION="ieee", num_warps=use["warps"],
        H=H, C=C, S_PAD=max(triton.next_power_of_2(S), 128), BLOCKS=blocks, BM=BM, BN=BN,
        SPLITS=splits,
    )  # fmt: skip
    return merge(cu_q, context_lens, out, lse, part, part_lse, P, blocks, BM, BN, splits, w_uv), lse


def processors(device: torch.device) -> int:
    """The programs that run at the same time, one a multiprocessor; 3 where there is no device."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def _tiling(dtype: torch.dtype, fp8: bool, rows: int, device: torch.device) -> dict[str, int]:
    """Measured on an H100; smaller tiles where shared memory is smaller."""
    if dtype.itemsize > 2:
        return {"BM": 16, "BN": 16, "STAGES": 1, "warps": 8, "fill": 1}
    if device.type != "cuda" or torch.cuda.get_device_properties(device).shared_memory_per_block_optin < 220_000:
        return {"BM": 16, "BN": 32, "STAGES": 2, "warps": 4, "fill": 1}
    if rows > 16 and not fp8:
        return {"BM": 64, "BN": 64, "STAGES": 2, "warps": 8, "fill": 1}
    return {"BM": 16, "BN": 64, "STAGES": 5, "warps": 8, "fill": 1}
