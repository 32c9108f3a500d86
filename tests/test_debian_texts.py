"""Text out of packages: dictionaries, pages, novels, as documents that are clean and in one order."""

import gzip
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import debian_texts
from debian_texts import Package, append, cleaned, dictionary, kernel, novels, number, plain, write


def based(value: int) -> str:
    letters = "".join(debian_texts.DIGITS)
    return (based(value // 64) if value >= 64 else "") + letters[value % 64]


def test_numbers_of_an_index() -> None:
    assert [number(text) for text in ("A", "B", "/", "BA", "Gb9L", "FaoB")] == [0, 1, 63, 64, 1_687_371, 1_419_777]
    assert all(number(based(n)) == n for n in (0, 1, 63, 64, 4095, 4096, 39_899_087))


def test_a_dictionary_is_cut_between_its_entries_and_only_there(tmp_path: Path) -> None:
    about = "00-database-info\n  of 1913\n"
    entries = [f"word{i}\n   meaning {'x' * (i % 700)}\n" for i in range(500)]
    text, index = about, [f"00-database-info\t{based(0)}\t{based(len(about))}"]
    for i, entry in enumerate(entries):
        index.append(f"word{i}\t{based(len(text))}\t{based(len(entry))}")
        index.append(f"meaning\t{based(len(text) + 9)}\tB")  # a headword in the middle of a line
        text += entry
    (tmp_path / "d.index").write_text("\n".join(reversed(index)) + "\n")
    (tmp_path / "d.dict.dz").write_bytes(gzip.compress(text.encode()))
    found = [piece.decode() for piece in dictionary(tmp_path) if isinstance(piece, bytes)]
    assert "".join(found) == "".join(entries)
    assert all(piece.startswith("word") and len(piece) >= debian_texts.GROUP for piece in found[:-1])
    assert all(len(piece) < debian_texts.GROUP + 720 for piece in found) and len(found) > 5


def test_a_page_says_what_is_read_and_no_more() -> None:
    html = """<!DOCTYPE html><html><head><title>T</title><style>p {}</style></head><body>
      <div class="navheader big"><div>Prev</div><p>Up</p></div>
      <h1>Sorting &amp; more</h1><p>One   <b>bold</b>
      word,<br/>then <i>another </i> one.</p><ul><li><p>first</p></li><li>second</li></ul>
      <pre>  a = 1
    b = 2</pre><table><tr><td>x</td><td>y</td></tr><tr><td>z</td></tr></table>
      <script>alert("<p>no</p>")</script><div class="navfooter">Next</div><p>End.</p></body></html>"""
    assert cleaned(plain(html)) == (
        "Sorting & more\n\nOne bold word,\nthen another one.\n\n- first\n\n- second\n\n"
        "  a = 1\n    b = 2\n\nx  y\n\nz\n\nEnd.\n"
    )


def test_cleaned_text_has_plain_ends_and_nothing_that_is_no_text() -> None:
    assert cleaned("\ufeffa  \r\nb\t\rc\x0c\n\n\n\n\nd\u00a0\n") == "a\nb\nc\n\nd\n"
    assert cleaned(b"  indented\n") == "  indented\n"
    assert cleaned(b"\xff\xfe") is None and cleaned(b"a\0b") is None


def test_documents_that_are_empty_binary_or_repeated_are_left_out_and_counted() -> None:
    stream, seen = io.StringIO(), set()
    package = Package("some", lambda root: iter([b"one\n", "", " \n\n", b"\xff", "one", "größer"]))
    row = append(stream, package, "1.0", Path(), seen)
    assert [json.loads(line)["text"] for line in stream.getvalue().splitlines()] == ["one\n", "größer\n"]
    assert (row.documents, row.skipped, row.bytes) == (2, 4, 4 + 9)
    assert append(stream, package, "1.0", Path(), seen).documents == 0  # of another package, too


def test_the_kernels_pages_in_order_without_translations_and_other_files(tmp_path: Path) -> None:
    folder = tmp_path / "usr/share/doc/linux-doc-6.1/Documentation"
    for name in ("b/z.rst", "a.txt", "b-c.rst", "translations/it/a.rst", "c.yaml"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.gz").write_bytes(gzip.compress(name.encode()))
    (folder / "link.rst.gz").symlink_to("a.txt.gz")
    assert list(kernel(tmp_path)) == [b"a.txt", b"b/z.rst", b"b-c.rst"]


def test_novels_are_cut_at_their_chapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import zlib

    lines = ["EMMA", "", "VOLUME I", "", "  CHAPTER I  ", "Emma said: chapter 2 was long.", "Chapter 2", "", "More."]
    stored = b"\0\0\0\x09" + zlib.compress(b"the lines")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/Rdata.rdx").write_bytes(gzip.compress(b"the table"))
    (tmp_path / "data/Rdata.rdb").write_bytes(b"before" + stored + b"after")
    known = {b"the table": {"variables": {"emma": [6, len(stored)]}}, b"the lines": lines}
    monkeypatch.setattr(debian_texts, "r_object", known.__getitem__)
    assert list(novels(tmp_path)) == [
        "EMMA\n\nVOLUME I\n", "  CHAPTER I  \nEmma said: chapter 2 was long.", "Chapter 2\n\nMore.",
    ]  # fmt: skip


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="Debian's dpkg-deb is not installed")
def test_a_package_that_cannot_be_had_is_named_and_the_others_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root, kept = tmp_path / "root", tmp_path / "kept"
    (root / "DEBIAN").mkdir(parents=True)
    kept.mkdir()
    control = "Package: here\nVersion: 1:2-3\nArchitecture: all\nMaintainer: a <a@b>\nDescription: texts\n"
    (root / "DEBIAN/control").write_text(control)
    (root / "page.html").write_text("<p>Hello</p>")
    subprocess.run(["dpkg-deb", "--build", str(root), str(kept / "here_1.deb")], check=True, capture_output=True)

    def called(*command: str, cwd: Path | None = None) -> str:
        if command[0] == "apt-get":
            raise OSError("apt-get -qq download: Unable to locate package nowhere")
        return run(*command, cwd=cwd)

    run = debian_texts.called
    monkeypatch.setattr(debian_texts, "called", called)
    monkeypatch.setattr(
        debian_texts, "PACKAGES", (Package("nowhere", debian_texts.pages), Package("here", debian_texts.pages))
    )
    rows = write(tmp_path / "out.jsonl", kept)
    assert [(r.package, r.version, r.documents) for r in rows] == [("here", "1:2-3", 1)]
    assert (tmp_path / "out.jsonl").read_text() == '{"text": "Hello\\n"}\n'
    assert "nowhere: left out: apt-get" in capsys.readouterr().err
