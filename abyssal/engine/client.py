"""The engine in a process of its own, seen from an event loop.

The worker (`worker.py`) holds the model; here are its requests and their streams. Both sides speak JSON, a line a
message, over the worker's standard input and output. A worker that ends, however it ends, closes its output: every
stream then ends in EngineDead, and `dead` is set. So it is where what the worker says can't be read.
"""

import asyncio
import json
import logging
import sys
import time
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Literal

from abyssal.engine.messages import Assembly, Blamed, from_sampling, line
from abyssal.engine.options import PRIORITIES
from abyssal.engine.request import Piece
from abyssal.engine.sampling import Sampling

LOGGER = logging.getLogger("abyssal.engine")
LONGEST = 1 << 24  # bytes of a message of the worker; see `messages.py` for what keeps them far below
GRACE = 5.0  # seconds that a worker may take to end


class EngineDead(RuntimeError):
    """The worker has ended, and with it every request."""


class QueueFull(RuntimeError):
    """As many requests wait as may. `retry_after` seconds is when to try again."""

    def __init__(self, retry_after: float) -> None:
        super().__init__(f"the queue is full; try again in {retry_after:.0f} s")
        self.retry_after = retry_after


class Refused(ValueError):
    """What the engine's worker finds wrong with a request, or with its grammar, as `blamed` says; where that is "busy",
    nothing but that too many grammars are being compiled, and the request may come again."""

    def __init__(self, message: str, blamed: Blamed) -> None:
        super().__init__(message)
        self.blamed = blamed


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
    step_tokens: int | None = None  # tokens of a step, prompts and decoding together; 2048 on a CPU, 8192 on a GPU
    drafts: int | None = None  # tokens drafted a step; one for each MTP module
    prefix_cache: bool = True
    deterministic: bool = False
    compiled: bool = False  # the decoding step, on a CPU
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

    def __init__(self, engine: "AsyncEngine", id: int, prompt: list[int], sampling: Sampling) -> None:
        self._engine, self._id = engine, id
        self._open = self._running = sampling.n  # samples whose Output has not been read, or has not come
        self._whole = Assembly(prompt, sampling)
        self._pieces: asyncio.Queue[Piece | Refused | EngineDead] = asyncio.Queue()

    def __aiter__(self) -> AsyncIterator[Piece]:
        return self

    async def __anext__(self) -> Piece:
        """Raises EngineDead where the worker has ended, and Refused, a ValueError, where it refuses the request."""
        if not self._open:
            raise StopAsyncIteration
        piece = await self._pieces.get()
        if isinstance(piece, Exception):
            self._open = 0
            raise piece
        self._open -= piece.output is not None
        return piece

    async def aclose(self) -> None:
        self.abort()

    def abort(self) -> None:
        """Ends the request; what it held is free within a step. Does nothing once it has ended."""
        self._engine._abort(self._id)


class AsyncEngine:
    """`await AsyncEngine.start(settings)`, then `submit`."""

    def __init__(self, settings: EngineSettings, process: asyncio.subprocess.Process, info: EngineInfo) -> None:
        """Use `start`."""
        self.settings, self.info, self.pid = settings, info, process.pid
        self.dead = asyncio.Event()  # set as soon as the worker has ended, whyever
        self._process = process
        self._streams: dict[int, RequestStream] = {}
        self._samples = 0  # of these, that have not ended
        self._next = 0
        self._stats: dict[str, Any] = {}
        self._closing = False
        self._heard = time.monotonic()
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
        `salt` never share pages. Raises QueueFull, EngineDead, and ValueError naming what can't be. What only the
        worker can tell, such as that a grammar doesn't compile, ends the stream in Refused; a failure in the worker
        ends it with an Output whose finish is "error"."""
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
        if isinstance(priority, bool) or not isinstance(priority, int) or abs(priority) > PRIORITIES:
            raise ValueError(f"priority: expected an integer from -{PRIORITIES} to {PRIORITIES}, got {priority!r}")
        most = self.settings.max_running + self.settings.max_waiting
        if sampling.n > most:
            raise ValueError(f"n: expected at most {most}, as many as may run and wait, got {sampling.n}")
        if self._samples + sampling.n > most:
            raise QueueFull(self._retry())
        self._next += 1
        stream = RequestStream(self, self._next, ids, sampling)
        self._streams[self._next] = stream
        self._samples += sampling.n
        self._send(
            op="add", id=self._next, prompt=ids, sampling=from_sampling(sampling), priority=priority,
            deadline=deadline, salt=salt, inspect=inspect,
        )  # fmt: skip
        return stream

    def stats(self) -> dict[str, Any]:
        """The newest numbers of the worker (`metrics.Metrics.snapshot`), at most a fraction of a second old."""
        return self._stats

    @property
    def silent(self) -> float:
        """Seconds since the worker last said something. It does a few times a second, but not during a step."""
        return time.monotonic() - self._heard

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
        try:
            while text := await self._process.stdout.readline():
                self._heard = time.monotonic()
                self._take(json.loads(text))
                await asyncio.sleep(0)  # many lines may be here already, and none of them waits
        except ConnectionError:
            pass
        except Exception as error:  # after it nothing can be trusted
            LOGGER.error("reading what the engine says", exc_info=error)
        finally:
            if self._process.returncode is None:
                with suppress(ProcessLookupError):
                    self._process.kill()
            self.dead.set()
            for stream in self._streams.values():
                stream._pieces.put_nowait(EngineDead("the engine has ended"))
            self._streams.clear()

    def _take(self, message: dict[str, Any]) -> None:
        self._stats = message.get("stats", self._stats)
        for plain in message.get("pieces", ()):
            stream = self._streams.get(plain["i"])
            if stream is not None:
                if "o" in plain:
                    self._ended_of(stream, 1)
                stream._pieces.put_nowait(stream._whole.piece(plain))
        if "prompt" in message:
            id, part = message["prompt"]
            if id in self._streams:
                self._streams[id]._whole.prompt(part)
        if "refused" in message:
            id, said, blamed = message["refused"]
            stream = self._streams[id]
            self._ended_of(stream, stream._running)
            stream._pieces.put_nowait(Refused(said, blamed))

    def _ended_of(self, stream: RequestStream, samples: int) -> None:
        self._samples -= samples
        stream._running -= samples
        if not stream._running:
            del self._streams[stream._id]
            self._ended = [*self._ended[1:], time.monotonic()]
