"""One stage of a pipeline: some of a model's blocks, and what stands before the first or after the last of them.

Stages are made of one `Transformer`, whose blocks on other ranks are taken out; so parameters keep their names. The
last stage has the final norm, the head and the MTP modules, which read the embedding too: it works on a copy, whose
owner is the first stage.
"""

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from abyssal.model.balance import Whole, expert_counts
from abyssal.model.experts import Gate, Routing
from abyssal.model.objective import (
    LossScales,
    Microbatch,
    Totals,
    balance_losses,
    counts_of,
    hits_of,
    live_of,
    prediction_losses,
)
from abyssal.model.positions import rotary
from abyssal.model.transformer import Transformer
from abyssal.ops.cross_entropy import linear_cross_entropy


class Elsewhere(nn.Module):
    """In the place of a part that other ranks have: a block, an MTP module, or what stands around them."""

    @property
    def block(self) -> nn.Module:
        return self


class Stage(nn.Module):
    """The blocks `layers` of a model; with `first` the embedding before them, with `last` everything after them."""

    def __init__(self, model: Transformer, layers: range, first: bool, last: bool, whole: Whole) -> None:
        """Of a model that still has these parts. `whole` as in `Objective`."""
        super().__init__()
        self.first, self.last, self.layers, self.whole = first, last, layers, whole
        view = copy.copy(model)
        view._modules = dict(model._modules)
        view.layers = nn.ModuleList(block if l in layers else Elsewhere() for l, block in enumerate(model.layers))
        if not last:
            view.norm, view.head = cast(Any, Elsewhere()), cast(Any, Elsewhere())
            view.mtp = nn.ModuleList(Elsewhere() for _ in model.mtp)
        tied = model.config.tie_word_embeddings
        self.copied = last and not first and (tied or len(model.mtp) > 0)
        if self.copied:
            view.embed = copy.deepcopy(model.embed)
        elif not first:
            view.embed = cast(Any, Elsewhere())
        if last and tied:
            view.head = copy.copy(model.head)
            view.head._parameters = {"weight": cast(nn.Parameter, view.embed.weight)}
        self.model = view
        self.number = 0  # the microbatch that the next forward pass is of
        self.gates = sum(isinstance(m, Gate) for m in view.modules())

    @property
    def blocks(self) -> list[nn.Module]:
        own = [self.model.layers[l] for l in self.layers]
        return [*own, *(cast(nn.Module, module.block) for module in self.model.mtp)] if self.last else own

    def begin(self, micros: Sequence[Microbatch], totals: Totals, scales: LossScales) -> None:
        """Before a step over these microbatches."""
        self.micros, self.totals, self.scales = micros, totals, scales
        device = micros[0].tokens.device
        experts = self.model.config.n_routed_experts or 1
        wide = totals.weights.dtype
        self.sums = torch.zeros(3 + len(self.model.mtp), dtype=wide, device=device)
        self.counts = torch.zeros(self.gates, experts, dtype=torch.int64, device=device)

    def end(self) -> tuple[Tensor, Tensor]:
        """What the step's forward passes came to: the sums of the losses of this stage, as `Spread.run` returns them,
        and how often each of its gates picked each expert, `[gates, E]`."""
        found = self.sums, self.counts
        del self.micros, self.totals, self.sums, self.counts
        return found

    def forward(self, x: Tensor) -> Tensor:
        """`x [T, D]` of microbatch `number` -> `[T, D]`, or the last stage's share of the loss, a scalar. The first
        stage reads tokens instead of `x`. Balance losses of other stages than the last join the backward pass where it
        comes by."""
        micro = self.micros[self.number]
        x, routings = self._through(x, micro)
        depths = [0] * len(routings)
        parts: list[Tensor] = []
        if self.last:
            predicted = prediction_losses(self.model, self.model.norm(x), micro, self.totals, self.scales)
            routings, depths = [*routings, *predicted.routings], depths + predicted.depths
            parts = [predicted.main, *predicted.mtp]
        balance = balance_losses(routings, depths, micro, self.totals, self.scales, self.whole)
        total = predicted.total + balance if self.last else balance
        with torch.no_grad():
            own = [total, parts[0] if parts else torch.zeros_like(total), balance, *parts[1:]]
            self.sums[: len(own)] += torch.stack([loss.to(self.sums.dtype) for loss in own])
            for row, routing, live in zip(self.counts, routings, live_of(depths, micro)):
                row += expert_counts(routing, live)
        if self.last:
            return total
        return cast(Tensor, _Beside.apply(x, balance)) if balance.requires_grad else x

    def measure(self, x: Tensor, micro: Microbatch) -> tuple[Tensor, Tensor, Tensor | None]:
        """Without gradients: `x [T, D]` -> `[T, D]`, or the last stage's sum of nats; how often each of the main
        model's gates here picked each expert, `[gates, E]` int64; and the last stage's `hits_of`."""
        with torch.no_grad():
            x, routings = self._through(x, micro)
            counts = counts_of(self.model, routings, micro)
            if not self.last:
                return x, counts, None
            states, head = self.model.norm(x), self.model.head.weight
            nats = linear_cross_entropy(states, head, micro.targets[0], micro.weights[0])
            return nats, counts, hits_of(self.model, states, micro)

    def _through(self, x: Tensor, micro: Microbatch) -> tuple[Tensor, list[Routing]]:
        """Through the blocks."""
        if self.first:
            x = self.model.enter(micro.tokens, micro.packing)
        angles = rotary(self.model.config, micro.packing.positions)
        routings = []
        for l in self.layers:
            x, routing = self.model.layers[l](x, angles, micro.packing, None, None)
            if routing is not None:
                routings.append(routing)
        return x, routings


class _Beside(torch.autograd.Function):
    """x, and in the backward pass the gradient of x + loss: as if the loss were added to what becomes of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.dtype = loss.dtype
        return x.detach()

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, Tensor]:
        return dx, torch.ones((), dtype=ctx.dtype, device=dx.device)
