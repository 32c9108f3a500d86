"""English out of Debian's packages, about 150 MB, as JSON lines: what a `stories` run is trained on.

    python benchmarks/debian_texts.py OUT.jsonl [--packages FOLDER]

Needs apt and dpkg-deb (Debian, no root) and PyPI's `rdata`, which reads the novels. A line is {"text": ...}, one
document: a page, a chapter, or some kilobytes of a dictionary. Documents come in the order of `PACKAGES`, then of
their paths, so the same versions of the packages give the same bytes. Empty, binary and repeated documents are left
out. A package that cannot be had is named, and the others are written all the same.
"""

import argparse
import gzip
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple, TextIO

GROUP = 8192  # bytes of a dictionary that make a document, at least
DIGITS = {c: i for i, c in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")}  # dictd's
ABOUT = ("00-database", "00database")  # how the entries begin that are about the dictionary

Texts = Iterator[bytes | str]


class Package(NamedTuple):
    name: str
    texts: Callable[[Path], Texts]  # of the folder that the package was unpacked into


class Row(NamedTuple):
    """A line of the table."""

    package: str
    version: str
    documents: int
    bytes: int  # of the texts in UTF-8
    skipped: int


# ---- how each kind of package is read -----------------------------------------------------------------------


def dictionary(root: Path) -> Texts:
    """The entries of a dictd dictionary as they follow one another, some kilobytes together."""
    (packed,) = root.rglob("*.dict.dz")
    text = gzip.decompress(packed.read_bytes())
    index = packed.with_name(packed.name.replace(".dict.dz", ".index")).read_text("utf-8")
    entries = (line.split("\t") for line in index.split("\n") if line)
    places = {number(place) for headword, place, _ in entries if not headword.startswith(ABOUT)}
    begin = min(places)
    for place in sorted(places):
        # A headword within another's entry is in the index, too.
        if place - begin >= GROUP and text[place - 1 : place] == b"\n":
            yield text[begin:place]
            begin = place
    yield text[begin:]


def number(letters: str) -> int:
    """A number as dictd's index writes it, in base 64."""
    value = 0
    for letter in letters:
        value = value * 64 + DIGITS[letter]
    return value


def kernel(root: Path) -> Texts:
    """The kernel's documentation but for its translations; the HTML and the schemas of devices say it again."""
    (folder,) = root.rglob("linux-doc-*/Documentation")
    for file in ordered(folder):
        if file.name.endswith((".rst.gz", ".txt.gz")) and "translations" not in file.parts:
            yield gzip.decompress(file.read_bytes())


def python_pages(root: Path) -> Texts:
    """The sources of the pages: the same text without the links of every page."""
    for file in ordered(root):
        if "_sources" in file.parts and file.suffix == ".txt":
            yield file.read_bytes()


def pods(root: Path) -> Texts:
    """Perl's manuals. The man pages are made from these and from the modules."""
    for file in ordered(root):
        if file.suffix == ".pod":
            yield file.read_bytes()


def pages(root: Path) -> Texts:
    for file in ordered(root):
        if file.suffix == ".html":
            yield plain(file.read_text("utf-8"))


def novels(root: Path) -> Texts:
    """The chapters of each novel, with what stands before the first. R keeps a package's data in one file of
    compressed objects, and the table of where each lies in another."""
    (table,) = root.rglob("data/Rdata.rdx")
    stored = table.with_suffix(".rdb").read_bytes()
    for place, size in r_object(gzip.decompress(table.read_bytes()))["variables"].values():
        # Four bytes say how long the object is, and zlib knows it too.
        lines = "\n".join(
            str(line) for line in r_object(zlib.decompress(stored[int(place) + 4 : int(place) + int(size)]))
        )
        yield from re.split(r"\n(?=[ \t]*chapter[ \t]+(?:\d+|[ivxlc]+)\.?[ \t]*\n)", lines, flags=re.IGNORECASE)


def r_object(serialized: bytes) -> Any:
    import rdata

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that an object without the header of a file is taken for one of R's
        return rdata.conversion.convert(rdata.parser.parse_data(serialized))


PACKAGES = (
    Package("anarchism", pages),
    Package("dict-foldoc", dictionary),
    Package("dict-gcide", dictionary),
    Package("dict-wn", dictionary),
    Package("linux-doc-6.1", kernel),
    Package("perl-doc", pods),
    Package("postgresql-doc-15", pages),
    Package("python3.11-doc", python_pages),
    Package("r-cran-janeaustenr", novels),
)


def ordered(folder: Path) -> list[Path]:
    """The files of a folder in an order that no file system or locale decides; links would repeat what they name."""
    found = [file for file in folder.rglob("*") if file.is_file() and not file.is_symlink()]
    return sorted(found, key=lambda file: file.relative_to(folder).parts)


# ---- HTML as text -------------------------------------------------------------------------------------------

# fmt: off
BLOCKS = frozenset((
    "address", "article", "blockquote", "body", "br", "caption", "center", "dd", "div", "dl", "dt", "fieldset",
    "figure", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hr", "li", "main", "ol", "p", "pre",
    "section", "table", "tr", "ul",
))
# fmt: on
APART = frozenset(("blockquote", "dl", "h1", "h2", "h3", "h4", "h5", "h6", "ol", "p", "pre", "table", "ul"))
HIDDEN = frozenset(("head", "script", "style"))
NAVIGATION = frozenset(("navheader", "navfooter", "book-navigation", "toc"))  # classes: the same on page after page
ITEM = "- "


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.pieces: list[str] = []
        self._hidden: list[str] = []  # the element that is left out, and those of its kind within it
        self._verbatim = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._hidden:
            if tag == self._hidden[0]:
                self._hidden.append(tag)
            return
        classes = (dict(attrs).get("class") or "").split()
        if tag in HIDDEN or not NAVIGATION.isdisjoint(classes):
            self._hidden.append(tag)
        self._break(tag)
        self._verbatim += tag == "pre"
        if tag == "li":
            self.pieces.append(ITEM)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._break(tag)  # <a class="…"/> holds nothing

    def handle_endtag(self, tag: str) -> None:
        if self._hidden:
            if tag == self._hidden[0]:
                self._hidden.pop()
            return
        self._break(tag)
        self._verbatim -= tag == "pre"
        if tag in ("td", "th"):
            self.pieces.append("  ")

    def handle_data(self, data: str) -> None:
        if self._hidden:
            return
        if not self._verbatim:
            data = re.sub(r"\s+", " ", data)
            if not self.pieces or self.pieces[-1].endswith((" ", "\n")):
                data = data.removeprefix(" ")
        if data:
            self.pieces.append(data)

    def _break(self, tag: str) -> None:
        # What begins an item stays in its line with the item's first paragraph.
        if tag in BLOCKS and not self._hidden and self.pieces[-1:] != [ITEM]:
            self.pieces.append("\n\n" if tag in APART else "\n")


def plain(html: str) -> str:
    """What a page says, without its marks, its head and its navigation."""
    page = _Page()
    page.feed(html)
    page.close()
    return "".join(page.pieces)


# ---- documents ----------------------------------------------------------------------------------------------


def cleaned(text: bytes | str) -> str | None:
    """The text with plain line ends, no space at the ends of lines and no two empty lines; None if it is not text."""
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError:
            return None
    if "\0" in text:
        return None
    text = re.sub(r"\r\n?", "\n", text)
    text = re.sub(r"[\x01-\x08\x0b-\x1f\x7f\ufeff]", "", text)
    text = re.sub(r"[ \t\u00a0]+(?=\n|$)", "", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n") + "\n"


def download(name: str, folder: Path) -> tuple[Path, str]:
    """The package's file, fetched into the folder where it is not there yet, and its version. Raises OSError."""
    if not list(folder.glob(f"{name}_*.deb")):
        called("apt-get", "-qq", "download", name, cwd=folder)
    file = sorted(folder.glob(f"{name}_*.deb"))[-1]
    return file, called("dpkg-deb", "--field", str(file), "Version").strip()


def called(*command: str, cwd: Path | None = None) -> str:
    """The standard output. Raises OSError with the last line of the other one."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(command[:3])}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
    return done.stdout


def write(out: Path, folder: Path) -> list[Row]:
    """Writes every package's documents. What is there at the end is whole: it gets its name last."""
    rows = []
    seen: set[bytes] = set()
    unfinished = out.with_name(f".{out.name}.tmp")
    with unfinished.open("w", encoding="utf-8", newline="\n") as stream:
        for package in PACKAGES:
            try:
                file, version = download(package.name, folder)
                with tempfile.TemporaryDirectory() as unpacked:
                    called("dpkg-deb", "--extract", str(file), unpacked)
                    rows.append(append(stream, package, version, Path(unpacked), seen))
            except OSError as error:
                print(f"{package.name}: left out: {error}", file=sys.stderr)
    unfinished.replace(out)
    return rows


def append(stream: TextIO, package: Package, version: str, root: Path, seen: set[bytes]) -> Row:
    """Writes one package's documents, those in `seen` left out, and adds them to it."""
    documents = size = skipped = 0
    for raw in package.texts(root):
        text = cleaned(raw)
        digest = hashlib.sha256((text or "").encode("utf-8")).digest()
        if text is None or not text.strip() or digest in seen:
            skipped += 1
            continue
        seen.add(digest)
        stream.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
        documents += 1
        size += len(text.encode("utf-8"))
    return Row(package.name, version, documents, size, skipped)


def table(rows: list[Row]) -> str:
    documents, size, skipped = (sum(column) for column in zip(*((r.documents, r.bytes, r.skipped) for r in rows)))
    lines = ["| package | version | documents | bytes | left out |", "|---|---|---:|---:|---:|"]
    for r in [*rows, Row("all", "", documents, size, skipped)]:
        lines.append(f"| {r.package} | {r.version} | {r.documents:,} | {r.bytes:,} | {r.skipped:,} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="the file of JSON lines to write")
    parser.add_argument("--packages", type=Path, help="keep the downloaded packages here, and take those that lie here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.packages or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        rows = write(arguments.out, folder.absolute())
    print(table(rows))
    with arguments.out.open("rb") as stream:
        print(f"\nsha256 of {arguments.out.name}: {hashlib.file_digest(stream, 'sha256').hexdigest()}")
    return 0 if len(rows) == len(PACKAGES) else 1


if __name__ == "__main__":
    sys.exit(main())
