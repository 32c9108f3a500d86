"""`attention_backward_gluon`'s one pass, laid out for heads of 192 + 64 / 256 (GLM-4.7-Flash)."""

import triton.experimental.gluon as gluon
import triton.experimental.gluon.language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from abyssal.kernels.attention_backward_gluon import add_queries, head_and_rank
from abyssal.kernels.gluon import thread_barrier


@gluon.jit
def _load_panels(nope, rope, panels, bar, row, nope_column, rope_column, pred):
    """One tile [rows, 256] whose first 192 columns are the nope half, panel by panel of 64 columns."""
    tma.async_copy_global_to_shared(nope, [row, nope_column], bar, panels.index(0), pred=pred)
    tma.async_copy_global_to_shared(nope, [row, nope_column + 64], bar, panels.index(1), pred=pred)
    tma.async_copy_global_to_shared(nope, [row, nope_column + 128], bar, panels.index(2), pred=pred)
    tma.async_copy_global_to_shared(rope, [row, rope_column], bar, panels.index(3), pred=pred)


@gluon.jit(do_not_specialize=["group"])
def wide_kernel(
    q_nope, q_rope, k_nope, k_rope, v, d_out,  # descriptors, [T, columns]
    stats, dq, dkv, dk_rope, plan,
    q_nope_head, q_rope_head, k_nope_head, v_head, d_out_head,  # columns between heads
    stats_row, heads, group, scale_log2, scale,
    BM: gl.constexpr, BN: gl.constexpr, KEYS: gl.constexpr,
):  # fmt: skip
    """Heads of 192 + 64 / 256: 64 keys a program, whose gradients fill half of the registers, and 128 queries a step.

    Both warp groups hold all 64 keys and half of the columns, so Pᵀ goes through shared memory too. There is room for
    one tile of queries only: its halves are loaded anew while products that don't read them run.
    """
    dtype: gl.constexpr = q_nope.dtype
    W: gl.constexpr = 256
    NOPE: gl.constexpr = 192
    head, rank = head_and_rank(heads, group)
    tiles = gl.num_programs(0) // heads // (KEYS // BN)
    part = rank % (KEYS // BN)
    rank //= KEYS // BN
    tile = gl.load(plan + rank)
    key0 = gl.load(plan + tiles + rank) + part * BN
    left = gl.load(plan + 2 * tiles + rank) - part * BN
    if left > 0:
        steps = gl.cdiv(left, BM)
        count = left
        key_tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, W], dtype)
        query_tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, W], dtype)
        k_panels = gl.allocate_shared_memory(dtype, [4, BN, 64], k_nope.layout)
        v_halves = gl.allocate_shared_memory(dtype, [1, BN, W], v.layout)
        q_panels = gl.allocate_shared_memory(dtype, [4, BM, 64], q_nope.layout)
        do = gl.allocate_shared_memory(dtype, [1, BM, W], d_out.layout)
        p_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, BM], dtype)
        p_shared = gl.allocate_shared_memory(dtype, [1, BN, BM], p_layout)
        ds_shared = gl.allocate_shared_memory(dtype, [1, BN, BM], p_layout)
        line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
        lse_shared = gl.allocate_shared_memory(gl.float32, [BM], line)
        delta_shared = gl.allocate_shared_memory(gl.float32, [BM], line)
        bar_k = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        bar_q = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        bar_do = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        mbarrier.init(bar_k, count=1)
        mbarrier.init(bar_q, count=1)
        mbarrier.init(bar_do, count=1)
        fence_async_shared()

        mbarrier.expect(bar_q, BM * W * 2)
        _load_panels(q_nope, q_rope, q_panels, bar_q, key0, head * q_nope_head, head * q_rope_head, True)
        mbarrier.expect(bar_k, 2 * BN * W * 2)
        _load_panels(k_nope, k_rope, k_panels, bar_k, key0, head * k_nope_head, 0, True)
        tma.async_copy_global_to_shared(v, [key0, head * v_head], bar_k, v_halves.index(0))
        mbarrier.expect(bar_do, BM * W * 2)
        tma.async_copy_global_to_shared(d_out, [key0, head * d_out_head], bar_do, do.index(0))

        ks = k_panels._reinterpret(dtype, [1, BN, W], key_tile)
        k_halves = k_panels._reinterpret(dtype, [2, BN, W // 2], key_tile)
        qs = q_panels._reinterpret(dtype, [1, BM, W], query_tile)
        s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, BM // 2, 16])
        g_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, W // 2, 16])
        dq_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, W // 2, 16])
        line_layout: gl.constexpr = gl.BlockedLayout([1], [32], [8], [0])
        query_layout: gl.constexpr = gl.SliceLayout(0, s_layout)

        at = gl.arange(0, BM, line_layout)
        line_at = stats + head.to(gl.int64) * 2 * stats_row + tile * KEYS + part * BN + at
        lse_shared.store(gl.load(line_at, mask=at < left, other=float("inf")))
        delta_shared.store(gl.load(line_at + stats_row, mask=at < left, other=0.0))
        dq_at = dq + ((head.to(gl.int64) * tiles + tile) * KEYS + part * BN) * W

        s_zero = gl.zeros([BN, BM], gl.float32, s_layout)
        dq_zero = gl.zeros([BM, W // 2], gl.float32, dq_layout)
        dks = gl.zeros([BN, W], gl.float32, g_layout)
        dvs = gl.zeros([BN, W], gl.float32, g_layout)
        keys = gl.arange(0, BN, gl.SliceLayout(1, s_layout))
        queries = gl.arange(0, BM, query_layout)
        mbarrier.wait(bar_k, 0)

        for i in range(steps):
            left -= BM
            more = i + 1 < steps
            line_at += BM
            lse_next = gl.load(line_at, mask=at < left, other=float("inf"))
            delta_next = gl.load(line_at + stats_row, mask=at < left, other=0.0)
            # Always 0, but the compiler can't know: it would keep the addresses of all these tiles in registers.
            zero = i >> 30
            k_i = ks.index(zero)
            v_i = v_halves.index(zero)
            q_i = qs.index(zero)
            do_i = do.index(zero)
            p_i = p_shared.index(zero)
            ds_i = ds_shared.index(zero)

            mbarrier.wait(bar_q, i & 1)
            st = warpgroup_mma(k_i, q_i.permute((1, 0)), s_zero, use_acc=False, is_async=True)
            mbarrier.wait(bar_do, i & 1)
            dpt = warpgroup_mma(v_i, do_i.permute((1, 0)), s_zero, use_acc=False, is_async=True)
            st = warpgroup_mma_wait(1, deps=[st])
            thread_barrier()
            lse = lse_shared.load(query_layout)
            pt = gl.exp2(st * scale_log2 - lse[None, :])
            pt = gl.where(keys[:, None] <= queries[None, :] + i * BM, pt, 0.0)
            p_i.store(pt.to(dtype))
            delta = delta_shared.load(query_layout)
            dpt = warpgroup_mma_wait(0, deps=[dpt])
            ds_i.store((pt * (dpt - delta[None, :])).to(dtype))
            fence_async_shared()
            thread_barrier()
            lse_shared.store(lse_next)
            delta_shared.store(delta_next)

            ds = ds_i.permute((1, 0))
            dq_low = warpgroup_mma(ds, k_halves.index(zero), dq_zero, use_acc=False, is_async=True)
            dks = warpgroup_mma(ds_i, q_i, dks, is_async=True)
            dq_low = warpgroup_mma_wait(1, deps=[dq_low])
            add_queries(dq_at, dq_low, 1, W)
            thread_barrier()  # without it ptxas gives both halves of dQ registers of their own, and has too few
            dq_high = warpgroup_mma(ds, k_halves.index(zero + 1), dq_zero, use_acc=False, is_async=True)
            dvs = warpgroup_mma(p_i, do_i, dvs, is_async=True)
            dks = warpgroup_mma_wait(2, deps=[dks])
            mbarrier.expect(bar_q, BM * W * 2, pred=more)
            thread_barrier()
            row = key0 + (i + 1) * BM
            _load_panels(q_nope, q_rope, q_panels, bar_q, row, head * q_nope_head, head * q_rope_head, more)
            dq_high = warpgroup_mma_wait(1, deps=[dq_high])
            add_queries(dq_at + 64 * (W // 2), dq_high, 1, W)
            dvs = warpgroup_mma_wait(0, deps=[dvs])
            mbarrier.expect(bar_do, BM * W * 2, pred=more)
            thread_barrier()
            tma.async_copy_global_to_shared(d_out, [row, head * d_out_head], bar_do, do.index(0), pred=more)
            dq_at += BM * W

        mbarrier.invalidate(bar_k)
        mbarrier.invalidate(bar_q)
        mbarrier.invalidate(bar_do)
        rows = gl.arange(0, BN, gl.SliceLayout(1, g_layout))
        columns = gl.arange(0, W, gl.SliceLayout(0, g_layout))
        place = ((key0 + rows).to(gl.int64) * heads + head)[:, None]
        at = dkv + place * (NOPE + W) + columns[None, :]
        mask = (rows < count)[:, None]
        rope = (columns >= NOPE)[None, :]
        gl.store(at + NOPE, dvs.to(dtype), mask=mask)
        dks = (dks * scale).to(dtype)
        gl.store(at, dks, mask=mask & (columns < NOPE)[None, :])
        gl.store(dk_rope + place * (W - NOPE) + (columns - NOPE)[None, :], dks, mask=mask & rope)
