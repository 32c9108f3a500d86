"""Which files of a folder make up its checkpoint, and how a save takes the place of the one before.

Several files cannot be replaced at once, so a save bears a stamp: a token in the metadata of its shards and of its
index. Its shards come to lie beside the old ones, under names that are free, and count for nothing until one atomic
rename (or removal) commits them:

    the save is one file      the rename to `model.safetensors`
    the save has shards       the rename to `model.safetensors.index.json`, or, where the checkpoint before was a
                              single file, the removal of that file, which readers prefer to an index

Its configuration waits as `.config.{stamp}.json`: whoever reads a stamped checkpoint takes that one if it is there, so
that it is committed with the weights and becomes `config.json` a moment later.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from abyssal.checkpoint.errors import CheckpointError
from abyssal.checkpoint.shards import STAMP, Header, read_header

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True)
class Found:
    """A folder's checkpoint."""

    config: Path
    headers: dict[str, Header]  # of every tensor, file by file
    files: list[Path]
    unread: list[Path]  # safetensors files that are not part of it


def pending_config(folder: Path, stamp: str) -> Path:
    return folder / f".config.{stamp}.json"


def find(folder: Path) -> Found:
    """Reads the index and every header, and no tensor.

    A save of ours is complete: its one file, or the files of its index. In anybody else's folder every
    `*.safetensors` is part of the checkpoint, for indices forget files, except what a save of ours left there
    before it was interrupted.

    Raises CheckpointError: no weights, or pickled ones alone; an index that is not one, leaves the folder, names
    an absent file, or places a tensor in a file that lacks it; a damaged file; a tensor in two files; no config.json.
    """
    present = sorted(folder.glob("*.safetensors"))
    index = folder / INDEX
    listed: dict[str, str] = {}
    stamp = None
    if folder / SINGLE in present:
        stamp, first = read_header(folder / SINGLE)
        read = {folder / SINGLE: first}
    elif index.is_file():
        stamp, listed = _read_index(index)
        read = {folder / name: read_header(folder / name)[1] for name in sorted(set(listed.values()))}
    else:
        read = {}
    if stamp is None:
        for file in present:
            if file not in read:
                left, tensors = read_header(file)
                if left is None:
                    read[file] = tensors
    _check_index(index, listed, {file.name: tensors for file, tensors in read.items()})
    headers: dict[str, Header] = {}
    for tensors in read.values():
        for name, header in tensors.items():
            if name in headers:
                raise CheckpointError(f"{header.file}: {name}: stands in {headers[name].file.name} as well")
            headers[name] = header
    if not headers:
        raise CheckpointError(_no_weights(folder, present))
    config = folder / CONFIG
    if stamp is not None and pending_config(folder, stamp).is_file():
        config = pending_config(folder, stamp)
    if not config.is_file():
        raise CheckpointError(f"{config}: missing")
    return Found(config, headers, list(read), [file for file in present if file not in read])


def _read_index(index: Path) -> tuple[str | None, dict[str, str]]:
    try:
        content = json.loads(index.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{index}: not JSON: {error}") from None
    listed = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
        raise CheckpointError(f"{index}: expected a weight_map of file names")
    for tensor, name in listed.items():
        # The name alone is judged: hub caches have the files themselves behind symbolic links.
        if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
            raise CheckpointError(f"{index}: {tensor}: {name!r} leaves the folder: expected a file's name alone")
        if not name.endswith(".safetensors"):
            raise CheckpointError(f"{index}: {tensor}: {name!r}: expected a .safetensors file (pickles are never read)")
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index}: {tensor}: names {name!r}, which is absent")
    metadata = content.get("metadata")
    return (metadata.get(STAMP) if isinstance(metadata, dict) else None), listed


def _check_index(index: Path, listed: dict[str, str], read: dict[str, dict[str, Header]]) -> None:
    for tensor, name in listed.items():
        if tensor not in read[name]:
            raise CheckpointError(f"{index}: {tensor}: expected in {name}, which does not have it")


def _no_weights(folder: Path, present: list[Path]) -> str:
    if present:
        return f"{folder}: {present[0].name} was left by a save that was interrupted: there is no checkpoint here"
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    if pickles:
        return f"{folder}: expected *.safetensors, found {pickles[0]}: pickles can run code and are never read"
    return f"{folder}: no weights: expected {SINGLE}, or shards with {INDEX}"
