"""Clients of every kind: patient, hasty, slow, vanishing and wrong. Each says what it did in a Tally."""

import asyncio
import json
import random
import socket
import struct
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
from load_model import Case

MOST_FAILURES = 20  # that are kept in words
PATIENCE = 300.0  # seconds, from the first 429 until a request counts as lost


@dataclass
class Tally:
    """What has been done and seen. `failures` are what must not be."""

    done: Counter[str] = field(default_factory=Counter)  # by kind of client
    statuses: Counter[int] = field(default_factory=Counter)
    failed: int = 0
    failures: list[str] = field(default_factory=list)
    first: list[float] = field(default_factory=list)  # seconds to the first text of a stream
    whole: list[float] = field(default_factory=list)  # seconds to the last
    checked_chars: int = 0

    def fail(self, what: str) -> None:
        self.failed += 1
        if len(self.failures) < MOST_FAILURES:
            self.failures.append(what)

    def check(self, kind: str, case: Case, text: str, whole: bool = True) -> None:
        """Compares an answer, or how far it came, with its own prompt's."""
        self.checked_chars += len(text)
        if text != case.text if whole else not case.text.startswith(text):
            self.fail(f"{kind}: {case.prompt[-40:]!r} got {text!r} where {case.text!r} was due")


@dataclass
class Client:
    """One of many. `http` is its own, so that its connections are."""

    http: httpx.AsyncClient
    address: tuple[str, int]
    cases: list[Case]
    rng: random.Random
    tally: Tally

    # ---- those that want their answer ---------------------------------------------------------------------

    async def whole(self) -> None:
        case = self.rng.choice(self.cases)
        response = await self.patiently(lambda: self.http.post("/v1/completions", json=self.asks(case)))
        if response is not None:
            self.tally.check("whole", case, response.json()["choices"][0]["text"])

    async def samples(self) -> None:
        """Several samples share the prompt's pages; greedy, they are the same."""
        case = self.rng.choice(self.cases)
        response = await self.patiently(lambda: self.http.post("/v1/completions", json=self.asks(case, n=3)))
        if response is not None:
            choices = response.json()["choices"]
            if sorted(choice["index"] for choice in choices) != [0, 1, 2]:
                self.tally.fail(f"samples: got {len(choices)} of 3")
            for choice in choices:
                self.tally.check("samples", case, choice["text"])

    async def batch(self) -> None:
        cases = self.rng.sample(self.cases, 3)
        most = min(case.max_tokens for case in cases)
        body = self.asks(cases[0], prompt=[case.prompt for case in cases], max_tokens=most)
        response = await self.patiently(lambda: self.http.post("/v1/completions", json=body))
        if response is not None:
            choices = {choice["index"]: choice["text"] for choice in response.json()["choices"]}
            for i, case in enumerate(cases):
                self.tally.check("batch", case, choices[i], whole=case.max_tokens == most)

    async def streamed(self) -> None:
        case = self.rng.choice(self.cases)
        text = ""
        async for piece in self.stream(case, inspect=self.rng.random() < 0.5):
            text += piece
        self.tally.check("streamed", case, text)

    async def slow(self) -> None:
        """Reads, but takes its time."""
        case = self.rng.choice(self.cases)
        text = ""
        async for piece in self.stream(case):
            text += piece
            await asyncio.sleep(self.rng.uniform(0.0, 0.08))
        self.tally.check("slow", case, text)

    async def hurried(self) -> None:
        """A deadline that may come before the end: the text so far is right."""
        case = self.rng.choice(self.cases)
        body = self.asks(case, deadline=self.rng.uniform(0.05, 2.0))
        response = await self.patiently(lambda: self.http.post("/v1/completions", json=body))
        if response is not None:
            [choice] = response.json()["choices"]
            self.tally.check("hurried", case, choice["text"], whole=choice["finish_reason"] != "deadline")

    # ---- those that do not ----------------------------------------------------------------------------------

    async def aborted(self) -> None:
        """Goes away in the middle of its stream."""
        case, stays = self.rng.choice(self.cases), self.rng.randint(1, 8)
        text, pieces = "", self.stream(case)
        async for piece in pieces:
            text, stays = text + piece, stays - 1
            if stays == 0:
                break
        await pieces.aclose()  # type: ignore[attr-defined]
        self.tally.check("aborted", case, text, whole=False)

    async def vanished(self) -> None:
        """Sends a request, or a part of it, and is gone: politely, or with a reset."""
        body = json.dumps(self.asks(self.rng.choice(self.cases), stream=self.rng.random() < 0.5)).encode()
        sent = plain_request(body)
        if self.rng.random() < 0.3:
            sent = sent[: self.rng.randrange(len(sent))]
        _, writer = await asyncio.open_connection(*self.address)
        writer.write(sent)
        await writer.drain()
        await asyncio.sleep(self.rng.uniform(0.0, 0.3))
        if self.rng.random() < 0.5:
            reset = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
        writer.close()

    async def stalled(self) -> None:
        """Asks for much, with a small window, and never reads."""
        case = max(self.cases, key=lambda case: case.max_tokens)
        body = json.dumps(self.asks(case, n=4, stream=True, inspect=True, max_tokens=128)).encode()
        plain = socket.socket()
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        plain.setblocking(False)
        loop = asyncio.get_running_loop()
        try:
            await loop.sock_connect(plain, self.address)
            await loop.sock_sendall(plain, plain_request(body))
            await asyncio.sleep(self.rng.uniform(1.0, 4.0))
        finally:
            plain.close()

    async def wrong(self) -> None:
        """Something that can't be: refused, in OpenAI's shape, and never a 500."""
        case = self.rng.choice(self.cases)
        good = self.asks(case)
        choices: list[tuple[str, str, bytes]] = [
            ("POST", "/v1/completions", b"{"),
            ("POST", "/v1/completions", b"\xff\xfe"),
            ("POST", "/v1/completions", b"[1, 2"),
            ("POST", "/v1/completions", b"null"),
            ("POST", "/v1/completions", b"[" * 5000 + b"]" * 5000),
            ("POST", "/v1/completions", json.dumps(good | {"temperature": -1}).encode()),
            ("POST", "/v1/completions", json.dumps(good | {"temperature": float("nan")}).encode()),
            ("POST", "/v1/completions", json.dumps(good | {"max_tokens": 10**30}).encode()),
            ("POST", "/v1/completions", json.dumps(good | {"n": 100_000}).encode()),
            ("POST", "/v1/completions", json.dumps(good | {"prompt": ""}).encode()),
            ("POST", "/v1/completions", json.dumps(good | {"prompt": [1, 2, 10**9]}).encode()),
            ("POST", "/v1/completions", json.dumps(good | {"prompt": "\ud800"}).encode()),
            ("POST", "/v1/completions", json.dumps(good | {"prompt": "sea " * 5000}).encode()),
            ("POST", "/v1/completions", json.dumps(good | {"stop": ["x"] * 10_000}).encode()),
            ("POST", "/v1/completions", json.dumps(good | {"model": "another"}).encode()),
            ("POST", "/v1/completions", b'{"prompt": "' + b"x" * (4 << 20) + b'"}'),
            ("POST", "/v1/chat/completions", b'{"messages": []}'),
            ("POST", "/v1/chat/completions", b'{"messages": [{"role": "pirate", "content": "x"}]}'),
            ("GET", "/v1/completions", b""),
            ("POST", "/v1/nothing", b"{}"),
        ]
        method, path, body = self.rng.choice(choices)
        try:
            response = await self.http.request(method, path, content=body, headers={"content-type": "application/json"})
        except httpx.TransportError:
            # Whoever sends too much may find the connection closed before the refusal is read.
            if len(body) < 1 << 20:
                self.tally.fail(f"wrong: no answer to {method} {path} {body[:60]!r}")
            return
        self.tally.statuses[response.status_code] += 1
        if not 400 <= response.status_code < 500:
            self.tally.fail(f"wrong: {response.status_code} to {method} {path} {body[:60]!r}")
        elif not isinstance(response.json().get("error", {}).get("message"), str):
            self.tally.fail(f"wrong: not OpenAI's shape: {response.text[:100]!r}")

    # ---- how they ask ---------------------------------------------------------------------------------------

    def asks(self, case: Case, **more: Any) -> dict[str, Any]:
        base = {"prompt": case.prompt, "max_tokens": case.max_tokens, "temperature": 0, "ignore_eos": True}
        return base | {"priority": self.rng.randint(0, 2)} | more

    async def patiently(self, send: Callable[[], Awaitable[httpx.Response]]) -> httpx.Response | None:
        """The answer, after as many 429 as there are. None if it was another, which is a failure."""
        began = time.monotonic()
        while True:
            response = await send()
            self.tally.statuses[response.status_code] += 1
            if response.status_code == 200:
                self.tally.whole.append(time.monotonic() - began)
                return response
            await response.aread()
            if response.status_code != 429:
                self.tally.fail(f"{response.status_code}: {response.text[:200]}")
                return None
            wait = float(response.headers["retry-after"])
            if time.monotonic() - began > PATIENCE:
                self.tally.fail(f"lost: 429 for {PATIENCE:.0f} s")
                return None
            await asyncio.sleep(min(wait, 2.0) * self.rng.uniform(0.5, 1.0))

    async def stream(self, case: Case, inspect: bool = False) -> AsyncIterator[str]:
        """The pieces of a text. That the stream ends as it should is checked here."""
        body = self.asks(case, stream=True, inspect=inspect, stream_options={"include_usage": True})
        request = self.http.build_request("POST", "/v1/completions", json=body)
        began = time.monotonic()
        response = await self.patiently(lambda: self.http.send(request, stream=True))
        if response is None:
            return
        finish = usage = None
        ended = first = False
        try:
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    ended = True
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    self.tally.fail(f"stream: {event['error']}")
                    return
                usage = event.get("usage") or usage
                for choice in event["choices"]:
                    finish = choice["finish_reason"] or finish
                    if choice["text"] and not first:
                        first = True
                        self.tally.first.append(time.monotonic() - began)
                    spans = (event.get("abyssal") or {}).get("spans", [])
                    if inspect and "".join(span[0] for span in spans) != choice["text"]:
                        self.tally.fail(f"stream: spans {spans} of {choice['text']!r}")
                    yield choice["text"]
        finally:
            await response.aclose()
        if not ended or finish != "length" or usage is None or usage["completion_tokens"] != case.max_tokens:
            self.tally.fail(f"stream: ended {ended}, finish {finish}, usage {usage}, due {case.max_tokens} tokens")


def plain_request(body: bytes) -> bytes:
    """A request as it goes over the wire."""
    lines = ["POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body


KINDS: dict[str, float] = {
    "whole": 20,
    "samples": 4,
    "batch": 4,
    "streamed": 28,
    "slow": 8,
    "hurried": 6,
    "aborted": 12,
    "vanished": 6,
    "stalled": 2,
    "wrong": 10,
}


async def live(client: Client, until: float) -> None:
    """Does one thing after another until then; what it has begun, it ends."""
    await asyncio.sleep(client.rng.uniform(0.0, 0.5))
    while time.monotonic() < until:
        [kind] = client.rng.choices(list(KINDS), weights=list(KINDS.values()))
        try:
            await getattr(client, kind)()
        except (httpx.HTTPError, OSError, ValueError, KeyError) as error:
            client.tally.fail(f"{kind}: {type(error).__name__}: {error}")
        client.tally.done[kind] += 1
        await asyncio.sleep(client.rng.uniform(0.0, 0.1))
