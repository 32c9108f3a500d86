"""The page at `/`: one file, sent with a policy under which nothing runs but what stands in it."""

import base64
import hashlib
import re
from pathlib import Path

from starlette.responses import Response

FILE = Path(__file__).parent / "page" / "index.html"

_INLINE = re.compile(r"<(script|style)\b[^>]*>(.*?)</\1>", re.DOTALL | re.IGNORECASE)


def page(file: Path = FILE) -> Response | None:
    """None if the file is not there. Hashes are of what stands in it now: it is read once, at the start."""
    if not file.is_file():
        return None
    text = file.read_text("utf-8")
    return Response(
        text,
        media_type="text/html",
        headers={
            "Content-Security-Policy": policy(text),
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-cache",
        },
    )


def policy(html: str) -> str:
    """Only the file's own scripts and styles, by their hashes; connections only to where it came from."""
    hashes: dict[str, list[str]] = {"script": [], "style": []}
    for kind, inner in _INLINE.findall(html):
        digest = base64.b64encode(hashlib.sha256(inner.encode("utf-8")).digest()).decode("ascii")
        hashes[kind.lower()].append(f"'sha256-{digest}'")
    script, style = (" ".join(hashes[kind]) or "'none'" for kind in ("script", "style"))
    return (
        f"default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; img-src 'self' data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
