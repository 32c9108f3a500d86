"""Each way of spreading a model, and their products, against one process: gradients, and 20 steps."""

from pathlib import Path

import pytest
from ranks import on_ranks
from steps import Steps, compare, settings, take


@pytest.fixture(scope="session")
def alone(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Steps:
    return take(settings(tokens, tmp_path_factory.mktemp("alone"), "", {}))


def spread(tokens: Path, out: Path, mesh: str, changes: dict) -> Steps:
    return take(settings(tokens, out, mesh, {}, **changes))


MODES = ["dp=2", "pp=2", "ep=2", "tp=2", "cp=2"]


@pytest.mark.parametrize("mesh", MODES)
def test_two_ranks_take_the_steps_of_one(mesh: str, tokens: Path, tmp_path: Path, alone: Steps) -> None:
    for found in on_ranks(2, spread, tokens, tmp_path, mesh, {}):
        compare(found, alone)


PRODUCTS = ["dp=2,tp=2", "dp=2,cp=2", "cp=2,tp=2", "ep=2,tp=2", "ep=2,cp=2"]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", PRODUCTS)
def test_four_ranks_take_the_steps_of_one(mesh: str, tokens: Path, tmp_path: Path, alone: Steps) -> None:
    for found in on_ranks(4, spread, tokens, tmp_path, mesh, {}):
        compare(found, alone)
