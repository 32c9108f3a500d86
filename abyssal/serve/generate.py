"""Prompts to the engine, and its pieces back, however many prompts there are; nothing is left running behind."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field

from starlette.types import Receive

from abyssal.engine.client import EngineDead, QueueFull, Refused, RequestStream
from abyssal.engine.request import Output, Piece
from abyssal.engine.sampling import Sampling
from abyssal.serve.answers import FinishReason, InsideView, PromptDetails, Usage, View
from abyssal.serve.errors import ApiError, dead, draining
from abyssal.serve.service import Service

_AHEAD = 64  # pieces of several prompts that may wait for who reads them


@dataclass(frozen=True)
class Job:
    """One prompt for the engine."""

    prompt: list[int]
    sampling: Sampling
    priority: int
    deadline: float
    salt: str
    inspect: bool


@dataclass
class Tally:
    """What a request used, summed as its outputs come."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    _counted: set[int] = field(default_factory=set)

    def add(self, prompt: int, output: Output) -> None:
        self.completion_tokens += len(output.tokens)
        if prompt not in self._counted:  # once, however many samples it has
            self._counted.add(prompt)
            self.prompt_tokens += len(output.prompt_tokens)
            self.cached_tokens += output.cached_tokens

    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            total_tokens=self.prompt_tokens + self.completion_tokens,
            prompt_tokens_details=PromptDetails(cached_tokens=self.cached_tokens),
        )


async def pieces(service: Service, jobs: Sequence[Job]) -> AsyncGenerator[tuple[int, Piece], None]:
    """Every piece with the number of its job, as it comes. Closing the generator aborts what still runs.

    Raises ApiError: 429 where the queue is full, 503 where the engine is dead, the server is shutting down or too many
    grammars are being compiled, 400 for what the engine refuses.
    """
    streams: list[RequestStream] = []
    try:
        for job in jobs:
            streams.append(_submitted(service, job))
        if len(streams) == 1:
            async for piece in streams[0]:
                yield 0, _checked(piece, service)
        else:
            async with aclosing(_merged(streams)) as merged:
                async for number, piece in merged:
                    yield number, _checked(piece, service)
    except EngineDead:
        raise dead() from None
    except Refused as error:
        if error.blamed == "busy":
            raise ApiError(503, str(error), code="busy", retry_after=2) from None
        if error.blamed == "grammar":
            raise ApiError(400, str(error), param="response_format", code="bad_grammar") from None
        raise ApiError(400, str(error)) from None
    finally:
        for stream in streams:
            stream.abort()
            service.streams.discard(stream)


async def _merged(streams: Sequence[RequestStream]) -> AsyncGenerator[tuple[int, Piece], None]:
    queue: asyncio.Queue[tuple[int, Piece] | Exception | None] = asyncio.Queue(_AHEAD)

    async def forward(number: int, stream: RequestStream) -> None:
        async for piece in stream:
            await queue.put((number, piece))

    async def forward_all() -> None:
        end: Exception | None = None
        try:
            async with asyncio.TaskGroup() as group:
                for number, stream in enumerate(streams):
                    group.create_task(forward(number, stream))
        except* (EngineDead, Refused) as errors:
            end = next(error for error in errors.exceptions if isinstance(error, EngineDead | Refused))
        await queue.put(end)

    work = asyncio.create_task(forward_all())
    try:
        while isinstance(item := await queue.get(), tuple):
            yield item
        if item is not None:
            raise item
        await work
    finally:
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)


async def unless_gone(receive: Receive, work: Awaitable[object]) -> bool:
    """Awaits `work`, and cancels it if the client goes away first: then False."""
    working = asyncio.ensure_future(work)
    gone = asyncio.create_task(disconnected(receive))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            return False
        working.result()
        return True
    finally:
        working.cancel()
        gone.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def finish_reason(output: Output, calls: int = 0) -> FinishReason:
    match output.finish:
        case "stop":
            return "tool_calls" if calls else "stop"
        case "length" | "deadline":
            return output.finish
        case _:
            raise AssertionError(output.finish)  # `_checked` has raised for these


def view(spans: Sequence[tuple[str, bool]], piece: Piece) -> View:
    inside = InsideView(**asdict(piece.inside)) if piece.inside is not None else None
    return View(spans=list(spans), inside=inside)


def _submitted(service: Service, job: Job) -> RequestStream:
    service.check_ready()
    try:
        stream = service.engine.submit(
            job.prompt,
            job.sampling,
            priority=job.priority,
            deadline=job.deadline,
            salt=job.salt,
            inspect=job.inspect,
        )
    except QueueFull as error:
        raise ApiError(429, str(error), code="queue_full", retry_after=error.retry_after) from None
    except ValueError as error:
        raise ApiError(400, str(error)) from None
    service.streams.add(stream)
    return stream


def _checked(piece: Piece, service: Service) -> Piece:
    """Raises ApiError for an output that is none."""
    output = piece.output
    if output is None or output.finish in ("stop", "length", "deadline"):
        return piece
    if output.finish == "abort":
        raise draining() if service.draining else ApiError(503, "the request was aborted", code="aborted")
    raise ApiError(500, output.error or "the engine failed at this request", code="generation_failed")
