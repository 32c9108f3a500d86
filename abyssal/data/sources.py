"""Documents out of files and folders: text, code, JSON lines, Parquet, and gzip of the first three."""

import gzip
import json
import os
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

Skip = Callable[[str, str], None]

FIELDS = ("text", "content")  # the names under which public data sets keep a document, in this order
LINES = (".jsonl", ".jsonl.gz", ".json.gz")  # public corpora (C4) name compressed JSON lines .json.gz
PEEK = 8192  # bytes looked at before a file that may be binary and large is read whole


@dataclass(frozen=True)
class Document:
    """One text and where it came from: a path relative to the source, with `#number` for a line or a row."""

    name: str
    text: str


def documents(path: str | Path | None, on_skip: Skip) -> Iterator[Document]:
    """The documents of a file or a folder, always in the same order; None is Python's own standard library.

    A folder is walked recursively, in sorted order, without hidden entries, `__pycache__` and links to folders.
    `.jsonl`, `.jsonl.gz` and `.json.gz` hold one object a line with a field `text` or `content`; `.parquet` has
    such a column; any other file is one document of UTF-8 text (through gzip if its name ends in `.gz`).
    What cannot be read is left out and told to `on_skip(name, reason)`; line numbers count from 1, rows from 0.

    Raises FileNotFoundError at once if there is no such path, ValueError at the end if nothing was usable, and
    ImportError at the first Parquet file if pyarrow is not installed.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if path is None else Path(path)
    if not root.exists():
        raise FileNotFoundError(f"{root}: no such file or folder to read documents from")
    return _documents(root, path is None, on_skip)


def _documents(root: Path, library: bool, on_skip: Skip) -> Iterator[Document]:
    found = False
    for file, name in _files(root, library):
        for document in _read(file, name, on_skip):
            if not document.text:
                on_skip(document.name, "empty")
                continue
            found = True
            yield document
    if not found:
        raise ValueError(f"{root}: no usable document; expected UTF-8 text, JSON lines or Parquet with {_either()}")


def _files(root: Path, library: bool) -> Iterator[tuple[Path, str]]:
    if not root.is_dir():
        yield root, root.name
        return
    without = {"__pycache__", "site-packages", "dist-packages"} if library else {"__pycache__"}
    relative = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in without]
        for name in files:
            if not name.startswith(".") and (name.endswith(".py") or not library):
                relative.append((Path(folder) / name).relative_to(root))
    # Sorted by the parts of the path, so that the order is that of no particular file system or platform.
    for path in sorted(relative, key=lambda p: p.parts):
        # A name that is not UTF-8 keeps its odd bytes as \\udcxx, so that every name can be hashed and written.
        yield root / path, path.as_posix().encode("utf-8", "backslashreplace").decode("utf-8")


def _read(file: Path, name: str, on_skip: Skip) -> Iterator[Document]:
    lower = name.lower()
    if not file.is_file():  # opening a pipe would wait for ever
        on_skip(name, "not a regular file")
        return
    try:
        if lower.endswith(".parquet"):
            yield from _parquet(file, name, on_skip)
        elif lower.endswith(LINES):
            with _open(file) as stream:
                yield from _json_lines(stream, name, on_skip)
        else:
            with _open(file) as stream:
                head = stream.read(PEEK)
                data = head if b"\0" in head else head + stream.read()
            if b"\0" in data:
                on_skip(name, "binary: it has NUL bytes")
            else:
                yield Document(name, data.decode("utf-8"))
    except UnicodeDecodeError as error:
        on_skip(name, f"not UTF-8: {error.reason} at byte {error.start}")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        on_skip(name, f"damaged gzip: {error}")
    except OSError as error:
        on_skip(name, f"unreadable: {error.strerror or error}")


def _open(file: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(file, "rb")) if file.name.lower().endswith(".gz") else file.open("rb")


def _json_lines(lines: Iterable[bytes], name: str, on_skip: Skip) -> Iterator[Document]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{name}#{number}"
        try:
            entry = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            on_skip(where, f"not UTF-8: {error.reason} at byte {error.start}")
            continue
        except (ValueError, RecursionError) as error:
            on_skip(where, f"malformed JSON: {error}")
            continue
        texts = [entry[field] for field in FIELDS if field in entry] if isinstance(entry, dict) else []
        if not texts or not isinstance(texts[0], str):
            on_skip(where, f"expected an object with a string in {_either()}")
        elif not _encodable(texts[0]):
            on_skip(where, "not UTF-8: its text has half a surrogate pair")
        else:
            yield Document(where, texts[0])


def _parquet(file: Path, name: str, on_skip: Skip) -> Iterator[Document]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"{file}: reading Parquet needs pyarrow; install abyssal[parquet]") from error
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            column = next((field for field in FIELDS if field in table.schema_arrow.names), None)
            if column is None:
                on_skip(name, f"expected a column {_either()}, found {', '.join(table.schema_arrow.names)}")
                return
            row = 0
            for batch in table.iter_batches(batch_size=1024, columns=[column]):
                for value in batch.column(0).to_pylist():
                    if isinstance(value, str):
                        yield Document(f"{name}#{row}", value)
                    else:
                        on_skip(f"{name}#{row}", f"expected a string in {column}, found {type(value).__name__}")
                    row += 1
    except pyarrow.ArrowException as error:
        on_skip(name, f"damaged Parquet: {error}")


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _either() -> str:
    return " or ".join(f"`{field}`" for field in FIELDS)
