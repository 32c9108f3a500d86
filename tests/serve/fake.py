"""An engine that computes nothing: it has AsyncEngine's face, and says what a test has it say."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from typing import Any

import httpx

from abyssal.data.tokenizer import Detokenizer, Tokenizer
from abyssal.engine.client import AsyncEngine, EngineDead, EngineInfo, QueueFull, Refused, RequestStream
from abyssal.engine.metrics import Metrics
from abyssal.engine.request import Finish, Inside, Output, Piece, TokenLogprob
from abyssal.engine.sampling import Sampling
from abyssal.engine.text import StopWatcher

Client = Callable[..., AbstractAsyncContextManager[httpx.AsyncClient]]

INSIDE = Inside(640, 2560, 1, 0, 0, 50.0, 4, 2, [[3, 1], [2, 2]])


@dataclass(frozen=True)
class Asked:
    """What the server asked of the engine."""

    prompt: list[int]
    sampling: Sampling
    priority: int
    deadline: float | None
    salt: str
    inspect: bool


def echo(prompt: str) -> str:
    """What is said by default: the prompt's last letters, from the last."""
    return prompt[-40:][::-1]


class FakeStream(RequestStream):
    def __init__(self, engine: "FakeEngine", asked: Asked) -> None:
        self._engine, self._asked = engine, asked
        self.aborted = asyncio.Event()
        self.ended = False

    def abort(self) -> None:
        self.aborted.set()

    async def __aiter__(self) -> AsyncIterator[Piece]:
        self._engine.running += 1
        try:
            if self._engine.refused is not None:
                raise self._engine.refused
            for sample in range(self._asked.sampling.n):
                async for piece in self._sample(sample):
                    yield piece
            self.ended = True
        finally:
            self._engine.running -= 1

    async def _sample(self, sample: int) -> AsyncIterator[Piece]:
        engine, sampling = self._engine, self._asked.sampling
        tokenizer, inspect = engine.tokenizer, self._asked.inspect
        watcher, detokenizer = StopWatcher(sampling.stop), Detokenizer(tokenizer)
        said = tokenizer.encode(engine.says(tokenizer.decode(self._asked.prompt, special=True)), special=True)
        done: list[int] = []
        text = ""
        finish: Finish = "error" if engine.error else "stop"
        for count, token in enumerate([] if engine.error else said):
            await self._wait()
            if self.aborted.is_set():
                finish = "abort"
                break
            done.append(token)
            piece, stopped = watcher.push(detokenizer.push(token))
            text += piece
            spans = ((piece, count % 2 == 1),) if inspect else ()
            yield Piece(0, piece, None, sample, (token,), spans, self._logprobs([token]), INSIDE if inspect else None)
            if stopped:
                break
            if len(done) == sampling.max_tokens:
                finish = "length"
                break
        rest = "" if watcher.reached else watcher.push(detokenizer.flush())[0] + watcher.flush()
        logprobs = None if sampling.logprobs is None else list(self._logprobs(done))
        prompt = self._asked.prompt
        output = Output(
            prompt, done, text + rest, finish, logprobs, engine.error, sample, cached_tokens=len(prompt) - 1
        )
        if sampling.prompt_logprobs is not None:
            output = replace(output, prompt_logprobs=[None, *self._logprobs(prompt[1:])])
        yield Piece(0, rest, output, sample)

    async def _wait(self) -> None:
        engine = self._engine
        if engine.dead.is_set():
            raise EngineDead("killed")
        if engine.delay is not None:
            waits = [asyncio.ensure_future(event.wait()) for event in (engine.dead, self.aborted)]
            await asyncio.wait(waits, timeout=engine.delay, return_when=asyncio.FIRST_COMPLETED)
            for wait in waits:
                wait.cancel()
            if engine.dead.is_set():
                raise EngineDead("killed")

    def _logprobs(self, tokens: Sequence[int]) -> tuple[TokenLogprob, ...]:
        n = self._asked.sampling.logprobs
        if n is None:
            return ()
        return tuple(TokenLogprob(t, -0.5, [(i, -1.0 - i) for i in range(n)]) for t in tokens)


class FakeEngine(AsyncEngine):
    """`says` maps a prompt's text to the answer; `delay` is seconds a token; `full` has every request refused."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        says: Callable[[str], str] = echo,
        delay: float | None = None,
        max_context: int = 4096,
    ) -> None:
        self.tokenizer, self.says, self.delay = tokenizer, says, delay
        self.full = False
        self.error: str | None = None
        self.refused: Refused | None = None
        self._heard = time.monotonic()
        self.running = 0
        self.asked: list[Asked] = []
        self.streams: list[FakeStream] = []
        self.dead = asyncio.Event()
        self.pid = 0
        self.metrics = Metrics(drafted=[10, 5], accepted=[8, 2], expert_load=[[1, 2], [3, 4]])
        self.info = EngineInfo(tokenizer.vocab_size, max_context, 1, 1, 10, 64, 640, 10, 40, 2, 2, (1,))

    def submit(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        *,
        priority: int = 0,
        deadline: float | None = None,
        salt: str = "",
        inspect: bool = False,
    ) -> FakeStream:
        if self.dead.is_set():
            raise EngineDead("killed")
        if self.full:
            raise QueueFull(2.5)
        self.asked.append(Asked(list(prompt), sampling, priority, deadline, salt, inspect))
        self.streams.append(FakeStream(self, self.asked[-1]))
        self.metrics.requests += 1
        return self.streams[-1]

    def stats(self) -> dict[str, Any]:
        return self.metrics.snapshot()

    async def close(self, drain: float = 0.0) -> None:
        self.dead.set()
