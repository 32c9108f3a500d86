"""A request, and what its caller sees of it."""

import time
from dataclasses import dataclass, field
from typing import Literal

from abyssal.engine.sampling import Sampling

Finish = Literal["stop", "length", "error", "abort", "deadline"]


@dataclass(frozen=True)
class Request:
    """What one caller wants. `id` is the caller's; `deadline` and `arrived` are of `time.monotonic`."""

    id: int
    prompt: tuple[int, ...]
    sampling: Sampling
    priority: int = 0  # lower runs earlier
    deadline: float | None = None
    salt: str = ""  # prompts of different salts never share pages
    inspect: bool = False
    arrived: float = field(default_factory=time.monotonic)


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
    cached_tokens: int = 0  # of these, found in the prefix cache
    prefill_seconds: float = 0.0  # of steps with prompts in them
    decode_seconds: float = 0.0  # of the others
    decoded_tokens: int = 0  # generated in those
    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    drafted_at: list[int] = field(default_factory=list)  # by position in the draft
    accepted_at: list[int] = field(default_factory=list)
    cache_bytes: int = 0  # allocated
    mha_cache_bytes: int = 0  # what as many tokens would take if every head kept its key and value

    @property
    def tokens_per_second(self) -> float:
        """Of decoding, all sequences together."""
        return self.decoded_tokens / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def acceptance(self) -> float | None:
        """The share of drafted tokens that were accepted; None if none were drafted."""
        return self.accepted / self.drafted if self.drafted else None
