"""A run's state on disk: a folder that is there whole or not at all.

`state/step-00000100/` holds safetensors, `trainer.json` and a list of the files. Tensors are called as the model's
parameters and buffers, and `kind/parameter` what the optimizer keeps. One process writes them whole; many ranks write
the pieces that each owns (`checkpoint/distributed.py`), with the float32 masters under the parameters' names. Either
is read by any number of ranks. It is written under another name, brought to the disk, and renamed. What is removed is
renamed first.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from abyssal.checkpoint import CheckpointError
from abyssal.checkpoint.distributed import FILES, StateFiles, StateWriter, list_files
from abyssal.files import sync
from abyssal.model.transformer import Transformer
from abyssal.train.optimizer import MASTER, Optimizer

MODEL, OPTIMIZER, RANDOM, TRAINER = "model.safetensors", "optimizer.safetensors", "random.safetensors", "trainer.json"

Part = Callable[[str, Tensor], Tensor]
"""A parameter's name and what this process has of a tensor of its shape -> that, as a part of the whole tensor."""


def whole(name: str, local: Tensor) -> Tensor:
    """Of one process, which has everything."""
    return local


def save_state(folder: Path, model: Transformer, optimizer: Optimizer, trainer: Mapping[str, Any]) -> None:
    """Writes `folder`, which replaces one of the same name. Returns when it is on the disk."""
    temporary = _opened(folder)
    for name, tensors in ((MODEL, _tensors(model)), (OPTIMIZER, optimizer.state())):
        save_file({key: t.contiguous() for key, t in tensors.items()}, temporary / name)
        sync(temporary / name)
    _commit(folder, _random(), trainer)


def begin_state(
    writer: StateWriter, folder: Path, model: Transformer, optimizer: Optimizer, part: Part, trainer: Mapping[str, Any],
    then: Callable[[], None],
) -> None:  # fmt: skip
    """Begins to write `folder` from all ranks, of which each has parts; `writer.wait` ends it. The first rank calls
    `then` when it is there."""
    tensors = {name: t.detach() for name, t in model.named_buffers()}
    for name, master in zip(optimizer.names, optimizer.masters, strict=True):
        tensors[name] = part(name, master.detach())
    for key, value in optimizer.state().items():
        tensors[key] = part(key.partition("/")[2], value) if value.ndim else value
    random, trainer = _random(), dict(trainer)

    def commit() -> None:
        _commit(folder, random, trainer)
        then()

    writer.begin(_temporary(folder), tensors, lambda: _opened(folder), commit)


def load_state(folder: Path, model: Transformer, optimizer: Optimizer, part: Part = whole) -> None:
    """Brings model, optimizer and random state to what they were, whoever wrote them. Raises CheckpointError naming a
    file that is missing or cut short, and a tensor that is not the model's, is missing or misshapen."""
    files = StateFiles(folder)
    _no_others(files, model)
    wanted = {name: t.detach() for name, t in model.named_buffers()}
    masters = dict(zip(optimizer.names, (m.detach() for m in optimizer.masters), strict=True))
    for name, master in masters.items():
        kept = f"{MASTER}/{name}"
        wanted[kept if kept in files else name] = part(name, master)
    kinds: dict[str, Tensor] = {}
    for key in files.names():
        kind, slash, name = key.partition("/")
        if slash and kind != MASTER and name in masters:
            shape = masters[name].shape if files.shape(key) else ()
            # As AdamW makes them: its scalars, `step`, are float32 beside masters of any dtype.
            kinds[key] = torch.empty(shape, dtype=masters[name].dtype if shape else torch.float32)
            wanted[key] = part(name, kinds[key]) if shape else kinds[key]
    missing = next((key for key in optimizer.expected() if key not in kinds), None)
    if missing is not None and read_trainer(folder)["step"]:
        raise CheckpointError(f"{folder}: tensor {missing} is missing")
    files.read(wanted)
    optimizer.load_state(kinds)
    random = load_file(folder / RANDOM)
    torch.set_rng_state(random["cpu"])
    if "cuda" in random and torch.cuda.is_available():
        torch.cuda.set_rng_state(random["cuda"])


def read_trainer(folder: Path) -> dict[str, Any]:
    """What the state was saved with as `trainer`. Raises CheckpointError if that isn't there or not readable."""
    try:
        trainer = json.loads((folder / TRAINER).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / TRAINER}: {error}") from None
    if not isinstance(trainer, dict):
        raise CheckpointError(f"{folder / TRAINER}: expected an object, got {type(trainer).__name__}")
    return trainer


def state_folder(states: Path, step: int) -> Path:
    """Where the state after `step` steps belongs."""
    return states / f"step-{step:08d}"


def newest_state(states: Path) -> Path | None:
    """The complete state of the latest step; None if there is none."""
    return max(_complete(states), key=lambda folder: int(folder.name.removeprefix("step-")), default=None)


def prune_states(states: Path, keep: int) -> None:
    """Removes all but the latest `keep` states, and what killed processes left half written or half removed; call it
    while none is being written."""
    complete = sorted(_complete(states), key=lambda folder: int(folder.name.removeprefix("step-")))
    for folder in complete[:-keep]:
        _remove(folder)
    for folder in states.glob(".step-*"):
        shutil.rmtree(folder)


def _complete(states: Path) -> list[Path]:
    return [folder for folder in states.glob("step-*") if folder.name.removeprefix("step-").isdigit()]


def _temporary(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.tmp")


def _opened(folder: Path) -> Path:
    """Where `folder` is written, empty."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    return temporary


def _commit(folder: Path, random: Mapping[str, Tensor], trainer: Mapping[str, Any]) -> None:
    """Adds what is small to the tensors' files, which are on the disk, and gives the folder its name."""
    temporary = _temporary(folder)
    save_file(dict(random), temporary / RANDOM)
    (temporary / TRAINER).write_text(json.dumps(trainer, indent=2) + "\n", "utf-8")
    list_files(temporary)
    for name in (RANDOM, TRAINER, FILES):
        sync(temporary / name)
    sync(temporary)
    _remove(folder)
    temporary.rename(folder)
    sync(folder.parent)


def _remove(folder: Path) -> None:
    if folder.exists():
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        shutil.rmtree(old)


def _random() -> dict[str, Tensor]:
    random = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        random["cuda"] = torch.cuda.get_rng_state()
    return random


def _tensors(model: Transformer) -> dict[str, Tensor]:
    """Parameters, shared ones once, and buffers: the router biases."""
    return {name: t.detach() for name, t in (*model.named_parameters(), *model.named_buffers())}


def _no_others(files: StateFiles, model: Transformer) -> None:
    """Raises CheckpointError for a tensor that isn't of the whole model, of which this process may have a part."""
    with torch.device("meta"):
        known = _tensors(Transformer(model.config)).keys() | {"cpu", "cuda"}  # RANDOM's
    for key in files.names():
        if key.rpartition("/")[2] not in known:
            raise CheckpointError(f"{files.folder}: tensor {key} is unknown")
