"""A request on its way: its tokens, its text so far, and what its caller sees of it."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from abyssal.data.tokenizer import Detokenizer, Tokenizer
from abyssal.engine.sampling import Sampling, distribution, top_logprobs
from abyssal.engine.text import StopWatcher

Finish = Literal["stop", "length", "error", "abort", "deadline"]


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probabilities under the model's own distribution, before any setting of the request."""

    token: int
    logprob: float
    top: list[tuple[int, float]]  # the likeliest, best first


@dataclass(frozen=True)
class Output:
    """A finished sample of a request."""

    prompt_tokens: list[int]
    tokens: list[int]  # what was generated; an end-of-text token is not among them
    text: str  # up to a stop string, which is not in it
    finish: Finish
    logprobs: list[TokenLogprob] | None = None
    error: str | None = None  # why, where finish is "error"
    sample: int = 0  # which of the request's n
    cached_tokens: int = 0  # of the prompt, read from the prefix cache
    stop: str | None = None  # the stop string that ended it
    prompt_logprobs: list[TokenLogprob | None] | None = None  # of each prompt token; None for the first


@dataclass(frozen=True)
class Inside:
    """What a request that asked for it (`inspect`) is shown of the engine while it runs."""

    latent_bytes: int  # of the cache, that hold this sequence
    mha_bytes: int  # what multi-head attention of the same shape would hold for it
    pages: int
    shared_pages: int  # of these, that others hold too
    cached_tokens: int  # of the prompt, that were found in the prefix cache
    tokens_per_second: float  # of this sequence, so far
    drafted: int
    accepted: int
    expert_load: list[list[int]]  # tokens that each layer (with experts) sent to each expert, for this sequence


@dataclass(frozen=True)
class Piece:
    """What has become certain of sample `sample` of the request `index`; `output` comes with the last.

    `spans` cut `text` by where it came from: True where an MTP module drafted the token and the model accepted it.
    """

    index: int
    text: str
    output: Output | None = None
    sample: int = 0
    tokens: tuple[int, ...] = ()
    spans: tuple[tuple[str, bool], ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()  # of `tokens`, where asked for
    inside: Inside | None = None


@dataclass
class Totals:
    """What a call has done so far."""

    tokens: int = 0  # generated
    prompt_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    drafted_at: list[int] = field(default_factory=list)  # by position in the draft
    accepted_at: list[int] = field(default_factory=list)
    cache_bytes: int = 0  # allocated
    mha_cache_bytes: int = 0  # what as many tokens would take if every head kept its key and value

    @property
    def tokens_per_second(self) -> float:
        """Of decoding: the first token of a request comes of its prompt."""
        return self.tokens / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def acceptance(self) -> float | None:
        """The share of drafted tokens that were accepted; None if none were drafted."""
        return self.accepted / self.drafted if self.drafted else None


class Request:
    """`tokens` are the prompt's and then the output's; the last is not in the cache yet."""

    def __init__(
        self, index: int, prompt: list[int], sampling: Sampling, tokenizer: Tokenizer | None, eos: frozenset[int]
    ) -> None:
        self.index, self.sampling = index, sampling
        self.prompt, self.tokens = prompt, list(prompt)
        self.drafts: list[int] = []
        self.draft_probs: list[Tensor] = []
        self.logprobs: list[TokenLogprob] = []
        self.text = ""
        self.finish: Finish | None = None
        self.error: str | None = None
        self.allowed = tokenizer.vocab_size if tokenizer else None
        self.eos = frozenset() if sampling.ignore_eos else eos
        self.generator = torch.Generator()
        if sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(sampling.seed)
        self._detokenizer = Detokenizer(tokenizer) if tokenizer else None
        self._watcher = StopWatcher(sampling.stop)

    @property
    def generated(self) -> int:
        return len(self.tokens) - len(self.prompt)

    def probabilities(self, logits: Tensor, drafts: list[int]) -> Tensor:
        """`[n, vocab]` logits after the tokens so far and then each of `drafts` -> what may follow, by the settings."""
        counts = seen = None
        if self.sampling.penalised:
            vocab = logits.shape[-1]
            output = torch.tensor(self.tokens[len(self.prompt) :], dtype=torch.int64)
            counts = torch.bincount(output, minlength=vocab).repeat(logits.shape[0], 1)
            for row, draft in enumerate(drafts[: logits.shape[0] - 1], start=1):
                counts[row:, draft] += 1
            seen = torch.zeros(vocab, dtype=torch.bool)
            seen[torch.tensor(self.prompt, dtype=torch.int64)] = True
        return distribution(logits, self.sampling, counts, seen, self.allowed)

    def push(self, token: int, logits: Tensor) -> str:
        """Takes one generated token, whose logits `[vocab]` were these; returns the text that is now certain."""
        if token in self.eos:
            self.finish = "stop"
            return self._rest()
        self.tokens.append(token)
        if self.sampling.logprobs is not None:
            own, top = top_logprobs(logits[: self.allowed], token, self.sampling.logprobs)
            self.logprobs.append(TokenLogprob(token, own, top))
        text, stopped = self._watcher.push(self._detokenizer.push(token)) if self._detokenizer else ("", False)
        self.text += text
        if stopped:
            self.finish = "stop"
        elif self.generated >= self.sampling.max_tokens:
            self.finish = "length"
            text += self._rest()
        return text

    def _rest(self) -> str:
        if self._detokenizer is None:
            return ""
        text, _ = self._watcher.push(self._detokenizer.flush())
        text += self._watcher.flush()
        self.text += text
        return text

    def fail(self, error: str) -> None:
        """Ends this request alone."""
        self.finish, self.error = "error", error

    def output(self) -> Output:
        assert self.finish is not None
        logprobs = self.logprobs if self.sampling.logprobs is not None else None
        generated = self.tokens[len(self.prompt) :]
        return Output(self.prompt, generated, self.text, self.finish, logprobs, self.error)
