"""A real server under load and with its worker killed: no answer lost or mixed up, no page leaked, no 500."""

import asyncio
import os
import signal
import time
from pathlib import Path

import httpx
import pytest
from load_model import Case, make_cases, save_model
from load_run import ARGUMENTS, Report, Server, load, serving

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

MIB = 1 << 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("load") / "model")


@pytest.fixture(scope="module")
def cases(model: Path) -> list[Case]:
    return make_cases(model, 32)


def must_hold(report: Report) -> None:
    assert report.failures == [] and report.failed == 0
    assert not any(status >= 500 for status in report.statuses)
    assert report.pages_free_at_the_end == report.pages_total
    assert report.answers_checked_chars > 0 and report.engine["generated_tokens"] > 0


def test_ten_seconds_of_every_kind_of_client(model: Path, cases: list[Case]) -> None:
    with serving(model, *ARGUMENTS) as server:
        report = asyncio.run(load(server, cases, clients=40, seconds=10))
        must_hold(report)
        assert server.process.poll() is None
    assert server.process.returncode == 0  # it drained


@pytest.mark.slow
def test_a_minute_of_200_clients_leaks_nothing(model: Path, cases: list[Case]) -> None:
    with serving(model, *ARGUMENTS) as server:
        report = asyncio.run(load(server, cases, clients=200, seconds=60))
    must_hold(report)
    assert report.engine["preemptions"] > 0 and report.engine["evicted_pages"] > 0  # the pool was too small
    assert report.statuses[429] > 0  # and the queue
    assert len(report.memory_after) == 2
    for before, after in zip(report.memory_before, report.memory_after):
        assert after < before * 1.03 + 4 * MIB, (before, after)


def test_a_killed_worker_turns_health_red_within_a_second_and_ends_the_process(model: Path) -> None:
    with serving(model, *ARGUMENTS) as server:
        asyncio.run(killed(server))
        assert server.process.wait(30) not in (0, None)


async def killed(server: Server) -> None:
    body = {"prompt": "the sea", "max_tokens": 400, "temperature": 0, "ignore_eos": True, "stream": True}
    async with (
        httpx.AsyncClient(base_url=server.url, timeout=20, trust_env=False) as http,
        http.stream("POST", "/v1/completions", json=body) as response,
    ):
        assert response.status_code == 200
        lines = response.aiter_lines()
        await anext(lines)
        [worker] = server.workers()
        os.kill(worker, signal.SIGKILL)
        at = time.monotonic()
        red = None
        while red is None and time.monotonic() < at + 5:
            try:
                if (await http.get("/health")).status_code == 503:
                    red = time.monotonic()
            except httpx.TransportError:  # it has ended already
                red = time.monotonic()
            await asyncio.sleep(0.02)
        assert red is not None and red - at < 1.0
        try:
            rest = [line async for line in lines]  # the stream ends, and not as if it were complete
        except httpx.TransportError:
            rest = []
        assert "data: [DONE]" not in rest
