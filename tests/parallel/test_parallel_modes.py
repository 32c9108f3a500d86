"""Each way of spreading a model, and their products, against one process: gradients, and 20 steps."""

from pathlib import Path

import pytest
from ranks import on_ranks
from steps import Steps, compare, settings, take


@pytest.fixture(scope="session")
def alone(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Steps:
    return take(settings(tokens, tmp_path_factory.mktemp("alone"), "", {}))


def spread(tokens: Path, out: Path, meshes: list[str]) -> dict[str, Steps]:
    return {mesh: take(settings(tokens, out / mesh, mesh, {})) for mesh in meshes}


def check(ranks: int, meshes: list[str], tokens: Path, out: Path, alone: Steps) -> None:
    """One after the other in the same processes, whose start takes longer than the steps."""
    for rank, found in enumerate(on_ranks(ranks, spread, tokens, out, meshes)):
        for mesh in meshes:
            try:
                compare(found[mesh], alone)
            except AssertionError as error:
                raise AssertionError(f"{mesh}, rank {rank}: {error}") from None


MODES = ["dp=2", "pp=2", "ep=2", "tp=2", "cp=2"]


def test_two_ranks_take_the_steps_of_one(tokens: Path, tmp_path: Path, alone: Steps) -> None:
    check(2, MODES, tokens, tmp_path, alone)


PRODUCTS = ["dp=2,tp=2", "dp=2,cp=2", "cp=2,tp=2", "ep=2,tp=2", "ep=2,cp=2"]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", PRODUCTS)
def test_four_ranks_take_the_steps_of_one(mesh: str, tokens: Path, tmp_path: Path, alone: Steps) -> None:
    check(4, [mesh], tokens, tmp_path, alone)
