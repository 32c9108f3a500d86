# ruff: noqa: RUF059  (a kernel's tuples are unpacked whole)
"""The roles of `latent_decode_hopper`'s warps: what they do, and the barriers by which they hand pages on.

    full, empty              a half page has come (TMA), its values' warpgroup is done with it
    rope_full, rope_empty    the same for a page's rotary part, which only the scores need
    p_ready, p_free          a page's probabilities and factor are written, both warpgroups have read them
    q_issued                 the first tile's queries are asked for

All walk the same list: the units of the block's share, page after page; `n` counts pages over all units.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from abyssal.kernels.gluon import thread_barrier
from abyssal.kernels.latent_split import arrive, merge, part_of, span_of

TILE = gl.constexpr(64)  # rows of work a tile, and tokens a page
HALF = gl.constexpr(256)
SOON = gl.constexpr(5)  # pages before a part's end


@gluon.jit
def _prefetch(address):
    """Asks for the L2 cache's lines; the values come later, when the queue for memory is long."""
    gl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [address.to(gl.int64)], gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def loads(
    share_args, split, table, P, pages_lo, pages_rope, rings, bars, NH: gl.constexpr, NR: gl.constexpr,
    F: gl.constexpr, G: gl.constexpr, PACE: gl.constexpr
):  # fmt: skip
    cu_q, lens, S, H = share_args
    s, start, lo, hi, block, g = split
    latent, rope, _, _, _, _, _ = rings
    full, empty, rope_full, rope_empty, _, _, q_issued = bars
    n = 0
    ahead = 0
    ahead_of = -1
    while (start < hi) & (s < S):
        rows, count, length, span, groups, q0 = span_of(cu_q, lens, s, H, F, G)
        for j in range(groups):
            first, last = part_of(start + j * span + F, count, lo, hi)
            if (first < last) & (rows > (j * G + g) * TILE):
                page = ahead
                if (s != ahead_of) | (first > 0):
                    page = gl.load(table + s * P + first)
                if n == 0:
                    # Queries first: behind the pages' requests they would wait for all of those.
                    mbarrier.wait(q_issued, 0)
                ahead_of = gl.minimum(s + 1, S - 1)
                ahead = gl.load(table + ahead_of * P)
                for i in range(first, last):
                    row = page * TILE
                    page = gl.load(table + s * P + gl.minimum(i + 1, last - 1))
                    _prefetch(table + s * P + gl.minimum(i + 33, last - 1))
                    for half in gl.static_range(2):
                        h = 2 * n + half
                        # Few requests at a time: all at once, the first page would come as late as the last.
                        if PACE < NH:
                            e = gl.maximum(h - PACE, 0)
                            mbarrier.wait(full.index(e % NH), (e // NH) & 1, pred=h >= PACE)
                        mbarrier.wait(empty.index(h % NH), ((h // NH) & 1) ^ 1)
                        mbarrier.expect(full.index(h % NH), TILE * HALF * 2)
                        tma.async_copy_global_to_shared(
                            pages_lo, [row, half * HALF], full.index(h % NH), latent.index(h % NH)
                        )
                    mbarrier.wait(rope_empty.index(n % NR), ((n // NR) & 1) ^ 1)
                    mbarrier.expect(rope_full.index(n % NR), TILE * TILE * 2)
                    tma.async_copy_global_to_shared(
                        pages_rope, [row, 2 * HALF], rope_full.index(n % NR), rope.index(n % NR)
                    )
                    n += 1
        start += groups * span
        s += 1


@gluon.jit
def _prefetch_queries(q, strides, row, TH, H: gl.constexpr):
    """The tile from `row` on, for the L2 cache; too early, and the pages would drive it out again."""
    st, sh, rt, rh = strides
    line = gl.arange(0, 512, gl.BlockedLayout([1], [32], [4], [0]))
    r = gl.minimum(row + line // 8, TH - 1)
    _prefetch(q[0] + (r // H) * st + (r % H) * sh + (line % 8) * 64)
    line = gl.arange(0, 128, gl.BlockedLayout([1], [32], [4], [0]))
    r = gl.minimum(row + line // 2, TH - 1)
    _prefetch(q[1] + (r // H) * rt + (r % H) * rh)


@gluon.jit
def _product(n, q_low, rings, bars, mma: gl.constexpr, NH: gl.constexpr, NR: gl.constexpr, Q_REGS: gl.constexpr):
    """The scores of the `n`th page, begun: [rows, tokens]."""
    latent, rope, q_latent, q_rope, p, factor, inverse = rings
    full, empty, rope_full, rope_empty, p_ready, p_free, q_issued = bars
    acc = gl.zeros([TILE, TILE], gl.float32, mma)
    h = 2 * n
    mbarrier.wait(full.index(h % NH), (h // NH) & 1)
    k = latent.index(h % NH).permute([1, 0])
    if Q_REGS:
        acc = warpgroup_mma(q_low, k, acc, use_acc=False, is_async=True)
    else:
        acc = warpgroup_mma(q_latent.index(0), k, acc, use_acc=False, is_async=True)
    h += 1
    mbarrier.wait(full.index(h % NH), (h // NH) & 1)
    k = latent.index(h % NH).permute([1, 0])
    acc = warpgroup_mma(q_latent.index(0 if Q_REGS else 1), k, acc, is_async=True)
    mbarrier.wait(rope_full.index(n % NR), (n // NR) & 1)
    return warpgroup_mma(q_rope, rope.index(n % NR).permute([1, 0]), acc, is_async=True)


@gluon.jit
def _softmax(scores, most, total, i, n, ends, limits, scale2, rings, bars, NR: gl.constexpr, segment, final):
    """Hands page `i`'s probabilities and the factor for what was summed before to the values' warpgroups."""
    latent, rope, q_latent, q_rope, p, factor, inverse = rings
    full, empty, rope_full, rope_empty, p_ready, p_free, q_issued = bars
    seen, col = limits
    if (i + 1) * TILE > ends:
        scores = gl.where((i * TILE + col)[None, :] < seen[:, None], scores, float("-inf"))
    higher = gl.maximum(most, gl.max(scores, 1))
    # A row that has seen nothing yet has no maximum to subtract.
    ref = gl.where(higher == float("-inf"), 0.0, higher * scale2)
    probs = gl.exp2(scores * scale2 - ref[:, None])
    alpha = gl.exp2(most * scale2 - ref)
    mbarrier.wait(p_free, (n & 1) ^ 1)
    p.store(probs.to(gl.bfloat16))
    factor.store(alpha)
    if final:
        whole = total * alpha + gl.sum(probs, 1)
        inverse.index(segment & 1).store(gl.where(whole > 0.0, 1.0 / whole, 0.0))
    fence_async_shared()
    thread_barrier()
    mbarrier.arrive(p_ready)
    mbarrier.arrive(rope_empty.index(n % NR))
    return higher, total * alpha + gl.sum(probs, 1)


@gluon.jit
def scores(
    share_args, split, q, q_strides, TH, lse, parts, flags, rings, bars, scale, NH: gl.constexpr, NR: gl.constexpr,
    F: gl.constexpr, G: gl.constexpr, Q_REGS: gl.constexpr
):  # fmt: skip
    cu_q, lens, S, H = share_args
    s, start, lo, hi, block, g = split
    latent, rope, q_latent, q_rope, p, factor, inverse = rings
    full, empty, rope_full, rope_empty, p_ready, p_free, q_issued = bars
    q_lat_ptr, q_rope_ptr = q
    st, sh, rt, rh = q_strides
    _, part_lse = parts
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    # A thread reads 2 rows only: few addresses, and little code, which is cold when a launch begins.
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0])
    by_row: gl.constexpr = gl.SliceLayout(1, mma)
    by_col: gl.constexpr = gl.SliceLayout(0, mma)
    wide_row = gl.arange(0, TILE, gl.SliceLayout(1, wide))
    wide_col = gl.arange(0, HALF, gl.SliceLayout(0, wide))
    narrow_col = gl.arange(0, TILE, gl.SliceLayout(0, wide))
    row = gl.arange(0, TILE, by_row)
    col = gl.arange(0, TILE, by_col)
    scale2 = scale * 1.4426950408889634
    n = 0
    segment = 0
    while (start < hi) & (s < S):
        rows, count, length, span, groups, q0 = span_of(cu_q, lens, s, H, F, G)
        for j in range(groups):
            first, last = part_of(start + j * span + F, count, lo, hi)
            row0 = (j * G + g) * TILE
            if (first < last) & (rows > row0):
                # The tile's queries; rows past the last are zeros.
                r = row0 + wide_row
                at = (q0 + r // H) * st + (r % H) * sh
                here = (r < rows)[:, None]
                q_lo = gl.load(q_lat_ptr + at[:, None] + wide_col[None, :], mask=here, other=0.0)
                q_hi = gl.load(q_lat_ptr + at[:, None] + (HALF + wide_col)[None, :], mask=here, other=0.0)
                at = (q0 + r // H) * rt + (r % H) * rh
                q_r = gl.load(q_rope_ptr + at[:, None] + narrow_col[None, :], mask=here, other=0.0)
                after = gl.where(row0 + TILE * G < rows, row0 + TILE * G, rows + g * TILE) + q0 * H
                if n == 0:
                    mbarrier.arrive(q_issued)
                q_low = q_lo
                if Q_REGS:
                    q_latent.index(0).store(q_lo)
                    thread_barrier()
                    q_low = q_latent.index(0).load(operand)
                    thread_barrier()
                    q_latent.index(0).store(q_hi)
                else:
                    q_latent.index(0).store(q_lo)
                    q_latent.index(1).store(q_hi)
                q_rope.store(q_r)
                fence_async_shared()
                thread_barrier()
                # Query t of a sequence's sees all tokens but those of the queries after it.
                queries = rows // H
                seen = length - queries + 1 + (row0 + row) // H
                most = gl.full([TILE], float("-inf"), gl.float32, by_row)
                total = gl.full([TILE], 0.0, gl.float32, by_row)
                ends = length - queries + 1
                for i in range(first, last):
                    acc = _product(n, q_low, rings, bars, mma, NH, NR, Q_REGS)
                    products = warpgroup_mma_wait(0, deps=[acc])
                    most, total = _softmax(
                        products, most, total, i, n, ends, (seen, col), scale2, rings, bars, NR, segment, i + 1 == last
                    )
                    if i == gl.maximum(last - SOON, first):
                        _prefetch_queries(q, q_strides, after, TH, H)
                    n += 1
                segment += 1
                found = gl.where(total > 0.0, most * scale + gl.log(total), float("-inf"))
                whole = last - first == count
                slot = (block * 2 + gl.where(first == 0, 1, 0)) * TILE
                to = gl.where(whole, lse.to(gl.int64) + (q0 * H + row0) * 4, part_lse.to(gl.int64) + slot * 4)
                gl.store(to.to(gl.pointer_type(gl.float32)) + row, found, mask=row0 + row < rows)
        start += groups * span
        s += 1
    arrive(flags + block)


@gluon.jit
def values(
    share_args, split, out, lse, parts, flags, base_flag, rings, bars, width, NH: gl.constexpr, F: gl.constexpr,
    G: gl.constexpr, SIDE: gl.constexpr
):  # fmt: skip
    cu_q, lens, S, H = share_args
    s, start, lo, hi, block, g = split
    latent, rope, _, _, p, factor, inverse = rings
    full, empty, _, _, p_ready, p_free, _ = bars
    part, part_lse = parts
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    by_row: gl.constexpr = gl.SliceLayout(1, mma)
    by_col: gl.constexpr = gl.SliceLayout(0, mma)
    tile: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    row = gl.arange(0, TILE, by_row)
    col = SIDE * HALF + gl.arange(0, HALF, by_col)
    token = gl.arange(0, TILE, gl.SliceLayout(1, tile))
    n = 0
    segment = 0
    # What the block has parts of: the unit that began before its share, and the one that ends after it.
    head_unit = 0
    head_row = 0
    head_rows = 0
    head_count = 0
    tail_unit = 0
    tail_row = 0
    tail_rows = 0
    tail_count = 0
    while (start < hi) & (s < S):
        rows, count, length, span, groups, q0 = span_of(cu_q, lens, s, H, F, G)
        for j in range(groups):
            base = start + j * span + F
            first, last = part_of(base, count, lo, hi)
            row0 = (j * G + g) * TILE
            if (first < last) & (rows > row0):
                acc = gl.zeros([TILE, HALF], gl.float32, mma)
                for i in range(first, last):
                    h = 2 * n + SIDE
                    mbarrier.wait(p_ready, n & 1)
                    acc = acc * factor.load(by_row)[:, None]
                    mbarrier.wait(full.index(h % NH), (h // NH) & 1)
                    v = latent.index(h % NH)
                    if (i + 1) * TILE > length:
                        # What lies past the context may be anything, and 0 · NaN is NaN.
                        for k in gl.static_range(4):
                            quarter = v.slice(k * 64, 64, dim=1)
                            kept = gl.where((i * TILE + token < length)[:, None], quarter.load(tile), 0.0)
                            quarter.store(kept.to(gl.bfloat16))
                        fence_async_shared()
                        thread_barrier()
                    acc = warpgroup_mma(p, v, acc, is_async=True)
                    acc = warpgroup_mma_wait(0, deps=[acc])
                    thread_barrier()
                    mbarrier.arrive(empty.index(h % NH))
                    mbarrier.arrive(p_free)
                    n += 1
                acc = acc * inverse.index(segment & 1).load(by_row)[:, None]
                segment += 1
                whole = last - first == count
                slot = (block * 2 + gl.where(first == 0, 1, 0)) * TILE
                at = gl.where(whole, q0 * H + row0, slot) * 1024
                to = (gl.where(whole, out.to(gl.int64), part.to(gl.int64)) + at).to(gl.pointer_type(gl.bfloat16))
                to = gl.multiple_of(to, 16)
                gl.store(to + row[:, None] * 512 + col[None, :], acc.to(gl.bfloat16), mask=(row0 + row < rows)[:, None])
                if not whole:
                    if first == 0:
                        tail_unit = base
                        tail_row = q0 * H + row0
                        tail_rows = gl.minimum(rows - row0, TILE)
                        tail_count = count
                    else:
                        head_unit = base
                        head_row = q0 * H + row0
                        head_rows = gl.minimum(rows - row0, TILE)
                        head_count = count
        start += groups * span
        s += 1
    arrive(flags + block)
    for which in range(2):
        head = which == 0
        merge(
            out, lse, part, part_lse, flags, base_flag, block, g, width, gl.where(head, head_unit, tail_unit),
            gl.where(head, head_row, tail_row), gl.where(head, head_rows, tail_rows),
            gl.where(head, head_count, tail_count), G, SIDE,
        )  # fmt: skip
