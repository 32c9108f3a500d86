"""The loss of a step, cut into microbatches without changing it.

Every mean is taken over the whole step: a microbatch contributes its sum divided by the step's total, so the
gradients of a step's microbatches add up to the gradient of the step, however it is cut.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from abyssal.data import Batch
from abyssal.model.balance import auxiliary_loss, sequence_balance_loss
from abyssal.model.experts import Routing
from abyssal.model.packing import Packing, shift
from abyssal.model.transformer import Transformer
from abyssal.ops.cross_entropy import linear_cross_entropy
from abyssal.train.config import TrainConfig


@dataclass(frozen=True)
class Microbatch:
    """One packed batch and what it is to predict. Depth 0 is the main model, depth d the MTP module d."""

    tokens: Tensor  # [T] int64
    packing: Packing
    targets: list[Tensor]  # a depth: [T] int64, the token 1 + d places on, 0 where there is none
    weights: list[Tensor]  # a depth: [T] float32, the weight of that target, 0 where there is none
    totals: list[float]  # a depth: Σ weights
    sequences: list[int]  # a depth: sequences of more than d tokens, which are those it routes

    @staticmethod
    def of(batch: Batch, modules: int) -> "Microbatch":
        """For a model with `modules` MTP modules. A weight belongs to the token that is predicted."""
        packing = Packing.of(batch.lengths, batch.tokens)
        depths = range(modules + 1)
        weights = [shift(batch.weights, packing, 1 + d)[0] for d in depths]
        return Microbatch(
            batch.tokens,
            packing,
            [shift(batch.tokens, packing, 1 + d)[0] for d in depths],
            weights,
            [float(w.sum(dtype=torch.float64)) for w in weights],
            [sum(n > d for n in batch.lengths) for d in depths],
        )

    def to(self, device: torch.device) -> "Microbatch":
        """The same on another device."""
        if device == self.tokens.device:
            return self

        def move(t: Tensor) -> Tensor:
            return t.to(device, non_blocking=True)

        packing = dataclasses.replace(
            self.packing, cu_seqlens=move(self.packing.cu_seqlens), positions=move(self.packing.positions)
        )
        targets, weights = [move(t) for t in self.targets], [move(w) for w in self.weights]
        return dataclasses.replace(self, tokens=move(self.tokens), packing=packing, targets=targets, weights=weights)


@dataclass(frozen=True)
class Totals:
    """What a step's sums are divided by."""

    tokens: int
    weights: list[float]  # a depth
    sequences: list[int]  # a depth

    @staticmethod
    def of(microbatches: Sequence[Microbatch]) -> "Totals":
        """Over all microbatches of a step; where nothing is to be predicted, 1."""
        return Totals(
            sum(m.tokens.shape[0] for m in microbatches),
            [sum(part) or 1.0 for part in zip(*(m.totals for m in microbatches))],
            [sum(part) or 1 for part in zip(*(m.sequences for m in microbatches))],
        )


class Losses(NamedTuple):
    """A microbatch's share of the step's losses: scalars that add up over the step. All but `total` detached."""

    total: Tensor
    main: Tensor
    mtp: list[Tensor]  # a module, unweighted
    balance: Tensor  # the balance losses, weighted by their alphas
    routings: list[Routing]  # a gate, in the order of `Transformer.gates`
    live: list[Tensor | None]  # a gate: which tokens it routes


def losses(model: Transformer, micro: Microbatch, totals: Totals, config: TrainConfig, mtp_weight: float) -> Losses:
    """L = L_main + λ/D Σ_d L_d + α Σ_layers L_balance (DeepSeek-V3, equations 17 and 24-25)."""
    states, routings = model.hidden(micro.tokens, micro.packing)
    live: list[Tensor | None] = [None] * len(routings)
    depth_of = [0] * len(routings)

    def predicted(states: Tensor, depth: int) -> Tensor:
        head, target, weight = model.head.weight, micro.targets[depth], micro.weights[depth]
        return linear_cross_entropy(states, head, target, weight) / totals.weights[depth]

    main = predicted(states, 0)
    total, mtp = main, []
    if len(model.mtp):
        for d, module in enumerate(model.predict_states(states, micro.tokens, micro.packing), start=1):
            loss = predicted(module.states, d)
            total = total + mtp_weight / len(model.mtp) * loss
            mtp.append(loss.detach())
            if module.routing is not None:
                routings, live, depth_of = [*routings, module.routing], [*live, module.live], [*depth_of, d]

    balance = torch.zeros_like(main)
    for routing, mask, d in zip(routings, live, depth_of, strict=True):
        if config.sequence_balance:
            share = micro.sequences[d] / totals.sequences[d]
            balance = balance + config.sequence_balance * share * sequence_balance_loss(routing, micro.packing, mask)
        if config.auxiliary_balance:
            share = micro.tokens.shape[0] / totals.tokens
            balance = balance + config.auxiliary_balance * share * auxiliary_loss(routing, mask)
    return Losses(total + balance, main.detach(), mtp, balance.detach(), routings, live)
