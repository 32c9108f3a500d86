"""Absorbed attention over bf16 rows on Hopper (Gluon), for few rows of work a sequence: transposed, and fed by TMA.

Rows of work are a sequence's (query token, head) pairs, BM of them a program. Scores are made transposed,
S^T = K Q^T `[64 tokens, BM]`, and so is the output, O^T += C^T P^T `[512, BM]`: the cached rows are the wide side of
each wgmma, and BM may be as little as 16, one token of 16 heads, without waste. What limits such work is how many
bytes are on their way from memory at any time. So the queries take little room, a page comes in halves, and a ring of
five halves is kept full by one warp that does nothing else.

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

from abyssal.kernels.gluon import let_next_launch_begin, thread_barrier, wait_for_launch_before
from abyssal.kernels.latent_decode import LOG2E, processors
from abyssal.kernels.latent_merge import merge
from abyssal.kernels.latent_ranges import BN, range_of, tiles_of

HALF, ROPE = gl.constexpr(256), gl.constexpr(64)


@gluon.jit
def _read(
    plan, lists, halves_at, ropes_at, halves, ropes, bars, BM: gl.constexpr, NH: gl.constexpr, NR: gl.constexpr
):  # fmt: skip
    """One warp: every tile of the range into the rings, as room appears."""
    s, begin, tile, last, block = plan
    cu_q, context_lens, H, table, pages, page_size = lists
    full, empty, rope_full, rope_empty, q_asked = bars
    _, _, _, tiles = tiles_of(cu_q, context_lens, s, H, block, BM)
    page = gl.load(table + s * pages + (tile - begin) * BN // page_size)
    # Behind the requests of several tiles the queries would wait for all of those.
    mbarrier.wait(q_asked, 0)
    for n in range(last - tile):
        t = (tile + n - begin) * BN
        row = page * page_size + t % page_size
        if tile + n + 1 < last:
            while tile + n + 1 >= begin + tiles:
                begin += tiles
                s += 1
                _, _, _, tiles = tiles_of(cu_q, context_lens, s, H, block, BM)
            page = gl.load(table + s * pages + (tile + n + 1 - begin) * BN // page_size)
        for half in gl.static_range(2):
            h = 2 * n + half
            mbarrier.wait(empty.index(h % NH), ((h // NH) & 1) ^ 1)
            mbarrier.expect(full.index(h % NH), BN * HALF * 2)
            tma.async_copy_global_to_shared(halves_at, [row, half * HALF], full.index(h % NH), halves.index(h % NH))
            if half == 0:
                mbarrier.wait(rope_empty.index(n % NR), ((n // NR) & 1) ^ 1)
                mbarrier.expect(rope_full.index(n % NR), BN * ROPE * 2)
                tma.async_copy_global_to_shared(ropes_at, [row, 2 * HALF], rope_full.index(n % NR), ropes.index(n % NR))


@gluon.jit
def _clear(half, inside):
    """Zeroes the rows of a tile from `inside` on: what lies past the context may be anything, and 0 · NaN is NaN."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    token = gl.arange(0, BN, gl.SliceLayout(1, layout))
    for k in gl.static_range(HALF // 64):
        part = half.slice(k * 64, 64, dim=1)
        part.store(gl.where((token < inside)[:, None], part.load(layout), 0.0))
    fence_async_shared()
    thread_barrier()


@gluon.jit
def _keep(acc, q0, r, side, whole, slot, out, part, H, live, BM: gl.constexpr, BLOCKS: gl.constexpr):
    """Half `side` of the output, `[HALF, BM]`, to its place or, where it is not all there is, to a part's."""
    mma: gl.constexpr = acc.type.layout
    at = r[None, :] * (2 * HALF) + (side * HALF + gl.arange(0, HALF, gl.SliceLayout(1, mma)))[:, None]
    if whole:
        gl.store(out + q0.to(gl.int64) * (H * 2 * HALF) + at, acc.to(gl.bfloat16), mask=live[None, :])
    else:
        gl.store(part + slot.to(gl.int64) * (BLOCKS * BM * 2 * HALF) + at, acc, mask=live[None, :])


@gluon.jit
def _attend_to(
    plan, lists, queries_at, strides, results, scale, slots, halves, ropes, q_smem, qr_smem, p_smem, bars,
    BM: gl.constexpr, BLOCKS: gl.constexpr, NH: gl.constexpr, NR: gl.constexpr,
):  # fmt: skip
    """A warpgroup: scores, softmax and products of every tile of the range."""
    s, begin, tile, last, block = plan
    cu_q, context_lens, H = lists
    q_latent, q_rope = queries_at
    stride_qt, stride_qh, stride_rt, stride_rh = strides
    out, lse, part, part_lse = results
    full, empty, rope_full, rope_empty, q_asked = bars
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
    narrow: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    of_row: gl.constexpr = gl.SliceLayout(0, mma)
    r = block * BM + gl.arange(0, BM, of_row)
    token = gl.arange(0, BN, gl.SliceLayout(1, mma))
    c = gl.arange(0, HALF, gl.SliceLayout(0, wide))[None, :]
    r_wide = block * BM + gl.arange(0, BM, gl.SliceLayout(1, wide))
    r_narrow = block * BM + gl.arange(0, BM, gl.SliceLayout(1, narrow))
    n = 0
    while tile < last:
        q0, queries, length, tiles = tiles_of(cu_q, context_lens, s, H, block, BM)
        stop = gl.minimum(begin + tiles, last)
        if tile < stop:
            at = q_latent + ((q0 + r_wide // H).to(gl.int64) * stride_qt + (r_wide % H) * stride_qh)[:, None] + c
            here = (r_wide < queries * H)[:, None]
            q_low = gl.load(at, mask=here, other=0.0)
            q_high = gl.load(at + HALF, mask=here, other=0.0)
            at = q_rope + ((q0 + r_narrow // H).to(gl.int64) * stride_rt + (r_narrow % H) * stride_rh)[:, None]
            at += gl.arange(0, ROPE, gl.SliceLayout(0, narrow))[None, :]
            qr = gl.load(at, mask=(r_narrow < queries * H)[:, None], other=0.0)
            if n == 0:
                mbarrier.arrive(q_asked)
            q_smem.index(0).store(q_low)
            q_smem.index(1).store(q_high)
            qr_smem.store(qr)
            fence_async_shared()
            thread_barrier()
            live = r < queries * H
            limit = gl.where(live, length - (queries - 1 - r // H), 0)  # how many cached rows a query sees
            m = gl.full([BM], float("-inf"), gl.float32, of_row)
            total = gl.zeros([BN, BM], gl.float32, mma)
            acc_low = gl.zeros([HALF, BM], gl.float32, mma)
            acc_high = gl.zeros([HALF, BM], gl.float32, mma)
            for i in range(tile - begin, stop - begin):
                low, high, rope = (2 * n) % NH, (2 * n + 1) % NH, n % NR
                x = gl.zeros([BN, BM], gl.float32, mma)
                mbarrier.wait(full.index(low), ((2 * n) // NH) & 1)
                x = warpgroup_mma(halves.index(low), q_smem.index(0).permute([1, 0]), x, use_acc=False, is_async=True)
                mbarrier.wait(rope_full.index(rope), (n // NR) & 1)
                x = warpgroup_mma(ropes.index(rope), qr_smem.permute([1, 0]), x, is_async=True)
                mbarrier.wait(full.index(high), ((2 * n + 1) // NH) & 1)
                x = warpgroup_mma(halves.index(high), q_smem.index(1).permute([1, 0]), x, is_async=True)
                x = warpgroup_mma_wait(0, deps=[x]) * scale
                thread_barrier()
                mbarrier.arrive(rope_empty.index(rope))
                if i * BN + BN > length - queries + 1:
                    x = gl.where((i * BN + token)[:, None] < limit[None, :], x, float("-inf"))
                    if i * BN + BN > length:
                        _clear(halves.index(low), length - i * BN)
                        _clear(halves.index(high), length - i * BN)
                larger = gl.maximum(m, gl.max(x, 0))
                base = gl.where(larger == float("-inf"), 0.0, larger)
                fade = gl.exp2(m - base)
                x = gl.exp2(x - base[None, :])
                p_smem.permute([1, 0]).store(x.to(gl.bfloat16))
                total = total * fade[None, :] + x
                acc_low = acc_low * fade[None, :]
                acc_high = acc_high * fade[None, :]
                fence_async_shared()
                thread_barrier()
                weights = p_smem.permute([1, 0])
                acc_low = warpgroup_mma(halves.index(low).permute([1, 0]), weights, acc_low, is_async=True)
                acc_high = warpgroup_mma(halves.index(high).permute([1, 0]), weights, acc_high, is_async=True)
                acc_low = warpgroup_mma_wait(1, deps=[acc_low])
                thread_barrier()
                mbarrier.arrive(empty.index(low))
                acc_high = warpgroup_mma_wait(0, deps=[acc_high])
                thread_barrier()
                mbarrier.arrive(empty.index(high))
                m = larger
                n += 1
            l = gl.sum(total, 0)
            inverse = 1.0 / gl.where(l > 0, l, 1.0)
            sums = gl.where(l > 0, m + gl.log2(l), float("-inf"))
            whole = (tile == begin) & (stop == begin + tiles)
            slot = slots + gl.where(tile == begin, 1, 0)
            _keep(acc_low * inverse[None, :], q0, r, 0, whole, slot, out, part, H, live, BM, BLOCKS)
            _keep(acc_high * inverse[None, :], q0, r, 1, whole, slot, out, part, H, live, BM, BLOCKS)
            if whole:
                gl.store(lse + q0 * H + r, sums * 0.6931471805599453, mask=live)
            else:
                gl.store(part_lse + slot * (BLOCKS * BM) + r, sums, mask=live)
        tile = gl.maximum(tile, stop)
        begin += tiles
        s += 1


@gluon.jit(do_not_specialize=["S", "P", "pages", "page_size"])
def _attend(
    q_latent, q_rope, halves_at, ropes_at, cu_q, block_table, context_lens, out, lse, part, part_lse,
    S, P, pages, page_size, stride_qt, stride_qh, stride_rt, stride_rh, scale, H,
    S_PAD: gl.constexpr, BLOCKS: gl.constexpr, BM: gl.constexpr, NH: gl.constexpr, NR: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    swizzled: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    halves = gl.allocate_shared_memory(gl.bfloat16, [NH, BN, HALF], halves_at.layout)
    ropes = gl.allocate_shared_memory(gl.bfloat16, [NR, BN, ROPE], ropes_at.layout)
    q_smem = gl.allocate_shared_memory(gl.bfloat16, [2, BM, HALF], swizzled)
    qr_smem = gl.allocate_shared_memory(gl.bfloat16, [BM, ROPE], swizzled)
    p_smem = gl.allocate_shared_memory(gl.bfloat16, [BM, BN], swizzled)
    full = gl.allocate_shared_memory(gl.int64, [NH, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [NH, 1], mbarrier.MBarrierLayout())
    rope_full = gl.allocate_shared_memory(gl.int64, [NR, 1], mbarrier.MBarrierLayout())
    rope_empty = gl.allocate_shared_memory(gl.int64, [NR, 1], mbarrier.MBarrierLayout())
    q_asked = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NH):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    for i in gl.static_range(NR):
        mbarrier.init(rope_full.index(i), count=1)
        mbarrier.init(rope_empty.index(i), count=1)
    mbarrier.init(q_asked, count=1)
    fence_async_shared()
    thread_barrier()

    block, p = gl.program_id(0) % BLOCKS, gl.program_id(0) // BLOCKS
    wait_for_launch_before()
    let_next_launch_begin()
    s, begin, tile, last = range_of(p, P, cu_q, context_lens, S, H, block, S_PAD, BM)
    if tile < last:
        plan = (s, begin, tile, last, block)
        lists = (cu_q, context_lens, H)
        paged = (cu_q, context_lens, H, block_table, pages, page_size)
        bars = (full, empty, rope_full, rope_empty, q_asked)
        where = (q_latent, q_rope)
        strides = (stride_qt, stride_qh, stride_rt, stride_rh)
        results = (out, lse, part, part_lse)
        gl.warp_specialize(
            [
                (_attend_to, (
                    plan, lists, where, strides, results, scale, 2 * p, halves, ropes, q_smem, qr_smem, p_smem, bars,
                    BM, BLOCKS, NH, NR,
                )),
                (_read, (plan, paged, halves_at, ropes_at, halves, ropes, bars, BM, NH, NR)),
            ],
            [1],
            [24],
        )  # fmt: skip


# By rows a program: halves and rotary parts on their way, and registers a thread (measured on an H100).
SETTINGS = {
    16: {"NH": 6, "NR": 1, "maxnreg": 128},
    32: {"NH": 5, "NR": 2, "maxnreg": 152},
}


def latent_decode_few(
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
    """As `latent_decode.latent_decode`, for bf16 rows of 512 + 64 in pages of a multiple of 64 rows, on compute
    capability 9."""
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
    layout = gl.NVMMASharedLayout(128, 16, 2)
    halves_at, ropes_at = (TensorDescriptor.from_tensor(rows, [64, width], layout) for width in (256, 64))
    _attend[(P * blocks,)](
        q_latent, q_rope, halves_at, ropes_at, cu_q, block_table, context_lens, out, lse, part, part_lse,
        S, P, block_table.stride(0), page_size, q_latent.stride(0), q_latent.stride(1), q_rope.stride(0),
        q_rope.stride(1), scale * LOG2E, H, S_PAD=1 if S == 1 else max(triton.next_power_of_2(S), 128), BLOCKS=blocks,
        BM=BM, **SETTINGS[BM], num_warps=4, launch_pdl=True,
    )  # fmt: skip
    return merge(cu_q, context_lens, out, lse, part, part_lse, P, blocks, BM, 64, w_uv=w_uv), lse
