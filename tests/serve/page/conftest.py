"""A headless Chromium, and the page in it, against a server that follows the test's script."""

from collections.abc import Iterator
from typing import Any

import pytest
from page_browser import CHROMIUM, QUIET, Open
from scripted import Script, serving, stats


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """No longer than its module: Playwright keeps an event loop running in this thread, beside which no other can."""
    if CHROMIUM is None:
        pytest.skip("no chromium is installed (Debian: apt-get install chromium)")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture
def script() -> Script:
    return Script(stats=stats())


@pytest.fixture
def open_page(browser: Any, script: Script) -> Iterator[Open]:
    """Opens the page for `script`; keywords are the browser context's. An error in the browser's console fails the
    test, such as what the policy forbids; an answer that the script refuses is none."""
    contexts, complaints = [], []

    def heard(message: Any) -> None:
        if message.type == "error" and "the server responded with a status of" not in message.text:
            complaints.append(message.text)

    with serving(script) as url:

        def opened(**settings: Any) -> Any:
            context = browser.new_context(**settings)
            contexts.append(context)
            page = context.new_page()
            page.set_default_timeout(60_000)
            page.on("console", heard)
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.goto(url)
            return page

        yield opened
        for context in contexts:
            context.close()
    assert not complaints
