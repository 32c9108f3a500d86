"""Takes the pictures of the page that stand in docs/, from a running server: `python screenshots.py URL`.

abyssal serve runs/small --port 8000 &
python tests/serve/page/screenshots.py http://127.0.0.1:8000
"""

import argparse
from pathlib import Path

from page_browser import CHROMIUM, QUIET
from playwright.sync_api import sync_playwright

DOCS = Path(__file__).parents[3] / "docs"
PROMPT = "class Stack:\n    "
MOST_BYTES = 300_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--seed", default="1")
    parser.add_argument("--chat", action="store_true", help="by the model's chat template")
    parser.add_argument("--out", type=Path, default=DOCS)
    arguments = parser.parse_args()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        for theme in ("light", "dark"):
            page = browser.new_page(viewport={"width": 1440, "height": 940}, color_scheme=theme)
            page.goto(arguments.url)
            page.wait_for_selector("#state[data-is=ready]")
            page.click("#settings summary")
            if not arguments.chat and page.is_visible("#template"):
                page.uncheck("#template")
            for name, value in {"temperature": "0.5", "max_tokens": "240", "seed": arguments.seed}.items():
                page.fill(f"#{name}", value)
            page.select_option("#speculation", "true")
            page.click("#settings summary")
            page.wait_for_timeout(3000)  # for the engine's line to have a beginning
            page.fill("#message", arguments.prompt)
            page.press("#message", "Enter")
            page.wait_for_selector(".again:visible", timeout=120_000)
            page.wait_for_timeout(1500)
            file = arguments.out / f"page-{theme}.png"
            page.screenshot(path=file)
            size = file.stat().st_size
            print(f"{file}: {size:,} bytes")
            if size > MOST_BYTES:
                raise SystemExit(f"{file}: expected at most {MOST_BYTES:,} bytes")
        browser.close()


if __name__ == "__main__":
    main()
