"""The loader's benchmark reads what it says, from files."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import loader


def test_random_sets_are_mapped_and_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("SET_TOKENS", 60_000), ("STEPS", 3), ("BATCHES", (4096,)), ("MEANS", (30, 3000))):
        monkeypatch.setattr(loader, name, value)
    out = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["loader.py", "--folder", str(tmp_path), "--rate", "1e6", "--json", str(out)])
    loader.main()
    rows = json.loads(out.read_text())["rows"]
    assert [row["documents"] for row in rows] == ["random, 30 tokens", "random, 3,000 tokens"]
    assert all(row["cold"] > 0 and row["warm"] > 0 and row["core"] > 0 and 0 <= row["waited"] < 1 for row in rows)
    assert capsys.readouterr().out.count("\n") == 4
    assert [p.name for p in tmp_path.iterdir()] == ["rows.json"]  # the sets are gone


def test_a_made_set_is_the_same_again_and_has_documents_of_about_the_mean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "SET_TOKENS", 500_000)
    split = loader.opened(*loader.made(tmp_path, 100))
    assert split.documents == 5000 and 85 < split.lengths.mean() < 115 and split.lengths.min() >= 1
    assert split.document(7).dtype == np.uint16 and int(split.document(7).max()) < loader.VOCAB
    first = split.document(7).tolist()
    assert loader.opened(*loader.made(tmp_path, 100)).document(7).tolist() == first
