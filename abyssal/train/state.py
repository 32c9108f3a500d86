"""A run's state on disk: a folder that is there whole or not at all.

`state/step-00000100/` holds the model, the optimizer and the random state as safetensors, and `trainer.json`. It is
written under another name, brought to the disk, and renamed. What is removed is renamed first.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from abyssal.files import sync
from abyssal.model.transformer import Transformer
from abyssal.train.optimizer import Optimizer

MODEL, OPTIMIZER, RANDOM, TRAINER = "model.safetensors", "optimizer.safetensors", "random.safetensors", "trainer.json"


def save_state(folder: Path, model: Transformer, optimizer: Optimizer, trainer: Mapping[str, Any]) -> None:
    """Writes `folder`, which replaces one of the same name. Returns when it is on the disk."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    random = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        random["cuda"] = torch.cuda.get_rng_state()
    for name, tensors in ((MODEL, _tensors(model)), (OPTIMIZER, optimizer.state()), (RANDOM, random)):
        save_file({key: t.contiguous() for key, t in tensors.items()}, temporary / name)
    (temporary / TRAINER).write_text(json.dumps(trainer, indent=2) + "\n", "utf-8")
    for name in (MODEL, OPTIMIZER, RANDOM, TRAINER):
        sync(temporary / name)
    sync(temporary)
    _remove(folder)
    temporary.rename(folder)
    sync(folder.parent)


def load_state(folder: Path, model: Transformer, optimizer: Optimizer) -> None:
    """Brings model, optimizer and random state to what they were. Raises ValueError naming a tensor that is not
    the model's, or one that is missing or misshapen."""
    stored, own = load_file(folder / MODEL), _tensors(model)
    for name in stored.keys() ^ own.keys():
        raise ValueError(f"{folder / MODEL}: tensor {name} is {'unknown' if name in stored else 'missing'}")
    with torch.no_grad():
        for name, tensor in own.items():
            if stored[name].shape != tensor.shape:
                raise ValueError(
                    f"{folder / MODEL}: tensor {name} is {list(stored[name].shape)}, not {list(tensor.shape)}"
                )
            tensor.copy_(stored[name])
    optimizer.load_state(load_file(folder / OPTIMIZER))
    random = load_file(folder / RANDOM)
    torch.set_rng_state(random["cpu"])
    if "cuda" in random and torch.cuda.is_available():
        torch.cuda.set_rng_state(random["cuda"])


def read_trainer(folder: Path) -> dict[str, Any]:
    """What `save_state` was given as `trainer`."""
    trainer: dict[str, Any] = json.loads((folder / TRAINER).read_text("utf-8"))
    return trainer


def state_folder(states: Path, step: int) -> Path:
    """Where the state after `step` steps belongs."""
    return states / f"step-{step:08d}"


def newest_state(states: Path) -> Path | None:
    """The complete state of the latest step; None if there is none."""
    return max(_complete(states), key=lambda folder: int(folder.name.removeprefix("step-")), default=None)


def prune_states(states: Path, keep: int) -> None:
    """Removes all but the latest `keep` states, and what killed processes left half written or half removed."""
    complete = sorted(_complete(states), key=lambda folder: int(folder.name.removeprefix("step-")))
    for folder in complete[:-keep]:
        _remove(folder)
    for folder in states.glob(".step-*"):
        shutil.rmtree(folder)


def _complete(states: Path) -> list[Path]:
    return [folder for folder in states.glob("step-*") if folder.name.removeprefix("step-").isdigit()]


def _remove(folder: Path) -> None:
    if folder.exists():
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        shutil.rmtree(old)


def _tensors(model: Transformer) -> dict[str, Tensor]:
    """Parameters, shared ones once, and buffers: the router biases."""
    return {name: t.detach() for name, t in (*model.named_parameters(), *model.named_buffers())}
