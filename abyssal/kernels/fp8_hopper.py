"""Many rows by a block-scaled weight on Hopper: 1x128-scaled e4m3 by 128x128-scaled e4m3, near the tensor cores' rate.

The tensor cores' sums of FP8 products are short (DeepSeek-V3, section 3.3.2), so every 128 columns' product is scaled
and added to float32 registers by the ordinary cores. To hide that, three groups of four warps share each 192x128
tile, 64 rows each, and drift apart: while one scales and adds, another's product has the tensor cores. One more warp
does nothing but ask the copy engine for tiles, four steps ahead, across the ends of tiles too. The tile is as large
as the registers allow (a product beside its sum, 128 a thread): L2's rate of serving tiles limits smaller ones.
"""

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

TOKENS, ROWS, BLOCK = 192, 128, 128  # a tile: rows of x, rows of the weight, columns a step
_TOKENS, _ROWS, _BLOCK = gl.constexpr(TOKENS), gl.constexpr(ROWS), gl.constexpr(BLOCK)


@gluon.jit
def _place(tile, tiles, tokens, down, across, GROUP: gl.constexpr):
    """Which tile of y this is: the expert (0 where there are none, -1 where there is no tile), its first row and the
    end of the expert's rows, and its column. GROUP tiles of tokens go through all of the weight together, so that
    both stay in L2."""
    first = tile // (GROUP * across) * GROUP
    high = min(down - first, GROUP)
    inside = tile - first * across
    i, j = first + inside % high, inside // high
    if tiles is None:
        return 0, i * _TOKENS, tokens, j
    else:
        return gl.load(tiles + i), gl.load(tiles + down + i), gl.load(tiles + 2 * down + i), j


@gluon.jit
def _load(
    x_desc, w_desc, x_tiles, w_tiles, ready, empty, tiles, tokens, rows, down, across, blocks, GROUP: gl.constexpr
):  # fmt: skip
    STAGES: gl.constexpr = w_tiles.type.shape[0]
    step = 0
    for tile in range(gl.program_id(0), down * across, gl.num_programs(0)):
        expert, t0, _, j = _place(tile, tiles, tokens, down, across, GROUP)
        steps = gl.where(expert >= 0, blocks, 0)
        for b in range(steps):
            stage = step % STAGES
            bar = ready.index(stage)
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            mbarrier.expect(bar, 3 * x_desc.block_type.nbytes + w_desc.block_type.nbytes)
            w_row = expert * rows + j * _ROWS
            tma.async_copy_global_to_shared(w_desc, [w_row, b * _BLOCK], bar, w_tiles.index(stage))
            for part in gl.static_range(3):
                at = [t0 + part * 64, b * _BLOCK]
                tma.async_copy_global_to_shared(x_desc, at, bar, x_tiles.index(stage * 3 + part))
            step += 1


@gluon.jit
def _store(sums, y, order, t0, n0, end, rows):
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    t = t0 + gl.arange(0, 64, gl.SliceLayout(1, layout))
    n = n0 + gl.arange(0, _ROWS, gl.SliceLayout(0, layout))
    values = gl.convert_layout(sums.to(y.dtype.element_ty), layout)
    here = t < end
    if order is not None:
        t = gl.load(order + t, mask=here, other=0)
    at = y + t.to(gl.int64)[:, None] * rows + n[None, :]
    gl.store(at, values, mask=here[:, None] & (n < rows)[None, :])


