"""A model spread over a mesh, and a step's forward and backward passes over it."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from abyssal.model.balance import Balance
from abyssal.model.objective import LossScales, Measured, Microbatch, Objective, Totals
from abyssal.model.transformer import Transformer
from abyssal.ops.device import sent
from abyssal.parallel.context import spread_context
from abyssal.parallel.cut import cut, padded
from abyssal.parallel.experts import spread_experts
from abyssal.parallel.mesh import AXES, DATA, PIECES, STAGE, Mesh
from abyssal.parallel.passes import passes
from abyssal.parallel.pipeline import Pipeline
from abyssal.parallel.replay import Replay
from abyssal.parallel.shard import Split, Splits, drop_gathered, shard
from abyssal.parallel.tensor import spread_tensor


def place(model: Transformer, device: torch.device, dtype: torch.dtype | None = None) -> Transformer:
    """The model on `device`, in `dtype`; left alone where it is so already, as `to` does not take fake tensors."""
    for p in model.parameters():
        if p.device != device or (dtype is not None and p.dtype != dtype):
            return model.to(device, dtype)
    return model


class Piece(NamedTuple):
    """A parameter of which this rank owns a piece."""

    name: str
    param: nn.Parameter  # a DTensor over the ranks that hold the same values
    master: Tensor  # this rank's piece, float32 or wider, sharing its memory; may be empty
    split: Split | None


class Spread:
    """`model` as this rank has it, after it was given whole and alike to every rank.

    `wrap` is applied to the blocks before they are sharded: recomputation and compilation. Raises ValueError for a
    model that the mesh cannot divide.
    """

    def __init__(
        self, model: Transformer, mesh: Mesh, device: torch.device, dtype: torch.dtype, reshard: bool = True,
        wrap: Callable[[Transformer], None] = lambda model: None, schedule: str = "1f1b", accumulate: int = 1,
        halves: bool = True,
    ) -> None:  # fmt: skip
        """`accumulate`: the microbatches of a step, over all ranks; `schedule`: of a pipeline; `halves`: whether it may
        split backward passes, which blocks that are recomputed or compiled cannot well."""
        self.model, self.mesh, self.device = model, mesh, device
        self.wide = torch.promote_types(dtype, torch.float32)
        self.pipeline: Pipeline | None = None
        if mesh.shape.pp > 1:
            self.pipeline = Pipeline(model, mesh, dtype, schedule, accumulate // mesh.shape.batches, halves)
        place(model, device, self.wide)
        self.splits: Splits = {}
        if mesh.shape.cp > 1:
            spread_context(model, mesh)
        if mesh.shape.ep > 1:
            self.splits |= spread_experts(model, mesh)
        if mesh.shape.tp > 1:
            self.splits |= spread_tensor(model, mesh)  # around what context parallel made of attention
        wrap(model)
        if self.pipeline is not None:
            for stage in self.pipeline.build(self._whole):
                shard(stage, stage.blocks, mesh, dtype, reshard and self.pipeline.reshards, self.splits)
            return
        self.objective = Objective(model, self._whole)
        blocks = [*model.layers, *(module.block for module in model.mtp)]
        shard(self.objective, blocks, mesh, dtype, reshard, self.splits)

    replay: Replay | None = None  # of a microbatch's passes, where no pipeline divides them

    def parameters(self) -> list[Piece]:
        """This rank's pieces, by the parameters' names in a whole model; a parameter that two stages have is its
        owner's."""
        owners = {id(p): self.splits.get(m) for m in self.model.modules() for p in m.parameters(recurse=False)}
        copies = self.pipeline.copies() if self.pipeline is not None else set()
        return [
            Piece(name, p, cast(DTensor, p).to_local().detach(), owners[id(p)])
            for name, p in self.model.named_parameters()
            if p not in copies
        ]

    def run(
        self, microbatches: Sequence[Microbatch], scales: LossScales, collect: Callable[[], None], balance: Balance
    ) -> Tensor:
        """Forward and backward over the microbatches of a step that this rank's `reader` reads, on the CPU; `collect`
        is called at the end. Returns the sums of loss, main loss, balance loss and the MTP modules' losses over all
        ranks, `[3 + modules]`."""
        totals = Totals.of(microbatches, self._everywhere)
        return self.passes([cut(micro, self.mesh) for micro in microbatches], totals, scales, collect, balance)

    def passes(
        self, pieces: Sequence[Microbatch], totals: Totals, scales: LossScales, collect: Callable[[], None],
        balance: Balance,
    ) -> Tensor:  # fmt: skip
        """`run`, of microbatches already cut, whose step's totals are known."""
        if self.pipeline is not None:
            sums = self.pipeline.run([piece.to(self.device) for piece in pieces], totals, scales, balance)
        else:
            sums = passes(self.objective, pieces, totals, scales, balance, self.device, replay=self.replay)
        collect()
        dist.all_reduce(sums, group=self.mesh.group(*AXES))
        return sums

    def measure(self, micro: Microbatch) -> Measured:
        """Of a batch that every rank has, on the CPU; the same on every rank."""
        whole = padded(micro, self.mesh.size(*PIECES))
        local = cut(whole, self.mesh).to(self.device)
        if self.pipeline is not None:
            found = self.pipeline.measure(local)
        else:
            found = self.objective.measure(local)
            drop_gathered(self.objective)
        if self.mesh.size(*PIECES) > 1:
            for sums in found:
                dist.all_reduce(sums, group=self.mesh.group(*PIECES))
        return found

    def norms(self, squares: Tensor) -> Tensor:
        """The norms by part and over all, `[parts + 1]`, from this rank's sums of squares by part: every number has one
        owner."""
        dist.all_reduce(squares, group=self.mesh.group(*AXES))
        return torch.cat((squares, squares.sum()[None])).sqrt()

    def add_up(self, counts: Tensor) -> None:
        """Adds a tensor up, in place, over every rank of the stage: each saw other tokens."""
        dist.all_reduce(counts, group=self.mesh.group(*STAGE))

    def of_all_gates(self, violation: Tensor) -> Tensor:
        """What is known of this rank's gates, of all gates."""
        return violation if self.pipeline is None else self.pipeline.of_all_gates(violation)

    @property
    def reader(self) -> tuple[int, int]:
        """Which of a step's microbatches this rank reads: every `count`-th from number `place` on, `(place, count)`."""
        return self.mesh.place(*DATA), self.mesh.shape.batches

    def _everywhere(self, sums: Tensor) -> Tensor:
        """Adds a step's totals up over the readers."""
        sums = sent(sums, self.device)
        dist.all_reduce(sums, group=self.mesh.group(*DATA))
        return sums.to(self.wide)

    def _whole(self, counts: Tensor) -> Tensor:
        """Sums what balance losses count over the pieces of the same sequences."""
        if self.mesh.size(*PIECES) > 1:
            counts = counts.clone()
            dist.all_reduce(counts, group=self.mesh.group(*PIECES))
        return counts
