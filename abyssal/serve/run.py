"""`abyssal serve`: the engine, the socket, signals, and the code that the process exits with."""

import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import uvicorn

from abyssal.checkpoint import local_folder
from abyssal.data.tokenizer import Tokenizer
from abyssal.engine.client import AsyncEngine, EngineDead, EngineSettings
from abyssal.serve.app import create_app
from abyssal.serve.auth import VARIABLE, Keys, is_loopback
from abyssal.serve.connection import bounded
from abyssal.serve.limits import Limits
from abyssal.serve.service import Service

_TELL = 0.4  # seconds that clients have to be told that the engine is dead, before the process ends
_LAST = 1.0  # seconds that aborted requests have to say so


@dataclass(frozen=True)
class Address:
    """Where to listen. Raises ValueError for one that others reach, without a key and not `insecure`."""

    host: str
    port: int
    keys: Keys
    insecure: bool

    def __post_init__(self) -> None:
        if not (is_loopback(self.host) or len(self.keys) or self.insecure):
            raise ValueError(
                f"host {self.host}: others than this machine would reach it; expected an API key "
                f"({VARIABLE} or --api-key-file) or --insecure"
            )

    def bind(self) -> socket.socket:
        """A socket that nobody can connect to yet. Raises ValueError if there is no such address, or it is taken."""
        try:
            found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            bound = socket.socket(found[0][0], socket.SOCK_STREAM)
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(found[0][4])
        except OSError as error:
            raise ValueError(f"{self.host}:{self.port}: {error.strerror or error}") from None
        return bound


def serve(settings: EngineSettings, name: str | None, address: Address, limits: Limits, drain: float) -> int:
    """Serves until a signal ends it (0) or the engine has ended (1). `drain` is in seconds.

    Raises ValueError if the model has no tokenizer, or nothing can listen at the address.
    """
    bound = address.bind()
    with bound:
        tokenizer = Tokenizer.load(local_folder(settings.model))
        # More at once than may run and wait would be told for ever to come again.
        limits = replace(limits, samples=min(limits.samples, settings.max_running + limits.waiting))
        settings = replace(
            settings,
            max_waiting=limits.waiting,
            max_grammar_bytes=limits.grammar_bytes,
            grammar_seconds=limits.grammar_seconds,
        )
        return asyncio.run(_serve(settings, tokenizer, name or _name_of(settings.model), bound, address, limits, drain))


async def _serve(
    settings: EngineSettings,
    tokenizer: Tokenizer,
    name: str,
    bound: socket.socket,
    address: Address,
    limits: Limits,
    drain: float,
) -> int:
    signals = _Signals()
    starting = asyncio.create_task(AsyncEngine.start(settings))
    await _first(starting, signals.first)
    if not starting.done():
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        return 0
    try:
        engine = starting.result()
    except EngineDead as error:
        _say(f"the engine did not start: {error}")
        return 1
    service = Service(engine, tokenizer, name, limits)
    config = uvicorn.Config(
        create_app(service, address.keys, address.host),
        http=bounded(limits),
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_level="critical",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=min(limits.connections, 1024),
        timeout_keep_alive=max(1, round(limits.idle_seconds)),
        h11_max_incomplete_event_size=limits.header_bytes,
    )
    server = _Server(config)
    serving = asyncio.create_task(server.serve(sockets=[bound]))
    dead = asyncio.create_task(engine.dead.wait())
    host, port = bound.getsockname()[:2]
    _say(f"{name} at http://{f'[{host}]' if ':' in host else host}:{port}")
    try:
        await _first(serving, signals.first, dead)
        if signals.first.done() and not dead.done():
            service.draining = server.should_exit = True
            _say(f"draining {service.in_flight} requests, up to {drain:g} s")
            await _first(serving, signals.second, dead, seconds=drain)
            service.abort_all()
            await _first(serving, dead, seconds=_LAST)
        if dead.done():
            _say("the engine has ended")
            await asyncio.sleep(_TELL)
        ended_well = not dead.done() and (serving.done() or signals.first.done())
        server.should_exit = server.force_exit = True
        await _first(serving, seconds=0.3)
        return 0 if ended_well else 1
    finally:
        serving.cancel()
        dead.cancel()
        await asyncio.gather(serving, dead, return_exceptions=True)
        service.close()
        with contextlib.suppress(EngineDead):
            await engine.close()


class _Server(uvicorn.Server):
    """Signals are `_Signals`'s."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Signals:
    """The first SIGTERM or SIGINT asks for an end, the second for one at once."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.first: asyncio.Future[None] = loop.create_future()
        self.second: asyncio.Future[None] = loop.create_future()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._came)

    def _came(self) -> None:
        waiting = next((future for future in (self.first, self.second) if not future.done()), None)
        if waiting is not None:
            waiting.set_result(None)


async def _first(*waited: "asyncio.Future[Any]", seconds: float | None = None) -> None:
    await asyncio.wait(waited, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)


def _name_of(model: str) -> str:
    """A run's folder names the model in it."""
    path = Path(model)
    if not path.exists():
        return model  # a hub id
    resolved = path.resolve()
    return resolved.parent.name if resolved.name == "model" else resolved.name


def _say(text: str) -> None:
    print(f"abyssal: {text}", file=sys.stderr, flush=True)
