"""From logits to tokens for a whole batch: drawing, and verifying drafts (Leviathan et al. 2023, Chen et al. 2023).

Nothing random is kept between calls. A uniform number is a hash of a sequence's seed, the token's position in it and
what the number is for, so that a seed gives the same text whatever is decoded beside it, and when a step is repeated.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from abyssal.ops.device import capability

# What a uniform number is for.
TAKE = 0  # the token that is drawn, or that replaces a rejected draft
DRAFT = 1  # a draft
ACCEPT = 2  # the test of a draft

GREEDY = 1e-5  # a temperature below which float32 overflows before it sharpens

PART = 256  # tokens whose weights are summed at once where a running sum is inverted

# The constants of splitmix64 (Steele, Lea and Flood 2014), as signed numbers.
GOLDEN = 0x9E3779B97F4A7C15 - 2**64
MULTIPLY_1 = 0xBF58476D1CE4E5B9 - 2**64
MULTIPLY_2 = 0x94D049BB133111EB - 2**64


class Settings(NamedTuple):
    """How each of S sequences is sampled; the filters come in this order: min-p, top-k, top-p."""

    temperature: Tensor  # [S] float32; below GREEDY: the first of the largest logits
    top_k: Tensor  # [S] int32, only the k likeliest; 0: all
    top_p: Tensor  # [S] float32, only the fewest likeliest that together have this share; 1: all
    min_p: Tensor  # [S] float32, only what has at least this share of the likeliest's probability; 0: all
    seed: Tensor  # [S] int64


class Adjust(NamedTuple):
    """What is done to logits before temperature, in this order; None: not wanted by any sequence of the batch."""

    bias: Tensor | None = None  # [S, V] float32, added
    mask: Tensor | None = None  # [S, W, ceil(V / 32)] int32: token i is allowed where bit i % 32 of word i // 32 is set
    counts: Tensor | None = None  # [S, V] int32, how often each token is in the output before row 0
    seen: Tensor | None = None  # [S, V] bool, whether it is in the prompt
    repetition: Tensor | None = None  # [S] float32: of tokens counted or seen, positive logits over, negative times it
    presence: Tensor | None = None  # [S] float32, subtracted once from tokens counted
    frequency: Tensor | None = None  # [S] float32, subtracted for each time a token is counted


NOTHING = Adjust()


def verify(
    logits: Tensor, drafts: Tensor, draft_probs: Tensor | None, positions: Tensor, settings: Settings,
    allowed: int | None = None, adjust: Adjust = NOTHING, greedy: bool = False, path: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """How many of each sequence's drafts are kept, `[S]` int64, and the token that follows them, `[S]` int64.

    `logits [S, W, V]`: row j is the model's after the first j of `drafts [S, W - 1]` int64; -1 stands for no draft, and
    nothing after it counts. `draft_probs [S, W - 1, V]` float is what each draft was drawn from; None: drafts were not
    drawn but chosen. `positions [S]` int64 is where row 0's token will stand. Ids from `allowed` on are never taken.
    With `greedy` every sequence is, whatever its settings, and nothing but the largest logits is looked for.

    What is kept and what follows are together distributed as if drawn from the model alone. Chosen drafts change
    nothing at all: a row's token is drawn as it would be without them, and a draft is kept where it is that token.

    A sequence with NaN, +inf, or nothing but -inf in a row from which a token would come gets token -1 and 0 accepted.

    Paths: "reference" (any device and dtype; reads settings on the host), "triton" (on a GPU, from bf16, fp16 or
    float32 logits, without waiting for the host). None chooses. Raises ValueError for another name.
    """
    if _path(logits, path) == "triton":
        from abyssal.kernels import sample as kernels

        return kernels.verify(logits, drafts, draft_probs, positions, settings, allowed, adjust, greedy)
    scores = _adjusted(logits, drafts, allowed, adjust)
    if greedy:
        best, drawn = scores.max(-1)
        return _kept(drawn[:, :-1] == drafts, drawn, best.isfinite())
    S, W, _ = logits.shape
    at = positions[:, None] + torch.arange(W, device=logits.device)
    seed = settings.seed[:, None]
    probs, fine = _distributions(scores, settings)
    if draft_probs is None:
        drawn = _invert(probs, uniform(seed, at, TAKE))
        return _kept(drawn[:, :-1] == drafts, drawn, fine)

    there = drafts >= 0
    q = draft_probs.to(probs.dtype).where(there[..., None], 0.0)
    ids = drafts.clamp(min=0)[..., None]
    p_id, q_id = probs[:, :-1].gather(2, ids).squeeze(2).double(), q.gather(2, ids).squeeze(2).double()
    chance = torch.where(q_id > 0, p_id / q_id, (p_id > 0).double())
    kept = there & (uniform(seed, at[:, :-1], ACCEPT) < chance)
    # Of the rows only the first whose draft is not kept gives a token; the last has no draft to be rejected.
    row = (kept & fine[:, :-1]).cumprod(1).sum(1)
    sequence = torch.arange(S, device=logits.device)
    p = probs[sequence, row]
    rest = (p - torch.cat((q, torch.zeros_like(probs[:, :1])), 1)[sequence, row]).clamp(min=0)
    # p exceeds q nowhere where rounding has it so of equals.
    rest = rest.where((rest > 0).any(-1, keepdim=True), p)
    drawn = _invert(rest, uniform(settings.seed, positions + row, TAKE))
    return _kept(kept, drawn[:, None].expand(S, W), fine)


def draw(
    logits: Tensor, positions: Tensor, settings: Settings, allowed: int | None = None, adjust: Adjust = NOTHING,
    want_probs: bool = False, greedy: bool = False, path: str | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Drafts: one token of each sequence, `[S]` int64, and with `want_probs` what it was drawn from, `[S, V]`, float32
    or wider; one-hot where the sequence is greedy.

    `logits [S, V]`, `positions [S]` int64 where the token will stand; the rest is as of `verify`, a mask `[S, 1, ...]`.
    A row of NaN, +inf, or nothing but -inf gives -1, and probabilities of 0.
    """
    if _path(logits, path) == "triton":
        from abyssal.kernels import sample as kernels

        return kernels.draw(logits, positions, settings, allowed, adjust, want_probs, greedy)
    no_drafts = positions.new_empty(len(positions), 0)
    scores = _adjusted(logits[:, None], no_drafts, allowed, adjust)
    if greedy:
        best, drawn = scores.max(-1)
        fine = best.isfinite()
        probs = torch.zeros_like(scores).scatter_(-1, drawn[..., None], fine[..., None].to(scores.dtype))
    else:
        probs, fine = _distributions(scores, settings)
        drawn = _invert(probs, uniform(settings.seed, positions, DRAFT)[:, None])
    return drawn.where(fine, -1)[:, 0], probs[:, 0] if want_probs else None


