"""One row of logits, in passes over it by one program: sums, the cut that the filters make, and a draw.

Nothing is sorted. What is kept of a row is what lies above a value, its cut, and the first few of those equal to it.
The cut is found by bisection, each pass over the row moving one end of the bracket onto a value that occurs.
A weight is exp2((score - largest) * scale): probabilities before they are divided by their sum.
"""

import triton
import triton.language as tl

_GOLDEN = 0x9E3779B97F4A7C15
GOLDEN = tl.constexpr(_GOLDEN - 2**64)
# What a uniform number is for, as in `ops.sample`: what a seed is increased by.
TAKE, DRAFT, ACCEPT = (tl.constexpr((n * _GOLDEN + 2**63) % 2**64 - 2**63) for n in (1, 2, 3))
MULTIPLY_1 = tl.constexpr(0xBF58476D1CE4E5B9 - 2**64)
MULTIPLY_2 = tl.constexpr(0x94D049BB133111EB - 2**64)
INF = tl.constexpr(float("inf"))


@triton.jit
def _mix(z):
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * MULTIPLY_1
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * MULTIPLY_2
    return z ^ ((z >> 31) & ((1 << 33) - 1))


@triton.jit
def uniform(seed, position, STREAM: tl.constexpr):
    """As `ops.sample.uniform`; STREAM is TAKE, DRAFT or ACCEPT."""
    bits = _mix(_mix(seed.to(tl.int64) + STREAM) + position.to(tl.int64) * GOLDEN)
    return ((bits >> 11) & ((1 << 53) - 1)).to(tl.float64) * (1.0 / (1 << 53))


@triton.jit
def weight(score, id, best, scale, cut, last, min_p):
    """0 for what is filtered out: below the cut, at it but after the id `last`, or below min_p."""
    w = tl.exp2((score - best) * scale)
    return tl.where(((score > cut) | ((score == cut) & (id <= last))) & (w >= min_p), w, 0.0)


@triton.jit
def total_weight(row, n, best, scale, cut, last, min_p, BLOCK: tl.constexpr):
    """The weights' sum, float64."""
    at = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n, BLOCK):
        id = start + at
        score = tl.load(row + id, mask=id < n, other=-INF).to(tl.float32)
        total += weight(score, id, best, scale, cut, last, min_p)
    return tl.sum(total.to(tl.float64), 0)


@triton.jit
def _between(low, high):
    """A value from `low` on, below `high`."""
    middle = tl.maximum(low * 0.5 + high * 0.5, low)
    return tl.where(middle < high, middle, low)


@triton.jit
def kth_value(row, n, low, best, k, BLOCK: tl.constexpr):
    """The k-th largest score and how many are above it. `low`: a bound of all that matters, the result where fewer than
    k are not below it."""
    at = tl.arange(0, BLOCK)
    high = best
    above = tl.full([], 0, tl.int32)
    while low < high:
        middle = _between(low, high)
        count = tl.zeros([BLOCK], tl.int32)
        up = tl.full([BLOCK], INF, tl.float32)
        down = tl.full([BLOCK], -INF, tl.float32)
        for start in range(0, n, BLOCK):
            id = start + at
            score = tl.load(row + id, mask=id < n, other=-INF).to(tl.float32)
            larger = score > middle
            count += larger.to(tl.int32)
            up = tl.minimum(up, tl.where(larger, score, INF))
            down = tl.maximum(down, tl.where(larger, -INF, score))
        number = tl.sum(count, 0)
        if number >= k:
            low = tl.min(up, 0)
        else:
            high = tl.maximum(tl.max(down, 0), low)
            above = number
    return high, above


@triton.jit
def nucleus_value(row, n, low, best, scale, min_p, target, BLOCK: tl.constexpr):
    """The smallest score such that the weight above it is below `target`, and that weight, float64. Of scores from
    `low` on, which is not below the cut of top-k."""
    at = tl.arange(0, BLOCK)
    high = best
    above = tl.full([], 0.0, tl.float64)
    while low < high:
        middle = _between(low, high)
        mass = tl.zeros([BLOCK], tl.float32)
        up = tl.full([BLOCK], INF, tl.float32)
        down = tl.full([BLOCK], -INF, tl.float32)
        for start in range(0, n, BLOCK):
            id = start + at
            score = tl.load(row + id, mask=id < n, other=-INF).to(tl.float32)
            larger = score > middle
            w = tl.exp2((score - best) * scale)
            mass += tl.where(larger & (w >= min_p), w, 0.0)
            up = tl.minimum(up, tl.where(larger, score, INF))
            down = tl.maximum(down, tl.where(larger, -INF, score))
        number = tl.sum(mass.to(tl.float64), 0)
        if number >= target:
            # Rounding may have it that all weigh less than their share asked for: then nothing lies above.
            low = tl.minimum(tl.min(up, 0), high)
        else:
            high = tl.maximum(tl.max(down, 0), low)
            above = number
    return high, above


