"""A plan's settings: those of a training run, most of which a plan doesn't need."""

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from abyssal.config import ConfigError, ModelConfig
from abyssal.parallel import MeshShape
from abyssal.parallel.check import nearest, why_not
from abyssal.train.config import TrainConfig, override


def settings_of(model: str, overrides: Sequence[str], gpus: int, mesh: str | None) -> TrainConfig:
    """The configuration of a run of `model` on so many GPUs. Where they aren't said, a microbatch is one sequence of
    4096 tokens, or of what the model takes, and a step has four microbatches a reader.

    Raises ConfigError naming the setting, or saying why the mesh cannot be and which could.
    """
    shape = MeshShape(dp=gpus) if mesh is None else _parsed(mesh)
    if shape.ranks != gpus:
        raise ConfigError(f"mesh {shape}: {shape.ranks} ranks, and --gpus is {gpus}")
    longest = min(4096, ModelConfig.load(model).max_position_embeddings)
    settings: dict[str, Any] = {
        "model": model, "out": str(Path(tempfile.gettempdir()) / "plan"), "steps": 1, "sequence": longest,
        "batch_tokens": longest, "accumulate": 4 * math.prod((shape.dp, shape.ep)),
        "mesh": "" if shape.ranks == 1 else str(shape),
    }  # fmt: skip
    override(settings, overrides)
    config = TrainConfig.of(settings, where="plan")
    made = config.model_settings()
    problem = why_not(shape, gpus, config, made)
    if problem:
        near = nearest(shape, gpus, config, made)
        raise ConfigError(problem + (f"; the nearest that is right: {near}" if near else ""))
    return config


def _parsed(mesh: str) -> MeshShape:
    try:
        return MeshShape.parse(mesh)
    except ValueError as error:
        raise ConfigError(str(error)) from None
