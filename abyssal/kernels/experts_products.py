"""Grouped products of the routed experts on Hopper: the machine that every one of them shares.

A program stays on its multiprocessor and takes one tile of an output after another. Four warps (or one) only load: the
copy engine brings weights and rows that lie in order, `cp.async` brings rows that are gathered by token, both into a
ring of STAGES slots. Two warpgroups multiply, each 64 of the tile's 128 rows by all of its 256 columns: a weight tile
is read from shared memory once by each, and the two drift apart, so that one writes its results while the other
multiplies. `ready[slot]` says that a slot is full, `empty[slot]` that both warpgroups are done with it.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

BN = gl.constexpr(256)  # columns of a tile
BK = gl.constexpr(64)  # a step: 128 bytes of bfloat16, one swizzled line
SLOT = gl.constexpr((64 * 64 * 2 + 64 * 256) * 2)  # bytes of a slot: both warpgroups' A and the shared B
PIECE = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))
ACC = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16]))
HALF = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))
QUARTER = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
LINES = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))  # eight threads a line of 64 columns


@gluon.jit
def tile_at(tile, rows, columns, GROUP: gl.constexpr):
    """Tile number to (row tile, column tile): GROUP row tiles share their weights in L2 before the next GROUP."""
    group = tile // (GROUP * columns)
    first = group * GROUP
    size = gl.minimum(rows - first, GROUP)
    place = tile - group * (GROUP * columns)
    return first + place % size, place // size


@gluon.jit
def gather(source, token, start, end, width):
    """Pointers to the first 64 columns of 64 rows of `source [T, width]`, the tokens being `token[start:start + 64]`,
    and which of them lie before `end`."""
    row = start + gl.arange(0, 64, layout=gl.SliceLayout(1, LINES))
    live = row < end
    at = gl.load(token + row, mask=live, other=0).to(gl.int64) * width
    columns = gl.arange(0, 64, layout=gl.SliceLayout(0, LINES))
    return source + (at[:, None] + columns[None, :]), live


@gluon.jit
def copy_lines(buffer, pointers, live, column, width):
    """Starts the copy of a gathered piece at `column`. Rows that aren't live and columns past the width are zero."""
    columns = column + gl.arange(0, buffer.shape[1], layout=gl.SliceLayout(0, LINES))
    async_copy.async_copy_global_to_shared(buffer, pointers, mask=live[:, None] & (columns < width)[None, :])


@gluon.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) in four instructions; exact division would be twenty."""
    return gl.inline_asm_elementwise(
        "{ mul.ftz.f32 $0, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 $0, $0; "
        "add.ftz.f32 $0, $0, 0f3F800000; rcp.approx.ftz.f32 $0, $0; }",
        "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def multiply(a_ring, b_ring, ready, empty, turn, steps, WG: gl.constexpr, A_TURNED: gl.constexpr,
             B_TURNED: gl.constexpr, GATHERED: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """`[64, 256]` float32 of this warpgroup: the sum of `steps` slots, from the ring's `turn` on.

    A slot is given back a step late, when the next product is under way.
    """
    acc = gl.zeros([64, 256], gl.float32, ACC)
    for k in range(steps):
        slot = turn % STAGES
        mbarrier.wait(ready.index(slot), (turn // STAGES) & 1)
        if GATHERED:  # cp.async wrote for the ordinary view of shared memory, wgmma reads through the other
            fence_async_shared()
        a = a_ring.index(slot * 2 + WG)
        b = b_ring.index(slot)
        if A_TURNED:
            a = a.permute((1, 0))
        if B_TURNED:
            b = b.permute((1, 0))
        acc = warpgroup_mma(a, b, acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=[acc])
        mbarrier.arrive(empty.index((turn + STAGES - 1) % STAGES), count=1, pred=k > 0)
        turn += 1
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(empty.index((turn + STAGES - 1) % STAGES), count=1, pred=steps > 0)
    return acc, turn


@gluon.jit
def halves(x, LAYOUT: gl.constexpr):
    """The left and the right half of the columns: a renaming of registers."""
    left, right = x.reshape([64, 2, x.shape[1] // 2]).permute([0, 2, 1]).split()
    left = gl.convert_layout(left, LAYOUT, assert_trivial=True)
    return left, gl.convert_layout(right, LAYOUT, assert_trivial=True)


@gluon.jit
def send(buffer, out_desc, out, row, column, end, width):
    """Writes a staged `[64, 64]` piece to `out[row:, column:]`; rows from `end` on belong to somebody else."""
    fence_async_shared()
    if row + 64 <= end:
        tma.async_copy_shared_to_global(out_desc, [row, column], buffer)
    else:
        piece = buffer.load(LINES)
        rows = row + gl.arange(0, 64, layout=gl.SliceLayout(1, LINES))
        columns = column + gl.arange(0, 64, layout=gl.SliceLayout(0, LINES))
        at = rows.to(gl.int64)[:, None] * width + columns[None, :]
        gl.store(out + at, piece, mask=(rows < end)[:, None] & (columns < width)[None, :])
        tma.store_wait(0)  # nothing was added to the pieces on their way: the next wait must not count on it


@gluon.jit
def write(x, staging, turn, out_desc, out, row, column, end, width, WG: gl.constexpr, TURNED: gl.constexpr = False):
    """Stages a `[64, 64]` piece in one of a warpgroup's two buffers and sends it off, the last one still on its way."""
    buffer = staging.index(WG * 2 + turn % 2)
    tma.store_wait(1)
    if TURNED:
        buffer.permute((1, 0)).store(x.to(out_desc.dtype))
    else:
        buffer.store(x.to(out_desc.dtype))
    send(buffer, out_desc, out, row, column, end, width)
    return turn + 1


