"""Which meshes a run can have: what is wrong with one, and the nearest that is right. Nothing is built for it."""

import math
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from abyssal.config import ConfigError, ModelConfig
from abyssal.parallel import pipeline, tensor
from abyssal.parallel.mesh import AXES, MeshShape, launched

if TYPE_CHECKING:
    from abyssal.train.config import TrainConfig


def check_mesh(config: "TrainConfig", model: ModelConfig) -> None:
    """Raises ConfigError unless the processes that there are can train so: with the reason, and the nearest mesh that
    is right, or the command that starts as many processes as the mesh has ranks."""
    world = int(os.environ["WORLD_SIZE"]) if launched() else 1
    if not config.mesh:
        if world > 1:
            near = nearest(MeshShape(dp=world), world, config, model)
            hint = f"say --mesh {near}" if near else "and no mesh of so many suits the run"
            raise ConfigError(f"mesh: there are {world} processes and none is named; {hint}")
        return
    try:
        shape = MeshShape.parse(config.mesh)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if config.optimizer == "muon":
        raise ConfigError(f"mesh {shape}: optimizer: expected 'adamw', got 'muon', which needs whole matrices")
    if not launched():
        if shape.ranks > 1 and (problem := why_not(shape, shape.ranks, config, model)):
            raise ConfigError(f"{problem}{_hint(shape, shape.ranks, config, model)}")
        raise ConfigError(
            f"mesh {shape}: expected {shape.ranks} processes of one run; start them with: {shape.launcher} train RUN "
            f"--mesh {shape} (or train on one, with --mesh '')"
        )
    if problem := why_not(shape, world, config, model):
        raise ConfigError(f"{problem}{_hint(shape, world, config, model)}")


def why_not(shape: MeshShape, world: int, config: "TrainConfig", model: ModelConfig) -> str | None:
    """The first thing that is wrong with a mesh for so many processes; None if it is right."""
    if shape.ranks != world:
        return f"mesh {shape}: has {shape.ranks} ranks, and there are {world} processes"
    if config.accumulate % shape.batches:
        return f"mesh {shape}: accumulate: expected a multiple of dp·ep = {shape.batches}, got {config.accumulate}"
    if shape.ep > 1 and model.n_routed_experts is None:
        return f"mesh {shape}: ep: the model has no experts to divide"
    if shape.ep > 1 and (model.n_routed_experts or 0) % shape.ep:
        return f"mesh {shape}: n_routed_experts: expected a multiple of ep = {shape.ep}, got {model.n_routed_experts}"
    pieces = shape.cp * shape.tp
    if config.batch_tokens % pieces:
        return f"mesh {shape}: batch_tokens: expected a multiple of cp·tp = {pieces}, got {config.batch_tokens}"
    try:
        tensor.check(model, shape.tp)
        if shape.pp > 1:
            pipeline.check(model, shape.pp, config.schedule, config.accumulate // shape.batches)
    except ValueError as error:
        return str(error)
    return None


def nearest(shape: MeshShape, world: int, config: "TrainConfig", model: ModelConfig) -> MeshShape | None:
    """Of the meshes that are right for so many processes, the one with the fewest axes changed, and those by the
    least factor; None if there is none."""

    def far(other: MeshShape) -> tuple[int, float, tuple[int, ...]]:
        factors = [abs(math.log2(a / b)) for a, b in zip(shape.sizes, other.sizes)]
        # Where all else is equal the axis that costs least: other batches rather than pieces of one.
        return sum(f > 0 for f in factors), round(sum(factors), 9), tuple(-other.sizes[AXES.index(a)] for a in _CHEAP)

    right = [other for other in shapes(world) if why_not(other, world, config, model) is None]
    return min(right, key=far, default=None)


_CHEAP = ("dp", "ep", "tp", "cp", "pp")


def shapes(world: int) -> Iterator[MeshShape]:
    """Every mesh of so many ranks."""

    def split(left: int, axes: int) -> Iterator[tuple[int, ...]]:
        if axes == 1:
            yield (left,)
            return
        for size in range(1, left + 1):
            if left % size == 0:
                for rest in split(left // size, axes - 1):
                    yield (size, *rest)

    for sizes in split(world, len(AXES)):
        yield MeshShape(*sizes)


def _hint(shape: MeshShape, world: int, config: "TrainConfig", model: ModelConfig) -> str:
    near = nearest(shape, world, config, model)
    return f"; the nearest that is right: {near}" if near else f"; no mesh of {world} ranks is right for this run"
