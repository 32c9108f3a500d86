"""The page against the real `abyssal serve`, its policy and its engine, on a tiny model of random weights."""

import dataclasses
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch

from abyssal import ModelConfig
from abyssal.data import Tokenizer
from abyssal.model.transformer import Transformer

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
expect = playwright.expect
expect.set_options(timeout=60_000)

KEY = "sesame"
START = "from abyssal.cli import main; main()"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("page")
    config = dataclasses.replace(ModelConfig.load("tiny"), max_position_embeddings=4096)  # room for a long answer
    model = Transformer(config).init_weights(torch.Generator().manual_seed(0))
    model.save(folder)
    Tokenizer.train(["the sea keeps one small vector for a token " * 20], 320).save(folder)
    (folder / "keys").write_text(KEY)
    arguments = [str(folder), "--name", "tiny", "--port", "0", "--api-key-file", str(folder / "keys")]
    command = [sys.executable, "-c", START, "serve", *arguments, "--cache-bytes", str(64 * 32768)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        said = ""
        for line in process.stderr:
            said += line
            if found := re.search(r"at (http://\S+)", line):
                break
        else:
            raise AssertionError(f"the server did not start: {said}")
        yield found[1]
    finally:
        process.terminate()
        assert process.wait(30) == 0


@pytest.fixture
def page(browser: Any, url: str) -> Iterator[Any]:
    """With the key in its place. An error in the console, such as what the policy forbids, fails the test."""

    def heard(message: Any) -> None:
        if message.type == "error" and "the server responded with a status of 400" not in message.text:
            complaints.append(message.text)

    context = browser.new_context()
    context.add_init_script(f"sessionStorage.setItem('abyssal.key', '{KEY}')")
    complaints: list[str] = []
    page = context.new_page()
    page.on("console", heard)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(url)
    expect(page.locator("#state")).to_have_text("ready")
    yield page
    context.close()
    assert not complaints


def choose(page: Any, **settings: str) -> None:
    page.click("#settings summary")
    for name, value in settings.items():
        page.fill(f"#{name}", value)
    page.uncheck("#template")
    page.click("#settings summary")


def test_the_text_is_the_servers_and_its_insides_are_shown(page: Any, url: str) -> None:
    choose(page, temperature="0", top_p="", max_tokens="80")
    page.fill("#message", "the sea")
    page.press("#message", "Enter")
    expect(page.locator(".assistant .foot")).to_contain_text("80 tokens")
    body = {"prompt": "the sea", "max_tokens": 80, "temperature": 0}
    headers = {"Authorization": f"Bearer {KEY}"}
    answer = httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=60).json()
    assert page.locator(".answer").text_content() == answer["choices"][0]["text"].removesuffix("\n")
    expect(page.locator("#ratio")).to_have_text("4×")  # 4 heads of 16 + 16, and not 24 + 8
    expect(page.locator("#cache-note")).to_contain_text("in 2 pages of together 64 KiB")
    expect(page.locator("#drafts")).to_contain_text("drafted tokens accepted in this answer")
    expect(page.locator("#heat-of")).to_have_text("this answer")
    expect(page.locator("#heat")).to_have_attribute("aria-label", "Expert load, 2 layers of 16 experts")
    expect(page.locator("#pool")).to_have_text(re.compile(r"^\d+ pages of 32 KiB"))
    page.focus("#heat")
    page.keyboard.press("ArrowDown")
    expect(page.locator("#readout")).to_have_text(re.compile(r"^layer with experts 1, expert 0: \d+ token"))


def stats_of(url: str) -> dict[str, Any]:
    return httpx.get(f"{url}/v1/stats", headers={"Authorization": f"Bearer {KEY}"}, timeout=60).json()


def test_stop_ends_the_request_in_the_engine(page: Any, url: str) -> None:
    before = stats_of(url)["finished"].get("abort", 0)
    choose(page, temperature="0", top_p="", max_tokens="4000")  # far more than are made until it is stopped
    page.fill("#message", "the sea")
    page.press("#message", "Enter")
    expect(page.locator(".answer .prose")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator(".assistant .foot")).to_contain_text("stopped")
    # The page says so at once; the server learns it when the connection has closed.
    deadline = time.monotonic() + 60
    while True:
        stats = stats_of(url)
        if stats["finished"].get("abort") == before + 1 and stats["pages_free"] == stats["pages_total"]:
            break
        assert time.monotonic() < deadline, stats
        time.sleep(0.05)
    expect(page.locator("#queue")).to_contain_text("0 running")


def test_what_the_server_refuses_is_told(page: Any) -> None:
    choose(page, max_tokens="100000")
    page.fill("#message", "the sea")
    page.press("#message", "Enter")
    expect(page.locator("[role=alert]")).to_contain_text("max_tokens")