@triton.jit
def tie(row, n, value, m, BLOCK: tl.constexpr):
    """The id of the m-th score equal to `value`, by id; n where there are fewer. m is at least 1."""
    at = tl.arange(0, BLOCK)
    seen = tl.full([], 0, tl.int32)
    start = tl.full([], 0, tl.int32)
    last = start + n
    while (start < n) & (seen < m):
        id = start + at
        score = tl.load(row + id, mask=id < n, other=-INF).to(tl.float32)
        equal = ((score == value) & (id < n)).to(tl.int32)
        number = tl.sum(equal, 0)
        if seen + number >= m:
            last = tl.min(tl.where((equal != 0) & (seen + tl.cumsum(equal, 0) == m), id, n), 0)
        seen += number
        start += BLOCK
    return last


@triton.jit
def cuts(row, n, low, best, scale, total, k, p, min_p, BLOCK: tl.constexpr):
    """The filters of one row -> its cut, the last id of those equal to it, and the weights' sum. `total` is the sum
    before filters, `low` the smallest finite score."""
    # A weight of 2 ** -160 is 0 in float32; what lies further down may lie very far down.
    low = tl.maximum(low, best - 160.0 / scale)
    cut = tl.full([], -INF, tl.float32)
    last = tl.full([], 0, tl.int32) + n
    if (k > 0) & (k < n):
        cut, above = kth_value(row, n, low, best, k, BLOCK)
        last = tie(row, n, cut, k - above, BLOCK)
    if ((k > 0) & (k < n)) | (min_p > 0):
        total = total_weight(row, n, best, scale, cut, last, min_p, BLOCK)
    if p < 1:
        target = p.to(tl.float64) * total
        value, mass = nucleus_value(row, n, tl.maximum(low, cut), best, scale, min_p, target, BLOCK)
        w = tl.exp2((value - best) * scale).to(tl.float64)
        wanted = tl.minimum((target - mass) / w, 1073741824.0)
        m = wanted.to(tl.int32)
        m = tl.maximum(m + (m < wanted).to(tl.int32), 1)
        found = tie(row, n, value, m, BLOCK)
        last = tl.where(value == cut, tl.minimum(last, found), found)
        cut = value
        total = total_weight(row, n, best, scale, cut, last, min_p, BLOCK)
    return cut, last, total


@triton.jit
def passed(w, id, base, target, token, last):
    """One block of a running sum: the first id with weight at which it passes `target`, unless `token` was found
    already (is not negative); the last id with weight so far, for where rounding has it that none does; the sum."""
    running = base + tl.cumsum(w.to(tl.float64), 0)
    hit = tl.min(tl.where((running > target) & (w > 0), id, 2147483647), 0)
    token = tl.where((token < 0) & (hit < 2147483647), hit, token)
    last = tl.maximum(last, tl.max(tl.where(w > 0, id, -1), 0))
    return token, last, base + tl.sum(w.to(tl.float64), 0)


@triton.jit
def drawn(row, n, best, scale, cut, last, min_p, target, BLOCK: tl.constexpr):
    """The first id at which the weights' running sum passes `target`."""
    at = tl.arange(0, BLOCK)
    token = tl.full([], -1, tl.int32)
    final = tl.full([], -1, tl.int32)
    start = tl.full([], 0, tl.int32)
    base = tl.full([], 0.0, tl.float64)
    while (start < n) & (token < 0):
        id = start + at
        score = tl.load(row + id, mask=id < n, other=-INF).to(tl.float32)
        w = weight(score, id, best, scale, cut, last, min_p)
        token, final, base = passed(w, id, base, target, token, final)
        start += BLOCK
    return tl.where(token < 0, final, token)