def likeliest(logits: Tensor, tokens: Tensor, n: int, allowed: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities (natural) of `tokens [S, W]`, `[S, W]`; and the `n` likeliest ids, best first, `[S, W, n]`
    int64, and their log-probabilities, `[S, W, n]`; fewer where the vocabulary is smaller. All float32 or wider.

    `logits [S, W, V]` as the model gave them: before anything was done to them. Ids from `allowed` on do not count:
    among `tokens`, which may be a prompt's, they have -inf.
    """
    logits = logits[..., :allowed]
    wide = torch.promote_types(logits.dtype, torch.float32)
    total = logits.to(wide).logsumexp(-1, keepdim=True)
    values, ids = logits.topk(min(n, logits.shape[-1]))
    own = logits.gather(-1, tokens.clamp(0, logits.shape[-1] - 1)[..., None]).to(wide) - total
    own = own.squeeze(-1).masked_fill(tokens >= logits.shape[-1], float("-inf"))
    return own, ids, values.to(wide) - total


def uniform(seed: Tensor, position: Tensor, stream: int) -> Tensor:
    """Float64 numbers in [0, 1) of the broadcast shape of `seed` and `position`, both int64: a hash of the two and
    `stream`. It is the number that comes `position`-th of splitmix64 started from a hash of the seed and the stream."""
    start = ((stream + 1) * GOLDEN + 2**63) % 2**64 - 2**63
    bits = _mix(_mix(seed + start) + position * GOLDEN)
    return _shifted(bits, 11).double() * 2.0**-53


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shifted(z, 30)) * MULTIPLY_1
    z = (z ^ _shifted(z, 27)) * MULTIPLY_2
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, by: int) -> Tensor:
    """To the right, zeros coming in: int64's own shift repeats the sign."""
    return (z >> by) & ((1 << (64 - by)) - 1)


def _path(logits: Tensor, path: str | None) -> str:
    if path is None:
        served = capability(logits) > (0, 0) and logits.dtype != torch.float64
        # Of a vocabulary of one there is nothing to choose, and Triton 3.6 can't compile it.
        return "triton" if served and logits.shape[-1] > 1 else "reference"
    if path not in ("reference", "triton"):
        raise ValueError(f"path: expected 'reference' or 'triton', got {path!r}")
    return path


# ---- the reference ------------------------------------------------------------------------------------------------


def _adjusted(logits: Tensor, drafts: Tensor, allowed: int | None, adjust: Adjust) -> Tensor:
    """`[S, W, V]`, float32 or wider, -inf where a token may not be taken."""
    S, W, V = logits.shape
    changed = allowed is not None or any(part is not None for part in adjust)
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=changed)
    if adjust.bias is not None:
        scores += adjust.bias[:, None]
    if adjust.mask is not None:
        bits = adjust.mask[..., None] >> torch.arange(32, dtype=torch.int32, device=logits.device) & 1
        scores.masked_fill_(bits.flatten(2)[..., :V] == 0, float("-inf"))
    if allowed is not None:
        scores[..., allowed:] = float("-inf")
    if adjust.repetition is None and adjust.presence is None and adjust.frequency is None:
        return scores

    counts = torch.zeros(S, W, V, dtype=torch.int32, device=logits.device)
    if adjust.counts is not None:
        counts += adjust.counts[:, None]
    for j in range(1, W):  # a row's output ends with the drafts before it
        draft = drafts[:, j - 1, None, None].expand(S, W - j, 1)
        counts[:, j:].scatter_add_(2, draft.clamp(min=0), (draft >= 0).to(torch.int32))
    if adjust.repetition is not None:
        seen = counts > 0 if adjust.seen is None else (counts > 0) | adjust.seen[:, None]
        factor = adjust.repetition[:, None, None]
        scores = torch.where(seen, torch.where(scores > 0, scores / factor, scores * factor), scores)
    if adjust.frequency is not None:
        scores = scores - adjust.frequency[:, None, None] * counts
    if adjust.presence is not None:
        scores = scores - adjust.presence[:, None, None] * (counts > 0)
    return scores


