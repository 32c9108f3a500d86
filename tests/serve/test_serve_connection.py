"""Over a real socket: who sends slowly, reads slowly, says too much, or goes away."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import uvicorn
from fake import FakeEngine

from abyssal.data.tokenizer import Tokenizer
from abyssal.serve.app import create_app
from abyssal.serve.auth import Keys
from abyssal.serve.connection import bounded
from abyssal.serve.limits import Limits
from abyssal.serve.service import Service

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def served(engine: FakeEngine, limits: Limits) -> AsyncIterator[tuple[Service, int]]:
    """The app on a free port of this machine."""
    service = Service(engine, engine.tokenizer, "fake", limits)
    with socket.create_server(("127.0.0.1", 0)) as bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        config = uvicorn.Config(
            create_app(service, Keys([])),
            http=bounded(limits),
            ws="none",
            lifespan="off",
            log_level="critical",
            timeout_keep_alive=max(1, round(limits.idle_seconds)),
            h11_max_incomplete_event_size=limits.header_bytes,
        )
        server = uvicorn.Server(config)
        task = asyncio.create_task(server._serve([bound]))
        while not server.started:
            await asyncio.sleep(0.01)
        try:
            yield service, bound.getsockname()[1]
        finally:
            server.should_exit = server.force_exit = True
            await asyncio.wait([task], timeout=2)
            task.cancel()
            service.close()


def request(body: object, path: str = "/v1/completions", length: int | None = None) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data) if length is None else length}\r\n\r\n".encode() + data


async def answered(connection: Connection, data: bytes, seconds: float = 5.0) -> bytes:
    """What comes until the other side closes."""
    reader, writer = connection
    writer.write(data)
    await writer.drain()
    try:
        return await asyncio.wait_for(reader.read(), seconds)
    except ConnectionResetError:
        return b""
    finally:
        writer.close()


async def until(condition: "asyncio.Future[None] | object", seconds: float = 5.0) -> None:
    assert callable(condition)
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    "sent",
    [b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nHost: localhost\r\n", request({}, length=100)],
    ids=["nothing", "half a line", "half a head", "half a body"],
)
def test_who_sends_slowly_is_cut_off(tokenizer: Tokenizer, sent: bytes) -> None:
    async def ask() -> None:
        limits = Limits(head_seconds=0.2, body_seconds=0.2)
        async with served(FakeEngine(tokenizer), limits) as (service, port):
            said = await answered(await asyncio.open_connection("127.0.0.1", port), sent)
            assert (b" 408 " in said) is sent.endswith(b"{}")
            await until(lambda: service.in_flight == 0)

    asyncio.run(ask())


def test_a_drip_does_not_keep_a_connection_alive(tokenizer: Tokenizer) -> None:
    """A second request's head, a byte at a time, after a first that was answered; and a body after an answer."""

    async def drip(port: int, first: bytes, then: bytes) -> float:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        loop = asyncio.get_running_loop()
        writer.write(first)
        assert await reader.read(1)
        started = loop.time()
        try:
            for byte in then:
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(0.05)
                if reader.at_eof():
                    break
        except ConnectionError:
            pass
        writer.close()
        return loop.time() - started

    async def ask() -> None:
        limits = Limits(head_seconds=0.3, body_seconds=0.1)
        async with served(FakeEngine(tokenizer), limits) as (_, port):
            get = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
            assert await drip(port, get, b"GET /health HTTP/1.1\r\nX: " + b"a" * 60) < 2
            wrong = b"POST /nowhere HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n"
            assert await drip(port, wrong, b"a" * 80) < 3

    asyncio.run(ask())


def test_an_idle_connection_is_closed_and_a_busy_one_is_not(tokenizer: Tokenizer) -> None:
    async def ask() -> None:
        limits = Limits(idle_seconds=1, head_seconds=0.2, body_seconds=0.2)
        async with served(FakeEngine(tokenizer, delay=0.05), limits) as (_, port):
            connection = await asyncio.open_connection("127.0.0.1", port)
            started = asyncio.get_running_loop().time()
            said = await answered(connection, request({"prompt": "x" * 100, "max_tokens": 40, "stop": "no"}))
            assert b" 200 " in said and asyncio.get_running_loop().time() - started > 1.5

    asyncio.run(ask())


def test_who_does_not_read_is_ended_and_the_request_with_it(tokenizer: Tokenizer) -> None:
    async def ask(limits: Limits) -> None:
        engine = FakeEngine(tokenizer, says=lambda prompt: "lorem ipsum " * 5000, max_context=1 << 20)
        async with served(engine, limits) as (service, port):
            client = socket.socket()
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(client, ("127.0.0.1", port))
            await loop.sock_sendall(client, request({"prompt": "a", "stream": True, "max_tokens": 60000}))
            await until(lambda: engine.running == 1)
            await until(lambda: engine.running == 0 and service.in_flight == 0)
            assert engine.streams[0].aborted.is_set() and not engine.streams[0].ended
            client.close()

    asyncio.run(ask(Limits(unsent_bytes=20000, send_seconds=60)))  # too much waits
    asyncio.run(ask(Limits(unsent_bytes=1 << 40, send_seconds=0.2)))  # for too long


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("prompt", ["abc" * 20, ["abc" * 20, "def" * 20]])
def test_who_goes_away_is_forgotten(tokenizer: Tokenizer, stream: bool, prompt: object) -> None:
    async def ask() -> None:
        engine = FakeEngine(tokenizer, delay=0.05)
        async with served(engine, Limits()) as (service, port):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(request({"prompt": prompt, "stream": stream, "max_tokens": 1000}))
            await until(lambda: engine.running >= 1)
            writer.close()
            await until(lambda: engine.running == 0 and service.in_flight == 0 and not service.streams)
            assert all(s.aborted.is_set() and not s.ended for s in engine.streams)

    asyncio.run(ask())


def test_malformed_http_is_answered_in_openais_shape(tokenizer: Tokenizer) -> None:
    async def ask() -> None:
        async with served(FakeEngine(tokenizer), Limits(header_bytes=4096)) as (service, port):
            large = b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 100000
            for data in (b"\x16\x03\x01\x00\xff\r\n\r\n", b"GET /\r\n\r\n", large):
                said = await answered(await asyncio.open_connection("127.0.0.1", port), data)
                assert said.startswith(b"HTTP/1.1 400") and b'{"error": {"message"' in said
            assert service.in_flight == 0

    asyncio.run(ask())


def test_connections_beyond_the_limit_are_closed(tokenizer: Tokenizer) -> None:
    async def ask() -> None:
        async with served(FakeEngine(tokenizer), Limits(connections=2)) as (_, port):
            held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
            await asyncio.sleep(0.05)
            assert await answered(await asyncio.open_connection("127.0.0.1", port), b"") == b""
            held.pop()[1].close()
            await asyncio.sleep(0.05)
            get = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
            assert b" 200 " in await answered(await asyncio.open_connection("127.0.0.1", port), get)

    asyncio.run(ask())
