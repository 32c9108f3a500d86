"""Grouped products of the routed experts' backward pass, on the machine of `experts_products`.

With a, b the inner products that the forward pass kept, s = silu, g the choice's weight, dy its token's gradient:

    dh = dy w2,   da = g dh b s'(a),   db = g dh s(a),   dg = sum(dh s(a) b),   hidden = g s(a) b
    dw1 = daᵀ x,  dw3 = dbᵀ x,  dw2 = dyᵀ hidden
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier, tma

from abyssal.kernels.experts_products import (
    HALF,
    LINES,
    PIECE,
    QUARTER,
    copy_lines,
    gather,
    halves,
    multiply,
    ring,
    send,
    sigmoid,
    tile_at,
    write,
)


@gluon.jit
def _load_hidden(dy, token, w2_desc, a_desc, b_desc, table, a_ring, b_ring, pieces, ready, empty, D, F,
                 GROUP: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    columns = (F + 255) // 256
    row_tiles = gl.load(table)
    turn = 0
    for tile in range(gl.program_id(0), row_tiles * columns, gl.num_programs(0)):
        m, n = tile_at(tile, row_tiles, columns, GROUP)
        expert = gl.load(table + 4 * m + 4)
        row = gl.load(table + 4 * m + 5)
        end = gl.load(table + 4 * m + 6)
        upper, upper_live = gather(dy, token, row, end, D)
        lower, lower_live = gather(dy, token, row + 64, end, D)
        for at in range(0, D, 64):
            slot = turn % STAGES
            mbarrier.wait(empty.index(slot), ((turn // STAGES) & 1) ^ 1)
            bar = ready.index(slot)
            mbarrier.expect(bar, 64 * 256 * 2)
            tma.async_copy_global_to_shared(w2_desc, [expert * D + at, n * 256], bar, b_ring.index(slot))
            copy_lines(a_ring.index(slot * 2), upper + at, upper_live, at, D)
            copy_lines(a_ring.index(slot * 2 + 1), lower + at, lower_live, at, D)
            async_copy.mbarrier_arrive(bar, increment_count=False)
            turn += 1
        for j in range(4):  # what the results need: the kept products, through the same ring
            slot = turn % STAGES
            mbarrier.wait(empty.index(slot), ((turn // STAGES) & 1) ^ 1)
            bar = ready.index(slot)
            mbarrier.expect(bar, 4 * 64 * 64 * 2)
            column = n * 256 + 64 * j
            for half in gl.static_range(2):
                at = row + 64 * half
                tma.async_copy_global_to_shared(a_desc, [at, column], bar, pieces.index(slot * 4 + 2 * half))
                tma.async_copy_global_to_shared(b_desc, [at, column], bar, pieces.index(slot * 4 + 2 * half + 1))
            async_copy.mbarrier_arrive(bar, increment_count=False)
            turn += 1


@gluon.jit
def _multiply_hidden(results, weight, table, a_ring, b_ring, pieces, ready, empty, D, F, GROUP: gl.constexpr,
                     STAGES: gl.constexpr, WG: gl.constexpr):  # fmt: skip
    da_desc, da, db_desc, db, hidden_desc, hidden, parts, rows_total = results
    columns = (F + 255) // 256
    row_tiles = gl.load(table)
    turn = 0
    for tile in range(gl.program_id(0), row_tiles * columns, gl.num_programs(0)):
        m, n = tile_at(tile, row_tiles, columns, GROUP)
        row = gl.load(table + 4 * m + 5) + 64 * WG
        end = gl.load(table + 4 * m + 6)
        rows = row + gl.arange(0, 64, layout=gl.SliceLayout(1, QUARTER))
        scale = gl.load(weight + rows, mask=rows < end, other=0.0)
        acc, turn = multiply(a_ring, b_ring, ready, empty, turn, (D + 63) // 64, WG, False, False, True, STAGES)
        left, right = halves(acc, HALF)
        dhs = halves(left, QUARTER) + halves(right, QUARTER)
        for j in gl.static_range(4):  # parked beside the kept products: the loop below is then a real one, and short
            slot = (turn + j) % STAGES  # code is what keeps it fast (unrolled it missed the instruction cache)
            mbarrier.wait(ready.index(slot), ((turn + j) // STAGES) & 1)
            a_ring.index(slot * 2 + WG).store(dhs[j].to(da_desc.dtype))
        part = gl.zeros([64], gl.float32, gl.SliceLayout(1, QUARTER))
        for j in range(4):
            slot = turn % STAGES
            column = n * 256 + 64 * j
            a_piece = pieces.index(slot * 4 + 2 * WG)
            b_piece = pieces.index(slot * 4 + 2 * WG + 1)
            hidden_piece = a_ring.index(slot * 2 + WG)
            a = a_piece.load(QUARTER).to(gl.float32)
            b = b_piece.load(QUARTER).to(gl.float32)
            dh = hidden_piece.load(QUARTER).to(gl.float32)
            gate = sigmoid(a)
            act = a * gate
            part += gl.sum(dh * act * b, axis=1)
            dh = dh * scale[:, None]
            a_piece.store((dh * b * (gate + act * (1 - gate))).to(da_desc.dtype))
            b_piece.store((dh * act).to(da_desc.dtype))
            hidden_piece.store((act * b * scale[:, None]).to(da_desc.dtype))
            send(a_piece, da_desc, da, row, column, end, F)
            send(b_piece, db_desc, db, row, column, end, F)
            send(hidden_piece, hidden_desc, hidden, row, column, end, F)
            tma.store_wait(3)  # the slot before is free once its three pieces have been read
            mbarrier.arrive(empty.index((turn + STAGES - 1) % STAGES), count=1, pred=j > 0)
            turn += 1
        gl.store(parts + n * rows_total + rows, part, mask=rows < end)
        tma.store_wait(0)
        mbarrier.arrive(empty.index((turn + STAGES - 1) % STAGES), count=1)


@gluon.jit(do_not_specialize=["rows_total", "D8", "F8"])
def hidden_kernel(dy, token, w2_desc, a_desc, b_desc, da_desc, da, db_desc, db, hidden_desc, hidden, parts, rows_total,
                  weight, table, D8, F8, GROUP: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """da, db, hidden `[N, F]` and the weights' gradients, a part for each tile of columns `[⌈F / 256⌉, N]`, from dy
    `[T, D]`, gathered, and the two products that the forward pass kept `[N, F]`."""
    gl.static_assert(STAGES == 4, "the kept products of a tile take four slots")
    D = D8 * 8
    F = F8 * 8
    a_ring, b_ring, ready, empty = ring(STAGES, 129, w2_desc.dtype, 64)
    pieces = b_ring._reinterpret(w2_desc.dtype, [STAGES * 4, 64, 64], PIECE)
    results = (da_desc, da, db_desc, db, hidden_desc, hidden, parts, rows_total)
    gl.warp_specialize(
        [
            (_multiply_hidden, (results, weight, table, a_ring, b_ring, pieces, ready, empty, D, F, GROUP, STAGES, 0)),
            (_multiply_hidden, (results, weight, table, a_ring, b_ring, pieces, ready, empty, D, F, GROUP, STAGES, 1)),
            (_load_hidden, (dy, token, w2_desc, a_desc, b_desc, table, a_ring, b_ring, pieces, ready, empty,
                            D, F, GROUP, STAGES)),
        ],
        [4, 4],
        [224, 56],
    )  # fmt: skip


@gluon.jit
def waves_of(count):
    """How many of `count` tiles, dealt out there and back, are this program's."""
    programs = gl.num_programs(0)
    full = count // programs
    return full + (seat(full) < count - full * programs).to(gl.int32)


