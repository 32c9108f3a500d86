"""Texts of several kinds, told apart by their form alone: what the trained studies learn from and are measured on.

Without data of one's own they are the sources of Python's standard library, read as syntax trees. A file gives up to
three kinds: *prose*, its docstrings; *tables*, its lists, tuples, sets and dictionaries of 32 or more short literals
that are assigned at the top, as they are written; *code*, all that is left, written out again from the tree, which
has no comments. Of a folder every entry is a kind. Of a long document the beginning is taken, so that many have a part.
"""

import ast
import hashlib
import json
import platform
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path

import torch

from abyssal.data import Batch, Tokenizer, TokenSet, documents, prepare
from abyssal.files import write_file
from abyssal.source import code_digest, short_digest

LITERALS, LETTERS = 32, 40  # a table has so many at least, none longer
SHORTEST = 64  # bytes of a document that is kept
PARTS, PART = 64, 512  # of a kind no document is longer than a 64th of what is read, or 512 bytes
HELD_OUT = 8  # every 8th document of a kind
DONE = "texts.json"


@dataclass(frozen=True)
class Texts:
    """`tokens` to train on; of every kind as many held-out sequences, each a batch of its own, all equally long. None
    of them stands anywhere in the texts that are trained on: sources repeat each other."""

    tokens: TokenSet
    tokenizer: Tokenizer
    held_out: dict[str, list[Batch]]
    about: dict[str, dict[str, int]]  # a kind: documents and bytes that are trained on
    fingerprint: str  # of everything that is trained and measured on

    @property
    def kinds(self) -> list[str]:
        return list(self.held_out)


def open_texts(
    folder: Path, data: Path | None, most: int, vocab_size: int, sequence: int, sequences: int,
    say: Callable[[str], None] = lambda text: None,
) -> Texts:  # fmt: skip
    """Reads, or makes below `folder`, up to `most` bytes of each kind, and a tokenizer trained on them. Of a kind at
    most `sequences` of `sequence` tokens are held out.

    Raises FileNotFoundError or ValueError for `data` that isn't there or has fewer than two kinds, and ValueError for
    a kind with too little text.
    """
    made = folder / f"texts-{_key(data, most, vocab_size)}"
    if not (made / DONE).is_file():
        say("reading texts")
        _make(made, data, most, vocab_size)
    about = json.loads((made / DONE).read_text("utf-8"))
    tokens = TokenSet.open(made / "tokens")
    tokenizer = Tokenizer.load(tokens.tokenizer)
    lines = [json.loads(line) for line in (made / "held-out.jsonl").read_text("utf-8").splitlines()]
    known = "\0".join(json.loads(line)["text"] for line in (made / "train.jsonl").read_text("utf-8").splitlines())
    held_out = {
        kind: _chunks([x["text"] for x in lines if x["kind"] == kind], tokenizer, sequence, known) for kind in about
    }
    count = min(sequences, *map(len, held_out.values()))
    if count == 0:
        least = min(held_out, key=lambda kind: len(held_out[kind]))
        raise ValueError(f"texts: kind {least} has no held-out document of {sequence} tokens; give more of it")
    held_out = {kind: chunks[:count] for kind, chunks in held_out.items()}
    digest = hashlib.sha256(str([tokens.index[k] for k in ("source_sha256", "tokenizer_sha256")]).encode())
    for batch in chain(*held_out.values()):
        digest.update(batch.tokens.numpy().tobytes())
    return Texts(tokens, tokenizer, held_out, about, digest.hexdigest())


def source_of(data: Path | None) -> str:
    """What texts of `data` are, for the note of a table."""
    if data is not None:
        return f"Every entry of {data} is a kind; every 8th document of it is held out."
    return (
        "Of the Python standard library's sources, by their syntax trees: prose is a file's docstrings, tables are "
        "lists and dictionaries of 32 or more short literals, code is the rest without its comments. Every 8th "
        "document of a kind is held out; bits a byte are of the bytes that the held-out tokens stand for."
    )


