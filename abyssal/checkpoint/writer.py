"""Saving: the same format, a shard at a time, and either the old checkpoint or the new one at any moment."""

import json
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from abyssal.checkpoint.errors import CheckpointError
from abyssal.checkpoint.folder import CONFIG, INDEX, SINGLE, find, pending_config
from abyssal.checkpoint.names import SCALE_SUFFIX, Slot, Stored, copies, table
from abyssal.checkpoint.shards import STAMP, nbytes, split, write_shard
from abyssal.files import sync
from abyssal.model.transformer import Transformer

_SHARD_BYTES = 5_000_000_000

# Shards, and what waits for its name: by a stamp of 16 hexadecimal digits.
_OURS = re.compile(r"model-.*\d{5}-of-\d{5}\.safetensors|\..+\.[0-9a-f]{16}\.tmp|\.config\.[0-9a-f]{16}\.json")

# What lies beside the weights and belongs to the model: tokenizer, chat template, generation settings. No code.
_COMPANIONS = ("*.json", "*.jinja", "tiktoken.model", "tokenizer.model", "vocab.txt", "merges.txt")


def save(
    model: Transformer, path: str | Path, max_shard_bytes: int = _SHARD_BYTES,
    read: Callable[[str], Tensor] | None = None,
) -> None:  # fmt: skip
    """Writes a public-format folder: config.json, and one `model.safetensors` or shards with an index.

    `read`: where the model is on the meta device, gives its tensors by their public names, one at a time.

    What `load` read, this writes back bit for bit: tensors, dtypes and configuration. A model that was read from FP8
    and dequantised is saved without `quantization_config`, and a UserWarning says so. The tokenizer's and other
    companion files are copied from the folder that the model was loaded from.

    Killed at any moment, the folder loads as what it was before or as the whole of this. Files of the checkpoint
    before are removed at the end. Two saves at once into one folder are not supported.

    Raises CheckpointError for a dtype the format lacks, ValueError for a shard of no bytes, OSError as it comes.
    """
    if max_shard_bytes <= 0:
        raise ValueError(f"max_shard_bytes: expected a positive number, got {max_shard_bytes}")
    stored = model.stored if isinstance(model.stored, Stored) else None
    config = _config_json(model, stored)
    shards = split(_tensors(model, stored), max_shard_bytes)
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    before = _files_before(folder)

    stamp = secrets.token_hex(8)
    names = _free_names(folder, len(shards), stamp)
    pending = pending_config(folder, stamp)
    target = folder / (SINGLE if names == [SINGLE] else INDEX)
    staged = _beside(target, stamp)
    placed = [pending, staged]
    try:
        _write(pending, stamp, lambda file: file.write(config))
        _copy_companions(stored, folder, stamp)
        if target.name == SINGLE:
            _force(staged, lambda file: write_shard(file, shards[0], stamp, read))
        else:
            for name, shard in zip(names, shards, strict=True):
                placed.append(folder / name)
                _write(folder / name, stamp, lambda file, shard=shard: write_shard(file, shard, stamp, read))  # type: ignore[misc]
            index = _index_json(names, shards, stamp)
            _force(staged, lambda file: file.write(index))
        sync(folder)
    except BaseException:  # a full disk, say: half a checkpoint would only be in the way
        for file in placed:
            file.unlink(missing_ok=True)
        raise
    os.replace(staged, target)
    sync(folder)
    # From here the new weights are in place: what is left takes moments, and a kill leaves it to the next save.
    (folder / (INDEX if target.name == SINGLE else SINGLE)).unlink(missing_ok=True)
    os.replace(pending, folder / CONFIG)
    sync(folder)
    _clear(folder, before, names)


def _config_json(model: Transformer, stored: Stored | None) -> bytes:
    config = model.config
    holds_fp8 = any(name.split(".")[-1].endswith("scale") for name, _ in model.named_buffers())
    if config.fp8 and not holds_fp8:
        warnings.warn("the model is dequantised: saved without quantization_config", stacklevel=3)
    config = config.replace(fp8=holds_fp8)
    if stored is not None:
        counted = stored.config  # config.json is not corrected where it miscounts the MTP modules
        config = config.replace(num_nextn_predict_layers=counted.num_nextn_predict_layers, mtp_moe=counted.mtp_moe)
    public = config.to_dict()
    dtype = model.embed.weight.dtype
    if stored is None or stored.dtype != dtype:
        # transformers and vLLM run a checkpoint in the dtype that its configuration states.
        public["dtype" if "dtype" in public else "torch_dtype"] = str(dtype).removeprefix("torch.")
    return (json.dumps(public, indent=2, ensure_ascii=False) + "\n").encode()


