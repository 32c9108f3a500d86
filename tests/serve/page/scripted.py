"""A server that answers as a test says: it serves the page under a policy as strict as the real one's, and streams
scripted events. What it was asked is kept."""

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[3] / "abyssal" / "serve" / "page" / "index.html"
LAYERS, EXPERTS = 4, 16


@dataclass(frozen=True)
class Say:
    """One event: text that the model wrote itself and text that was drafted, alternating as `spans` say."""

    spans: tuple[tuple[str, bool], ...]
    thought: bool = False
    inside: dict[str, Any] | None = None
    wait: float = 0.0  # seconds, before it is sent


@dataclass(frozen=True)
class Refuse:
    status: int
    message: str = ""
    retry_after: str | None = None


@dataclass
class Script:
    """What the server does; a test changes it between two requests."""

    answers: list[list[Say] | Refuse] = field(default_factory=list)  # in turn; the last again and again
    chat: bool = True
    key: str | None = None
    stats: dict[str, Any] = field(default_factory=dict)
    breaks_off: bool = False  # after the last event, without a finish
    error: str | None = None  # that follows the last event
    requests: list[tuple[str, dict[str, Any]]] = field(default_factory=list)  # path and body
    hung_up: int = 0  # clients that went before their answer had ended

    def next(self) -> list[Say] | Refuse:
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


def inside(step: int = 1, **changed: Any) -> dict[str, Any]:
    load = [[(7 * layer + 3 * expert) % 11 * step for expert in range(EXPERTS)] for layer in range(LAYERS)]
    base = {
        "latent_bytes": 4096 * step,
        "mha_bytes": 40960 * step,
        "pages": 2,
        "shared_pages": 1,
        "cached_tokens": 64,
        "tokens_per_second": 40.0 + step,
        "drafted": 4 * step,
        "accepted": 3 * step,
        "expert_load": load,
    }
    return base | changed


def stats(**changed: Any) -> dict[str, Any]:
    base = {
        "running": 1,
        "waiting": 2,
        "pages_total": 256,
        "pages_free": 200,
        "pages_cached": 40,
        "page_bytes": 32768,
        "cached_rows": 3500,
        "mha_bytes_a_token": 10240,
        "latent_bytes_a_token": 1024,
        "tokens_per_second": 120.0,
        "speculating": True,
        "prompt_tokens": 1000,
        "cached_tokens": 250,
        "drafted": [100],
        "accepted": [71],
        "expert_load": [[layer + expert for expert in range(EXPERTS)] for layer in range(LAYERS)],
    }
    return base | changed


def policy(page: str) -> str:
    """A policy that allows the page's own script and style, by their hashes, and requests to where it came from."""

    def hashes(tag: str) -> str:
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in found]
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    )


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    script: Script  # of the subclass that `serving` makes

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def send(self, status: int, kind: str, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def refuse(self, refusal: Refuse) -> None:
        headers = {"Retry-After": refusal.retry_after} if refusal.retry_after else {}
        body = json.dumps({"error": {"message": refusal.message, "type": "error", "param": None, "code": None}})
        self.send(refusal.status, "application/json", body.encode(), **headers)

    def allowed(self) -> bool:
        if self.script.key is None or self.headers["Authorization"] == f"Bearer {self.script.key}":
            return True
        self.refuse(Refuse(401, "No key, or not the right one."))
        return False

    def do_GET(self) -> None:
        if self.path == "/":
            page = PAGE.read_bytes()
            headers = {"Content-Security-Policy": policy(page.decode())}
            self.send(200, "text/html; charset=utf-8", page, **headers)
        elif self.path == "/favicon.ico":
            self.send(204, "image/x-icon", b"")
        elif self.allowed():
            info = {"max_context": 2048, "modules": 1, "experts": EXPERTS, "expert_layers": LAYERS}
            info |= {"latent_bytes_a_token": 1024, "mha_bytes_a_token": 10240}
            model = {"id": "scripted", "object": "model", "abyssal": {"chat": self.script.chat, **info}}
            body = self.script.stats if self.path == "/v1/stats" else {"object": "list", "data": [model]}
            self.send(200, "application/json", json.dumps(body).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.allowed():
            return
        self.script.requests.append((self.path, body))
        answer = self.script.next()
        if isinstance(answer, Refuse):
            self.refuse(answer)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        try:
            for event in events(self.path, answer, self.script):
                self.wfile.write(event.encode())
                self.wfile.flush()
        except OSError:
            self.script.hung_up += 1


def events(path: str, says: list[Say], script: Script) -> Iterator[str]:
    """OpenAI's chunks, each with what the page shows beside them."""
    chat = path == "/v1/chat/completions"

    def event(choices: list[dict[str, Any]], **more: Any) -> str:
        return f"data: {json.dumps({'id': 'x', 'choices': choices, **more})}\n\n"

    yield ": a comment, which is no event\n\n"
    if chat:
        yield event([{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])
    for say in says:
        time.sleep(say.wait)
        text = "".join(piece for piece, _ in say.spans)
        told = {"delta": {"reasoning_content" if say.thought else "content": text}} if chat else {"text": text}
        seen = {"spans": say.spans, "inside": say.inside}
        yield event([{"index": 0, "finish_reason": None, **told}], abyssal=seen)
    if script.error is not None:
        yield f"data: {json.dumps({'error': {'message': script.error, 'type': 'server_error', 'code': 'x'}})}\n\n"
    if script.error is not None or script.breaks_off:
        return
    end = {"delta": {}} if chat else {"text": ""}
    yield event([{"index": 0, "finish_reason": "stop", **end}])
    yield event([], usage={"prompt_tokens": 9, "completion_tokens": len(says), "total_tokens": 9 + len(says)})
    yield "data: [DONE]\n\n"


@contextmanager
def serving(script: Script) -> Iterator[str]:
    """The address of a server on the loopback that follows `script`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Scripted", (Handler,), {"script": script}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
