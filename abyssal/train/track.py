"""Records of metrics told to a tracker as well: TensorBoard, trackio or Weights & Biases, each an optional package."""

import importlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any, Protocol

from abyssal.config import ConfigError
from abyssal.train.config import TrainConfig
from abyssal.train.metrics import Record

PACKAGES = {"tensorboard": "tensorboard", "trackio": "trackio", "wandb": "wandb"}


class Tracker(Protocol):
    """Something that draws curves."""

    def log(self, step: int, values: dict[str, float]) -> None: ...
    def close(self) -> None: ...


class _TensorBoard:
    def __init__(self, config: TrainConfig, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What a killed run told of later steps is told anew.
        self._writer: Any = SummaryWriter(str(config.out / "tensorboard"), purge_step=done + 1 if done else None)

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Run:
    """trackio and wandb, which share their calls. A resumed run goes on with the name of its folder."""

    def __init__(self, config: TrainConfig, package: str) -> None:
        self._module = _package(package)
        settings = config.to_dict()
        if package == "wandb":
            self._module.init(project="abyssal", name=config.out.name, dir=str(config.out), config=settings)
        else:
            self._module.init(project="abyssal", name=config.out.name, config=settings, resume="allow")

    def log(self, step: int, values: dict[str, float]) -> None:
        self._module.log(values, step=step)

    def close(self) -> None:
        self._module.finish()


def trackers(config: TrainConfig, done: int) -> list[Tracker]:
    """Those that `track` names, of a run of which `done` steps have been taken. Raises ConfigError, and begins none, if
    a package is missing."""
    for name in config.track:
        _package(name)
    return [_TensorBoard(config, done) if name == "tensorboard" else _Run(config, name) for name in config.track]


def flat(record: Record, prefix: str = "") -> dict[str, float]:
    """The numbers of a record, by names like `validation/loss` and `max_violation/0`."""
    return dict(_numbers(record, prefix))


def _numbers(value: Any, name: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(inner, f"{name}/{key}" if name else str(key))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _numbers(inner, f"{name}/{i}")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, float(value)


def _package(name: str) -> ModuleType:
    try:
        return importlib.import_module(PACKAGES[name])
    except ImportError:
        raise ConfigError(f"track: {name} is not installed: pip install {PACKAGES[name]}") from None
