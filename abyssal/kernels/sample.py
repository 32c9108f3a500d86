"""Sampling and verification of a batch: a pass spread over the chip, one program a row, one a sequence.

`_peaks` reads the logits once, many programs a row: what is done to them beforehand, each piece's largest and its sum.
`_rows` makes of each row its cut (sample_rows.py) and, where drafts were chosen or absent, draws its token; the row is
found in the L2 cache. `_accept` tests drafts that were drawn and draws from what is left of the model's distribution.
`_follow` finds the first draft that is not what its row gave; of a greedy batch that is the largest logit, and nothing
lies between it and `_peaks`.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from abyssal.kernels.sample_rows import ACCEPT, DRAFT, INF, TAKE, cuts, drawn, passed, uniform, weight

if TYPE_CHECKING:
    from abyssal.ops.sample import Adjust, Settings

PIECE = 4096  # scores of a row a program of `_peaks`
BLOCK = 8192  # scores at a time of the programs that have a row to themselves
FEW = 4096  # scores of a row that are searched without reading the row again
LOG2E = tl.constexpr(1.4426950408889634)
GREEDY = tl.constexpr(1e-5)  # as in `ops.sample`


@triton.jit
def _peaks(
    logits, stride_s, stride_w, drafts, bias, mask, counts, seen, repetition, presence, frequency, temperature,
    scores, peaks, firsts, lows, totals, n, V, words,
    W: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr, COUNTS: tl.constexpr, SEEN: tl.constexpr,
    REPETITION: tl.constexpr, PRESENCE: tl.constexpr, FREQUENCY: tl.constexpr, WRITE: tl.constexpr,
    STATIC_GREEDY: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """Of each piece of a row: its largest score, that one's first id, its smallest finite score, and the sum of
    exponentials below the largest. NaN counts as infinity, which fails the row."""
    row, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    s, j = row // W, row % W
    id = piece * PIECE + tl.arange(0, PIECE)
    inside = id < n
    x = tl.load(logits + s * stride_s + j * stride_w + id, mask=inside, other=-INF).to(tl.float32)
    if BIAS:
        x += tl.load(bias + s * V + id, mask=inside, other=0.0).to(tl.float32)
    if MASK:
        word = tl.load(mask + row * words + id // 32, mask=inside, other=0)
        x = tl.where(((word >> (id % 32)) & 1) != 0, x, -INF)
    if REPETITION or PRESENCE or FREQUENCY:
        count = tl.zeros([PIECE], tl.int32)
        if COUNTS:
            count += tl.load(counts + s * V + id, mask=inside, other=0).to(tl.int32)
        for i in tl.static_range(W - 1):  # a row's output ends with the drafts before it
            count += ((tl.load(drafts + s * (W - 1) + i) == id) & (i < j)).to(tl.int32)
        if REPETITION:
            factor = tl.load(repetition + s).to(tl.float32)
            known = count > 0
            if SEEN:
                known = known | (tl.load(seen + s * V + id, mask=inside, other=0) != 0)
            x = tl.where(known, tl.where(x > 0, tl.div_rn(x, tl.zeros_like(x) + factor), x * factor), x)
        if FREQUENCY:
            x -= tl.load(frequency + s).to(tl.float32) * count.to(tl.float32)
        if PRESENCE:
            x -= tl.where(count > 0, tl.load(presence + s).to(tl.float32), 0.0)
    if WRITE:
        tl.store(scores + row * n + id, x, mask=inside)
    peak = tl.max(tl.where(x == x, x, INF), 0)
    at = row * tl.num_programs(1) + piece
    tl.store(peaks + at, peak)
    tl.store(firsts + at, tl.min(tl.where(x == peak, id, n - 1), 0))
    if not STATIC_GREEDY:
        tl.store(lows + at, tl.min(tl.where(x > -INF, x, INF), 0))
        scale = LOG2E / tl.maximum(tl.load(temperature + s).to(tl.float32), GREEDY)
        from_peak = tl.where(inside, x - tl.where(peak > -INF, peak, 0.0), -INF)
        tl.store(totals + at, tl.sum(tl.exp2(from_peak * scale), 0))


@triton.jit
def _largest(peaks, firsts, row, PIECES: tl.constexpr, PIECES_UP: tl.constexpr):
    """A row's largest score, its first id, and whether it is a number."""
    piece = tl.arange(0, PIECES_UP)
    peak = tl.load(peaks + row * PIECES + piece, mask=piece < PIECES, other=-INF)
    first = tl.load(firsts + row * PIECES + piece, mask=piece < PIECES, other=0)
    best = tl.max(peak, 0)
    return best, tl.min(tl.where(peak == best, first, 2147483647), 0), (best > -INF) & (best < INF)


