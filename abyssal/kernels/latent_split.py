"""How `latent_decode_hopper` splits contexts over its blocks, and merges what the blocks found.

All work lies on one line: unit after unit (a sequence and a tile, or pair of tiles, of its rows), each `F` quarters
of a page for its own cost and then four quarters a page. The line is cut in equal shares, one a block (two blocks
with two tiles of the same rows share a share, so that the second finds each page in the L2 cache). A page belongs to
the block in whose share it begins. Every block finds its own share from the lengths: nothing is planned on the host.

A unit cut in several parts is merged by those who made them, each a portion of the rows and columns, once all of
them have raised their flags. Flags only ever count up, three a launch (the three warpgroups that write), so that
nothing must be reset between launches. The order of merging follows from the lengths: results repeat bit by bit.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from abyssal.kernels.gluon import thread_barrier

QUARTERS = gl.constexpr(4)
ROWS = gl.constexpr(64)
WRITERS = gl.constexpr(3)


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def share(
    cu_q, lens, S, H, member, members, BLOCK_S: gl.constexpr, F: gl.constexpr, G: gl.constexpr, LEAST: gl.constexpr
):  # fmt: skip
    """The sequence in which `member`'s share begins, where on the line that sequence begins, a share's width."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    at = gl.arange(0, BLOCK_S, layout)
    queries = gl.load(cu_q + at + 1, mask=at < S, other=0) - gl.load(cu_q + at, mask=at < S, other=0)
    pages = (gl.load(lens + at, mask=at < S, other=0) + ROWS - 1) // ROWS
    groups = (queries * H + (ROWS * G - 1)) // (ROWS * G)
    cost = gl.where((pages > 0) & (at < S), groups * (pages * QUARTERS + F), 0)
    ends = gl.associative_scan(cost, 0, _add)
    width = gl.maximum((gl.max(ends, 0) + members - 1) // members, LEAST * QUARTERS)
    before = ends <= member * width
    return gl.sum(before.to(gl.int32), 0), gl.max(gl.where(before, ends, 0), 0), width


@gluon.jit
def span_of(cu_q, lens, s, H, F: gl.constexpr, G: gl.constexpr):
    """Sequence `s`: rows of work, pages, length, a unit's span, units, first query."""
    q0 = gl.load(cu_q + s)
    rows = (gl.load(cu_q + s + 1) - q0) * H
    length = gl.load(lens + s)
    pages = (length + ROWS - 1) // ROWS
    units = gl.where(pages > 0, (rows + (ROWS * G - 1)) // (ROWS * G), 0)
    return rows, pages, length, pages * QUARTERS + F, units, q0


@gluon.jit
def part_of(base, count, lo, hi):
    """The pages, of the `count` that begin at `base` on the line, in the share from `lo` to `hi`."""
    first = gl.where(lo > base, (lo - base + (QUARTERS - 1)) // QUARTERS, 0)
    last = gl.where(hi > base, gl.minimum(count, (hi - base + (QUARTERS - 1)) // QUARTERS), 0)
    return first, last


@gluon.jit
def arrive(flag):
    """All of this warpgroup's writes are done."""
    thread_barrier()
    gl.atomic_add(flag, 1, sem="release", scope="gpu")


@gluon.jit
def _wait(flags, base_flag, first, count, G: gl.constexpr):
    """Until the `count` blocks from `first` on have arrived; those that have are not asked again."""
    layout: gl.constexpr = gl.BlockedLayout([2], [32], [4], [0])
    at = gl.arange(0, 256, layout)
    missing = at < count
    left = 1
    while left > 0:
        seen = gl.load(flags + first + at * G, mask=missing, other=0, volatile=True) - base_flag
        missing = missing & (seen < WRITERS)
        left = gl.max(missing.to(gl.int32), 0)
    gl.inline_asm_elementwise("fence.acq_rel.gpu; mov.b32 $0, $1;", "=r,r", [at], dtype=gl.int32, is_pure=False, pack=1)
    thread_barrier()


@gluon.jit
def _merge_items(
    out, lse, part, part_lse, blocks, row0, rows, worker, workers, G: gl.constexpr, PB: gl.constexpr,
    RB: gl.constexpr, CB: gl.constexpr, layout: gl.constexpr
):  # fmt: skip
    """Items of `RB` rows by `CB` columns, `PB` parts at a time."""
    first, count = blocks
    flat: gl.constexpr = gl.SliceLayout(2, layout)
    a_part = gl.arange(0, PB, gl.SliceLayout(1, flat))
    a_row = gl.arange(0, RB, gl.SliceLayout(0, flat))
    a_col = gl.arange(0, CB, gl.SliceLayout(0, gl.SliceLayout(1, layout)))
    out_row = gl.arange(0, RB, gl.SliceLayout(1, gl.SliceLayout(0, layout)))
    out_col = gl.arange(0, CB, gl.SliceLayout(0, gl.SliceLayout(0, layout)))
    chunks: gl.constexpr = 512 // CB
    for item in range(worker, ((rows + RB - 1) // RB) * chunks, workers):
        r = (item // chunks) * RB
        c = (item % chunks) * CB
        top = gl.full([RB], float("-inf"), gl.float32, gl.SliceLayout(0, flat))
        total = gl.full([RB], 0.0, gl.float32, gl.SliceLayout(0, flat))
        acc = gl.zeros([RB, CB], gl.float32, gl.SliceLayout(0, layout))
        for i in range(0, count, PB):
            k = i + a_part
            # The first part is its block's last work, any other the first work of its block.
            slot = (first + k * G) * 2 + gl.where(k == 0, 1, 0)
            at = slot[:, None] * ROWS + (r + a_row)[None, :]
            here = (k < count)[:, None] & (r + a_row < rows)[None, :]
            found = gl.load(part_lse + at, mask=here, other=float("-inf"), cache_modifier=".cg")
            cells = gl.expand_dims(at * 512 + c, 2) + gl.expand_dims(gl.expand_dims(a_col, 0), 1)
            values = gl.load(part + cells, mask=gl.expand_dims(here, 2), other=0.0, cache_modifier=".cg")
            higher = gl.maximum(top, gl.max(found, 0))
            ref = gl.where(higher == float("-inf"), 0.0, higher)
            weight = gl.exp2((found - ref[None, :]) * 1.4426950408889634)
            keep = gl.exp2((top - ref) * 1.4426950408889634)
            top = higher
            total = total * keep + gl.sum(weight, 0)
            keep = gl.convert_layout(keep, gl.SliceLayout(1, gl.SliceLayout(0, layout)))
            acc = acc * keep[:, None] + gl.sum(values.to(gl.float32) * gl.expand_dims(weight, 2), 0)
        inverse = gl.convert_layout(1.0 / total, gl.SliceLayout(1, gl.SliceLayout(0, layout)))
        at = (row0 + r + out_row) * 512 + c
        gl.store(
            out + at[:, None] + out_col[None, :], (acc * inverse[:, None]).to(gl.bfloat16),
            mask=(r + out_row < rows)[:, None],
        )  # fmt: skip
        if c == 0:
            gl.store(lse + row0 + r + a_row, top + gl.log(total), mask=r + a_row < rows)


@gluon.jit
def merge(
    out, lse, part, part_lse, flags, base_flag, block, g, width, base, row0, rows, pages, G: gl.constexpr,
    SIDE: gl.constexpr
):  # fmt: skip
    """This warpgroup's portion of a unit that `block` had a part of; `pages` 0: there is none."""
    few: gl.constexpr = gl.BlockedLayout([4, 1, 8], [1, 1, 32], [1, 4, 1], [2, 1, 0])
    many: gl.constexpr = gl.BlockedLayout([8, 1, 8], [8, 1, 4], [1, 1, 4], [2, 1, 0])
    if pages > 0:
        head = base // width
        count = (base + (pages - 1) * QUARTERS) // width - head + 1
        blocks = (head * G + g, count)
        worker = (block // G - head) * 2 + SIDE
        wide = (count > 16) | ((count > 4) & (rows <= 16))
        if worker < gl.where(wide, rows * 4, (rows + 7) // 8 * 2):
            _wait(flags, base_flag, head * G + g, count, G)
            if wide:
                _merge_items(out, lse, part, part_lse, blocks, row0, rows, worker, 2 * count, G, 64, 1, 128, many)
            else:
                _merge_items(out, lse, part, part_lse, blocks, row0, rows, worker, 2 * count, G, 4, 8, 256, few)
