"""Captured passes over many ranks, as far as it can be seen without a GPU: what a graph does to gradients' memory."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ranks import on_ranks
from steps import settings
from test_parallel_experts import Fixed, make, tokens_of
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from abyssal.data import TokenSet
from abyssal.model.objective import Microbatch, Totals
from abyssal.parallel import replay
from abyssal.parallel.dispatch import Way
from abyssal.parallel.experts import SpreadMoE
from abyssal.parallel.replay import Replay, Work, counted, tensors_of
from abyssal.train.optimizer import Optimizer
from abyssal.train.trainer import Trainer


def local(gradient: Any) -> Tensor:
    found: Tensor = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    return found


class Written:
    """A pass that, like a CUDA graph, writes gradients where they lay when it was captured, wherever others lie now."""

    def __init__(self, optimizer: Optimizer, run: Any) -> None:
        self.optimizer, self.run = optimizer, run
        self.added = [p.grad is not None for p in optimizer.params]
        self.sums = run()
        self.at = [None if p.grad is None else local(p.grad) for p in optimizer.params]

    def replay(self) -> None:
        there = [p.grad for p in self.optimizer.params]
        for p in self.optimizer.params:
            p.grad = None
        self.sums.copy_(self.run())
        for p, before, at, added in zip(self.optimizer.params, there, self.at, self.added, strict=True):
            new, p.grad = p.grad, before
            if new is not None and at is not None:
                at.add_(local(new)) if added else at.copy_(local(new))

    def reset(self) -> None:
        pass


class Taped(Replay):
    """Replays what has been captured by computing it again."""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer.optimizer.snapshot, trainer.accord.most)
        self.optimizer, self.balance, self.captured = trainer.optimizer, trainer.balance, 0

    def _capture(self, work: Work, micro: Microbatch, totals: Totals, device: torch.device) -> Any:
        def mine(t: Tensor) -> Tensor:
            return t.clone()

        packing = micro.packing
        own = dataclasses.replace(
            micro, tokens=mine(micro.tokens), sequences=counted(micro, totals.sequences.dtype).clone(),
            packing=dataclasses.replace(
                packing, cu_seqlens=mine(packing.cu_seqlens), positions=mine(packing.positions)
            ),
            targets=[mine(t) for t in micro.targets], weights=[mine(t) for t in micro.weights],
            live=[mine(t) for t in micro.live],
        )  # fmt: skip
        kept = Totals(totals.tokens.clone(), totals.weights.clone(), totals.sequences.clone())
        self.captured += 1
        before = [None if p.grad is None else local(p.grad).clone() for p in self.optimizer.params]
        counts = self.balance.counts.clone()
        graph = Written(self.optimizer, lambda: work(own, kept))
        self.balance.counts.copy_(counts)
        for at, was in zip(graph.at, before, strict=True):  # a capture computes nothing
            if at is not None and was is not None:
                at.copy_(was)
        return replay._Graph(graph, tensors_of(own, kept), graph.sums, self._snapshot())  # type: ignore[arg-type]


@contextmanager
def never() -> Iterator[list[str]]:
    yield []


def norms(tokens: Path, out: Path, mesh: str, accumulate: int, taped: bool) -> tuple[list[list[float]], int]:
    config = settings(tokens, out, mesh, {}, accumulate=accumulate)
    trainer = Trainer(config, config.model_settings(), TokenSet.open(tokens))
    found = []
    if taped:
        replay.waits = never
        Tensor.pin_memory = lambda self: self  # type: ignore[method-assign, misc, assignment]
        trainer.spread.replay = Taped(trainer)
    with trainer.stream() as stream:
        for _ in range(10):
            counts = trainer.balance.counts
            step = trainer.step(next(stream))
            assert counts is trainer.balance.counts
            found.append([step.loss, step.main_loss, *step.mtp_losses, step.grad_norm])
    return found, getattr(trainer.spread.replay, "captured", 0)


COUNTS = (2, 4, 6)  # microbatches of a step, over both ranks


def launched_and_captured(tokens: Path, out: Path) -> list[list[tuple[list[list[float]], int]]]:
    return [[norms(tokens, out, "dp=2", count, taped) for count in COUNTS] for taped in (False, True)]


def test_captured_passes_over_two_ranks_leave_the_gradients_of_launched_ones(tokens: Path, tmp_path: Path) -> None:
    for launched, replayed in on_ranks(2, launched_and_captured, tokens, tmp_path):
        for count, (one, _), (other, captured) in zip(COUNTS, launched, replayed, strict=True):
            assert captured > 0
            same = torch.testing.assert_close
            same(torch.tensor(other), torch.tensor(one), rtol=1e-4, atol=1e-5, msg=f"{count} microbatches")


def unfinished() -> list[int]:
    return [unfinished_of(all_go, shared) for all_go in (False, True) for shared in (False, True)]


def unfinished_of(all_go: bool, shared: bool) -> int:
    """Exchanges of a block that is computed again, forward and backward, that nobody waited for."""
    ways: list[Way] = []
    send = Way.send

    def told(self: Way, *args: Any) -> None:
        ways.append(self)
        send(self, *args)

    Way.send = told  # type: ignore[method-assign]
    x, weights, indices, dy = tokens_of(0, [[0, 3], [2, 1]], 2)
    group = dist.group.WORLD
    assert group is not None
    spread = SpreadMoE(make(shared), group)
    spread.gate, spread.all_go = Fixed(weights, indices), all_go
    y, _ = checkpoint(spread, x, use_reentrant=False)
    y.backward(dy)
    Way.send = send  # type: ignore[method-assign]
    assert len(ways) == (11 if not all_go else 9)
    return sum(bool(way.works) for way in ways)


def test_what_is_on_its_way_when_a_block_is_computed_again_is_waited_for() -> None:
    """In a graph nothing else keeps what is received into: the next kernels would write there."""
    assert on_ranks(2, unfinished) == [[0, 0, 0, 0]] * 2
