"""The engine in a process of its own, seen from an event loop.

The worker (`worker.py`) holds the model; here are its requests and their streams. Both sides speak JSON, a line a
message, over the worker's standard input and output. A worker that ends, however it ends, closes its output: every
stream then ends in EngineDead, and `dead` is set.
"""

import asyncio
import json
import sys
import time
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Literal

from abyssal.engine.messages import from_sampling, line, to_piece
from abyssal.engine.request import Piece
from abyssal.engine.sampling import Sampling

LONGEST = 1 << 28  # bytes of a message
GRACE = 5.0  # seconds that a worker may take to end


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

    def __init__(self, engine: "AsyncEngine", id: int, prompt: list[int], samples: int) -> None:
        self._engine, self._id, self._prompt, self._open = engine, id, prompt, samples
        self._pieces: asyncio.Queue[Piece | None] = asyncio.Queue()

    def __aiter__(self) -> AsyncIterator[Piece]:
        return self

    async def __anext__(self) -> Piece:
        """Raises EngineDead where the worker has ended."""
        if not self._open:
            raise StopAsyncIteration
        piece = await self._pieces.get()
        if piece is None:
            self._open = 0
            raise EngineDead("the engine has ended")
        self._open -= piece.output is not None
        return piece

    async def aclose(self) -> None:
        self.abort()

    def abort(self) -> None:
        """Ends the request; what it held is free within a step. Does nothing once it has ended."""
        self._engine._abort(self._id)

    def _take(self, plain: dict[str, Any]) -> None:
        self._pieces.put_nowait(to_piece(plain, self._prompt))


class AsyncEngine:
    """`await AsyncEngine.start(settings)`, then `submit`."""

    def __init__(self, settings: EngineSettings, process: asyncio.subprocess.Process, info: EngineInfo) -> None:
        """Use `start`."""
        self.settings, self.info, self.pid = settings, info, process.pid
        self.dead = asyncio.Event()  # set as soon as the worker has ended, whyever
        self._process = process
        self._streams: dict[int, tuple[RequestStream, int]] = {}  # and samples that have not ended
        self._samples = 0
        self._next = 0
        self._stats: dict[str, Any] = {}
        self._closing = False
        self._ended = [time.monotonic()] * 32  # when the last requests did
        self._reader = asyncio.create_task(self._read())

    @classmethod
    async def start(cls, settings: EngineSettings) -> "AsyncEngine":
        """Returns once the worker is ready. Raises EngineDead with the worker's own words if it could not start."""
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "abyssal.engine.worker", stdin=PIPE, stdout=PIPE, limit=LONGEST
        )
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(line(asdict(settings)))
            first = await process.stdout.readline()
        except BaseException:
            process.kill()
            raise
        said: dict[str, Any] = json.loads(first) if first else {"failed": f"it ended with code {await process.wait()}"}
        if "ready" not in said:
            await process.wait()
            raise EngineDead(said["failed"])
        info = said["ready"]
        engine = cls(settings, process, EngineInfo(**info | {"eos_ids": tuple(info["eos_ids"])}))
        engine._stats = said["stats"]
        return engine

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
        if self.dead.is_set() or self._closing:
            raise EngineDead("the engine has ended")
        ids = list(prompt)
        if not ids or min(ids) < 0 or max(ids) >= self.info.vocab_size:
            raise ValueError(f"prompt: expected token ids from 0 to {self.info.vocab_size - 1}, one at least")
        if len(ids) + sampling.max_tokens > self.info.max_context:
            raise ValueError(
                f"prompt: {len(ids)} tokens and max_tokens {sampling.max_tokens} exceed the context of "
                f"{self.info.max_context}"
            )
        if self._samples + sampling.n > self.settings.max_running + self.settings.max_waiting:
            raise QueueFull(self._retry())
        self._next += 1
        stream = RequestStream(self, self._next, ids, sampling.n)
        self._streams[self._next] = (stream, sampling.n)
        self._samples += sampling.n
        self._send(
            op="add", id=self._next, prompt=ids, sampling=from_sampling(sampling), priority=priority,
            deadline=deadline, salt=salt, inspect=inspect,
        )  # fmt: skip
        return stream

    def stats(self) -> dict[str, Any]:
        """The newest numbers of the worker (`metrics.Metrics.snapshot`), at most a fraction of a second old."""
        return self._stats

    async def close(self, drain: float = 0.0) -> None:
        """Ends the worker, after waiting up to `drain` seconds for what runs."""
        self._closing = True
        if not self.dead.is_set():
            self._send(op="close", drain=drain)
            try:
                await asyncio.wait_for(self.dead.wait(), drain + GRACE)
            except TimeoutError:
                self._process.kill()
        await self._process.wait()
        await self._reader

    def _send(self, **message: Any) -> None:
        assert self._process.stdin is not None
        with suppress(ConnectionError):  # its end is seen where we read
            self._process.stdin.write(line(message))

    def _abort(self, id: int) -> None:
        if id in self._streams and not self.dead.is_set():
            self._send(op="abort", id=id)

    def _retry(self) -> float:
        """Seconds until about a tenth of the queue has gone, by how fast requests ended lately."""
        rate = len(self._ended) / max(time.monotonic() - self._ended[0], 0.1)
        return min(max(self.settings.max_waiting / 10 / rate, 1.0), 60.0)

    async def _read(self) -> None:
        assert self._process.stdout is not None
        with suppress(ConnectionError, ValueError):  # a line that isn't JSON, or too long: nothing can be trusted
            while text := await self._process.stdout.readline():
                message = json.loads(text)
                self._stats = message.get("stats", self._stats)
                for plain in message.get("pieces", ()):
                    self._deliver(plain)
        if self._process.returncode is None:
            with suppress(ProcessLookupError):
                self._process.kill()
        self.dead.set()
        for stream, _ in self._streams.values():
            stream._pieces.put_nowait(None)
        self._streams.clear()

    def _deliver(self, plain: dict[str, Any]) -> None:
        id = plain["i"]
        found = self._streams.get(id)
        if found is None:
            return
        stream, samples = found
        if "o" in plain:
            self._samples -= 1
            samples -= 1
            self._streams[id] = (stream, samples)
            if not samples:
                del self._streams[id]
                self._ended = [*self._ended[1:], time.monotonic()]
        stream._take(plain)
