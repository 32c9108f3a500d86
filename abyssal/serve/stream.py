"""Server-sent events to a client that may be slow or gone, with a bound on what waits for it."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import aclosing

from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from abyssal.serve.errors import LOGGER, ApiError
from abyssal.serve.generate import disconnected
from abyssal.serve.service import Service

DONE = b"data: [DONE]\n\n"


def event(body: BaseModel) -> bytes:
    """Only what was set: a delta says nothing of what it doesn't change."""
    return b"data: " + body.model_dump_json(exclude_unset=True).encode() + b"\n\n"


class EventStream(Response):
    """Sends `events` as they come. An error before the first becomes an answer with its status; later, an event.

    What the client hasn't read is joined into one write, counted, and bounded by `unsent_bytes`; a write may take
    `send_seconds`. Past either the events are closed, which aborts the request.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], service: Service) -> None:
        self.status_code, self.background = 200, None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._events, self._service = events, service
        self._unsent: deque[bytes] = deque()
        self._size = 0
        self._more = asyncio.Event()
        self._ended = self._slow = False
        self._refused: ApiError | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writing = asyncio.create_task(self._write(scope, receive, send))
        producing = asyncio.create_task(self._produce(writing))
        gone = asyncio.create_task(disconnected(receive))
        try:
            await asyncio.wait({writing, gone}, return_when=asyncio.FIRST_COMPLETED)
            if writing.done() and not self._slow:
                writing.result()
        finally:
            tasks = (writing, producing, gone)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._service.slow_readers += self._slow

    async def _produce(self, writing: "asyncio.Task[None]") -> None:
        """Never waits for the client; gives up where too much waits for it."""
        try:
            async with aclosing(self._events) as events:
                async for data in events:
                    self._put(data)
                    await asyncio.sleep(0)  # lets the writer have it, however many pieces were ready
                    if self._size > self._service.limits.unsent_bytes:
                        self._slow = True
                        writing.cancel()
                        return
            self._put(DONE)
        except ApiError as error:
            self._fail(error)
        except Exception as error:
            LOGGER.error("streaming", exc_info=error)
            self._fail(ApiError(500, "an error of the server's own; its log has more"))
        finally:
            self._ended = True
            self._more.set()

    def _put(self, data: bytes) -> None:
        self._unsent.append(data)
        self._size += len(data)
        self._more.set()

    def _fail(self, error: ApiError) -> None:
        self._refused = error
        self._put(b"data: " + error.body().model_dump_json().encode() + b"\n\n")

    async def _write(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._more.wait()
        if self._refused is not None and len(self._unsent) == 1:
            await self._refused.response()(scope, receive, send)
            return
        await self._send(send, {"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        while not (self._ended and not self._unsent):
            await self._more.wait()
            self._more.clear()
            data = b"".join(self._unsent)
            self._unsent.clear()
            await self._send(send, {"type": "http.response.body", "body": data, "more_body": True})
            self._size -= len(data)
            if self._ended:
                self._more.set()
        await self._send(send, {"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, message: dict[str, object]) -> None:
        try:
            async with asyncio.timeout(self._service.limits.send_seconds):
                await send(message)
        except TimeoutError:
            self._slow = True
            raise
