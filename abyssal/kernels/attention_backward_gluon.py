"""Backward of causal attention in one pass over the scores, for heads of 128 + 64 / 128 on Hopper (Gluon).

One program owns BN keys of one head and walks the queries that see them, BM at a time. With Sᵀ = K Qᵀ and the forward's
log-sum-exp, Pᵀ = exp(Sᵀ·scale - lse) and dSᵀ = Pᵀ ∘ (V dOᵀ - D), D = rowsum(dO ∘ O), it adds up
dV += Pᵀ dO and dK += dSᵀ Q in registers, and sends dS K to the queries' gradients in memory, in float32, by atomic
additions: five products where two passes would take seven, and an order of addition that differs from run to run.

The scores are transposed so that Pᵀ and dSᵀ come out of the tensor cores in the registers the next product reads its
first operand from: only dSᵀ goes through shared memory, once, for dS K. The nope and rotary halves stay apart all
the way (their products are summed in one accumulator), so nothing is concatenated.
"""

import torch
import triton.experimental.gluon as gluon
import triton.experimental.gluon.language as gl
from torch import Tensor
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from abyssal.kernels.gluon import thread_barrier

KEYS = 128  # a tile of the plan
LOG2E = 1.4426950408889634


@gluon.jit
def add_queries(block, value, HALVES: gl.constexpr, WIDTH: gl.constexpr):
    """Adds `value`, whose columns HALVES warps share, to blocks of 64 rows in the order in which registers hold it.

    Four neighbours there lie in one thread and 128 in one warp, so that an instruction adds to 512 bytes in a row; the
    order of a matrix would be 8 rows of 32 bytes. `narrow_kernel` reads it back.
    """
    BLOCKS: gl.constexpr = value.shape[0] // 64
    GROUPS: gl.constexpr = value.shape[1] // HALVES // 8
    # Rows are (block, warp, 2, 8) and columns (half, group, 4, 2): a thread has the 2, the groups and the last 2.
    value = value.reshape([BLOCKS, 4, 2, 8, HALVES, GROUPS, 4, 2]).permute([0, 5, 4, 1, 3, 6, 2, 7])
    value = value.reshape([BLOCKS, GROUPS * HALVES * 512])
    blocks = gl.arange(0, BLOCKS, gl.SliceLayout(1, value.type.layout))
    places = gl.arange(0, GROUPS * HALVES * 512, gl.SliceLayout(0, value.type.layout))
    gl.atomic_add(block + blocks[:, None] * (64 * WIDTH) + places[None, :], value, sem="relaxed")


@gluon.jit
def head_and_rank(heads, group):
    """Which head's program this is, and which tile of the plan: `group` heads at a time, tile by tile.

    The plan has the long tiles in front, so that what runs last is short; the heads of a group fill the device twice,
    and their queries stay in the L2 cache.
    """
    program = gl.program_id(0)
    tiles = gl.num_programs(0) // heads
    first = program // (tiles * group) * group
    size = gl.minimum(group, heads - first)
    program -= first * tiles
    return first + program % size, program // size


@gluon.jit
def _store_keys(pointer, value, layout: gl.constexpr, stride, count):
    value = gl.convert_layout(value.to(pointer.dtype.element_ty), layout)
    rows = gl.arange(0, value.shape[0], gl.SliceLayout(1, layout))
    columns = gl.arange(0, value.shape[1], gl.SliceLayout(0, layout))
    gl.store(pointer + rows[:, None] * stride + columns[None, :], value, mask=rows[:, None] < count)


