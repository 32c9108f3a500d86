"""Sampling one request at a time, on the host, written to be read: what `ops/sample.py` is held against.

Everything random comes from a `torch.Generator`.
"""

import torch
from torch import Tensor

from abyssal.engine.sampling import Sampling

# ---- what is sampled from -----------------------------------------------------------------------------------------


def distribution(
    logits: Tensor,
    sampling: Sampling,
    counts: Tensor | None = None,
    prompt_seen: Tensor | None = None,
    allowed: int | None = None,
) -> Tensor:
    """`logits [n, vocab]` of n consecutive positions of one request -> probabilities `[n, vocab]`, float32 or wider.

    In vLLM's order: penalties, temperature, min-p, top-k, top-p; then renormalised. Greedy is 1 at the largest
    logit, the first of equals. `counts [n, vocab]` says how often each id stands in the output before each
    position and `prompt_seen [vocab]` bool whether it stands in the prompt; None: in neither. Ids from `allowed` on
    are never sampled: a vocabulary may be wider than its tokenizer.

    Raises ValueError if a row has NaN, +inf, or nothing but -inf.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    scores = logits.to(wide, copy=True)
    if allowed is not None:
        scores[:, allowed:] = float("-inf")
    _penalise(scores, sampling, counts, prompt_seen)
    best = scores.amax(-1, keepdim=True)
    if not bool(best.isfinite().all()):
        raise ValueError("logits: expected numbers, got NaN or infinity")
    if sampling.greedy:
        first = scores.argmax(-1, keepdim=True)
        return torch.zeros_like(scores).scatter_(-1, first, 1.0)

    probs = ((scores - best) / sampling.temperature).softmax(-1)
    if sampling.min_p > 0:
        probs = probs.where(probs >= sampling.min_p * probs.amax(-1, keepdim=True), 0.0)
    if 0 < sampling.top_k < probs.shape[-1] or sampling.top_p < 1:
        probs = torch.stack([_keep_likeliest(row, sampling.top_k, sampling.top_p) for row in probs])
    return probs / probs.sum(-1, keepdim=True)


def _penalise(scores: Tensor, sampling: Sampling, counts: Tensor | None, prompt_seen: Tensor | None) -> None:
    """Lowers `scores [n, vocab]` in place."""
    if sampling.repetition_penalty != 1:
        seen = torch.zeros_like(scores, dtype=torch.bool)
        if counts is not None:
            seen |= counts > 0
        if prompt_seen is not None:
            seen |= prompt_seen
        factor = sampling.repetition_penalty
        scores.copy_(torch.where(seen, torch.where(scores > 0, scores / factor, scores * factor), scores))
    if counts is not None:
        if sampling.frequency_penalty:
            scores.sub_(sampling.frequency_penalty * counts)
        if sampling.presence_penalty:
            scores.sub_(sampling.presence_penalty * (counts > 0))


def _keep_likeliest(probs: Tensor, top_k: int, top_p: float) -> Tensor:
    """`[vocab]` -> `[vocab]`, 0 but for the k likeliest (0: all) and, of these, the fewest that together have the
    share p. Of equals the first ids are kept, so that k tokens are k, and k = 1 is greedy."""
    vocab = probs.shape[0]
    if 0 < top_k < vocab:
        floor = probs.topk(top_k).values[-1]
    else:
        # Sorting a whole vocabulary takes longer than a small model's step. Tokens this rare hold less than half of
        # what top-p cuts, all of them together.
        floor = (1 - top_p) / (2 * vocab) * probs.sum()
    ids = ((probs >= floor) & (probs > 0)).nonzero().squeeze(-1)
    values, order = probs[ids].sort(descending=True, stable=True)
    if top_k:
        values, order = values[:top_k], order[:top_k]
    if top_p < 1:
        mass = values.cumsum(0, dtype=torch.float64)
        total = mass[-1] if 0 < top_k < vocab else probs.sum(dtype=torch.float64)
        kept = mass - values < top_p * total
        kept[0] = True
        values, order = values[kept], order[kept]
    return torch.zeros_like(probs).index_copy_(0, ids[order], values)


# ---- drawing ------------------------------------------------------------------------------------------------------


def sample(probs: Tensor, generator: torch.Generator) -> int:
    """One id drawn from `probs [vocab]`, by one uniform number of the CPU's `generator`."""
    return _invert(probs, torch.rand(1, dtype=torch.float64, generator=generator))


def _invert(probs: Tensor, u: Tensor) -> int:
    """The first id at which the cumulative distribution exceeds `u [1]` in [0, 1), never one of probability 0.

    On the CPU, in float64: a parallel sum rounds, and would step up at an id that has no probability.
    """
    cumulative = probs.to("cpu", torch.float64).cumsum(0)
    total = cumulative[-1:]
    drawn = torch.searchsorted(cumulative, u * total, right=True)
    last = torch.searchsorted(cumulative, total)  # where u · total rounds up to the total
    return int(torch.minimum(drawn, last))


# ---- speculation --------------------------------------------------------------------------------------------------


def acceptance(target: Tensor, draft: Tensor) -> Tensor:
    """min(1, p/q), elementwise: the probability of keeping a drafted token that the model gives p and the draft q."""
    return torch.where(draft > 0, (target / draft).clamp(max=1), (target > 0).to(target.dtype))


def residual(target: Tensor, draft: Tensor) -> Tensor:
    """`[vocab]`: (p − q)+ over its sum, what a rejected token is replaced from.

    Where p exceeds q nowhere, as rounding may have it of equals, p itself.
    """
    rest = (target - draft).clamp(min=0)
    total = rest.sum()
    return torch.where(total > 0, rest / total, target)


def verify(
    draft_tokens: Tensor, draft_probs: Tensor, target_probs: Tensor, generator: torch.Generator
) -> tuple[int, int]:
    """Speculative sampling (Leviathan et al. 2023, algorithm 1; Chen et al. 2023, algorithm 2).

    `draft_tokens [k]` int64, token i drawn from `draft_probs[i]`, and `target_probs [k+1, vocab]`, the model's own
    distribution at the same positions and one further. Returns how many drafts are kept and the token that follows
    them. What is kept and what follows are distributed as if drawn from the model alone; where its rows are
    greedy they are its greedy tokens, whatever was drafted.

    Takes k + 1 uniform numbers of the CPU's `generator`; without drafts it is `sample`.
    """
    k = draft_tokens.shape[0]
    u = torch.rand(k + 1, dtype=torch.float64, generator=generator)
    at = draft_tokens[:, None]
    p, q = target_probs[:k].gather(1, at).double(), draft_probs.gather(1, at).double()
    kept = u[:k] < acceptance(p, q).squeeze(1).cpu()
    accepted = int(kept.cumprod(0).sum())
    if accepted == k:
        return k, _invert(target_probs[k], u[k:])
    return accepted, _invert(residual(target_probs[accepted].double(), draft_probs[accepted].double()), u[k:])


# ---- reporting ----------------------------------------------------------------------------------------------------


def top_logprobs(logits: Tensor, token: int, n: int) -> tuple[float, list[tuple[int, float]]]:
    """The log-probability (natural) of `token`, and ids and log-probabilities of the `n` likeliest, best first.

    `logits [vocab]` as the model gave them: before penalties, temperature and filters.
    """
    logprobs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    values, ids = logprobs.topk(min(n, logprobs.shape[0]))
    return float(logprobs[token]), list(zip(ids.tolist(), values.tolist()))