@gluon.jit
def ring(STAGES: gl.constexpr, ARRIVALS: gl.constexpr, dtype: gl.constexpr, B_ROWS: gl.constexpr):
    """Shared memory and barriers: `STAGES` slots of A (a piece for each warpgroup) and B (`[B_ROWS, …]`)."""
    a_ring = gl.allocate_shared_memory(dtype, [STAGES * 2, 64, 64], PIECE)
    b_ring = gl.allocate_shared_memory(dtype, [STAGES, B_ROWS, 64 * 256 // B_ROWS], PIECE)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=ARRIVALS)
        mbarrier.init(empty.index(i), count=2)
    return a_ring, b_ring, ready, empty


# Products whose output rows are the experts' rows: hidden = swiglu(x w1, x w3), y = hidden w2, dx = da w1 + db w3.


@gluon.jit
def _extent(D, F, PRODUCT: gl.constexpr):
    """Column tiles of the output, steps of one pair of operands, steps in all."""
    if PRODUCT == "up":
        return (F + 127) // 128, (D + 63) // 64, (D + 63) // 64
    elif PRODUCT == "down":
        return (D + 255) // 256, (F + 63) // 64, (F + 63) // 64
    else:
        return (D + 255) // 256, (F + 63) // 64, 2 * ((F + 63) // 64)


@gluon.jit
def _load_rows(a_desc, a2_desc, source, token, b_desc, b2_desc, table, a_ring, b_ring, ready, empty,
               D, F, PRODUCT: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    UP: gl.constexpr = PRODUCT == "up"
    columns, steps, total = _extent(D, F, PRODUCT)
    row_tiles = gl.load(table)
    turn = 0
    for tile in range(gl.program_id(0), row_tiles * columns, gl.num_programs(0)):
        m, n = tile_at(tile, row_tiles, columns, GROUP)
        expert = gl.load(table + 4 * m + 4)
        row = gl.load(table + 4 * m + 5)
        end = gl.load(table + 4 * m + 6)
        if UP:
            upper, upper_live = gather(source, token, row, end, D)
            lower, lower_live = gather(source, token, row + 64, end, D)
        for k in range(total):
            slot = turn % STAGES
            mbarrier.wait(empty.index(slot), ((turn // STAGES) & 1) ^ 1)
            bar = ready.index(slot)
            b = b_ring.index(slot)
            if UP:
                mbarrier.expect(bar, BN * BK * 2)
                tma.async_copy_global_to_shared(b_desc, [expert * F + n * 128, k * 64], bar, b.slice(0, 128))
                tma.async_copy_global_to_shared(b2_desc, [expert * F + n * 128, k * 64], bar, b.slice(128, 128))
                copy_lines(a_ring.index(slot * 2), upper + k * 64, upper_live, k * 64, D)
                copy_lines(a_ring.index(slot * 2 + 1), lower + k * 64, lower_live, k * 64, D)
                async_copy.mbarrier_arrive(bar, increment_count=False)
            else:
                mbarrier.expect(bar, SLOT)
                if PRODUCT == "down":
                    tma.async_copy_global_to_shared(a_desc, [row, k * 64], bar, a_ring.index(slot * 2))
                    tma.async_copy_global_to_shared(a_desc, [row + 64, k * 64], bar, a_ring.index(slot * 2 + 1))
                    tma.async_copy_global_to_shared(b_desc, [expert * D + n * 256, k * 64], bar, b)
                elif k < steps:
                    tma.async_copy_global_to_shared(a_desc, [row, k * 64], bar, a_ring.index(slot * 2))
                    tma.async_copy_global_to_shared(a_desc, [row + 64, k * 64], bar, a_ring.index(slot * 2 + 1))
                    tma.async_copy_global_to_shared(b_desc, [expert * F + k * 64, n * 256], bar, b)
                else:
                    at = (k - steps) * 64
                    tma.async_copy_global_to_shared(a2_desc, [row, at], bar, a_ring.index(slot * 2))
                    tma.async_copy_global_to_shared(a2_desc, [row + 64, at], bar, a_ring.index(slot * 2 + 1))
                    tma.async_copy_global_to_shared(b2_desc, [expert * F + at, n * 256], bar, b)
            turn += 1


@gluon.jit
def _multiply_rows(results, staging, D, F, PRODUCT: gl.constexpr, KEEP: gl.constexpr, GROUP: gl.constexpr,
                   STAGES: gl.constexpr, WG: gl.constexpr):  # fmt: skip
    out_desc, out, gate_desc, gate_out, up_desc, up_out, weight, table, a_ring, b_ring, ready, empty = results
    UP: gl.constexpr = PRODUCT == "up"
    columns, _steps, total = _extent(D, F, PRODUCT)
    row_tiles = gl.load(table)
    turn = 0
    sent = 0
    for tile in range(gl.program_id(0), row_tiles * columns, gl.num_programs(0)):
        m, n = tile_at(tile, row_tiles, columns, GROUP)
        row = gl.load(table + 4 * m + 5) + 64 * WG
        end = gl.load(table + 4 * m + 6)
        acc, turn = multiply(a_ring, b_ring, ready, empty, turn, total, WG, False, PRODUCT != "input", UP, STAGES)
        left, right = halves(acc, HALF)
        if UP:  # left: the gate's 128 columns, right: the same columns of the up projection
            rows = row + gl.arange(0, 64, layout=gl.SliceLayout(1, QUARTER))
            scale = gl.load(weight + rows, mask=rows < end, other=0.0)
            gates = halves(left, QUARTER)
            ups = halves(right, QUARTER)
            for i in gl.static_range(2):
                column = n * 128 + 64 * i
                if KEEP:
                    sent = write(gates[i], staging, sent, gate_desc, gate_out, row, column, end, F, WG)
                    sent = write(ups[i], staging, sent, up_desc, up_out, row, column, end, F, WG)
                hidden = gates[i] * sigmoid(gates[i]) * ups[i] * scale[:, None]
                sent = write(hidden, staging, sent, out_desc, out, row, column, end, F, WG)
        else:
            one, two = halves(left, QUARTER)
            three, four = halves(right, QUARTER)
            sent = write(one, staging, sent, out_desc, out, row, n * 256, end, D, WG)
            sent = write(two, staging, sent, out_desc, out, row, n * 256 + 64, end, D, WG)
            sent = write(three, staging, sent, out_desc, out, row, n * 256 + 128, end, D, WG)
            sent = write(four, staging, sent, out_desc, out, row, n * 256 + 192, end, D, WG)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["D8", "F8"])
def rows_kernel(a_desc, a2_desc, source, token, b_desc, b2_desc, out_desc, out, gate_desc, gate_out, up_desc, up_out,
                weight, table, D8, F8, PRODUCT: gl.constexpr, KEEP: gl.constexpr, GROUP: gl.constexpr,
                STAGES: gl.constexpr):  # fmt: skip
    """One of three products over the experts' rows, in the order of the experts.

    "up": hidden `[N, F]` = weight · silu(x w1) · (x w3) with x's rows gathered, and with KEEP the two inner products;
    "down": `[N, D]` = hidden w2; "input": `[N, D]` = da w1 + db w3. D8 and F8 are an eighth of D and F: the compiler
    must see that rows begin at 16 bytes.
    """
    D = D8 * 8
    F = F8 * 8
    UP: gl.constexpr = PRODUCT == "up"
    dtype: gl.constexpr = b_desc.dtype
    a_ring, b_ring, ready, empty = ring(STAGES, 129 if UP else 1, dtype, 64 if PRODUCT == "input" else 256)
    staging = gl.allocate_shared_memory(dtype, [4, 64, 64], PIECE)
    results = (out_desc, out, gate_desc, gate_out, up_desc, up_out, weight, table, a_ring, b_ring, ready, empty)
    gl.warp_specialize(
        [
            (_multiply_rows, (results, staging, D, F, PRODUCT, KEEP, GROUP, STAGES, 0)),
            (_multiply_rows, (results, staging, D, F, PRODUCT, KEEP, GROUP, STAGES, 1)),
            (_load_rows, (a_desc, a2_desc, source, token, b_desc, b2_desc, table, a_ring, b_ring, ready, empty,
                          D, F, PRODUCT, GROUP, STAGES)),
        ],
        [4, 4 if UP else 1],
        [224, 56],
    )  # fmt: skip
