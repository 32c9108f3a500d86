"""Backward of causal attention over packed sequences, from the five tensors as they are.

Two forms. On Hopper, for the widths of DeepSeek-V3, `attention_backward_gluon` passes once over the scores and adds the
queries' gradients up in memory by atomic additions. Everywhere else, and where the same bits are asked for every time,
the two Triton kernels here pass over them twice: one program for BN keys of a head (dK, dV), one for BM queries (dQ).

What comes out lies as the products of q and of kv need it for their own gradients: whole, a head's parts side by side.
The rotary part of a query's gradient is turned back by its angles on the way, where they are given.

Where the tiles of uneven sequences lie is found on the device, by `plan_kernel`: the host knows only T and S, and
starts T // KEYS + S programs a head, or a few more, of which those without a tile end at once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from abyssal.kernels.rotary import rotate_into, turned

KEYS = 128  # keys a tile of the schedule
LOG2E = 1.4426950408889634


@triton.jit(do_not_specialize=["sequences", "tiles"])
def plan_kernel(cu, plan, sequences, tiles, KEYS: tl.constexpr, BLOCK: tl.constexpr):
    """Program s plans the tiles of sequence s, KEYS tokens each, among those of all, the ones with most work first.

    plan `[4, tiles]`, a column a tile: its place in the order of the tokens; its first token; how many of the sequence
    are left from there on; the sequence's first token. Columns past the last tile have nothing left.
    """
    s = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    start = tl.load(cu + s)
    length = tl.load(cu + s + 1) - start
    mine = (length + KEYS - 1) // KEYS
    for low in range(0, tl.maximum(mine, 1), BLOCK):
        work = mine - low - at  # tiles of queries that see this one, itself among them
        rank = tl.zeros([BLOCK], tl.int32)
        place = low + at
        total = 0
        for other in range(0, sequences, BLOCK):
            d = other + at
            there = d < sequences
            ends = tl.load(cu + d + 1, mask=there, other=0)
            theirs = (ends - tl.load(cu + d, mask=there, other=0) + KEYS - 1) // KEYS
            more = tl.maximum(theirs[None, :] - work[:, None], 0)
            same = (d[None, :] < s) & (theirs[None, :] >= work[:, None])
            rank += tl.sum(more + same.to(tl.int32), 1)
            place += tl.sum(tl.where(d < s, theirs, 0), 0)
            total += tl.sum(theirs, 0)
        inside = work > 0
        tl.store(plan + rank, place, mask=inside)
        tl.store(plan + tiles + rank, start + (low + at) * KEYS, mask=inside)
        tl.store(plan + 2 * tiles + rank, length - (low + at) * KEYS, mask=inside)
        tl.store(plan + 3 * tiles + rank, start, mask=inside)
        if (s == sequences - 1) & (low == 0):
            for rest in range(total, tiles, BLOCK):
                tl.store(plan + 2 * tiles + rest + at, 0, mask=rest + at < tiles)


@triton.jit
def prepare_kernel(
    out, d_out, lse, stats, dq, plan,
    out_row, out_head, d_out_row, d_out_head, lse_head, stats_row, heads, width,
    V: tl.constexpr, VP: tl.constexpr, KEYS: tl.constexpr, ROWS: tl.constexpr, CLEAR: tl.constexpr,
):  # fmt: skip
    """The log-sum-exp in base 2 and D = rowsum(dO ∘ O) of a tile's tokens; clears their dQ if it is to be added to.

    They lie tile by tile, and past a sequence's end they say "infinity", of which a query's probabilities come out as
    0: a tile of queries may run over the end without a mask.
    """
    tiles = tl.num_programs(0)
    tile = tl.load(plan + tl.program_id(0))
    first = tl.load(plan + tiles + tl.program_id(0))
    left = tl.load(plan + 2 * tiles + tl.program_id(0))
    head = tl.program_id(1).to(tl.int64)
    if left > 0:
        columns = tl.arange(0, VP)
        for low in range(0, KEYS, ROWS):
            at = low + tl.arange(0, ROWS)
            row = (first + at).to(tl.int64)
            mask = (at < left)[:, None] & (columns < V)[None, :]
            o = tl.load(out + row[:, None] * out_row + head * out_head + columns[None, :], mask=mask, other=0.0)
            do = tl.load(d_out + row[:, None] * d_out_row + head * d_out_head + columns[None, :], mask=mask, other=0.0)
            log = tl.load(lse + head * lse_head + row, mask=at < left, other=float("inf"))
            to = stats + head * 2 * stats_row + tile * KEYS + at
            tl.store(to, log * 1.4426950408889634)
            tl.store(to + stats_row, tl.sum(o.to(tl.float32) * do.to(tl.float32), 1))
        if CLEAR:
            block = dq + (head * tiles + tile) * (KEYS * width)
            for low in range(0, KEYS * width, 2048):
                tl.store(block + low + tl.arange(0, 2048), tl.zeros([2048], tl.float32))


@triton.jit
def _narrow(
    block, dq, cos, sin, row, inside, heads, scale,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, HALVES: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """64 rows of COLUMNS columns, of which the last TURNED are turned back."""
    r = tl.arange(0, 64)
    c = tl.arange(0, COLUMNS)
    mine: tl.constexpr = COLUMNS // HALVES
    down = r // 16 * 128 + r % 8 * 16 + r // 8 % 2 * 2
    across = c % mine // 8 * (512 * HALVES) + c // mine * 512 + c % 8 // 2 * 4 + c % 2
    value = tl.load(block + down[:, None] + across[None, :]) * scale
    if TURNED > 0:
        pair = tl.arange(0, COLUMNS // 2) - (COLUMNS - TURNED) // 2
        angle = row.to(tl.int64)[:, None] * (TURNED // 2) + pair[None, :]
        mask = inside[:, None] & (pair >= 0)[None, :]
        value = turned(value, tl.load(cos + angle, mask=mask, other=1.0).to(tl.float32),
                       -tl.load(sin + angle, mask=mask, other=0.0).to(tl.float32), 64, COLUMNS)  # fmt: skip
    at = dq + row.to(tl.int64)[:, None] * (heads * WIDTH) + c[None, :]
    tl.store(at, value.to(dq.dtype.element_ty), mask=inside[:, None])


@triton.jit(do_not_specialize=["tiles"])
def narrow_kernel(
    dq_wide, dq, cos, sin, plan, tiles, heads, scale,
    WIDTH: tl.constexpr, LEFT: tl.constexpr, HALVES: tl.constexpr, KEYS: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """dq = dq_wide · scale, out of the blocks of 64 rows that `add_queries` wrote: LEFT columns, then the others, of
    which the last TURNED are turned back by their angles."""
    rank = tl.program_id(0) // (KEYS // 64)
    low = tl.program_id(0) % (KEYS // 64) * 64
    head = tl.program_id(1).to(tl.int64)
    left = tl.load(plan + 2 * tiles + rank)
    if low < left:
        row = tl.load(plan + tiles + rank) + low + tl.arange(0, 64)
        inside = low + tl.arange(0, 64) < left
        block = dq_wide + ((head * tiles + tl.load(plan + rank)) * KEYS + low) * WIDTH
        to = dq + head * WIDTH
        _narrow(block, to, cos, sin, row, inside, heads, scale, WIDTH, LEFT, HALVES, 0)
        _narrow(
            block + 64 * LEFT, to + LEFT, cos, sin, row, inside, heads, scale, WIDTH, WIDTH - LEFT, HALVES, TURNED
        )  # fmt: skip


@triton.jit
def _rows(pointer, row, stride, inside, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """[rows, PADDED]: some rows of a matrix, zeros around it."""
    column = tl.arange(0, PADDED)
    mask = inside[:, None] & (column < WIDTH)[None, :]
    return tl.load(pointer + row.to(tl.int64)[:, None] * stride + column[None, :], mask=mask, other=0.0)


@triton.jit
def _put(pointer, value, row, stride, inside, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    column = tl.arange(0, PADDED)
    mask = inside[:, None] & (column < WIDTH)[None, :]
    at = pointer + row.to(tl.int64)[:, None] * stride + column[None, :]
    tl.store(at, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def keys_kernel(
    q_nope, q_rope, k_nope, k_rope, v, d_out, stats, dkv, dk_rope, plan,
    q_nope_row, q_nope_head, q_rope_row, q_rope_head, k_nope_row, k_nope_head, k_rope_row, v_row, v_head,
    d_out_row, d_out_head, stats_row, heads, scale_log2, scale,
    N: tl.constexpr, NP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr,
    KEYS: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """dK and dV of BN keys of one head: dV = Pᵀ dO, dK = scale · dSᵀ Q over the queries that see them."""
    tiles = tl.num_programs(0) // (KEYS // BN)
    rank = tl.program_id(0) // (KEYS // BN)
    low = tl.program_id(0) % (KEYS // BN) * BN
    head = tl.program_id(1).to(tl.int64)
    left = tl.load(plan + 2 * tiles + rank)
    if low < left:
        tile_first = tl.load(plan + tiles + rank)
        end = tile_first + left
        key = tile_first + low + tl.arange(0, BN)
        mine = key < end
        kn = _rows(k_nope + head * k_nope_head, key, k_nope_row, mine, N, NP)
        vs = _rows(v + head * v_head, key, v_row, mine, V, VP)
        dkn = tl.zeros([BN, NP], tl.float32)
        dvs = tl.zeros([BN, VP], tl.float32)
        if R > 0:
            kr = _rows(k_rope, key, k_rope_row, mine, R, RP)
            dkr = tl.zeros([BN, RP], tl.float32)
        stat = stats + head * 2 * stats_row + tl.load(plan + rank) * KEYS - tile_first
        for at in range(tile_first + low, end, BM):
            query = at + tl.arange(0, BM)
            there = query < end
            qn = _rows(q_nope + head * q_nope_head, query, q_nope_row, there, N, NP)
            do = _rows(d_out + head * d_out_head, query, d_out_row, there, V, VP)
            st = tl.dot(kn, tl.trans(qn))
            if R > 0:
                qr = _rows(q_rope + head * q_rope_head, query, q_rope_row, there, R, RP)
                st = tl.dot(kr, tl.trans(qr), st)
            lse = tl.load(stat + query, mask=there, other=float("inf"))
            delta = tl.load(stat + stats_row + query, mask=there, other=0.0)
            pt = tl.exp2(st * scale_log2 - lse[None, :])
            pt = tl.where(key[:, None] <= query[None, :], pt, 0.0)
            dvs = tl.dot(pt.to(do.dtype), do, dvs)
            dst = (pt * (tl.dot(vs, tl.trans(do)) - delta[None, :])).to(qn.dtype)
            dkn = tl.dot(dst, qn, dkn)
            if R > 0:
                dkr = tl.dot(dst, qr, dkr)
        _put(dkv + head * (N + V) + N, dvs, key, heads * (N + V), mine, V, VP)
        _put(dkv + head * (N + V), dkn * scale, key, heads * (N + V), mine, N, NP)
        if R > 0:
            _put(dk_rope + head * R, dkr * scale, key, heads * R, mine, R, RP)


@triton.jit
def queries_kernel(
    q_nope, q_rope, k_nope, k_rope, v, d_out, stats, dq, plan,
    q_nope_row, q_nope_head, q_rope_row, q_rope_head, k_nope_row, k_nope_head, k_rope_row, v_row, v_head,
    d_out_row, d_out_head, stats_row, heads, scale_log2, scale,
    N: tl.constexpr, NP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr,
    KEYS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dQ = scale · dS K of BM queries of one head, over the keys they see."""
    tiles = tl.num_programs(0) // (KEYS // BM)
    rank = tl.program_id(0) // (KEYS // BM)
    low = tl.program_id(0) % (KEYS // BM) * BM
    head = tl.program_id(1).to(tl.int64)
    left = tl.load(plan + 2 * tiles + rank)
    if low < left:
        tile_first = tl.load(plan + tiles + rank)
        end = tile_first + left
        first = tile_first + low
        query = first + tl.arange(0, BM)
        mine = query < end
        qn = _rows(q_nope + head * q_nope_head, query, q_nope_row, mine, N, NP)
        do = _rows(d_out + head * d_out_head, query, d_out_row, mine, V, VP)
        dqn = tl.zeros([BM, NP], tl.float32)
        if R > 0:
            qr = _rows(q_rope + head * q_rope_head, query, q_rope_row, mine, R, RP)
            dqr = tl.zeros([BM, RP], tl.float32)
        stat = stats + head * 2 * stats_row + tl.load(plan + rank) * KEYS - tile_first
        lse = tl.load(stat + query, mask=mine, other=float("inf"))
        delta = tl.load(stat + stats_row + query, mask=mine, other=0.0)
        for at in range(tl.load(plan + 3 * tiles + rank), tl.minimum(first + BM, end), BN):
            key = at + tl.arange(0, BN)
            there = key < end
            kn = _rows(k_nope + head * k_nope_head, key, k_nope_row, there, N, NP)
            vs = _rows(v + head * v_head, key, v_row, there, V, VP)
            s = tl.dot(qn, tl.trans(kn))
            if R > 0:
                kr = _rows(k_rope, key, k_rope_row, there, R, RP)
                s = tl.dot(qr, tl.trans(kr), s)
            p = tl.exp2(s * scale_log2 - lse[:, None])
            p = tl.where(key[None, :] <= query[:, None], p, 0.0)
            ds = (p * (tl.dot(do, tl.trans(vs)) - delta[:, None])).to(kn.dtype)
            dqn = tl.dot(ds, kn, dqn)
            if R > 0:
                dqr = tl.dot(ds, kr, dqr)
        _put(dq + head * (N + R), dqn * scale, query, heads * (N + R), mine, N, NP)
        if R > 0:
            _put(dq + head * (N + R) + N, dqr * scale, query, heads * (N + R), mine, R, RP)


def tiles_of(tokens: int, sequences: int) -> int:
    """Enough for any packing; of many a multiple of 32, so that batches of about as many sequences need buffers of one
    size and kernels of one kind."""
    tiles = tokens // KEYS + sequences
    return tiles if tiles < 128 else -(-tiles // 32) * 32


def one_pass(q_nope: Tensor, q_rope: Tensor | None, v: Tensor) -> bool:
    """Whether the one-pass kernel takes tensors of these widths."""
    from abyssal.kernels import attention_backward_gluon

    return q_rope is not None and attention_backward_gluon.supports(q_nope.shape[-1], q_rope.shape[-1], v.shape[-1])


def attention_backward(
    d_out: Tensor, q_nope: Tensor, q_rope: Tensor | None, k_nope: Tensor, k_rope: Tensor | None, v: Tensor,
    out: Tensor, lse: Tensor, cu: Tensor, scale: float, deterministic: bool = False,
    angles: tuple[Tensor, Tensor] | None = None, buffers: "Buffers | None" = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`dq [T, H, N + R]`, `dkv [T, H, N + V]` (of k_nope and v), `dk_rope [T, R]` (summed over the heads).

    `q_nope`, `k_nope [T, H, N]`, `q_rope [T, H, R]`, `k_rope [T, R]`, `v`, `d_out`, `out [T, H, V]`; `lse [H, T]`
    float32, natural logarithm; `cu [S+1]` int32, for queries and keys alike (S of at least 1). With `deterministic`
    the same inputs give the same bits. With `angles`, cos and sin `[T, R/2]` float32 by which q_rope was rotated, dq is
    the gradient of what it was before. Nothing waits for the device.
    """
    from abyssal.kernels.attention_join import sum_heads

    (T, H, N), V = q_nope.shape, v.shape[-1]
    R = 0 if q_rope is None else q_rope.shape[-1]
    q_nope, q_rope, k_nope, k_rope, v, d_out, out, lse = (
        t if t is None or t.stride(-1) == 1 else t.contiguous()
        for t in (q_nope, q_rope, k_nope, k_rope, v, d_out, out, lse)
    )
    sequences = cu.shape[0] - 1
    tiles = tiles_of(T, sequences)
    once = not deterministic and q_nope.is_cuda and one_pass(q_nope, q_rope, v)
    b = buffers or Buffers(q_nope, T, H, N, R, V, sequences, once)
    cos, sin = (b.stats, b.stats) if angles is None else (t.contiguous() for t in angles)
    with torch.cuda.device_of(q_nope):
        plan_kernel[(sequences,)](cu, b.plan, sequences, tiles, KEYS, 64, num_warps=4)
        prepare_kernel[(tiles, H)](
            out, d_out, lse, b.stats, b.dq_wide, b.plan,
            out.stride(0), out.stride(1), d_out.stride(0), d_out.stride(1), lse.stride(0), b.stats.shape[-1], H, N + R,
            V, triton.next_power_of_2(V), KEYS, 32, once, num_warps=4,
        )  # fmt: skip
        if once:
            from abyssal.kernels.attention_backward_gluon import launch

            launch(q_nope, q_rope, k_nope, k_rope, v, d_out, b.stats, b.dq_wide, b.dkv, b.dk_rope, b.plan, scale)
            narrow_kernel[(tiles * (KEYS // 64), H)](
                b.dq_wide, b.dq, cos, sin, b.plan, tiles, H, scale, N + R, 128, 2 if V == 128 else 1, KEYS,
                R if angles is not None else 0, num_warps=4,
            )  # fmt: skip
        else:
            padded = [max(16, triton.next_power_of_2(w)) for w in (N, R or 1, V)]
            wide = sum(padded) > 384
            BM, BN, warps = (32, 64, 8) if wide else (64, 64, 4)
            tensors = (q_nope, q_rope, k_nope, k_rope, v, d_out, b.stats)
            strides = (
                *q_nope.stride()[:2], *(q_rope.stride()[:2] if q_rope is not None else (0, 0)), *k_nope.stride()[:2],
                k_rope.stride(0) if k_rope is not None else 0, *v.stride()[:2], *d_out.stride()[:2], b.stats.shape[-1],
            )  # fmt: skip
            widths = (N, padded[0], R, padded[1], V, padded[2], KEYS)
            grid = (tiles * (KEYS // BN), H)
            keys_kernel[grid](
                *tensors, b.dkv, b.dk_rope, b.plan, *strides, H, scale * LOG2E, scale, *widths, BN, BM,
                num_warps=warps, num_stages=1 if wide else 2,
            )  # fmt: skip
            BM, BN = (64, 32) if wide else (64, 64)
            grid = (tiles * (KEYS // BM), H)
            queries_kernel[grid](
                *tensors, b.dq, b.plan, *strides, H, scale * LOG2E, scale, *widths, BM, BN,
                num_warps=warps, num_stages=1 if wide else 2,
            )  # fmt: skip
            if angles is not None:
                rotate_into(b.dq[..., N:], cos, sin, b.dq[..., N:], back=True)
    return b.dq, b.dkv, sum_heads(b.dk_rope)


class Buffers:
    """What the backward writes. A test fills it with NaN."""

    def __init__(self, like: Tensor, T: int, H: int, N: int, R: int, V: int, sequences: int, once: bool) -> None:
        tiles = tiles_of(T, sequences)
        self.plan = like.new_empty(4, tiles, dtype=torch.int32)
        self.stats = like.new_empty(H, 2, tiles * KEYS, dtype=torch.float32)
        # Blocks of 64 rows for each head and tile. A tile of queries that runs over the end adds zeros to the next.
        self.dq_wide = like.new_empty((H * tiles * KEYS + 64) * (N + R) if once else 0, dtype=torch.float32)
        self.dq, self.dkv, self.dk_rope = (like.new_empty(T, H, width) for width in (N + R, N + V, R))

    def poison(self) -> "Buffers":
        for t in (self.stats, self.dq_wide, self.dq, self.dkv, self.dk_rope):
            t.fill_(float("nan"))
        return self
