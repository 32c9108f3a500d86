"""Documents out of files and folders, and what is left out."""

import builtins
import gzip
import json
import os

import pyarrow
import pyarrow.parquet
import pytest

from abyssal.data import Document, documents


def read(path):
    skipped = {}
    found = list(documents(path, lambda name, reason: skipped.update({name: reason})))
    return found, skipped


def test_folder_in_sorted_order_without_hidden_entries(tmp_path):
    for name in ("b/z.txt", "b/a.py", "a.md", ".hidden", ".git/config", "b/__pycache__/x.py", "b.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}\r\n", newline="")
    found, skipped = read(tmp_path)
    assert [d.name for d in found] == ["a.md", "b/a.py", "b/z.txt", "b.txt"]
    assert found[1] == Document("b/a.py", "text of b/a.py\r\n")  # line ends as they are
    assert skipped == {}


def test_every_format(tmp_path):
    lines = "\n".join(json.dumps(x) for x in ({"text": "one"}, {"content": "two ü"}, {"text": "3", "content": "no"}))
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b"\n" + lines.encode()))
    (tmp_path / "c.json.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "d.json").write_text('{"text": "a plain text"}')
    (tmp_path / "e.txt.gz").write_bytes(gzip.compress("häh".encode()))
    pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2], "content": ["p", "q"]}), tmp_path / "f.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["t", None, ""]}), tmp_path / "g.parquet")
    found, skipped = read(tmp_path)
    assert [(d.name, d.text) for d in found] == [
        *((f"a.jsonl#{n}", text) for n, text in ((1, "one"), (2, "two ü"), (3, "3"))),
        *((f"b.jsonl.gz#{n}", text) for n, text in ((2, "one"), (3, "two ü"), (4, "3"))),
        *((f"c.json.gz#{n}", text) for n, text in ((1, "one"), (2, "two ü"), (3, "3"))),
        ("d.json", '{"text": "a plain text"}'),
        ("e.txt.gz", "häh"),
        ("f.parquet#0", "p"),
        ("f.parquet#1", "q"),
        ("g.parquet#0", "t"),
    ]
    assert skipped == {"g.parquet#1": "expected a string in text, found NoneType", "g.parquet#2": "empty"}


def test_what_cannot_be_read_is_left_out_by_name(tmp_path):
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "binary").write_bytes(b"ELF\0")
    (tmp_path / "late").write_bytes(b"x" * 100_000 + b"\0")
    (tmp_path / "latin").write_bytes("naïve".encode("latin-1"))
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(os.urandom(1000))[:-30])
    (tmp_path / "not.txt.gz").write_bytes(b"plain text")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    pyarrow.parquet.write_table(pyarrow.table({"body": ["p"]}), tmp_path / "other.parquet")
    (tmp_path / "nowhere").symlink_to(tmp_path / "absent")
    os.mkfifo(tmp_path / "pipe")
    bad = [
        b"{",
        b'{"text": 5}',
        b'["text"]',
        b'{"text": "\\ud800"}',
        b'{"text": "\xff"}',
        b'{"a": "b"}',
        b"[" * 99999,
    ]
    (tmp_path / "x.jsonl").write_bytes(b"\n".join([*bad, b'{"text": "fine"}']))
    found, skipped = read(tmp_path)
    assert [(d.name, d.text) for d in found] == [("good.txt", "good"), ("x.jsonl#8", "fine")]
    expected = {
        "binary": "binary",
        "late": "binary",
        "latin": "not UTF-8: invalid continuation byte at byte 2",
        "empty": "empty",
        "cut.txt.gz": "damaged gzip",
        "not.txt.gz": "damaged gzip",
        "bad.parquet": "damaged Parquet",
        "other.parquet": "expected a column `text` or `content`, found body",
        "nowhere": "not a regular file",
        "pipe": "not a regular file",
        "x.jsonl#1": "malformed JSON",
        "x.jsonl#2": "expected an object with a string",
        "x.jsonl#3": "expected an object with a string",
        "x.jsonl#4": "not UTF-8: its text has half a surrogate pair",
        "x.jsonl#5": "not UTF-8: invalid start byte",
        "x.jsonl#6": "expected an object with a string",
        "x.jsonl#7": "malformed JSON",
    }
    assert skipped.keys() == expected.keys()
    assert {name: skipped[name][: len(reason)] for name, reason in expected.items()} == expected


def test_a_cut_gzip_of_lines_gives_the_lines_before_the_cut(tmp_path):
    lines = b"".join(json.dumps({"text": os.urandom(50).hex()}).encode() + b"\n" for _ in range(2000))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines)[:-2000])
    found, skipped = read(tmp_path)
    assert 1000 < len(found) < 2000
    assert skipped["a.jsonl.gz"].startswith("damaged gzip")


def test_nothing_to_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent: no such file or folder"):
        documents(tmp_path / "absent", print)  # at once, before anything is asked of it
    (tmp_path / "binary").write_bytes(b"\0")
    with pytest.raises(ValueError, match="no usable document; expected UTF-8 text"):
        read(tmp_path)


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"")
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("pyarrow"):
            raise ImportError("no pyarrow")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"install abyssal\[parquet\]"):
        read(tmp_path / "a.parquet")


def test_the_standard_library_is_at_hand():
    found, skipped = read(None)
    names = [d.name for d in found]
    assert names == sorted(names, key=lambda name: name.split("/"))
    assert "json/decoder.py" in names
    assert all(name.endswith(".py") and "site-packages" not in name for name in names)
    assert sum(len(d.text) for d in found) > 5_000_000
    assert any("UTF-8" in reason for reason in skipped.values()) or not any(n.startswith("test/") for n in names)
