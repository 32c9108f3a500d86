"""The engine in a process of its own, seen from an event loop.

The worker (`worker.py`) holds the model; here are its requests and their streams. Both sides speak JSON, a line a
message, over the worker's standard input and output. A worker that ends, however it ends, closes its output: every
stream then ends in EngineDead, and `dead` is set.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from abyssal.engine.request import Piece
from abyssal.engine.sampling import Sampling


class EngineDead(RuntimeError):
    """The worker has ended, and with it every request."""


class QueueFull(RuntimeError):
    """As many requests wait as may. `retry_after` seconds is when to try again."""

    def __init__(self, retry_after: float) -> None:
        super().__init__(f"the queue is full; try again in {retry_after:.0f} s")
        self.retry_after = retry_after


@dataclass(frozen=True)
class EngineSettings:
    """Everything that an engine is started with. `None` is what its comment says."""

    model: str  # a checkpoint's folder, a run's folder, or a hub id
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16", "float64"] | None = None  # as stored
    cache_dtype: Literal["float32", "bfloat16", "fp8"] | None = None  # of the latents; the weights'
    cache_bytes: int | None = None  # of the page pool; from free memory
    max_running: int = 64  # sequences decoded at once
    max_context: int | None = None  # tokens of a sequence; the model's
    step_tokens: int = 2048  # tokens of a step, prompts and decoding together
    drafts: int | None = None  # tokens drafted a step; one for each MTP module
    prefix_cache: bool = True
    deterministic: bool = False
    compiled: bool | None = False  # the decoding step, on a CPU
    max_waiting: int = 256  # requests in the queue
    max_grammar_bytes: int = 65536
    grammar_seconds: float = 2.0


@dataclass(frozen=True)
class EngineInfo:
    """What the worker says of itself once it is ready."""

    vocab_size: int
    max_context: int
    modules: int  # MTP modules in the checkpoint
    drafts: int
    pages: int
    page_size: int
    page_bytes: int
    latent_bytes_a_token: int
    mha_bytes_a_token: int  # what multi-head attention of the same shape would hold
    expert_layers: int
    experts: int
    eos_ids: tuple[int, ...]


class RequestStream:
    """The pieces of one request as they come; ends after the last sample's Output. Closing it early aborts."""

    def __aiter__(self) -> AsyncIterator[Piece]:
        raise NotImplementedError

    def abort(self) -> None:
        """Ends the request; what it held is free within a step. Does nothing once it has ended."""
        raise NotImplementedError


class AsyncEngine:
    """`await AsyncEngine.start(settings)`, then `submit`."""

    info: EngineInfo
    dead: asyncio.Event  # set as soon as the worker has ended, whyever
    pid: int  # of the worker

    @classmethod
    async def start(cls, settings: EngineSettings) -> "AsyncEngine":
        """Returns once the worker is ready. Raises EngineDead with the worker's own words if it could not start."""
        raise NotImplementedError

    def submit(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        *,
        priority: int = 0,
        deadline: float | None = None,
        salt: str = "",
        inspect: bool = False,
    ) -> RequestStream:
        """Queues a request. Lower `priority` runs earlier; `deadline` is in seconds from now; prompts of different
        `salt` never share pages. Raises QueueFull, EngineDead, and ValueError naming what can't be. A failure in the
        worker, such as a grammar that doesn't compile, ends the stream with an Output whose finish is "error"."""
        raise NotImplementedError

    def stats(self) -> dict[str, Any]:
        """The newest numbers of the worker (`metrics.Metrics.snapshot`), at most a fraction of a second old."""
        raise NotImplementedError

    async def close(self, drain: float = 0.0) -> None:
        """Ends the worker, after waiting up to `drain` seconds for what runs."""
        raise NotImplementedError
