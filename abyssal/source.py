"""Fingerprints of the package's own code and presets, and of settings: what others computed is not taken for what
these would."""

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path


@cache
def code_digest(*parts: str) -> str:
    """Sixteen hexadecimal digits of SHA-256 over the names and bytes of the package's Python, JSON and TOML files:
    those of `parts`, folders or files below `abyssal/`, or of all of it. Raises FileNotFoundError naming a part that
    is not there."""
    root = Path(__file__).parent
    files: set[Path] = set()
    for part in parts or (".",):
        path = root / part
        if not path.exists():
            raise FileNotFoundError(f"{path}: the package has no such part")
        files |= {file for file in (path, *path.rglob("*")) if file.suffix in (".py", ".json", ".toml")}
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.relative_to(root).as_posix().encode() + b"\0")
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]


def short_digest(what: Mapping[str, object] | list[object]) -> str:
    """Ten hexadecimal digits that tell settings apart."""
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:10]
