"""What every route shares: the engine, the tokenizer, the limits, and what is under way."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from abyssal.data.tokenizer import Tokenizer
from abyssal.engine.client import AsyncEngine, RequestStream
from abyssal.serve.errors import ApiError, dead, draining
from abyssal.serve.limits import Limits

Value = TypeVar("Value")


class Service:
    """One model being served under one name."""

    def __init__(self, engine: AsyncEngine, tokenizer: Tokenizer, name: str, limits: Limits) -> None:
        self.engine, self.tokenizer, self.name, self.limits = engine, tokenizer, name, limits
        self.created = int(time.time())
        self.draining = False
        self.in_flight = 0  # requests being answered
        self.streams: set[RequestStream] = set()
        self.slow_readers = 0  # ended for it
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="text")
        self._longest = max(len(tokenizer.token_bytes(id)) for id in _ids(tokenizer))

    def check_ready(self) -> None:
        """Raises ApiError 503 if nothing can be asked of the engine any more."""
        if self.engine.dead.is_set():
            raise dead()
        if self.draining:
            raise draining()

    def check_model(self, model: str | None) -> None:
        """Raises ApiError 404 for a model that isn't served; None is the one that is."""
        if model is not None and model != self.name:
            raise ApiError(404, f"model: {model!r} is not served here", param="model", code="model_not_found")

    async def aside(self, work: Callable[[], Value]) -> Value:
        """Off the event loop: what takes its time over a long text."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def encoded(self, text: str, special: bool, param: str) -> list[int]:
        """A text's tokens. Raises ApiError 400 for one that must be longer than the context, before it is cut up."""
        if len(text.encode("utf-8", "replace")) > self._longest * self.engine.info.max_context:
            raise self.too_long(param)
        try:
            return self.tokenizer.encode(text, special)
        except ValueError as error:
            raise ApiError(400, f"{param}: {error}", param=param) from None

    def too_long(self, param: str) -> ApiError:
        most = min(self.engine.info.max_context - 1, self.limits.prompt_tokens)
        said = f"{param}: expected a prompt of at most {most} tokens"
        return ApiError(400, said, param=param, code="context_length_exceeded")

    def abort_all(self) -> None:
        for stream in list(self.streams):
            stream.abort()

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


def _ids(tokenizer: Tokenizer) -> list[int]:
    found = []
    for id in range(tokenizer.vocab_size):
        try:
            tokenizer.token_bytes(id)
        except ValueError:
            continue
        found.append(id)
    return found