def _tensors(model: Transformer, stored: Stored | None) -> dict[str, Tensor]:
    """Public name -> tensor, views of the model's own."""
    slots = table(model)
    narrow = stored.narrow if stored else {}
    tensors: dict[str, Tensor] = {}
    for name, slot in slots.items():
        tensors[name] = _narrowed(slot, narrow.get(name))
        scale = slot.scale
        if scale is not None and getattr(scale.module, scale.attribute) is not None:
            tensors[name + SCALE_SUFFIX] = _narrowed(scale, narrow.get(name + SCALE_SUFFIX))
    for name, main in copies(model.config).items():
        # A model that was not loaded has its head stored once, and its MTP modules complete, as DeepSeek's are.
        if name in stored.copies if stored else name != "lm_head.weight":
            tensors[name] = tensors[main]
    return tensors | (stored.constants if stored else {})


def _narrowed(slot: Slot, dtype: torch.dtype | None) -> Tensor:
    """A router bias or a scale as it was stored, if that loses nothing of what it is now."""
    tensor = slot.tensor
    if dtype is None or not torch.equal(tensor.to(dtype).to(tensor.dtype), tensor):
        return tensor
    return tensor.to(dtype)


def _index_json(names: list[str], shards: list[dict[str, Tensor]], stamp: str) -> bytes:
    where = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    metadata = {"total_size": sum(nbytes(shard.values()) for shard in shards), STAMP: stamp}
    index = {"metadata": metadata, "weight_map": dict(sorted(where.items()))}
    return (json.dumps(index, indent=2) + "\n").encode()


def _free_names(folder: Path, shards: int, stamp: str) -> list[str]:
    """The usual names, unless the checkpoint that is there now needs them until the last moment."""
    if shards == 1:
        return [SINGLE]
    for stem in ("model", f"model-{stamp}"):
        names = [f"{stem}-{i:05}-of-{shards:05}.safetensors" for i in range(1, shards + 1)]
        if not any((folder / name).exists() for name in names):
            break
    return names


def _beside(target: Path, stamp: str) -> Path:
    return target.with_name(f".{target.name}.{stamp}.tmp")


def _force(file: Path, fill: Callable[[BinaryIO], object]) -> None:
    """Writes the file and forces it to disk."""
    with open(file, "wb") as opened:
        fill(opened)
        opened.flush()
        os.fsync(opened.fileno())


def _write(target: Path, stamp: str, fill: Callable[[BinaryIO], object]) -> None:
    """The whole file or none of it: written beside its place, then renamed."""
    temporary = _beside(target, stamp)
    try:
        _force(temporary, fill)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _copy_companions(stored: Stored | None, folder: Path, stamp: str) -> None:
    if stored is None or stored.folder.resolve() == folder.resolve():
        return
    if not stored.folder.is_dir():
        warnings.warn(f"{stored.folder}: is gone: saved without its tokenizer and other files", stacklevel=3)
        return
    for pattern in _COMPANIONS:
        for source in sorted(stored.folder.glob(pattern)):
            ours = source.name == CONFIG or source.name.startswith(".") or source.name.endswith(".index.json")
            if source.is_file() and not ours:
                with open(source, "rb") as content:
                    _write(folder / source.name, stamp, lambda file, c=content: shutil.copyfileobj(c, file))  # type: ignore[misc]


def _files_before(folder: Path) -> list[Path]:
    """What `load` would have read there: not whatever else bears the suffix."""
    try:
        return find(folder).files
    except CheckpointError:
        return []


def _clear(folder: Path, before: list[Path], names: list[str]) -> None:
    """Removes the checkpoint before, and what interrupted saves left."""
    for file in [*before, *folder.iterdir()]:
        ours = file in before or _OURS.fullmatch(file.name)
        if ours and file.name not in names:
            file.unlink(missing_ok=True)
