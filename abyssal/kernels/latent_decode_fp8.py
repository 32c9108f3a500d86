"""Absorbed attention over FP8 rows on Hopper (Gluon): unpacking and products by different warps of one program.

A tile is 64 cached rows of 656 bytes, all that comes from memory, by TMA into a ring of raw rows. Eight warps turn
e4m3 into bf16 times its scale: 64 x 576 numbers in one of two buffers of shared memory. Four warps multiply: scores
transposed, S^T = K Q^T `[64, BM]`, and the output transposed, O^T += V^T P^T `[512, BM]`. So the cached rows are the
wide side of each wgmma and BM may be as little as 16, one token of 16 heads, without waste.

Rows come by TMA because the unpacking warps must fence what they write for the tensor cores' eyes, and that fence
waits for their own loads in flight: prefetching into registers was a sixth slower.

Work is split and merged as in `latent_decode.py`, whose merging launch (`latent_merge.py`) this shares.
"""

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from abyssal.kernels.gluon import thread_barrier
from abyssal.kernels.latent_decode import LOG2E, REBIAS, processors
from abyssal.kernels.latent_merge import merge
from abyssal.kernels.latent_ranges import BN, range_of, tiles_of

# As `latent_decode.E4M3_TO_BF16`, a word of four bytes to two words of two, by a float32 factor.
E4M3_TO_BF16 = gl.constexpr("""{
.reg .b32 a, b, f, z;
cvt.rn.bf16x2.f32 f, $3, $3;
mov.b32 z, 0x80008000;
prmt.b32 a, $2, 0, 0x1404;
prmt.b32 b, $2, 0, 0x3424;
shr.u32 $0, a, 4;
shr.u32 $1, b, 4;
and.b32 $0, $0, 0x07f007f0;
and.b32 $1, $1, 0x07f007f0;
lop3.b32 a, a, 0x80008000, $0, 0xea;
lop3.b32 b, b, 0x80008000, $1, 0xea;
fma.rn.bf16x2 $0, a, f, z;
fma.rn.bf16x2 $1, b, f, z;
}""")

BUFFERS = gl.constexpr(2)
LATENT, ROPE, ROW = gl.constexpr(512), gl.constexpr(64), gl.constexpr(656)  # elements, elements, bytes
LATENT_AT, SCALES_AT, ROPE_AT, ROW_WORDS = gl.constexpr(0), gl.constexpr(128), gl.constexpr(132), gl.constexpr(164)


