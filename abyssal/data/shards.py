"""Token sets on disk: documents as tokens in shards that are memory-mapped, checked, and made resumably.

A folder holds `index.json`, the tokenizer's files in `tokenizer/`, and for shard n of a split
`train-00000.tokens` (little-endian uint16 or uint32) and `train-00000.offsets` (int64 [documents + 1]: where each
document begins, and the end). The index is written first and after every shard, so it always tells how far
the work has come; `"complete": true` comes last.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from abyssal.data.sources import Document, documents
from abyssal.data.tokenizer import Tokenizer
from abyssal.files import write_file

FORMAT = 1
INDEX, TOKENIZER_FOLDER = "index.json", "tokenizer"
SPLITS = ("train", "validation")
BATCH_BYTES = 2**22  # text given to the tokenizer at a time: enough for every core

_FIELDS = {
    "complete": bool,
    "tokenizer_sha256": str,
    "vocab_size": int,
    "eos_id": int,
    "dtype": str,
    "shard_tokens": int,
    "shards": list,
}
_PROGRESS = ("complete", "source", "shards")  # what may differ between two calls that make the same set


@dataclass(frozen=True)
class Shard:
    """One shard, as the index has it."""

    split: str
    number: int
    tokens: int
    documents: int
    text_bytes: int
    last_document: int  # its place among all documents of the source, from 0: where resuming begins
    tokens_sha256: str
    offsets_sha256: str

    def path(self, folder: Path, kind: str) -> Path:
        return folder / f"{self.split}-{self.number:05d}.{kind}"


class Split:
    """The documents of a split, memory-mapped.

    `tokens`, `documents` and `text_bytes` (of the text in UTF-8, for bits a byte) are totals, and `lengths`
    [documents] int64 the tokens of each document, its end-of-text token counted.
    """

    def __init__(self, name: str, tokens: list[np.ndarray], offsets: list[np.ndarray], text_bytes: int) -> None:
        self.name = name
        self.tokens = sum(len(shard) for shard in tokens)
        self.text_bytes = text_bytes
        self.lengths = np.concatenate([np.diff(shard) for shard in offsets])
        self.documents = len(self.lengths)
        self._tokens = tokens
        self._offsets = offsets
        self._first = np.cumsum([0, *(len(shard) - 1 for shard in offsets)])

    def document(self, i: int) -> np.ndarray:
        """The tokens of document i, uint16 or uint32, a read-only view of the file. Raises IndexError outside."""
        if not 0 <= i < self.documents:
            raise IndexError(f"document {i}: split {self.name} has {self.documents} documents")
        shard = int(np.searchsorted(self._first, i, side="right")) - 1
        begin, end = self._offsets[shard][i - self._first[shard] :][:2]
        return self._tokens[shard][begin:end]


class TokenSet:
    """A complete token set on disk.

    `folder`, `tokenizer` (a folder for `Tokenizer.load`), `vocab_size`, `eos_id`, and `index`, all that
    `index.json` says.
    """

    def __init__(self, folder: Path, index: dict[str, Any], splits: dict[str, Split]) -> None:
        self.folder = folder
        self.index = index
        self.tokenizer = folder / TOKENIZER_FOLDER
        self.vocab_size: int = index["vocab_size"]
        self.eos_id: int = index["eos_id"]
        self._splits = splits

    @classmethod
    def open(cls, folder: str | Path, verify: bool = True) -> "TokenSet":
        """Maps the shards. With `verify` their checksums are compared, without it only their sizes.

        Raises FileNotFoundError naming an absent file, ValueError naming a damaged, unfinished or unknown one.
        """
        folder = Path(folder)
        index = _read_index(folder)
        if index is None:
            raise FileNotFoundError(f"{folder / INDEX}: no such file; expected a token set made by `prepare`")
        if not index["complete"]:
            raise ValueError(f"{folder / INDEX}: the token set is unfinished; call `prepare` again to go on")
        if verify:
            saved = Tokenizer.load(folder / TOKENIZER_FOLDER).fingerprint
            if saved != index["tokenizer_sha256"]:
                raise ValueError(f"{folder / TOKENIZER_FOLDER}: not the tokenizer that {INDEX} names: {saved}")
        splits = {}
        for name in SPLITS:
            shards = [shard for shard in index["shards"] if shard.split == name]
            if not shards:
                raise ValueError(f"{folder / INDEX}: split {name} has no shards")
            tokens = [_map(s.path(folder, "tokens"), index["dtype"], s.tokens, s.tokens_sha256, verify) for s in shards]
            offsets = [
                _map(s.path(folder, "offsets"), "int64", s.documents + 1, s.offsets_sha256, verify) for s in shards
            ]
            for shard, places in zip(shards, offsets):
                if places[0] != 0 or places[-1] != shard.tokens or (verify and bool(np.any(np.diff(places) <= 0))):
                    raise ValueError(
                        f"{shard.path(folder, 'offsets')}: expected offsets rising from 0 to {shard.tokens}"
                    )
            splits[name] = Split(name, tokens, offsets, sum(shard.text_bytes for shard in shards))
        return cls(folder, index, splits)

    def split(self, name: str) -> Split:
        """`train` or `validation`; raises ValueError at any other name."""
        if name not in self._splits:
            raise ValueError(f"split {name!r}: expected one of {', '.join(SPLITS)}")
        return self._splits[name]


def prepare(
    source: str | Path | None,
    tokenizer: Tokenizer,
    out: str | Path,
    *,
    validation: float = 0.02,
    shard_tokens: int = 2**24,
    seed: int = 0,
    progress: bool = True,
    max_bytes: int | None = None,
    add_bos: bool = False,
    overwrite: bool = False,
) -> TokenSet:
    """Writes the documents of `source` (see `sources.documents`) to the folder `out` as tokens.

    A document becomes its tokens and the end-of-text token, with the beginning-of-text token first under
    `add_bos` if the tokenizer has one. About the fraction `validation` of the documents, at least one and never
    all, makes the validation split, chosen by a hash of the seed and each document's place and name. A shard
    ends with the document that brings it to `shard_tokens`. `max_bytes` leaves out the first document that would
    bring the UTF-8 text past it, and all that follow.

    The source is read twice, first to know it. Killed at any moment and called again, this goes on after the
    last complete shard and ends with the same bytes; once complete it only checks them. Two processes must not
    make the same folder at once.

    Raises ValueError if `out` holds a set made of another source, by another tokenizer or with other settings
    (`overwrite` begins anew whatever set it holds), if it is a folder of other files, if the tokenizer names no
    end-of-text token, or if there are not two documents, one a split.
    """
    out = Path(out)
    if not 0 < validation < 1:
        raise ValueError(f"validation {validation}: expected a fraction between 0 and 1")
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens {shard_tokens}: expected at least 1")
    if tokenizer.eos_id is None:
        raise ValueError("tokenizer_config.json: has no eos_token; each document must end with it")
    survey = _survey(source, max_bytes, _Survey(seed, validation), progress)
    bos = tokenizer.bos_id if add_bos else None
    index: dict[str, Any] = {
        "format": FORMAT,
        "complete": False,
        "source": _label(source),
        "source_sha256": survey.digest.hexdigest(),
        "documents": survey.documents,
        "text_bytes": survey.text_bytes,
        "skipped": survey.skipped,
        "tokenizer_sha256": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "bos_id": bos,
        "eos_id": tokenizer.eos_id,
        "dtype": "uint16" if tokenizer.vocab_size <= 2**16 else "uint32",
        "validation": validation,
        "shard_tokens": shard_tokens,
        "seed": seed,
        "shards": [],
    }
    known = None if overwrite else _read_index(out)
    if known is not None:
        changed = [key for key in index if key not in _PROGRESS and index[key] != known.get(key)]
        if changed:
            told = ", ".join(f"{key} was {known.get(key)!r} and is now {index[key]!r}" for key in changed)
            raise ValueError(f"{out}: holds a token set made otherwise: {told}; pass overwrite=True to replace it")
        index = known
    elif out.is_dir() and not (out / INDEX).exists() and any(not p.name.startswith(".") for p in out.iterdir()):
        raise ValueError(f"{out}: is not empty and has no {INDEX}; expected an empty folder or a token set")
    if not index["complete"]:
        out.mkdir(parents=True, exist_ok=True)
        _write_index(out, index)
        _remove_strangers(out, index)
        shutil.rmtree(out / TOKENIZER_FOLDER, ignore_errors=True)
        tokenizer.save(out / TOKENIZER_FOLDER)
        _fill(out, index, source, tokenizer, max_bytes, survey, progress)
    return TokenSet.open(out)


class _Survey:
    """What the first reading learns: how much there is, its digest, and which documents validate."""

    def __init__(self, seed: int, validation: float) -> None:
        self.documents = 0
        self.text_bytes = 0
        self.skipped: dict[str, int] = {}
        self.digest = hashlib.sha256()
        self._seed = seed
        self._validation = validation
        self._lowest = (2.0, 0)  # (a document's draw, its place)
        self._highest = (-1.0, 0)

    def skip(self, name: str, reason: str) -> None:
        kind = reason.split(":")[0]
        self.skipped[kind] = self.skipped.get(kind, 0) + 1

    def add(self, document: Document) -> None:
        name, text = document.name.encode("utf-8"), document.text.encode("utf-8")
        self.digest.update(b"%d %d\n" % (len(name), len(text)) + name + text)
        draw = self._draw(self.documents, document.name)
        self._lowest = min(self._lowest, (draw, self.documents))
        self._highest = max(self._highest, (draw, self.documents))
        self.documents += 1
        self.text_bytes += len(text)

    def split(self, place: int, name: str) -> str:
        """By the draw; but the lowest always validates and the highest never does, so neither split is empty."""
        if place == self._lowest[1]:
            return "validation"
        if place == self._highest[1]:
            return "train"
        return "validation" if self._draw(place, name) < self._validation else "train"

    def _draw(self, place: int, name: str) -> float:
        text = f"{self._seed} {place} {name}".encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") / 2**64


class _Writer:
    """The unfinished shard of one split."""

    def __init__(self, out: Path, index: dict[str, Any], split: str) -> None:
        self._out, self._index, self._split = out, index, split
        done = [shard for shard in index["shards"] if shard.split == split]
        self.next_document = done[-1].last_document + 1 if done else 0
        self._number = len(done)
        self._clear()

    def add(self, ids: list[int], text_bytes: int, place: int) -> None:
        # Its own little-endian bytes, whatever the machine's.
        self._pieces.append(np.array(ids, dtype=np.dtype(self._index["dtype"]).newbyteorder("<")))
        self._offsets.append(self._offsets[-1] + len(ids))
        self._text_bytes += text_bytes
        self._last = place
        if self._offsets[-1] >= self._index["shard_tokens"]:
            self.flush()

    def flush(self) -> None:
        """Writes the shard, then the index that knows of it: killed between the two, the shard is made again."""
        if not self._pieces:
            return
        tokens = np.concatenate(self._pieces).tobytes()
        offsets = np.array(self._offsets, dtype="<i8").tobytes()
        sums = [hashlib.sha256(data).hexdigest() for data in (tokens, offsets)]
        count, text_bytes = len(self._pieces), self._text_bytes
        shard = Shard(self._split, self._number, self._offsets[-1], count, text_bytes, self._last, *sums)
        write_file(shard.path(self._out, "tokens"), tokens)
        write_file(shard.path(self._out, "offsets"), offsets)
        self._index["shards"].append(shard)
        _write_index(self._out, self._index)
        self._number += 1
        self._clear()

    def _clear(self) -> None:
        self._pieces: list[np.ndarray] = []
        self._offsets = [0]
        self._text_bytes = 0
        self._last = -1


def _survey(source: str | Path | None, max_bytes: int | None, survey: _Survey, progress: bool) -> _Survey:
    with Progress(TextColumn("{task.description}"), transient=True, disable=not progress) as bar:
        task = bar.add_task("reading")
        for document in _read(source, max_bytes, survey):
            survey.add(document)
            if survey.documents % 256 == 0:
                told = f"reading {survey.documents:,} documents, {survey.text_bytes / 1e6:,.0f} MB"
                bar.update(task, description=told)
        for reason, count in survey.skipped.items() if progress else ():
            bar.console.print(f"{_label(source)}: {count:,} left out: {reason}", markup=False)
    if survey.documents < 2:
        within = "" if max_bytes is None else f" within max_bytes {max_bytes}"
        raise ValueError(
            f"{_label(source)}: {survey.documents} document(s){within}; expected at least two, one to train on and "
            "one to validate on (split a single text into several files, or into lines of JSON)"
        )
    return survey


def _fill(
    out: Path,
    index: dict[str, Any],
    source: str | Path | None,
    tokenizer: Tokenizer,
    max_bytes: int | None,
    survey: _Survey,
    progress: bool,
) -> None:
    """Reads the source again and writes every shard that the index lacks."""
    writers = {split: _Writer(out, index, split) for split in SPLITS}
    again = _Survey(index["seed"], index["validation"])
    front = [] if index["bos_id"] is None else [index["bos_id"]]
    waiting: list[tuple[int, _Writer, str, int]] = []  # place, writer, text, bytes
    waiting_bytes = 0

    def encode() -> None:
        encoded = tokenizer.encode_batch([text for _, _, text, _ in waiting])
        for (place, writer, _, size), ids in zip(waiting, encoded):
            writer.add([*front, *ids, index["eos_id"]], size, place)
        waiting.clear()

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    with Progress(*columns, TimeRemainingColumn(), disable=not progress) as bar:
        task = bar.add_task("making tokens", total=survey.text_bytes)
        for place, document in enumerate(_read(source, max_bytes, again)):
            before = again.text_bytes
            again.add(document)
            size = again.text_bytes - before
            writer = writers[survey.split(place, document.name)]
            if place >= writer.next_document:
                waiting.append((place, writer, document.text, size))
                waiting_bytes += size
                if waiting_bytes >= BATCH_BYTES:
                    encode()
                    waiting_bytes = 0
            bar.update(task, advance=size)
        encode()
    if again.digest.digest() != survey.digest.digest():
        raise ValueError(f"{index['source']}: changed while it was being read; pass overwrite=True to begin anew")
    for writer in writers.values():
        writer.flush()
    index["complete"] = True
    _write_index(out, index)


def _read(source: str | Path | None, max_bytes: int | None, survey: _Survey) -> Iterator[Document]:
    total = 0
    for document in documents(source, survey.skip):
        total += len(document.text.encode("utf-8"))
        if max_bytes is not None and total > max_bytes:
            return
        yield document


def _map(path: Path, dtype: str, count: int, sha256: str, verify: bool) -> np.ndarray:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, though {INDEX} names it")
    kind = np.dtype(dtype).newbyteorder("<")
    if path.stat().st_size != count * kind.itemsize:
        raise ValueError(f"{path}: expected {count * kind.itemsize} bytes, found {path.stat().st_size}")
    if verify:
        with path.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != sha256:
            raise ValueError(f"{path}: expected the checksum {sha256}, found {found}")
    # As a plain array: np.memmap's own slices cost several times as much, and documents are many.
    return np.memmap(path, dtype=kind, mode="r").view(np.ndarray)


def _read_index(folder: Path) -> dict[str, Any] | None:
    """The index, its shards as `Shard`; None if there is no such file, ValueError naming the field if it is off."""
    path = folder / INDEX
    if not path.is_file():
        return None
    try:
        index = json.loads(path.read_text("utf-8"))
        if not isinstance(index, dict) or index.get("format") != FORMAT:
            found = index.get("format") if isinstance(index, dict) else type(index).__name__
            raise ValueError(f"field format: expected {FORMAT}, found {found!r}")
        for field, kind in _FIELDS.items():
            if not isinstance(index.get(field), kind):
                raise ValueError(f"field {field}: expected {kind.__name__}, found {index.get(field)!r}")
        if index["dtype"] not in ("uint16", "uint32"):
            raise ValueError(f"field dtype: expected uint16 or uint32, found {index['dtype']!r}")
        index["shards"] = [Shard(**shard) for shard in index["shards"]]
        for split in SPLITS:
            numbers = [shard.number for shard in index["shards"] if shard.split == split]
            if numbers != list(range(len(numbers))):
                raise ValueError(f"field shards: expected {split} numbered from 0, found {numbers}")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
    return index


def _label(source: str | Path | None) -> str:
    return "Python's standard library" if source is None else str(source)


def _write_index(folder: Path, index: dict[str, Any]) -> None:
    # In one order, whichever split's shard came first before and after a resumption.
    shards = sorted(index["shards"], key=lambda shard: (shard.split, shard.number))
    text = json.dumps(index | {"shards": [asdict(shard) for shard in shards]}, indent=2)
    write_file(folder / INDEX, (text + "\n").encode("utf-8"))


def _remove_strangers(folder: Path, index: dict[str, Any]) -> None:
    """Removes shards that the index does not know, left by a set that was overwritten or a run that was killed."""
    ours = {shard.path(folder, kind) for shard in index["shards"] for kind in ("tokens", "offsets")}
    for split in SPLITS:
        for path in [*folder.glob(f"{split}-*.*"), *folder.glob(f".{split}-*.tmp")]:
            if path not in ours and path.name.lstrip(".").removesuffix(".tmp").endswith((".tokens", ".offsets")):
                path.unlink()
