"""A connection with time limits: for headers and bodies to arrive, to be idle, and for what is sent to be read."""

import asyncio
import json

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from abyssal.serve.errors import ApiError
from abyssal.serve.limits import Limits

_GRACE = 1.0  # seconds that the app has to say itself that a body is late


def bounded(limits: Limits) -> type[H11Protocol]:
    """uvicorn's protocol for HTTP/1.1 within `limits`."""

    class Bounded(H11Protocol):
        _arriving: asyncio.TimerHandle | None = None
        _head = True  # whether what is arriving is a head
        _unread: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > limits.connections:
                transport.abort()
                return
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_arriving()
            self.resume_writing()
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            if self._unread is None:
                self._unread = self.loop.call_later(limits.send_seconds, self.transport.abort)

        def resume_writing(self) -> None:
            if self._unread is not None:
                self._unread.cancel()
                self._unread = None
            super().resume_writing()

        def send_400_response(self, msg: str) -> None:
            """In OpenAI's shape; the connection ends with it."""
            if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # in the middle of an answer
                self.transport.abort()
                return
            body = json.dumps(ApiError(400, msg).body().model_dump()).encode()
            headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
            headers.append((b"content-length", b"%d" % len(body)))
            for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
            self.transport.close()

        def _watch(self) -> None:
            """Has the timer run that goes with what is arriving now."""
            if self.transport.is_closing():
                return self._stop_arriving()
            state = self.conn.their_state
            head = state is h11.IDLE
            # Between two requests uvicorn's own timer runs, until the first byte of the next.
            if head and self.cycle is not None and not self.conn.trailing_data[0]:
                return self._stop_arriving()
            if not head and state is not h11.SEND_BODY:
                return self._stop_arriving()
            if self._arriving is not None and self._head == head:
                return None
            self._stop_arriving()
            self._head = head
            seconds = limits.head_seconds if head else limits.body_seconds + _GRACE
            self._arriving = self.loop.call_later(seconds, self.transport.abort)
            return None

        def _stop_arriving(self) -> None:
            if self._arriving is not None:
                self._arriving.cancel()
                self._arriving = None

    return Bounded