def _distributions(scores: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """Probabilities `[S, W, V]` of what may be taken, and `[S, W]` whether a row is fine; one that is not is all 0."""
    best, first = scores.max(-1, keepdim=True)
    fine = best.isfinite()
    greedy = settings.temperature < GREEDY
    temperature = settings.temperature.where(~greedy, 1.0)[:, None, None]
    probs = (scores - best).div_(temperature).softmax(-1)
    if bool((settings.min_p > 0).any()):
        floor = settings.min_p[:, None, None] * probs.amax(-1, keepdim=True)
        probs = probs.where(probs >= floor, 0.0)
    V = scores.shape[-1]
    for s, (k, p, is_greedy) in enumerate(
        zip(settings.top_k.tolist(), settings.top_p.tolist(), greedy.tolist(), strict=True)
    ):
        if is_greedy:
            probs[s] = 0.0
            probs[s].scatter_(-1, first[s], 1.0)
        elif 0 < k < V or p < 1:
            for row, usable in zip(probs[s], fine[s, :, 0].tolist(), strict=True):
                if usable:
                    row.copy_(_likeliest_of(row, k, p))
    return probs.div_(probs.sum(-1, keepdim=True)).masked_fill_(~fine, 0.0), fine.squeeze(-1)


def _likeliest_of(probs: Tensor, top_k: int, top_p: float) -> Tensor:
    """`[V]` -> `[V]`, 0 but for the k likeliest (0: all) and, of these, the fewest that together have the share p. Of
    equals the first ids are kept, so that k tokens are k, and k = 1 is greedy."""
    V = probs.shape[0]
    if 0 < top_k < V:
        floor = probs.topk(top_k).values[-1]
    else:
        # Sorting a whole vocabulary takes longer than a small model's step. Tokens this rare hold less than half of
        # what top-p cuts, all of them together.
        floor = (1 - top_p) / (2 * V) * probs.sum()
    ids = ((probs >= floor) & (probs > 0)).nonzero().squeeze(-1)
    values, order = probs[ids].sort(descending=True, stable=True)
    if top_k:
        values, order = values[:top_k], order[:top_k]
    if top_p < 1:
        mass = values.cumsum(0, dtype=torch.float64)
        total = mass[-1] if 0 < top_k < V else probs.sum(dtype=torch.float64)
        kept = mass - values < top_p * total
        kept[0] = True
        values, order = values[kept], order[kept]
    return torch.zeros_like(probs).index_copy_(0, ids[order], values)


def _invert(weights: Tensor, u: Tensor) -> Tensor:
    """`weights [..., V]`, at least 0, and `u [...]` float64 in [0, 1) -> the first id at which the weights' running sum
    passes its share u, int64, never one of weight 0; any id where all are 0.

    Part by part first: sums are cheaper than running sums.
    """
    parts = pad(weights, (0, -weights.shape[-1] % PART)).unflatten(-1, (-1, PART))
    sums = parts.sum(-1, dtype=torch.float64)
    target = u[..., None] * sums.sum(-1, keepdim=True)
    part, left = _passed(sums, target)
    inside = parts.gather(-2, part[..., None].expand(*part.shape, PART)).squeeze(-2).double()
    id, _ = _passed(inside, left)
    return (part * PART + id).squeeze(-1)


def _passed(weights: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The first of `weights [..., n]`, of those that are not 0, at which their running sum is above `target [..., 1]`,
    or the last of them where rounding has it that none is; and how far the target lies beyond those before it."""
    running = weights.cumsum(-1)
    # A parallel sum rounds, and could step up where there is no weight.
    passed = (running > target) & (weights > 0)
    last = weights.shape[-1] - 1 - (weights > 0).flip(-1).int().argmax(-1, keepdim=True)
    first = passed.int().argmax(-1, keepdim=True).where(passed.any(-1, keepdim=True), last)
    return first, target - (running - weights).gather(-1, first)


def _kept(kept: Tensor, drawn: Tensor, fine: Tensor) -> tuple[Tensor, Tensor]:
    """How many drafts in a row are `kept [S, W - 1]`, and the next row's token of `drawn [S, W]`; 0 and -1 where the
    row the token would come of is not `fine [S, W]`."""
    accepted = (kept & fine[:, :-1]).cumprod(1).sum(1)
    sound = fine.gather(1, accepted[:, None]).squeeze(1)
    token = drawn.gather(1, accepted[:, None]).squeeze(1)
    return accepted.where(sound, 0), token.where(sound, -1)
