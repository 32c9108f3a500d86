"""From logits to a token: a request's settings, the distribution they make, drawing from it, and verifying drafts.

Everything random comes from the request's own `torch.Generator`, on the CPU, so that a seed gives the same tokens
whatever else is being decoded.
"""

import sys
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

_GREEDY = 1e-5  # a temperature below which float32 overflows before it sharpens


@dataclass(frozen=True)
class Grammar:
    """What a text must match: `text` is a JSON schema, a regular expression or a Lark grammar; of kind "json", any
    JSON object, it is empty."""

    kind: Literal["json", "json_schema", "regex", "lark"]
    text: str = ""


@dataclass(frozen=True)
class Sampling:
    """What one request asks for.

    Raises ValueError naming the field for a value, and TypeError for a type, that it cannot have.
    """

    max_tokens: int = 256
    temperature: float = 1.0  # 0, or less than 1e-5: greedy
    top_k: int = 0  # only the k likeliest; 0: all
    top_p: float = 1.0  # only the likeliest that together reach p
    min_p: float = 0.0  # only what is at least this share of the likeliest's probability
    repetition_penalty: float = 1.0  # of tokens in prompt or output: positive logits divided, negative multiplied
    presence_penalty: float = 0.0  # subtracted once from the logits of tokens in the output
    frequency_penalty: float = 0.0  # subtracted for each time that a token is in the output
    seed: int | None = None  # None: a different one every time
    stop: tuple[str, ...] = ()  # the text ends before the first of these; one string or several
    logprobs: int | None = None  # log-probabilities of the token and of this many likeliest; None: of none
    ignore_eos: bool = False
    speculate: bool | None = None  # None: where the checkpoint has the MTP layer
    n: int = 1  # samples of one prompt, which share its pages
    logit_bias: tuple[tuple[int, float], ...] = ()  # added to the logits of these ids; a dict will do
    grammar: Grammar | None = None  # what the text must match
    prompt_logprobs: int | None = None  # as `logprobs`, of the prompt, which is then computed whole

    def __post_init__(self) -> None:
        most = sys.float_info.max
        self._integer("max_tokens", 1, sys.maxsize, "1 or more")
        self._number("temperature", 0.0, most, "0 (greedy) or more")
        self._integer("top_k", 0, sys.maxsize, "0 (off) or more")
        self._number("top_p", 5e-324, 1.0, "above 0, at most 1")
        self._number("min_p", 0.0, 1.0, "from 0 to 1")
        self._number("repetition_penalty", 0.01, 100.0, "from 0.01 to 100")
        self._number("presence_penalty", -2.0, 2.0, "from -2 to 2")
        self._number("frequency_penalty", -2.0, 2.0, "from -2 to 2")
        if self.seed is not None:
            self._integer("seed", -(2**63), 2**64 - 1, "of 64 bits, or None")
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                self._integer(name, 0, sys.maxsize, "0 or more, or None")
        self._integer("n", 1, sys.maxsize, "1 or more")
        self._biases()
        if self.grammar is not None and not isinstance(self.grammar, Grammar):
            raise self._refused(TypeError, "grammar", "a Grammar or None")
        if not isinstance(self.ignore_eos, bool):
            raise self._refused(TypeError, "ignore_eos", "True or False")
        if not isinstance(self.speculate, bool | None):
            raise self._refused(TypeError, "speculate", "True, False or None")
        stops = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stops, tuple | list) or not all(isinstance(stop, str) for stop in stops):
            raise self._refused(TypeError, "stop", "a string or several")
        if "" in stops:
            raise self._refused(ValueError, "stop", "strings that are not empty")
        object.__setattr__(self, "stop", tuple(stops))

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken and nothing is drawn."""
        return self.temperature < _GREEDY

    @property
    def penalised(self) -> bool:
        """Whether `distribution` needs to know which tokens came before."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def _biases(self) -> None:
        given: Any = self.logit_bias
        pairs = tuple(given.items() if isinstance(given, dict) else given)
        for pair in pairs:
            id, value = pair if isinstance(pair, tuple | list) and len(pair) == 2 else (None, None)
            if isinstance(id, bool) or not isinstance(id, int) or id < 0:
                raise self._refused(TypeError, "logit_bias", "pairs of a token id and a number")
            if isinstance(value, bool) or not isinstance(value, int | float) or not -100 <= value <= 100:
                raise self._refused(ValueError, "logit_bias", "numbers from -100 to 100")
        object.__setattr__(self, "logit_bias", tuple((id, float(value)) for id, value in pairs))

    def _integer(self, name: str, low: int, high: int, expected: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._refused(TypeError, name, f"an integer {expected}")
        if not low <= value <= high:
            raise self._refused(ValueError, name, f"an integer {expected}")

    def _number(self, name: str, low: float, high: float, expected: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._refused(TypeError, name, f"a number {expected}")
        if not low <= value <= high:  # NaN is refused here too
            raise self._refused(ValueError, name, f"a number {expected}")
        object.__setattr__(self, name, float(value))

    def _refused(self, error: type[Exception], name: str, expected: str) -> Exception:
        value: Any = getattr(self, name)
        return error(f"{name}: expected {expected}, got {value!r}")


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