@triton.jit
def _rows(
    source, stride_s, stride_w, peaks, firsts, lows, totals, positions, temperature, top_k, top_p, min_p, seed,
    bests, scales, cut_s, lasts, sums, tokens, few, few_ids, n,
    W: tl.constexpr, STREAM: tl.constexpr, DRAW: tl.constexpr,
    PIECES: tl.constexpr, PIECES_UP: tl.constexpr, FEW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What describes each row's distribution; with DRAW its token, -1 where the row holds what is not a number."""
    row = tl.program_id(0).to(tl.int64)
    s, j = row // W, row % W
    best, first, fine = _largest(peaks, firsts, row, PIECES, PIECES_UP)
    warmth = tl.load(temperature + s).to(tl.float32)
    token = tl.full([], -1, tl.int32)
    # As a greedy row has them: nothing above the cut, one equal to it.
    scale = tl.full([], 1.0, tl.float32)
    cut = best
    last = first
    total = tl.full([], 0.0, tl.float64)
    if fine:
        if warmth < GREEDY:
            total += 1.0
            token = first
        else:
            scale = LOG2E / warmth
            piece = tl.arange(0, PIECES_UP)
            there = piece < PIECES
            peak = tl.load(peaks + row * PIECES + piece, mask=there, other=-INF)
            part = tl.load(totals + row * PIECES + piece, mask=there, other=0.0)
            # A piece of -inf alone has no sum.
            part = tl.where(peak > -INF, part * tl.exp2((peak - best) * scale), 0.0)
            total = tl.sum(part.to(tl.float64), 0)
            low = tl.min(tl.load(lows + row * PIECES + piece, mask=there, other=INF), 0)
            at = source + s * stride_s + j * stride_w
            floor = tl.load(min_p + s).to(tl.float32)
            k, p = tl.load(top_k + s).to(tl.int32), tl.load(top_p + s)
            cut, last, total = cuts(
                at, n, few + row * FEW, few_ids + row * FEW, low, best, scale, total, k, p, floor, FEW, BLOCK
            )  # fmt: skip
            if DRAW:
                u = uniform(tl.load(seed + s), tl.load(positions + s) + j, STREAM)
                token = drawn(at, n, best, scale, cut, last, floor, u * total, BLOCK)
    if DRAW:
        tl.store(tokens + row, token.to(tl.int64))
    tl.store(bests + row, best)
    tl.store(scales + row, scale)
    tl.store(cut_s + row, cut)
    tl.store(lasts + row, last)
    tl.store(sums + row, total)


@triton.jit
def _accept(
    source, stride_s, stride_w, draft_probs, q_stride_s, q_stride_w, drafts, positions, min_p, seed,
    bests, scales, cut_s, lasts, sums, accepted, token_of, n,
    W: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Tests one sequence's drafts against what they were drawn from, and draws the token that follows."""
    s = tl.program_id(0).to(tl.int64)
    floor = tl.load(min_p + s).to(tl.float32)
    own_seed, position = tl.load(seed + s), tl.load(positions + s)
    kept = tl.full([], 0, tl.int32)
    for j in tl.static_range(W - 1):
        row = s * W + j
        draft = tl.load(drafts + s * (W - 1) + j)
        total = tl.load(sums + row)
        if (kept == j) & (draft >= 0) & (total > 0):
            score = tl.load(source + s * stride_s + j * stride_w + draft).to(tl.float32)
            w = weight(
                score, draft, tl.load(bests + row), tl.load(scales + row), tl.load(cut_s + row), tl.load(lasts + row),
                floor,
            )  # fmt: skip
            p = tl.where(draft < n, w, 0.0).to(tl.float64) / total
            q = tl.load(draft_probs + s * q_stride_s + j * q_stride_w + draft).to(tl.float64)
            chance = tl.where(q > 0, p / tl.where(q > 0, q, 1.0), tl.where(p > 0, 1.0, 0.0))
            if uniform(own_seed, position + j, ACCEPT) < chance:
                kept += 1
    row = s * W + kept
    total = tl.load(sums + row)
    if total > 0:
        best, scale = tl.load(bests + row), tl.load(scales + row)
        cut, last = tl.load(cut_s + row), tl.load(lasts + row)
        p_row = source + s * stride_s + kept * stride_w
        # The row after a rejected draft loses what the draft had; the last row and one without a draft lose nothing.
        rejected = (kept < W - 1) & (tl.load(drafts + s * (W - 1) + kept, mask=kept < W - 1, other=-1) >= 0)
        q_row = draft_probs + s * q_stride_s + kept * q_stride_w
        at = tl.arange(0, BLOCK)
        share = (1.0 / total).to(tl.float32)
        left = tl.zeros([BLOCK], tl.float32)
        if rejected:
            for start in range(0, n, BLOCK):
                id = start + at
                score = tl.load(p_row + id, mask=id < n, other=-INF).to(tl.float32)
                q = tl.load(q_row + id, mask=id < n, other=0.0).to(tl.float32)
                left += tl.maximum(weight(score, id, best, scale, cut, last, floor) * share - q, 0.0)
        amount = tl.sum(left.to(tl.float64), 0)
        # The model exceeds the draft nowhere where rounding has it so of equals.
        rejected = rejected & (amount > 0)
        u = uniform(own_seed, position + kept, TAKE)
        target = u * tl.where(rejected, amount, total * share)
        q_n = tl.where(rejected, n, 0)
        token = tl.full([], -1, tl.int32)
        final = tl.full([], -1, tl.int32)
        start = tl.full([], 0, tl.int32)
        base = tl.full([], 0.0, tl.float64)
        while (start < n) & (token < 0):
            id = start + at
            score = tl.load(p_row + id, mask=id < n, other=-INF).to(tl.float32)
            q = tl.load(q_row + id, mask=id < q_n, other=0.0).to(tl.float32)
            w = tl.maximum(weight(score, id, best, scale, cut, last, floor) * share - q, 0.0)
            token, final, base = passed(w, id, base, target, token, final)
            start += BLOCK
        tl.store(token_of + s, tl.where(token < 0, final, token).to(tl.int64))
        tl.store(accepted + s, kept.to(tl.int64))
    else:
        tl.store(token_of + s, tl.full([], -1, tl.int64))
        tl.store(accepted + s, tl.full([], 0, tl.int64))


@triton.jit
def _follow(
    peaks, firsts, tokens, drafts, accepted, token_of,
    W: tl.constexpr, STATIC_GREEDY: tl.constexpr, PIECES: tl.constexpr, PIECES_UP: tl.constexpr,
):  # fmt: skip
    """The first row whose token, -1 if it has none, is not the draft after it."""
    s = tl.program_id(0).to(tl.int64)
    kept = tl.full([], 0, tl.int64)
    token = tl.full([], -1, tl.int64)
    for j in tl.static_range(W):
        if kept == j:
            if STATIC_GREEDY:
                _, first, fine = _largest(peaks, firsts, s * W + j, PIECES, PIECES_UP)
                token = tl.where(fine, first, -1).to(tl.int64)
            else:
                token = tl.load(tokens + s * W + j)
            if j < W - 1:
                kept += ((token >= 0) & (token == tl.load(drafts + s * (W - 1) + j))).to(tl.int64)
    tl.store(token_of + s, token)
    tl.store(accepted + s, tl.where(token < 0, 0, kept))


@triton.jit
def _probabilities(
    source, stride_s, tokens, min_p, bests, scales, cut_s, lasts, sums, probs, n, V,
    STATIC_GREEDY: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """Writes a row's weights over their sum; all 0 where it holds what is not a number."""
    row = tl.program_id(0).to(tl.int64)
    id = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    if STATIC_GREEDY:
        p = tl.where(id == tl.load(tokens + row), 1.0, 0.0)
    else:
        score = tl.load(source + row * stride_s + id, mask=id < n, other=-INF).to(tl.float32)
        best, scale, cut, last = (
            tl.load(bests + row), tl.load(scales + row), tl.load(cut_s + row), tl.load(lasts + row)
        )  # fmt: skip
        total = tl.load(sums + row)
        w = weight(score, id, best, scale, cut, last, tl.load(min_p + row).to(tl.float32))
        share = tl.where(total > 0, 1.0 / tl.where(total > 0, total, 1.0), 0.0).to(tl.float32)
        p = w * share
    tl.store(probs + row * V + id, p, mask=id < V)


class _Described(NamedTuple):
    """R rows and their distributions: what `_rows` writes, and where the scores lie."""

    scores: Tensor  # [S, W, n or more], the logits themselves where nothing is done to them beforehand
    peaks: Tensor  # [R, pieces] float32
    firsts: Tensor  # [R, pieces] int32
    bests: Tensor  # [R] float32, as are the next two
    scales: Tensor
    cuts: Tensor
    lasts: Tensor  # [R] int32
    sums: Tensor  # [R] float64, 0: a row of what is not a number
    tokens: Tensor  # [R] int64, written where a token is drawn
    n: int  # ids that may be taken


def _described(
    logits: Tensor, drafts: Tensor, positions: Tensor, settings: "Settings", allowed: int | None, adjust: "Adjust",
    greedy: bool, stream: tl.constexpr | None,
) -> _Described:  # fmt: skip
    """Runs `_peaks` and, unless `greedy`, `_rows`, which draws from `stream` unless it is None."""
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    S, W, V = logits.shape
    n = V if allowed is None else min(allowed, V)
    R, pieces, like = S * W, triton.cdiv(n, PIECE), logits.new_empty
    changed = any(part is not None for part in adjust)
    write = changed and not greedy
    scores = like(S, W, n, dtype=torch.float32) if write else logits
    peaks, lows, totals = like(3, R, pieces, dtype=torch.float32).unbind()
    firsts = like(R, pieces, dtype=torch.int32)
    parts = [x if x is None else x.contiguous() for x in adjust]
    bias, mask, counts, seen, repetition, presence, frequency = (logits if x is None else x for x in parts)
    seen = seen.view(torch.uint8) if seen.dtype == torch.bool else seen
    _peaks[(R, pieces)](
        logits, *logits.stride()[:2], drafts, bias, mask, counts, seen, repetition,
         presence, frequency, settings.temperature, scores, peaks, firsts, lows, totals,
        n, V, -(-V // 32), W, *(x is not None for x in parts), WRITE=write, STATIC_GREEDY=greedy,
        PIECE=min(PIECE, triton.next_power_of_2(n)), num_warps=4,
    )  # fmt: skip
    bests, scales, cut_s = like(3, R, dtype=torch.float32).unbind()
    lasts, sums = like(R, dtype=torch.int32), like(R, dtype=torch.float64)
    tokens = like(R, dtype=torch.int64)
    if not greedy:
        few = min(FEW, triton.next_power_of_2(n))
        candidates, ids = like(R, few, dtype=torch.float32), like(R, few, dtype=torch.int32)
        _rows[(R,)](
            scores, *scores.stride()[:2], peaks, firsts, lows, totals, positions, *settings,
            bests, scales, cut_s, lasts, sums, tokens, candidates, ids, n, W, stream or TAKE, stream is not None,
            pieces, triton.next_power_of_2(pieces), few, min(BLOCK, triton.next_power_of_2(n)), num_warps=16,
        )  # fmt: skip
    return _Described(scores, peaks, firsts, bests, scales, cut_s, lasts, sums, tokens, n)


def verify(
    logits: Tensor, drafts: Tensor, draft_probs: Tensor | None, positions: Tensor, settings: "Settings",
    allowed: int | None, adjust: "Adjust", greedy: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `ops.sample.verify`, from bf16, fp16 or float32 logits."""
    S, W, _ = logits.shape
    accepted, token = (torch.empty(S, dtype=torch.int64, device=logits.device) for _ in range(2))
    if not S:
        return accepted, token
    drafts, positions = drafts.contiguous(), positions.contiguous()
    drawn_from = None if greedy or W == 1 else draft_probs
    found = _described(
        logits, drafts, positions, _contiguous(settings), allowed, adjust, greedy, TAKE if drawn_from is None else None
    )
    if drawn_from is None:
        pieces = found.peaks.shape[1]
        _follow[(S,)](
            found.peaks, found.firsts, found.tokens, drafts, accepted, token, W, greedy, pieces,
            triton.next_power_of_2(pieces), num_warps=1,
        )  # fmt: skip
    else:
        q = drawn_from if drawn_from.stride(-1) == 1 else drawn_from.contiguous()
        _accept[(S,)](
            found.scores, *found.scores.stride()[:2], q, *q.stride()[:2], drafts, positions,
            settings.min_p.contiguous(), settings.seed.contiguous(), *found[3:8], accepted, token, found.n, W,
            min(BLOCK, triton.next_power_of_2(found.n)), num_warps=16,
        )  # fmt: skip
    return accepted, token


def draw(
    logits: Tensor, positions: Tensor, settings: "Settings", allowed: int | None, adjust: "Adjust", want_probs: bool,
    greedy: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """As `ops.sample.draw`, from bf16, fp16 or float32 logits."""
    S, V = logits.shape
    positions = positions.contiguous()
    token = torch.empty_like(positions)
    probs = torch.empty(S, V, dtype=torch.float32, device=logits.device) if want_probs else None
    if not S:
        return token, probs
    rows = _contiguous(settings)
    found = _described(logits[:, None], positions[:0], positions, rows, allowed, adjust, greedy, DRAFT)
    if greedy:
        pieces = found.peaks.shape[1]
        _follow[(S,)](
            found.peaks, found.firsts, token, token, torch.empty_like(token), token, 1, True, pieces,
            triton.next_power_of_2(pieces), num_warps=1,
        )  # fmt: skip
    else:
        token = found.tokens
    if probs is not None:
        piece = min(PIECE, triton.next_power_of_2(V))
        _probabilities[(S, triton.cdiv(V, piece))](
            found.scores, found.scores.stride(0), token, rows.min_p, *found[3:8], probs, found.n, V, greedy, piece,
            num_warps=4,
        )  # fmt: skip
    return token, probs


def _contiguous(settings: "Settings") -> "Settings":
    return settings._make(part.contiguous() for part in settings)