@gluon.jit
def _find(n, last, place, lists, block, BM: gl.constexpr):
    """Where tile n lies, found from where an earlier one does: its first row of the cache, rows that are of the
    context (none from `last` on), and the sequence."""
    s, begin, tiles, length = place
    cu_q, context_lens, H, table, pages, page_size = lists
    while (n < last) & (n >= begin + tiles):
        s += 1
        begin += tiles
        _, _, length, tiles = tiles_of(cu_q, context_lens, s, H, block, BM)
    t = (n - begin) * BN
    page = gl.load(table + s * pages + t // page_size, mask=n < last, other=0)
    return page * page_size + t % page_size, gl.where(n < last, length - t, 0), (s, begin, tiles, length)


@gluon.jit
def _request(row, unit, wanted, latents, ropes, raw, raw_rope, arrived, RR: gl.constexpr, RING: gl.constexpr):
    """TMA of RR rows into the ring, if they are `wanted`."""
    slot = unit % RING
    mbarrier.expect(arrived.index(slot), RR * (LATENT + 2 * ROPE), pred=wanted)
    tma.async_copy_global_to_shared(latents, [row, LATENT_AT], arrived.index(slot), raw.index(slot), pred=wanted)
    tma.async_copy_global_to_shared(ropes, [row, ROPE_AT], arrived.index(slot), raw_rope.index(slot), pred=wanted)


@gluon.jit
def _select(i: gl.constexpr, a, b, c):
    if i == 0:
        return a
    elif i == 1:
        return b
    else:
        return c


@gluon.jit
def _scales_of(scales, row, inside, RR: gl.constexpr, layout: gl.constexpr, sub: gl.constexpr):
    """The four scales of each row of a unit, from memory; 0 past the context, where rows may hold anything."""
    r = sub * RR + gl.arange(0, RR, gl.SliceLayout(1, layout))
    at = scales + (row + r).to(gl.int64) * ROW_WORDS + SCALES_AT
    mask = r < inside
    return (
        gl.load(at, mask=mask, other=0.0), gl.load(at + 1, mask=mask, other=0.0),
        gl.load(at + 2, mask=mask, other=0.0), gl.load(at + 3, mask=mask, other=0.0),
    )  # fmt: skip


@gluon.jit
def _unpack(
    plan, lists, sources, raw, raw_rope, arrived, latent, rope, full, empty, BM: gl.constexpr, RR: gl.constexpr,
    RING: gl.constexpr
):  # fmt: skip
    wide: gl.constexpr = gl.BlockedLayout([1, 2], [2, 16], [8, 1], [1, 0])
    words: gl.constexpr = gl.NVMMASharedLayout(128, 32, 2)
    UNITS: gl.constexpr = BN // RR
    s, begin, tile, last, block = plan
    latents, ropes, scales = sources
    _, _, length, tiles = tiles_of(lists[0], lists[1], s, lists[2], block, BM)
    row, inside, place = _find(tile, last, (s, begin, tiles, length), lists, block, BM)
    row1, inside1, place = _find(tile + 1, last, place, lists, block, BM)
    for u in gl.static_range(RING):
        at = _select(u // UNITS, row, row1, row1) + u % UNITS * RR
        _request(at, u, tile + u // UNITS < last, latents, ropes, raw, raw_rope, arrived, RR, RING)
    column = gl.arange(0, 128, gl.SliceLayout(0, wide))[None, :]
    r = gl.arange(0, RR, gl.SliceLayout(1, wide))
    for n in range(tile, last):
        row2, inside2, place = _find(n + 2, last, place, lists, block, BM)
        turn = n - tile
        b = turn % BUFFERS
        buffer = latent.index(b)._reinterpret(gl.int32, [BN, LATENT // 2], words)
        buffer_rope = rope.index(b)._reinterpret(gl.int32, [BN, ROPE // 2], words)
        for sub in gl.static_range(UNITS):
            unit = turn * UNITS + sub
            slot = unit % RING
            f0, f1, f2, f3 = _scales_of(scales, row, inside, RR, wide, sub)
            mbarrier.wait(arrived.index(slot), (unit // RING) & 1)
            bytes = raw.index(slot).load(wide)
            k = raw_rope.index(slot).load(wide)
            thread_barrier()
            # The slot is next for a unit of this tile or one of the next two.
            at = _select((sub + RING) // UNITS, row, row1, row2) + (sub + RING) % UNITS * RR
            _request(
                at, unit + RING, n + (sub + RING) // UNITS < last, latents, ropes, raw, raw_rope, arrived, RR, RING
            )
            factor = gl.where(column < 64, gl.where(column < 32, f0[:, None], f1[:, None]),
                              gl.where(column < 96, f2[:, None], f3[:, None]))  # fmt: skip
            low, high = gl.inline_asm_elementwise(
                E4M3_TO_BF16, "=r,=r,r,f", [bytes, factor * REBIAS], dtype=(gl.int32, gl.int32), is_pure=True, pack=1
            )
            k = gl.where((sub * RR + r < inside)[:, None], k, 0)
            if sub == 0:
                mbarrier.wait(empty.index(b), ((turn // BUFFERS) & 1) ^ 1)
            buffer.slice(sub * RR, RR, dim=0).store(gl.reshape(gl.join(low, high), [RR, LATENT // 2]))
            buffer_rope.slice(sub * RR, RR, dim=0).store(k)
        fence_async_shared()
        thread_barrier()
        mbarrier.arrive(full.index(b))
        row, inside, row1, inside1 = row1, inside1, row2, inside2


@gluon.jit
def _multiply(
    plan, lists, queries_at, strides, results, scale, slots, buffers, spaces, bars,
    BM: gl.constexpr, BLOCKS: gl.constexpr
):  # fmt: skip
    s, begin, tile, last, block = plan
    cu_q, context_lens, H = lists
    q_latent, q_rope = queries_at
    stride_qt, stride_qh, stride_rt, stride_rh = strides
    out, lse, part, part_lse = results
    latent, rope = buffers
    full, empty = bars
    q_smem, qr_smem, p_smem = spaces
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
    narrow: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    of_row: gl.constexpr = gl.SliceLayout(0, mma)
    r = block * BM + gl.arange(0, BM, of_row)
    c = gl.arange(0, LATENT, gl.SliceLayout(1, mma))
    token = gl.arange(0, BN, gl.SliceLayout(1, mma))
    turn = 0
    while tile < last:
        _, _, length, tiles = tiles_of(cu_q, context_lens, s, H, block, BM)
        q0 = gl.load(cu_q + s)
        queries = gl.load(cu_q + s + 1) - q0
        stop = gl.minimum(begin + tiles, last)
        if tile < stop:
            r_wide = block * BM + gl.arange(0, BM, gl.SliceLayout(1, wide))
            head = (q0 + r_wide // H).to(gl.int64) * stride_qt + (r_wide % H) * stride_qh
            from_wide = q_latent + head[:, None] + gl.arange(0, LATENT, gl.SliceLayout(0, wide))[None, :]
            q = gl.load(from_wide, mask=(r_wide < queries * H)[:, None], other=0.0)
            r_narrow = block * BM + gl.arange(0, BM, gl.SliceLayout(1, narrow))
            head_rope = (q0 + r_narrow // H).to(gl.int64) * stride_rt + (r_narrow % H) * stride_rh
            from_narrow = q_rope + head_rope[:, None] + gl.arange(0, ROPE, gl.SliceLayout(0, narrow))[None, :]
            qr = gl.load(from_narrow, mask=(r_narrow < queries * H)[:, None], other=0.0)
            q_smem.store(q)
            qr_smem.store(qr)
            fence_async_shared()
            thread_barrier()
            live = r < queries * H
            limit = gl.where(live, length - (queries - 1 - r // H), 0)
            m = gl.full([BM], float("-inf"), gl.float32, of_row)
            total = gl.zeros([BN, BM], gl.float32, mma)
            acc = gl.zeros([LATENT, BM], gl.float32, mma)
            for n in range(tile, stop):
                b = turn % BUFFERS
                mbarrier.wait(full.index(b), (turn // BUFFERS) & 1)
                x = gl.zeros([BN, BM], gl.float32, mma)
                x = warpgroup_mma(latent.index(b), q_smem.permute([1, 0]), x, use_acc=False, is_async=True)
                x = warpgroup_mma(rope.index(b), qr_smem.permute([1, 0]), x, is_async=True)
                x = warpgroup_mma_wait(0, deps=[x]) * scale
                t = (n - begin) * BN
                if t + BN > length - queries + 1:
                    x = gl.where((t + token)[:, None] < limit[None, :], x, float("-inf"))
                larger = gl.maximum(m, gl.max(x, 0))
                base = gl.where(larger == float("-inf"), 0.0, larger)
                fade = gl.exp2(m - base)
                x = gl.exp2(x - base[None, :])
                total = total * fade[None, :] + x
                acc = acc * fade[None, :]
                p_smem.permute([1, 0]).store(x.to(gl.bfloat16))
                fence_async_shared()
                thread_barrier()
                acc = warpgroup_mma(latent.index(b).permute([1, 0]), p_smem.permute([1, 0]), acc, is_async=True)
                acc = warpgroup_mma_wait(0, deps=[acc])
                thread_barrier()
                mbarrier.arrive(empty.index(b))
                m = larger
                turn += 1
            l = gl.sum(total, 0)
            acc = acc * (1.0 / gl.where(l > 0, l, 1.0))[None, :]
            sums = gl.where(l > 0, m + gl.log2(l), float("-inf"))
            whole = (tile == begin) & (stop == begin + tiles)
            if whole:
                row = q0.to(gl.int64) * H + r
                gl.store(out + row[None, :] * LATENT + c[:, None], acc.to(gl.bfloat16), mask=live[None, :])
                gl.store(lse + row, sums * 0.6931471805599453, mask=live)
            else:
                slot = slots + gl.where(tile == begin, 1, 0)
                row_of_part = slot.to(gl.int64) * (BLOCKS * BM) + r
                gl.store(part + row_of_part[None, :] * LATENT + c[:, None], acc, mask=live[None, :])
                gl.store(part_lse + row_of_part, sums, mask=live)
        tile = gl.maximum(tile, stop)
        begin += tiles
        s += 1


@gluon.jit(do_not_specialize=["S", "P", "pages", "page_size"])
def _attend(
    q_latent, q_rope, latents, ropes, scales, cu_q, block_table, context_lens, out, lse, part, part_lse,
    S, P, pages, page_size, stride_qt, stride_qh, stride_rt, stride_rh, scale, H,
    S_PAD: gl.constexpr, BLOCKS: gl.constexpr, BM: gl.constexpr, RR: gl.constexpr, RING: gl.constexpr,
    REGS: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    swizzled: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    latent = gl.allocate_shared_memory(gl.bfloat16, [BUFFERS, BN, LATENT], swizzled)
    rope = gl.allocate_shared_memory(gl.bfloat16, [BUFFERS, BN, ROPE], swizzled)
    q_smem = gl.allocate_shared_memory(gl.bfloat16, [BM, LATENT], swizzled)
    qr_smem = gl.allocate_shared_memory(gl.bfloat16, [BM, ROPE], swizzled)
    p_smem = gl.allocate_shared_memory(gl.bfloat16, [BM, BN], swizzled)
    full = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(BUFFERS):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    raw = gl.allocate_shared_memory(gl.int32, [RING, RR, LATENT // 4], latents.layout)
    raw_rope = gl.allocate_shared_memory(gl.int32, [RING, RR, ROPE // 2], ropes.layout)
    arrived = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(RING):
        mbarrier.init(arrived.index(i), count=1)
    fence_async_shared()
    thread_barrier()

    block, p = gl.program_id(0) % BLOCKS, gl.program_id(0) // BLOCKS
    s, begin, tile, last = range_of(p, P, cu_q, context_lens, S, H, block, S_PAD, BM)
    if tile < last:
        plan = (s, begin, tile, last, block)
        lists = (cu_q, context_lens, H)
        paged = (cu_q, context_lens, H, block_table, pages, page_size)
        where = (q_latent, q_rope)
        strides = (stride_qt, stride_qh, stride_rt, stride_rh)
        results = (out, lse, part, part_lse)
        buffers = (latent, rope)
        bars = (full, empty)
        spaces = (q_smem, qr_smem, p_smem)
        sources = (latents, ropes, scales)
        gl.warp_specialize(
            [
                (_multiply, (plan, lists, where, strides, results, scale, 2 * p, buffers, spaces, bars, BM, BLOCKS)),
                (_unpack, (plan, paged, sources, raw, raw_rope, arrived, latent, rope, full, empty, BM, RR, RING)),
            ],
            [8],
            [REGS],
        )


# By rows a program: cached rows a unit of the ring, units, registers of the warps that unpack.
RINGS = {16: {"RR": 32, "RING": 3, "REGS": 152}, 32: {"RR": 16, "RING": 3, "REGS": 128}}


def latent_decode_fp8(
    q_latent: Tensor,
    q_rope: Tensor,
    rows: Tensor,
    cu_q: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    page_size: int,
    max_q: int,
    scale: float,
    w_uv: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `latent_decode.latent_decode`, for bf16 queries of 512 + 64, rows of 656 bytes and pages of a multiple of 64
    rows, on compute capability 9. Right for any number of queries; blocks of more than 32 rows unpack anew."""
    T, H, C = q_latent.shape
    S = context_lens.shape[0]
    out = torch.empty(T, H, C, dtype=q_latent.dtype, device=q_latent.device)
    lse = torch.empty(T, H, dtype=torch.float32, device=q_latent.device)
    if not (T and S and H):
        return out, lse
    BM = 16 if max_q * H <= 16 else 32
    blocks = triton.cdiv(max_q * H, BM)
    P = max(processors(q_latent.device) // blocks, 1)
    part = torch.empty(2 * P * blocks * BM, C, dtype=torch.float32, device=q_latent.device)
    part_lse = torch.empty(2 * P * blocks * BM, dtype=torch.float32, device=q_latent.device)
    q_latent, q_rope = (q if q.stride(-1) == 1 else q.contiguous() for q in (q_latent, q_rope))
    use = RINGS[BM]
    words, layout = rows.view(torch.int32), gl.NVMMASharedLayout(128, 32, 2)
    latents, ropes = (TensorDescriptor.from_tensor(words, [use["RR"], width], layout) for width in (128, 32))
    _attend[(P * blocks,)](
        q_latent, q_rope, latents, ropes, rows.view(torch.float32), cu_q, block_table, context_lens, out, lse, part,
        part_lse, S, P, block_table.stride(0), page_size,
        q_latent.stride(0), q_latent.stride(1), q_rope.stride(0), q_rope.stride(1), scale * LOG2E, H,
        S_PAD=1 if S == 1 else max(triton.next_power_of_2(S), 128), BLOCKS=blocks, BM=BM, **use, num_warps=4,
    )  # fmt: skip
    return merge(cu_q, context_lens, out, lse, part, part_lse, P, blocks, BM, 64, w_uv=w_uv), lse
