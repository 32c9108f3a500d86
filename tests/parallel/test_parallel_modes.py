"""Each way of spreading a model, and their products, against one process: gradients, and 20 steps."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from steps import Steps, compare, settings, take

from abyssal.data import Batch
from abyssal.model.objective import Microbatch
from abyssal.parallel.accord import Accord
from abyssal.parallel.cut import piece
from abyssal.parallel.replay import Replay


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


LENGTHS = [[[9, 3, 4], [16]], [[2, 2, 2, 2, 8], [5, 11]]]  # of each of two ranks, its microbatches of a step


def filled_up() -> list[list[tuple[int, int]]]:
    return [sizes(pieces) for pieces in (False, True)]


def sizes(pieces: bool) -> list[tuple[int, int]]:
    """How many sequences each of a rank's microbatches has then, and how long they may be."""
    rank = dist.get_rank()
    made = [Microbatch.of(Batch(torch.zeros(16, dtype=torch.int64), n, torch.ones(16)), 0) for n in LENGTHS[rank]]
    if pieces:
        made = [piece(micro, 1, 0, 2, rank) for micro in made]
    found = Replay(lambda: lambda: None, Accord(True).most).alike(made)
    assert all(torch.equal(a.tokens, b.tokens) and a.totals == b.totals for a, b in zip(made, found, strict=True))
    return [(micro.packing.sequences, micro.packing.max_len) for micro in found]


def test_batches_that_are_captured_are_of_the_same_kinds_on_all_ranks() -> None:
    (whole, pieces), (other, others) = on_ranks(2, filled_up)
    assert whole == other == [(8, 16), (2, 16)]
    assert [pieces, others] == [[(3, 9), (1, 16)], [(5, 8), (2, 11)]]  # those are not captured
