"""How a Gluon decoding kernel finds its work: the ranges of `latent_decode.py`, in Gluon."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

BN = gl.constexpr(64)  # cached rows a tile


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def tiles_of(cu_q, context_lens, s, H, block, BM: gl.constexpr):
    """Of sequence s: its first query, queries, length, and tiles for this block of rows."""
    q0 = gl.load(cu_q + s)
    queries = gl.load(cu_q + s + 1) - q0
    length = gl.load(context_lens + s)
    return q0, queries, length, gl.where(queries * H > block * BM, (length + BN - 1) // BN, 0)


@gluon.jit
def range_of(p, P, cu_q, context_lens, S, H, block, S_PAD: gl.constexpr, BM: gl.constexpr):
    """Range p of P: the sequence it begins in, that sequence's first tile, the range's first tile, and its end."""
    if S_PAD == 1:
        _, _, _, count = tiles_of(cu_q, context_lens, 0, H, block, BM)
        chunk = gl.maximum((count + P - 1) // P, 1)
        return 0, 0, p * chunk, gl.minimum(p * chunk + chunk, count)
    i = gl.arange(0, S_PAD, gl.BlockedLayout([1], [32], [4], [0]))
    queries = gl.load(cu_q + i + 1, mask=i < S, other=0) - gl.load(cu_q + i, mask=i < S, other=0)
    lens = gl.load(context_lens + i, mask=i < S, other=0)
    tiles = gl.where(queries * H > block * BM, (lens + BN - 1) // BN, 0)
    ends = gl.associative_scan(tiles, 0, _add)
    count = gl.max(ends, 0)
    chunk = gl.maximum((count + P - 1) // P, 1)
    tile = p * chunk
    last = gl.minimum(tile + chunk, count)
    s = gl.sum((ends <= tile).to(gl.int32), 0)
    begin = gl.max(gl.where(ends <= tile, ends, 0), 0)
    return s, begin, tile, last
