"""One sample of a request on its way: its tokens, its text so far, and what it holds of the cache."""

import random
import time
from enum import Enum, auto

from abyssal.data.tokenizer import Detokenizer, Tokenizer
from abyssal.engine.constraint import Constraint
from abyssal.engine.pages import Node
from abyssal.engine.pending import Result
from abyssal.engine.request import Finish, Output, Piece, Request, TokenLogprob
from abyssal.engine.text import StopWatcher


class State(Enum):
    WAITING = auto()  # holds nothing
    PREFILL = auto()  # holds a slot and pages; some of its tokens are not in the cache yet
    DECODING = auto()  # all of its tokens but the last are in the cache
    DONE = auto()


class Sequence:
    """`tokens` are the prompt's and then the output's; the last is not in the cache yet."""

    def __init__(
        self,
        request: Request,
        sample: int,
        tokenizer: Tokenizer | None,
        eos: frozenset[int],
        constraint: Constraint | None = None,
    ) -> None:
        self.request, self.sample, self.constraint = request, sample, constraint
        self.sampling = request.sampling
        self.tokens = list(request.prompt)
        self.state = State.WAITING
        # What it holds of the cache.
        self.slot = -1
        self.pages: list[int] = []
        self.origin = 0  # tokens that were found in the prefix cache
        self.rows = 0  # tokens whose rows stand in the cache
        self.node: Node = 0  # of the last registered page
        self.registered = 0  # pages
        self.ahead = 0  # steps enqueued whose outcome is not known yet
        self.drafting = False  # the step before, whether its outcome is known or not, made drafts
        self.counted = False  # among the prompts taken in
        self.cold = False  # without the MTP modules' rows
        self.drafts: list[int] = []  # for the next step, where the host knows them
        # What its caller sees.
        self.text = ""
        self.stop: str | None = None
        self.finish: Finish | None = None
        self.error: str | None = None
        self.logprobs: list[TokenLogprob] = []
        asked = self.sampling.prompt_logprobs is not None
        self.prompt_logprobs: list[TokenLogprob | None] | None = (
            [None] if asked else None
        )  # of the first nothing is known
        self.cached_tokens = 0
        self.drafted = self.accepted = 0
        self.admitted: float | None = None
        self.first_token: float | None = None
        self.last_token: float | None = None
        self.eos = frozenset() if self.sampling.ignore_eos else eos
        seed = random.getrandbits(63) if self.sampling.seed is None else self.sampling.seed + sample
        self.seed = (seed + 2**63) % 2**64 - 2**63  # as an int64
        self._detokenizer = Detokenizer(tokenizer) if tokenizer else None
        self._watcher = StopWatcher(self.sampling.stop)
        # Since the last piece.
        self._spans: list[tuple[str, bool]] = []
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprob] = []

    @property
    def generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def most(self) -> int:
        """Tokens that it may still generate, not counting those of steps whose outcome is not known."""
        return self.sampling.max_tokens - self.generated

    def take(self, result: Result, now: float, drafted: bool) -> None:
        """What a step made for it: accepted drafts and a token. Sets `finish` where the text ends with that. `drafted`:
        the drafts were the MTP modules', and not what stands for them at first.

        Raises GrammarError for a token that its grammar forbids.
        """
        self.drafted += len(result.verified) * drafted
        self.accepted += result.accepted * drafted
        self.drafts = result.drafts
        for i, token in enumerate([*result.verified[: result.accepted], result.token]):
            if self.constraint is not None:
                self.constraint.accept(token)
            said = None
            if self.sampling.logprobs is not None and result.logprobs is not None:
                own, top = result.logprobs[i]
                said = TokenLogprob(token, own, top[: self.sampling.logprobs])
            self.push(token, drafted and i < result.accepted, said)
            if self.finish is None and self.constraint is not None and self.constraint.finished:
                self.finish = "stop"
                self._say(self._rest(), drafted and i < result.accepted)
            if self.finish is not None:
                break
        self.first_token = now if self.first_token is None else self.first_token
        self.last_token = now
        self.rows = len(self.tokens) - 1

    @property
    def prompt_missing(self) -> bool:
        """Whether log-probabilities of the prompt are asked for that are not all there."""
        said = len(self.prompt_logprobs or ())
        return self.sampling.prompt_logprobs is not None and said < len(self.request.prompt)

    def push_prompt(self, first: int, own: list[float], ids: list[list[int]], values: list[list[float]]) -> None:
        """Log-probabilities of the prompt's tokens from `first` on, and of the likeliest in their places. Those that
        are there already, from before a preemption, stay."""
        assert self.prompt_logprobs is not None
        for at, (logprob, some, of) in enumerate(zip(own, ids, values), start=first):
            if len(self.prompt_logprobs) == at < len(self.request.prompt):
                self.prompt_logprobs.append(TokenLogprob(self.tokens[at], logprob, list(zip(some, of))))

    def push(self, token: int, drafted: bool, logprob: TokenLogprob | None) -> None:
        """Takes one generated token. `drafted`: an MTP module drafted it. Sets `finish` where it ends the text."""
        if token in self.eos:
            self.finish = "stop"
            self._say(self._rest(), drafted)
            return
        self.tokens.append(token)
        self._tokens.append(token)
        if logprob is not None:
            self.logprobs.append(logprob)
            self._logprobs.append(logprob)
        if self._detokenizer is not None:
            text, stopped = self._watcher.push(self._detokenizer.push(token))
            self._say(text, drafted)
            if stopped:
                self.finish, self.stop = "stop", self._watcher.found
        if self.finish is None and self.generated >= self.sampling.max_tokens:
            self._say(self._rest(), drafted)
            self.finish = "length" if self.stop is None else "stop"

    def end(self, finish: Finish, error: str | None = None) -> None:
        """Ends this sample from outside: a failure, an abort or a deadline."""
        self.finish, self.error = finish, error
        if finish in ("abort", "deadline"):
            # What was held for a stop string is text; half a character is none, and would have become a whole one.
            self._say(self._watcher.flush(), False)

    def piece(self) -> Piece | None:
        """What has become certain since the last call; None where that is nothing."""
        if not (self._spans or self._tokens or self.finish):
            return None
        text = "".join(text for text, _ in self._spans)
        made = Piece(
            self.request.id, text, self.output() if self.finish else None, self.sample,
            tuple(self._tokens), tuple(self._spans), tuple(self._logprobs),
        )  # fmt: skip
        self._spans, self._tokens, self._logprobs = [], [], []
        return made

    def output(self) -> Output:
        assert self.finish is not None
        asked = self.sampling.logprobs is not None
        return Output(
            list(self.request.prompt), self.tokens[len(self.request.prompt) :], self.text, self.finish,
            self.logprobs if asked else None, self.error, self.sample, self.cached_tokens, self.stop,
            self.prompt_logprobs,
        )  # fmt: skip

    @property
    def tokens_per_second(self) -> float:
        """Since its first token."""
        if self.first_token is None or self.last_token is None or self.last_token <= self.first_token:
            return 0.0
        return (self.generated - 1) / (self.last_token - self.first_token)

    def overdue(self) -> bool:
        return self.request.deadline is not None and time.monotonic() > self.request.deadline

    def _say(self, text: str, drafted: bool) -> None:
        if text:
            self.text += text
            self._spans.append((text, drafted))

    def _rest(self) -> str:
        if self._detokenizer is None:
            return ""
        text, _ = self._watcher.push(self._detokenizer.flush())
        text += self._watcher.flush()
        if self._watcher.reached:
            self.stop = self._watcher.found
        return text
