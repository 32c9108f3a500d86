"""What an installed package has."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_file_that_is_no_code_is_installed() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["abyssal"]
    package = ROOT / "abyssal"
    installed = {path for pattern in patterns for path in package.glob(pattern)}
    here = {path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert here - installed - set(package.rglob("*.py")) == set()