@gluon.jit(do_not_specialize=["group"])
def backward_kernel(
    q_nope, q_rope, k_nope, k_rope, v, d_out,  # descriptors, [T, columns]
    stats, dq, dkv, dk_rope, plan,
    q_nope_head, q_rope_head, k_nope_head, v_head, d_out_head,  # columns between heads
    stats_row, heads, group, scale_log2, scale,
    BM: gl.constexpr, BN: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_nope.dtype
    N: gl.constexpr = q_nope.block_shape[1]
    R: gl.constexpr = q_rope.block_shape[1]
    V: gl.constexpr = v.block_shape[1]
    head, rank = head_and_rank(heads, group)
    tiles = gl.num_programs(0) // heads
    tile = gl.load(plan + rank)
    key0 = gl.load(plan + tiles + rank)
    left = gl.load(plan + 2 * tiles + rank)
    if left > 0:
        steps = gl.cdiv(left, BM)

        kn = gl.allocate_shared_memory(dtype, [1, BN, N], k_nope.layout)
        kr = gl.allocate_shared_memory(dtype, [1, BN, R], k_rope.layout)
        vs = gl.allocate_shared_memory(dtype, [1, BN, V], v.layout)
        qn = gl.allocate_shared_memory(dtype, [2, BM, N], q_nope.layout)
        qr = gl.allocate_shared_memory(dtype, [2, BM, R], q_rope.layout)
        do = gl.allocate_shared_memory(dtype, [2, BM, V], d_out.layout)
        ds_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, BM], dtype)
        ds_shared = gl.allocate_shared_memory(dtype, [1, BN, BM], ds_layout)
        line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
        lse_shared = gl.allocate_shared_memory(gl.float32, [BM], line)
        delta_shared = gl.allocate_shared_memory(gl.float32, [BM], line)
        bar_k = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        bar_qn = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        bar_qr = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        bar_do = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        mbarrier.init(bar_k, count=1)
        for half in gl.static_range(2):
            mbarrier.init(bar_qn.index(half), count=1)
            mbarrier.init(bar_qr.index(half), count=1)
            mbarrier.init(bar_do.index(half), count=1)
        fence_async_shared()

        mbarrier.expect(bar_k, k_nope.block_type.nbytes + k_rope.block_type.nbytes + v.block_type.nbytes)
        tma.async_copy_global_to_shared(k_nope, [key0, head * k_nope_head], bar_k, kn.index(0))
        tma.async_copy_global_to_shared(k_rope, [key0, 0], bar_k, kr.index(0))
        tma.async_copy_global_to_shared(v, [key0, head * v_head], bar_k, vs.index(0))
        mbarrier.expect(bar_qn.index(0), q_nope.block_type.nbytes)
        mbarrier.expect(bar_qr.index(0), q_rope.block_type.nbytes)
        mbarrier.expect(bar_do.index(0), d_out.block_type.nbytes)
        tma.async_copy_global_to_shared(q_nope, [key0, head * q_nope_head], bar_qn.index(0), qn.index(0))
        tma.async_copy_global_to_shared(q_rope, [key0, head * q_rope_head], bar_qr.index(0), qr.index(0))
        tma.async_copy_global_to_shared(d_out, [key0, head * d_out_head], bar_do.index(0), do.index(0))
        mbarrier.expect(bar_qn.index(1), q_nope.block_type.nbytes, pred=steps > 1)
        mbarrier.expect(bar_qr.index(1), q_rope.block_type.nbytes, pred=steps > 1)
        mbarrier.expect(bar_do.index(1), d_out.block_type.nbytes, pred=steps > 1)

        s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BM, 16])
        kn_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, N, 16])
        kr_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, R, 16])
        v_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, V, 16])
        qn_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, N // 2, 16])
        qr_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, R // 2, 16])
        line_layout: gl.constexpr = gl.BlockedLayout([1], [32], [8], [0])
        query_layout: gl.constexpr = gl.SliceLayout(0, s_layout)

        line_at = stats + head.to(gl.int64) * 2 * stats_row + tile * BN + gl.arange(0, BM, line_layout)
        lse_shared.store(gl.load(line_at))
        delta_shared.store(gl.load(line_at + stats_row))
        width: gl.constexpr = N + R
        dq_at = dq + (head.to(gl.int64) * tiles + tile) * (BN * width)

        s_zero = gl.zeros([BN, BM], gl.float32, s_layout)
        qn_zero = gl.zeros([BM, N], gl.float32, qn_layout)
        qr_zero = gl.zeros([BM, R], gl.float32, qr_layout)
        dkn = gl.zeros([BN, N], gl.float32, kn_layout)
        dkr = gl.zeros([BN, R], gl.float32, kr_layout)
        dvs = gl.zeros([BN, V], gl.float32, v_layout)
        keys = gl.arange(0, BN, gl.SliceLayout(1, s_layout))
        queries = gl.arange(0, BM, query_layout)
        mbarrier.wait(bar_k, 0)
        thread_barrier()

        for i in range(steps):
            stage = i & 1
            other = 1 - stage
            phase = (i >> 1) & 1
            mbarrier.wait(bar_qn.index(stage), phase)
            mbarrier.wait(bar_qr.index(stage), phase)
            line_at += BM
            more = i + 1 < steps
            # Always 0, but the compiler can't know: it would keep the addresses of all these tiles in registers.
            zero = i >> 30
            kn_i = kn.index(zero)
            kr_i = kr.index(zero)
            v_i = vs.index(zero)
            ds_i = ds_shared.index(zero)
            qn_i = qn.index(stage)
            qr_i = qr.index(stage)
            do_i = do.index(stage)

            st = warpgroup_mma(kn_i, qn_i.permute((1, 0)), s_zero, use_acc=False, is_async=True)
            st = warpgroup_mma(kr_i, qr_i.permute((1, 0)), st, is_async=True)
            mbarrier.wait(bar_do.index(stage), phase)
            dpt = warpgroup_mma(v_i, do_i.permute((1, 0)), s_zero, use_acc=False, is_async=True)
            st = warpgroup_mma_wait(1, deps=[st])
            # Past here every warp has left the other stage, and dS, of the tile before.
            thread_barrier()
            row = key0 + (i + 1) * BM
            tma.async_copy_global_to_shared(
                q_nope, [row, head * q_nope_head], bar_qn.index(other), qn.index(other), pred=more
            )
            tma.async_copy_global_to_shared(
                q_rope, [row, head * q_rope_head], bar_qr.index(other), qr.index(other), pred=more
            )
            tma.async_copy_global_to_shared(
                d_out, [row, head * d_out_head], bar_do.index(other), do.index(other), pred=more
            )

            lse = lse_shared.load(query_layout)
            pt = gl.exp2(st * scale_log2 - lse[None, :])
            pt = gl.where(keys[:, None] <= queries[None, :] + i * BM, pt, 0.0)
            pt16 = gl.convert_layout(pt.to(dtype), gl.DotOperandLayout(0, v_layout, 2))
            delta = delta_shared.load(query_layout)
            dpt = warpgroup_mma_wait(0, deps=[dpt])
            dvs = warpgroup_mma(pt16, do_i, dvs, is_async=True)
            dst = (pt * (dpt - delta[None, :])).to(dtype)
            ds_i.store(dst)
            # Each tensor has its barrier, told of the tile after the next's bytes here: between copies that share one,
            # and after `expect`, the compiler would put a barrier of all warps.
            later = i + 2 < steps
            mbarrier.expect(bar_qn.index(stage), q_nope.block_type.nbytes, pred=later)
            mbarrier.expect(bar_qr.index(stage), q_rope.block_type.nbytes, pred=later)
            mbarrier.expect(bar_do.index(stage), d_out.block_type.nbytes, pred=later)
            fence_async_shared()
            thread_barrier()
            dvs = warpgroup_mma_wait(0, deps=[dvs])  # gives back the registers of Pᵀ
            lse_next = gl.load(line_at, mask=more, other=0.0)
            delta_next = gl.load(line_at + stats_row, mask=more, other=0.0)
            ds = ds_i.permute((1, 0))
            dqn = warpgroup_mma(ds, kn_i, qn_zero, use_acc=False, is_async=True)
            dqr = warpgroup_mma(ds, kr_i, qr_zero, use_acc=False, is_async=True)
            dst_n = gl.convert_layout(dst, gl.DotOperandLayout(0, kn_layout, 2))
            dst_r = gl.convert_layout(dst, gl.DotOperandLayout(0, kr_layout, 2))
            dkn = warpgroup_mma(dst_n, qn_i, dkn, is_async=True)
            dkr = warpgroup_mma(dst_r, qr_i, dkr, is_async=True)
            dqn, dqr = warpgroup_mma_wait(2, deps=[dqn, dqr])
            add_queries(dq_at, dqn, 2, width)
            add_queries(dq_at + 64 * N, dqr, 2, width)
            # Not later: with a product in flight at the loop's end, ptxas waits after every single one of them.
            dkn, dkr = warpgroup_mma_wait(0, deps=[dkn, dkr])
            lse_shared.store(lse_next)
            delta_shared.store(delta_next)
            dq_at += BM * width

        mbarrier.invalidate(bar_k)
        for half in gl.static_range(2):
            mbarrier.invalidate(bar_qn.index(half))
            mbarrier.invalidate(bar_qr.index(half))
            mbarrier.invalidate(bar_do.index(half))
        store_layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
        row = key0.to(gl.int64) * heads + head
        _store_keys(dkv + row * (N + V) + N, dvs, store_layout, heads * (N + V), left)
        _store_keys(dkv + row * (N + V), dkn * scale, store_layout, heads * (N + V), left)
        _store_keys(dk_rope + row * R, dkr * scale, store_layout, heads * R, left)