@gluon.jit
def seat(wave):
    """This program's place in the order of a round."""
    return gl.program_id(0) + wave % 2 * (gl.num_programs(0) - 1 - 2 * gl.program_id(0))


@gluon.jit
def tile_of(wave):
    return wave * gl.num_programs(0) + seat(wave)


@gluon.jit
def _load_weights(left_desc, left2_desc, source, token, starts, busiest, E, a_ring, b_ring, ready, empty, D, F,
                  SIDES: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    rows = (F + 127) // 128
    columns = (D + 255) // 256
    tiles = rows * SIDES * columns
    lines = gl.arange(0, 64, layout=gl.SliceLayout(1, LINES))
    turn = 0
    for wave in range(waves_of(E * tiles)):
        tile = tile_of(wave)
        expert = gl.load(busiest + tile // tiles)
        m, n = tile_at(tile % tiles, rows * SIDES, columns, GROUP)
        start = gl.load(starts + expert)
        end = gl.load(starts + expert + 1)
        across = n * 256 + gl.arange(0, 256, layout=gl.SliceLayout(0, LINES))
        row = gl.load(token + start + lines, mask=start + lines < end, other=0)
        for at in range(start, end, 64):
            later = at + 64 + lines
            next_row = gl.load(token + later, mask=later < end, other=0)  # a step ahead: it takes a while
            slot = turn % STAGES
            mbarrier.wait(empty.index(slot), ((turn // STAGES) & 1) ^ 1)
            bar = ready.index(slot)
            mbarrier.expect(bar, 64 * 128 * 2)
            upper = a_ring.index(slot * 2)
            lower = a_ring.index(slot * 2 + 1)
            if SIDES == 1 or m < rows:
                tma.async_copy_global_to_shared(left_desc, [at, m * 128], bar, upper)
                tma.async_copy_global_to_shared(left_desc, [at, m * 128 + 64], bar, lower)
            else:
                tma.async_copy_global_to_shared(left2_desc, [at, (m - rows) * 128], bar, upper)
                tma.async_copy_global_to_shared(left2_desc, [at, (m - rows) * 128 + 64], bar, lower)
            pointers = source + ((row.to(gl.int64) * D)[:, None] + across[None, :])
            copy_lines(b_ring.index(slot), pointers, at + lines < end, n * 256, D)
            async_copy.mbarrier_arrive(bar, increment_count=False)
            row = next_row
            turn += 1


@gluon.jit
def _multiply_weights(results, starts, busiest, E, a_ring, b_ring, ready, empty, staging, D, F,
                      SIDES: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, WG: gl.constexpr):  # fmt: skip
    out_desc, out, out2_desc, out2 = results
    rows = (F + 127) // 128
    columns = (D + 255) // 256
    tiles = rows * SIDES * columns
    turn = 0
    sent = 0
    for wave in range(waves_of(E * tiles)):
        tile = tile_of(wave)
        expert = gl.load(busiest + tile // tiles)
        m, n = tile_at(tile % tiles, rows * SIDES, columns, GROUP)
        steps = (gl.load(starts + expert + 1) - gl.load(starts + expert) + 63) // 64
        acc, turn = multiply(a_ring, b_ring, ready, empty, turn, steps, WG, True, False, True, STAGES)
        left, right = halves(acc, HALF)
        parts = halves(left, QUARTER) + halves(right, QUARTER)
        for j in gl.static_range(4):
            f = m * 128 + 64 * WG
            d = n * 256 + 64 * j
            if SIDES == 1:
                sent = write(parts[j], staging, sent, out_desc, out, expert * D + d, f, (expert + 1) * D, F, WG, True)
            elif m < rows:
                sent = write(parts[j], staging, sent, out_desc, out, expert * F + f, d, (expert + 1) * F, D, WG)
            else:
                f -= rows * 128
                sent = write(parts[j], staging, sent, out2_desc, out2, expert * F + f, d, (expert + 1) * F, D, WG)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["E", "D8", "F8"])
def weights_kernel(left_desc, left2_desc, source, token, starts, busiest, out_desc, out, out2_desc, out2, E, D8, F8,
                   SIDES: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """The experts' weights' gradients, sums over each expert's rows; zero for an expert without any.

    SIDES 2: dw1, dw3 `[E, F, D]` from da, db `[N, F]` and x `[T, D]`, gathered. SIDES 1: dw2 `[E, D, F]` from hidden
    `[N, F]` and dy `[T, D]`, gathered; the tiles are the transpose's, since F has more divisors of 128 than of 256.

    A tile takes as long as its expert has rows. Tiles are dealt out in the order of `busiest [E]`, there and back: who
    got the longest of one round gets the shortest of the next.
    """
    D = D8 * 8
    F = F8 * 8
    dtype: gl.constexpr = left_desc.dtype
    a_ring, b_ring, ready, empty = ring(STAGES, 129, dtype, 64)
    staging = gl.allocate_shared_memory(dtype, [4, 64, 64], PIECE)
    results = (out_desc, out, out2_desc, out2)
    gl.warp_specialize(
        [
            (_multiply_weights, (results, starts, busiest, E, a_ring, b_ring, ready, empty, staging, D, F, SIDES,
                                 GROUP, STAGES, 0)),
            (_multiply_weights, (results, starts, busiest, E, a_ring, b_ring, ready, empty, staging, D, F, SIDES,
                                 GROUP, STAGES, 1)),
            (_load_weights, (left_desc, left2_desc, source, token, starts, busiest, E, a_ring, b_ring, ready, empty,
                             D, F, SIDES, GROUP, STAGES)),
        ],
        [4, 4],
        [216, 72],
    )  # fmt: skip