def library_texts(name: str, source: str) -> Iterator[tuple[str, str]]:
    """What a Python file has of each kind, as (kind, text); nothing if it is no Python of this version."""
    try:
        tree = ast.parse(source, name)
    except (SyntaxError, ValueError):
        return
    prose = []
    for node in list(ast.walk(tree)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            said = ast.get_docstring(node)
            if said is not None:
                prose.append(said)
                node.body = node.body[1:]
                if not node.body and not isinstance(node, ast.Module):
                    node.body = [ast.Pass()]
    tables = [node for node in tree.body if _is_table(node)]
    lines = source.splitlines(keepends=True)
    tree.body = [node for node in tree.body if not _is_table(node)]
    yield "prose", "\n\n".join(prose)
    for node in tables:
        yield "tables", "".join(lines[node.lineno - 1 : node.end_lineno])
    yield "code", ast.unparse(tree)


def _is_table(node: ast.stmt) -> bool:
    if not isinstance(node, ast.Assign | ast.AnnAssign):
        return False
    if not isinstance(node.value, ast.Dict | ast.List | ast.Tuple | ast.Set):
        return False
    literals = [x.value for x in ast.walk(node.value) if isinstance(x, ast.Constant)]
    return len(literals) >= LITERALS and all(not isinstance(x, str | bytes) or len(x) <= LETTERS for x in literals)


def _library() -> Iterator[tuple[str, str]]:
    """(kind, text) of the standard library, its own tests left out: not every system has them."""
    for document in documents(None, lambda name, reason: None):
        if not {"test", "tests", "idle_test"} & set(document.name.split("/")):
            yield from library_texts(document.name, document.text)


def _kinds_of(data: Path) -> dict[str, Path]:
    if not data.is_dir():
        raise FileNotFoundError(f"--data: {data} is no folder")
    paths = [path for path in sorted(data.iterdir()) if not path.name.startswith(".")]
    entries = {path.stem: path for path in paths}
    if len(paths) < 2 or len(entries) < len(paths):
        raise ValueError(
            f"--data: expected two or more kinds of text, a file or a folder each of another name, in {data}"
        )
    return entries


def _of_folder(data: Path) -> Iterator[tuple[str, str]]:
    for kind, path in _kinds_of(data).items():
        for document in documents(path, lambda name, reason: None):
            yield kind, document.text


def _make(folder: Path, data: Path | None, most: int, vocab_size: int) -> None:
    names = ["code", "prose", "tables"] if data is None else list(_kinds_of(data))
    found: dict[str, list[str]] = {kind: [] for kind in names}
    sizes = dict.fromkeys(names, 0)
    for kind, text in _library() if data is None else _of_folder(data):
        if sizes[kind] >= most:
            continue
        begun = _beginning(text, max(most // PARTS, PART))
        if len(begun) >= SHORTEST:
            found[kind].append(begun.decode())
            sizes[kind] += len(begun)
        if min(sizes.values()) >= most:
            break
    for kind, texts in found.items():
        if len(texts) < HELD_OUT:
            raise ValueError(f"texts: expected {HELD_OUT} or more documents of kind {kind}, got {len(texts)}")
    held = {kind: texts[HELD_OUT - 1 :: HELD_OUT] for kind, texts in found.items()}
    rest = {kind: [x for i, x in enumerate(texts, 1) if i % HELD_OUT] for kind, texts in found.items()}
    folder.mkdir(parents=True, exist_ok=True)
    for name, texts_of in (("train", rest), ("held-out", held)):
        lines = (json.dumps({"kind": kind, "text": text}) for kind, texts in texts_of.items() for text in texts)
        write_file(folder / f"{name}.jsonl", ("\n".join(lines) + "\n").encode())
    tokenizer = Tokenizer.train(chain(*rest.values()), vocab_size)
    # Its own validation split is not used: the held-out texts are measured kind by kind.
    prepare(folder / "train.jsonl", tokenizer, folder / "tokens", progress=False, overwrite=True, validation=1e-9)
    about = {k: {"documents": len(x), "bytes": sum(len(t.encode()) for t in x)} for k, x in rest.items()}
    write_file(folder / DONE, json.dumps(about).encode())


def _beginning(text: str, most: int) -> bytes:
    """The first lines of a text that have `most` bytes of UTF-8 or, where the first is longer, as much of it."""
    data = text.encode("utf-8", "replace")  # a literal may be half a surrogate pair
    if len(data) <= most:
        return data
    return data[: data.rfind(b"\n", 0, most) + 1] or data[:most].decode("utf-8", "ignore").encode()


def _chunks(texts: list[str], tokenizer: Tokenizer, sequence: int, known: str) -> list[Batch]:
    """The whole chunks of `sequence` tokens that do not stand in `known`, too, first those that documents begin with,
    then those that follow."""
    of_document = [
        [ids[i : i + sequence] for i in range(0, len(ids) - sequence + 1, sequence)]
        for ids in tokenizer.encode_batch(texts)
    ]
    in_turn = [ids for turn in zip_longest(*of_document) for ids in turn if ids is not None]
    new = [ids for ids in in_turn if tokenizer.decode(ids) not in known]
    return [Batch(torch.tensor(ids), [sequence], torch.ones(sequence)) for ids in new]


def _key(data: Path | None, most: int, vocab_size: int) -> str:
    """Names what texts are made of, so that other settings, or other code that makes them, make other ones."""
    parts: list[object] = [
        LITERALS,
        LETTERS,
        SHORTEST,
        PARTS,
        PART,
        HELD_OUT,
        most,
        vocab_size,
        platform.python_version(),
        code_digest("data", "study/texts.py"),
    ]
    if data is None:
        parts.append(sysconfig.get_paths()["stdlib"])
    else:
        files = [path for entry in _kinds_of(data).values() for path in (entry, *sorted(entry.rglob("*")))]
        parts += [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return short_digest(parts)
