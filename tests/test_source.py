"""The fingerprint of the code: every byte and name of it counts, and nothing else does."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from abyssal import source


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("source.py", "ops/norm.py", "ops/gate.py", "model/block.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"# {name}\n")
    monkeypatch.setattr(source, "__file__", str(tmp_path / "source.py"))
    return tmp_path


def digest(*parts: str) -> str:
    source.code_digest.cache_clear()
    return source.code_digest(*parts)


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    yield
    source.code_digest.cache_clear()


def test_a_change_anywhere_is_another_code_and_a_change_elsewhere_is_none(package: Path):
    whole, ops, some = digest(), digest("ops"), digest("ops/norm.py", "model")
    (package / "ops/gate.py").write_text("# changed\n")
    assert digest() != whole and digest("ops") != ops and digest("ops/norm.py", "model") == some
    (package / "ops/gate.py").write_text("# ops/gate.py\n")
    assert (digest(), digest("ops")) == (whole, ops)
    (package / "ops/notes.txt").write_text("no code")
    assert digest("ops") == ops
    (package / "model/tiny.json").write_text("{}")
    assert digest() != whole and digest("ops") == ops
    (package / "ops/gate.py").rename(package / "ops/gates.py")
    assert digest("ops") != ops and digest("ops") == digest("ops", "ops/norm.py")


def test_bytes_that_move_to_another_file_are_another_code(package: Path):
    before = digest("ops")
    (package / "ops/gate.py").write_text("")
    (package / "ops/norm.py").write_text("# ops/gate.py\n# ops/norm.py\n")
    assert digest("ops") != before


def test_a_part_that_is_not_there_is_named(package: Path):
    with pytest.raises(FileNotFoundError, match="opps: the package has no such part"):
        digest("opps")