WIDTHS = [(128, 64, 128), (192, 64, 256)]


def supports(N: int, R: int, V: int) -> bool:
    """Whether a kernel here takes heads of N + R / V on this device."""
    return (N, R, V) in WIDTHS and torch.cuda.get_device_capability()[0] == 9


def _descriptor(t: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """`[T, H, W]` or `[T, W]` as a matrix of T rows, in which head h begins at column h · stride(1)."""
    aligned = all(s > 0 and s * t.element_size() % 16 == 0 for s in t.stride()[:-1])
    if t.data_ptr() % 16 or not aligned or t.stride(-1) != 1:
        t = t.contiguous()
    extent = t.shape[-1] + (t.stride(1) * (t.shape[1] - 1) if t.ndim == 3 else 0)
    layout = gl.NVMMASharedLayout.get_default_for([rows, columns], gl.bfloat16)
    return TensorDescriptor(t, [t.shape[0], extent], [t.stride(0), 1], [rows, columns], layout)


def launch(
    q_nope: Tensor, q_rope: Tensor, k_nope: Tensor, k_rope: Tensor, v: Tensor, d_out: Tensor,
    stats: Tensor, dq: Tensor, dkv: Tensor, dk_rope: Tensor, plan: Tensor, scale: float, group: int | None = None,
) -> None:  # fmt: skip
    """Writes dkv `[T, H, N + V]` and dk_rope `[T, H, R]`; adds dS K to dq, float32, in blocks, not yet scaled."""
    H, N, R, V = q_nope.shape[1], q_nope.shape[-1], q_rope.shape[-1], v.shape[-1]
    wide = V == 256
    BM, BN = (128, 64) if wide else (64, 128)
    columns = (64, 64, 64, 64, V, V) if wide else (N, R, N, R, V, V)
    rows = (BM, BM, BN, BN, BN, BM)
    descriptors = [
        _descriptor(*each) for each in zip((q_nope, q_rope, k_nope, k_rope, v, d_out), rows, columns, strict=True)
    ]
    strides = [descriptors[i].base.stride(1) for i in (0, 1, 2, 4, 5)]
    programs = plan.shape[1] * (KEYS // BN)  # a head
    processors = torch.cuda.get_device_properties(v.device).multi_processor_count
    group = group or min(H, -(-2 * processors // programs))
    arguments = (*descriptors, stats, dq, dkv, dk_rope, plan, *strides, stats.shape[-1], H, group, scale * LOG2E, scale)
    if wide:
        from abyssal.kernels.attention_backward_wide import wide_kernel

        wide_kernel[(programs * H,)](*arguments, BM, BN, KEYS, num_warps=8)
    else:
        backward_kernel[(programs * H,)](*arguments, BM, BN, num_warps=8)
