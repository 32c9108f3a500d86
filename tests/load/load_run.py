"""Many clients against one real server on the loopback: `python tests/load/load_run.py --json figures.json`.

The server is a process of its own on a tiny model in float32, its page pool and its queue too small on purpose.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import httpx
from load_clients import Client, Tally, live
from load_model import Case, make_cases, save_model

POOL_BYTES = 40 * 32768  # 40 pages of 64 tokens, where 32 sequences of 3 run at once
ARGUMENTS = ("--dtype=float32", f"--cache-bytes={POOL_BYTES}", "--max-running=32", "--limit=waiting=48")
START = "from abyssal.cli import main; main()"  # whether or not the command is on the path
COUNTED = (
    *("requests", "steps", "prompt_tokens", "cached_tokens", "generated_tokens"),
    *("preemptions", "evicted_pages", "copied_pages", "finished"),
)


@dataclass(frozen=True)
class Server:
    process: subprocess.Popen[bytes]
    port: int
    said: IO[bytes]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def last_words(self) -> str:
        """What it printed last, and its exit code if it has ended."""
        self.said.seek(0)
        return f"exit code {self.process.poll()}: {self.said.read()[-3000:].decode(errors='replace')}"

    def workers(self) -> list[int]:
        """Its child processes: one, the engine's."""
        children = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        return [int(pid) for file in children for pid in file.read_text().split()]

    def resident(self) -> list[int]:
        """Bytes in memory: of the server, then of its children."""
        return [resident(pid) for pid in (self.process.pid, *self.workers())]


def resident(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def serving(model: Path, *arguments: str, seconds: float = 120.0) -> Iterator[Server]:
    """`abyssal serve` once it is healthy. Raises RuntimeError with its last words if it does not become so."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", START, "serve", str(model), "--port", str(port), *arguments]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, env={**os.environ, "OMP_NUM_THREADS": "1"})
        server = Server(process, port, said)
        try:
            until = time.monotonic() + seconds
            while not healthy(server):
                if process.poll() is not None or time.monotonic() > until:
                    raise RuntimeError(f"the server did not start; {server.last_words()}")
                time.sleep(0.1)
            yield server
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def healthy(server: Server) -> bool:
    try:
        return httpx.get(f"{server.url}/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


@dataclass
class Watch:
    """What was seen of the server from the side, about twice a second."""

    resident: list[tuple[float, list[int]]] = field(default_factory=list)  # seconds since the start; bytes a process
    worst_health: float = 0.0  # seconds until /health answered
    most_used: int = 0  # pages
    most_waiting: int = 0

    async def look(self, server: Server, http: httpx.AsyncClient, tally: Tally) -> None:
        began = time.monotonic()
        while True:
            asked = time.monotonic()
            status = (await http.get("/health")).status_code
            self.worst_health = max(self.worst_health, time.monotonic() - asked)
            if status != 200:
                tally.fail(f"/health answered {status}")
            stats = (await http.get("/v1/stats")).json()
            if stats:  # the worker reports within a moment
                self.most_used = max(self.most_used, stats["pages_total"] - stats["pages_free"])
                self.most_waiting = max(self.most_waiting, stats["waiting"])
            self.resident.append((time.monotonic() - began, server.resident()))
            await asyncio.sleep(0.5)

    def between(self, begin: float, end: float) -> list[int]:
        """The most bytes that each process held between two times."""
        rows = [row for time, row in self.resident if begin <= time <= end]
        return [max(column) for column in zip(*rows)]


@dataclass(frozen=True)
class Report:
    """Bytes, seconds and counts. Memory is the most in the third quarter of the run and in the fourth: by then every
    kind of client has come by."""

    clients: int
    seconds: float
    done: dict[str, int]
    statuses: dict[int, int]
    failed: int
    failures: list[str]
    answers_checked_chars: int
    first_text: dict[str, float]
    whole_answer: dict[str, float]
    worst_health_seconds: float
    most_waiting: int
    most_pages_used: int
    pages_total: int
    pages_free_at_the_end: int
    memory_before: list[int]  # of the server and of its worker
    memory_after: list[int]
    engine: dict[str, Any]  # of /v1/stats at the end
    machine: str = field(default_factory=lambda: f"{os.cpu_count()} CPU cores, {platform.platform()}")


async def load(server: Server, cases: Sequence[Case], clients: int, seconds: float, seed: int = 0) -> Report:
    """Lets the clients live for that long, waits until they have ended what they began, and for the engine to rest."""
    tally, watch = Tally(), Watch()
    context = ssl.create_default_context()  # costs more than a client, and all can share it

    def connection(timeout: float) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=server.url, timeout=timeout, verify=context, trust_env=False)

    async with connection(30.0) as side:
        watching = asyncio.create_task(watch.look(server, side, tally))
        began = time.monotonic()
        https = [connection(180.0) for _ in range(clients)]
        lives = [
            live(Client(http, ("127.0.0.1", server.port), list(cases), random.Random(seed + i), tally), began + seconds)
            for i, http in enumerate(https)
        ]
        await asyncio.gather(*lives)
        if server.process.poll() is not None:
            raise RuntimeError(f"the server has ended; {server.last_words()}; {tally.failures}")
        for http in https:
            await http.aclose()
        stats = await at_rest(side)
        ran = time.monotonic() - began
        watching.cancel()
        if watching.done() and not watching.cancelled():
            tally.fail(f"the watch ended: {watching.exception()}")
        watch.resident.append((ran, server.resident()))
    return Report(
        clients=clients,
        seconds=round(ran, 1),
        done=dict(sorted(tally.done.items())),
        statuses=dict(sorted(tally.statuses.items())),
        failed=tally.failed,
        failures=tally.failures,
        answers_checked_chars=tally.checked_chars,
        first_text=quantiles(tally.first),
        whole_answer=quantiles(tally.whole),
        worst_health_seconds=round(watch.worst_health, 3),
        most_waiting=watch.most_waiting,
        most_pages_used=watch.most_used,
        pages_total=stats["pages_total"],
        pages_free_at_the_end=stats["pages_free"],
        memory_before=watch.between(ran / 2, ran * 3 / 4),
        memory_after=watch.between(ran * 3 / 4, ran),
        engine={name: stats[name] for name in COUNTED},
    )


async def at_rest(http: httpx.AsyncClient, seconds: float = 10.0) -> dict[str, Any]:
    """The engine's numbers once nothing runs or waits, or after that long."""
    until = time.monotonic() + seconds
    while True:
        stats: dict[str, Any] = (await http.get("/v1/stats")).json()
        resting = not stats["running"] and not stats["waiting"] and stats["pages_free"] == stats["pages_total"]
        if resting or time.monotonic() > until:
            return stats
        await asyncio.sleep(0.2)


def quantiles(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    if not ordered:
        return {}
    return {f"p{q}": round(ordered[min(len(ordered) - 1, len(ordered) * q // 100)], 3) for q in (50, 90, 99)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="a file for the figures; the standard output without it")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = save_model(Path(folder))
        cases = make_cases(model, 32)
        with serving(model, *ARGUMENTS) as server:
            report = asyncio.run(load(server, cases, arguments.clients, arguments.seconds, arguments.seed))
    text = json.dumps(asdict(report), indent=1)
    if arguments.json:
        arguments.json.write_text(text + "\n")
    else:
        print(text)
    sys.exit(1 if report.failed else 0)


if __name__ == "__main__":
    main()
