"""One row of logits, in passes over it by one program: sums, the cut that the filters make, and a draw.

Nothing is sorted. What is kept of a row is what lies above a value, its cut, and the first few of those equal to it.
The cut is found by bisection, each pass over the row moving one end of the bracket onto a value that occurs, until what
is left between the ends fits into registers.
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
def _counted(score, best, scale, min_p, MASS: tl.constexpr):
    """What a score counts in a search: its weight, or one."""
    if MASS:
        w = tl.exp2((score - best) * scale)
        return tl.where(w >= min_p, w, 0.0)
    else:
        return score * 0 + 1.0


@triton.jit
def _wanted(value, above, target, best, scale, min_p, MASS: tl.constexpr):
    """How many scores equal to `value` it takes to bring `above` to `target`, at least 1."""
    each = _counted(value, best, scale, min_p, MASS).to(tl.float64)
    share = tl.minimum((target - above) / each, 1073741824.0)
    m = share.to(tl.int32)
    return tl.maximum(m + (m < share).to(tl.int32), 1)


@triton.jit
def _tie(row, n, value, m, BLOCK: tl.constexpr):
    """The id of the m-th score equal to `value`, by id, n where there are fewer; how many there are, at most m."""
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
    return last, tl.minimum(seen, m)


@triton.jit
def search(row, n, few, few_ids, low, best, scale, min_p, target, MASS: tl.constexpr, FEW: tl.constexpr,
           BLOCK: tl.constexpr):  # fmt: skip
    """Where scores, counted from the largest down and equal ones by id, reach `target` (float64): the score, the id of
    the last of its equals that is needed, how many of them are, and what is counted above it.

    Scores below `low` do not matter; where all others do not reach the target, it is the smallest. Bisection goes over
    the row until FEW scores are left in the bracket, and then over these alone, kept in `few [FEW]` and registers.
    """
    at = tl.arange(0, BLOCK)
    high = best
    above = tl.full([], 0.0, tl.float64)  # what is counted beyond `high`
    beyond = tl.full([], 0, tl.int32)  # how many scores that is
    upto = beyond + n  # how many there are from `low` on, at most
    while (low < high) & (upto - beyond > FEW):
        middle = _between(low, high)
        mass = tl.zeros([BLOCK], tl.float32)
        count = tl.zeros([BLOCK], tl.int32)
        up = tl.full([BLOCK], INF, tl.float32)
        down = tl.full([BLOCK], -INF, tl.float32)
        for start in range(0, n, BLOCK):
            id = start + at
            score = tl.load(row + id, mask=id < n, other=-INF).to(tl.float32)
            larger = score > middle
            count += larger.to(tl.int32)
            if MASS:
                mass += tl.where(larger, _counted(score, best, scale, min_p, MASS), 0.0)
            up = tl.minimum(up, tl.where(larger, score, INF))
            down = tl.maximum(down, tl.where(larger, -INF, score))
        number = tl.sum(count, 0)
        amount = number.to(tl.float64)
        if MASS:
            amount = tl.sum(mass.to(tl.float64), 0)
        if amount >= target:
            # Rounding may have it that nothing above weighs as much as it should: then the largest is what is left.
            low = tl.minimum(tl.min(up, 0), high)
            upto = number
        else:
            high = tl.maximum(tl.max(down, 0), low)
            above = amount
            beyond = number
    if low < high:
        filled = tl.full([], 0, tl.int32)
        for start in range(0, n, BLOCK):
            id = start + at
            score = tl.load(row + id, mask=id < n, other=-INF).to(tl.float32)
            left = ((score >= low) & (score <= high)).to(tl.int32)
            place = filled + tl.cumsum(left, 0) - 1
            wanted = (left != 0) & (place < FEW)
            tl.store(few + place, score, mask=wanted)
            tl.store(few_ids + place, id, mask=wanted)
            filled += tl.sum(left, 0)
        tl.debug_barrier()  # each thread reads what others wrote
        place = tl.arange(0, FEW)
        score = tl.load(few + place, mask=place < filled, other=-INF)
        id = tl.load(few_ids + place, mask=place < filled, other=0)
        counts = tl.where(score > -INF, _counted(score, best, scale, min_p, MASS), 0.0)
        outside = above
        while low < high:
            middle = _between(low, high)
            larger = score > middle
            amount = outside + tl.sum(tl.where(larger, counts, 0.0).to(tl.float64), 0)
            if amount >= target:
                low = tl.minimum(tl.min(tl.where(larger, score, INF), 0), high)
            else:
                high = tl.maximum(tl.max(tl.where(larger, -INF, score), 0), low)
                above = amount
        m = _wanted(high, above, target, best, scale, min_p, MASS)
        equal = (score == high).to(tl.int32)
        last = tl.min(tl.where((equal != 0) & (tl.cumsum(equal, 0) == m), id, n), 0)
        held = tl.minimum(tl.sum(equal, 0), m)
        tl.debug_barrier()  # before `few` is written again
    else:
        last, held = _tie(row, n, high, _wanted(high, above, target, best, scale, min_p, MASS), BLOCK)
    return high, last, held, above


@triton.jit
def cuts(row, n, few, few_ids, low, best, scale, total, k, p, min_p, FEW: tl.constexpr, BLOCK: tl.constexpr):
    """The filters of one row -> its cut, the last id of those equal to it, and the weights' sum. `total` is the sum
    before filters, `low` the smallest finite score."""
    # A weight of 2 ** -160 is 0 in float32; what lies further down may lie very far down.
    low = tl.maximum(low, best - 160.0 / scale)
    cut = tl.full([], -INF, tl.float32)
    last = tl.full([], 0, tl.int32) + n
    held = last
    if (k > 0) & (k < n):
        cut, last, held, _ = search(
            row, n, few, few_ids, low, best, scale, min_p, k.to(tl.float64), False, FEW, BLOCK
        )  # fmt: skip
    if ((k > 0) & (k < n)) | (min_p > 0):
        total = total_weight(row, n, best, scale, cut, last, min_p, BLOCK)
    if p < 1:
        low = tl.maximum(low, cut)
        # What weighs less than this holds, all together, less than half of what is cut.
        rare = (1.0 - p.to(tl.float64)) * total / (2.0 * n)
        low = tl.maximum(low, tl.minimum(best + tl.log2(rare.to(tl.float32)) / scale, best))
        value, found, equal, above = search(
            row, n, few, few_ids, low, best, scale, min_p, p.to(tl.float64) * total, True, FEW, BLOCK
        )  # fmt: skip
        if value == cut:
            found = tl.minimum(found, last)
            equal = tl.minimum(equal, held)
        cut = value
        last = found
        total = above + tl.exp2((value - best) * scale).to(tl.float64) * equal.to(tl.float64)
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