@gluon.jit
def _multiply(
    PART: gl.constexpr, x_scale, w_scale, y, x_tiles, w_tiles, ready, empty, tiles, order, tokens, rows, down, across,
    blocks, x_scale_stride, GROUP: gl.constexpr,
):  # fmt: skip
    STAGES: gl.constexpr = w_tiles.type.shape[0]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _ROWS, 32])
    lane = gl.arange(0, 64, gl.SliceLayout(1, layout))
    zero = gl.zeros([64, _ROWS], gl.float32, layout)
    step = 0
    for tile in range(gl.program_id(0), down * across, gl.num_programs(0)):
        expert, t0, end, j = _place(tile, tiles, tokens, down, across, GROUP)
        if expert >= 0:
            t0 += PART * 64
            x_at, w_at = x_scale + gl.minimum(t0 + lane, tokens - 1), w_scale + (expert * across + j) * blocks
            sums = zero
            # Scales are asked for one step before they are needed.
            next_x, next_w = gl.load(x_at), gl.load(w_at)
            for b in range(blocks):
                factor = next_x * next_w
                more = (b + 1 < blocks).to(gl.int32)
                x_at += x_scale_stride * more
                w_at += more
                next_x, next_w = gl.load(x_at), gl.load(w_at)

                stage = step % STAGES
                mbarrier.wait(ready.index(stage), (step // STAGES) & 1)
                w = w_tiles.index(stage).permute((1, 0))
                product = warpgroup_mma(x_tiles.index(stage * 3 + PART), w, zero, use_acc=False, is_async=True)
                product = warpgroup_mma_wait(0, (product,))
                mbarrier.arrive(empty.index(stage), count=1)
                sums = sums + product * factor[:, None]
                step += 1
            _store(sums, y, order, t0, j * _ROWS, end, rows)


@gluon.jit(do_not_specialize=["tokens", "down", "across", "blocks", "x_scale_stride"])
def _scaled_product(
    x_desc, w_desc, x_scale, w_scale, y, tiles, order, tokens, rows, down, across, blocks, x_scale_stride,
    STAGES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    x_tiles = gl.allocate_shared_memory(x_desc.dtype, [STAGES * 3, 64, _BLOCK], x_desc.layout)
    w_tiles = gl.allocate_shared_memory(w_desc.dtype, [STAGES, _ROWS, _BLOCK], w_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=3)
    gl.warp_specialize(
        [
            (_multiply, (0, x_scale, w_scale, y, x_tiles, w_tiles, ready, empty, tiles, order, tokens, rows, down,
                         across, blocks, x_scale_stride, GROUP)),
            (_multiply, (1, x_scale, w_scale, y, x_tiles, w_tiles, ready, empty, tiles, order, tokens, rows, down,
                         across, blocks, x_scale_stride, GROUP)),
            (_multiply, (2, x_scale, w_scale, y, x_tiles, w_tiles, ready, empty, tiles, order, tokens, rows, down,
                         across, blocks, x_scale_stride, GROUP)),
            (_load, (x_desc, w_desc, x_tiles, w_tiles, ready, empty, tiles, tokens, rows, down, across, blocks,
                     GROUP)),
        ],
        [4, 4, 1],
        [160, 160, 24],
    )  # fmt: skip


def scaled_product(
    q: Tensor, q_scale: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype,
    tiles: Tensor | None = None, order: Tensor | None = None, tuning: tuple[int, ...] | None = None,
) -> Tensor:  # fmt: skip
    """Rows as `fp8.quantize_rows` made them, times the weight `[out, in]`, `in` a multiple of 16: `[T, out]`.

    With `tiles [3, slots]` int32, the expert (or -1), first row and end of each tile of TOKENS rows, the weights are
    `[E, out, in]` and the scales with them. With `order [T]`, row t of the product is stored as row order[t].
    """
    tokens, (rows, width) = q.shape[0], weight.shape[-2:]
    stages, group = tuning or (4, 4)
    down, across = triton.cdiv(tokens, TOKENS) if tiles is None else tiles.shape[1], triton.cdiv(rows, ROWS)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
    x_desc = TensorDescriptor.from_tensor(q, [64, BLOCK], layout)
    w_desc = TensorDescriptor.from_tensor(weight.view(-1, width), [ROWS, BLOCK], layout)
    y = torch.empty(tokens, rows, dtype=dtype, device=q.device)
    programs = torch.cuda.get_device_properties(q.device).multi_processor_count
    _scaled_product[(min(programs, down * across),)](
        x_desc, w_desc, q_scale, scale, y, tiles, order, tokens, rows, down, across, triton.cdiv(width, BLOCK),
        q_scale.stride(0), STAGES=stages, GROUP=group, num_warps=4, maxnreg=128,
    )  # fmt: skip
    return y
