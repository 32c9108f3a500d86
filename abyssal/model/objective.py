"""What training minimises, cut into microbatches without changing it (DeepSeek-V3, equations 17 and 24-25).

Every mean is taken over the whole step: a microbatch contributes its sum divided by the step's total, so the
gradients of a step's microbatches add up to the gradient of the step, however it is cut. For the same reason a
microbatch may itself be cut between its tokens: each piece carries its targets, and what a balance loss counts over
a whole sequence is asked for through `whole`, which sums a tensor over the pieces.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from abyssal.model.balance import (
    Sequences,
    Whole,
    alone,
    auxiliary_loss,
    expert_counts,
    sequence_balance_loss,
)
from abyssal.model.experts import Routing
from abyssal.model.packing import Packing, shift
from abyssal.model.transformer import Transformer
from abyssal.ops.cross_entropy import CHUNK_LOGITS, linear_cross_entropy
from abyssal.ops.device import sent


class Packed(Protocol):
    """A batch as `abyssal.data` makes it."""

    @property
    def tokens(self) -> Tensor: ...  # [T] int64
    @property
    def lengths(self) -> list[int]: ...  # of the packed sequences
    @property
    def weights(self) -> Tensor: ...  # [T] float32


@dataclass(frozen=True)
class Microbatch:
    """One packed batch and what it is to predict. Depth 0 is the main model, depth d the MTP module d."""

    tokens: Tensor  # [T] int64
    packing: Packing
    targets: list[Tensor]  # a depth: [T] int64, the token 1 + d places on, 0 where there is none
    weights: list[Tensor]  # a depth: [T] float32, the weight of that target, 0 where there is none
    live: list[Tensor]  # a module, from depth 1: [T] bool, whether there is a token d places on
    totals: list[float]  # a depth: Σ weights
    # A depth: sequences of more than d tokens, which are those it routes. In a CUDA graph a tensor.
    sequences: list[int] | Tensor
    spans: Sequences | None = None  # which sequence each token is of, where the packing does not say it
    cut_from: int | None = None  # tokens of the batch that this is a piece of; totals and sequences are that batch's
    real: Tensor | None = None  # [T] bool: tokens that are no padding, which trained batches do not have; None: all are

    @staticmethod
    def of(batch: Packed, modules: int) -> "Microbatch":
        """For a model with `modules` MTP modules. A weight belongs to the token that is predicted."""
        packing = Packing.of(batch.lengths, batch.tokens)
        depths = range(modules + 1)
        weights = [shift(batch.weights, packing, 1 + d)[0] for d in depths]
        further = [shift(batch.tokens, packing, 1 + d) for d in depths]
        return Microbatch(
            batch.tokens,
            packing,
            [targets for targets, _ in further],
            weights,
            [inside for _, inside in further[:-1]],
            [float(w.sum(dtype=torch.float64)) for w in weights],
            [sum(n > d for n in batch.lengths) for d in depths],
        )

    def to(self, device: torch.device) -> "Microbatch":
        """The same on another device; copies from the CPU to a GPU are under way when it returns."""
        if device == self.tokens.device:
            return self

        def move(t: Tensor) -> Tensor:
            return sent(t, device)

        packing, spans = self.packing, self.spans
        moved: dict[str, Any] = {
            field.name: move(value)
            for field in dataclasses.fields(packing)
            if isinstance(value := getattr(packing, field.name), Tensor)
        }
        return dataclasses.replace(
            self,
            tokens=move(self.tokens),
            packing=dataclasses.replace(packing, **moved),
            targets=[move(t) for t in self.targets],
            weights=[move(w) for w in self.weights],
            live=[move(l) for l in self.live],
            spans=None if spans is None else Sequences(move(spans.of_token), spans.sequences),
            real=None if self.real is None else move(self.real),
        )


@dataclass(frozen=True)
class Totals:
    """What a step's sums are divided by. Python never reads them: they may be on their way to a GPU."""

    tokens: Tensor  # a scalar
    weights: Tensor  # [1 + modules], a depth
    sequences: Tensor  # [1 + modules], a depth

    @staticmethod
    def of(microbatches: Sequence[Microbatch], everywhere: Whole = alone) -> "Totals":
        """Over all microbatches of a step; where nothing is to be predicted, 1. `everywhere` adds a float64 tensor up
        over all that have other microbatches of the step, and says what device and dtype the totals are of."""
        tokens = [sum(m.tokens.shape[0] for m in microbatches)]
        weights = [sum(part) for part in zip(*(m.totals for m in microbatches))]
        sequences = [sum(part) for part in zip(*(m.sequences for m in microbatches))]
        sums = everywhere(torch.tensor(tokens + weights + sequences, dtype=torch.float64))
        sums = torch.where(sums == 0, 1.0, sums)
        tokens_sum, weight_sums, sequence_sums = sums.split([1, len(weights), len(sequences)])
        return Totals(tokens_sum[0], weight_sums, sequence_sums)


@dataclass(frozen=True)
class LossScales:
    """What the losses beside the main one are multiplied by."""

    mtp: float  # λ of equation 25
    sequence_balance: float = 0.0  # α of equation 17
    auxiliary_balance: float = 0.0  # of the classic loss


class Losses(NamedTuple):
    """A microbatch's share of the step's losses: scalars that add up over the step. All but `total` detached."""

    total: Tensor
    main: Tensor
    mtp: list[Tensor]  # a module, unweighted
    balance: Tensor  # the balance losses, weighted by their alphas
    routings: list[Routing]  # a gate, in the order of `Transformer.gates`
    live: list[Tensor | None]  # a gate: which tokens it routes


class Predicted(NamedTuple):
    """The losses of a batch's predictions, and what the MTP modules' gates decided."""

    total: Tensor  # L_main + λ/D Σ_d L_d
    main: Tensor
    mtp: list[Tensor]
    routings: list[Routing]
    depths: list[int]  # a routing: the module it is of


class Measured(NamedTuple):
    """How well a batch is predicted, and what the main model's gates decided. Sums add up over batches."""

    nats: Tensor  # Σ weights · −log p, a scalar, float64
    counts: Tensor  # [gates, E] int64: how often each picked each expert
    hits: Tensor  # [modules, 4] int64, see `hits_of`; of the modules that the batch is for

    @staticmethod
    def of(model: Transformer, micro: Microbatch) -> "Measured":
        states, routings = model.hidden(micro.tokens, micro.packing)
        nats = linear_cross_entropy(states, model.head.weight, micro.targets[0], micro.weights[0])
        return Measured(nats.double(), counts_of(model, routings, micro), hits_of(model, states, micro))


def hits_of(model: Transformer, states: Tensor, micro: Microbatch) -> Tensor:
    """`[modules, 4]` int64: over the positions that have a target for MTP module d, how many there are, at how many its
    likeliest token is the target, and the same of those where that holds for the main model and the modules before d,
    whose tokens a speculating engine would have kept. `states [T, D]` of the main model after its final norm."""
    found = []
    if len(micro.targets) > 1:
        kept = greedy(model, states) == micro.targets[0]
        ahead = list(zip(micro.targets, micro.live))
        for d, module in enumerate(model.predict_states(states, micro.tokens, micro.packing, ahead), start=1):
            inside, right = micro.weights[d] > 0, greedy(model, module.states) == micro.targets[d]
            before, kept = kept, kept & right
            found.append(torch.stack([m.sum() for m in (inside, inside & right, inside & before, inside & kept)]))
    return torch.stack(found) if found else torch.zeros(0, 4, dtype=torch.int64, device=micro.tokens.device)


def greedy(model: Transformer, states: Tensor) -> Tensor:
    """`[T, D]` -> `[T]` int64: the likeliest token of each row. Never holds all logits."""
    step = max(CHUNK_LOGITS // model.config.vocab_size, 1)
    return torch.cat([model.logits(part).argmax(-1) for part in states.split(step)])


def counts_of(model: Transformer, routings: Sequence[Routing], micro: Microbatch) -> Tensor:
    """`[gates, E]` int64: how often each gate picked each expert."""
    if routings:
        return torch.stack([expert_counts(routing, micro.real) for routing in routings])
    return torch.zeros(0, model.config.n_routed_experts or 1, dtype=torch.int64, device=micro.tokens.device)


class Objective(nn.Module):
    """The loss of a model over a microbatch: L = L_main + λ/D Σ_d L_d + α Σ_layers L_balance."""

    def __init__(self, model: Transformer, whole: Whole = alone) -> None:
        super().__init__()
        self.model = model
        self.whole = whole

    def forward(self, micro: Microbatch, totals: Totals, scales: LossScales) -> Losses:
        """The microbatch's share."""
        states, routings = self.model.hidden(micro.tokens, micro.packing)
        predicted = prediction_losses(self.model, states, micro, totals, scales)
        depths = [0] * len(routings) + predicted.depths
        routings = [*routings, *predicted.routings]
        balance = balance_losses(routings, depths, micro, totals, scales, self.whole)
        return Losses(
            predicted.total + balance, predicted.main.detach(), [loss.detach() for loss in predicted.mtp],
            balance.detach(), routings, live_of(depths, micro),
        )  # fmt: skip

    def measure(self, micro: Microbatch) -> Measured:
        """How well the main model and, where the batch is for them, the MTP modules predict; without gradients."""
        with torch.no_grad():
            return Measured.of(self.model, micro)


def prediction_losses(
    model: Transformer, states: Tensor, micro: Microbatch, totals: Totals, scales: LossScales
) -> Predicted:
    """The main loss and the MTP modules', from the main model's states `[T, D]` after its final norm."""

    def loss_of(states: Tensor, depth: int) -> Tensor:
        head, target, weight = model.head.weight, micro.targets[depth], micro.weights[depth]
        return linear_cross_entropy(states, head, target, weight) / totals.weights[depth]

    main = loss_of(states, 0)
    total, mtp = main, []
    routings: list[Routing] = []
    depths: list[int] = []
    # The token d places on is the target of the depth before.
    ahead = list(zip(micro.targets, micro.live))
    for d, module in enumerate(model.predict_states(states, micro.tokens, micro.packing, ahead), start=1):
        loss = loss_of(module.states, d)
        total = total + scales.mtp / len(model.mtp) * loss
        mtp.append(loss)
        if module.routing is not None:
            routings.append(module.routing)
            depths.append(d)
    return Predicted(total, main, mtp, routings, depths)


def balance_losses(
    routings: Sequence[Routing], depths: Sequence[int], micro: Microbatch, totals: Totals, scales: LossScales,
    whole: Whole = alone,
) -> Tensor:  # fmt: skip
    """The balance losses of some gates, weighted, a scalar; `depths`: the MTP module that each gate is of, or 0."""
    total = micro.weights[0].new_zeros((), dtype=routings[0].scores.dtype if routings else None)
    if not (scales.sequence_balance or scales.auxiliary_balance):
        return total
    spans = micro.spans or Sequences.of(micro.packing)
    for routing, d, live in zip(routings, depths, live_of(depths, micro)):
        if scales.sequence_balance:
            share = micro.sequences[d] / totals.sequences[d]
            total = total + scales.sequence_balance * share * sequence_balance_loss(routing, spans, live, whole)
        if scales.auxiliary_balance:
            share = (micro.cut_from or micro.tokens.shape[0]) / totals.tokens
            total = total + scales.auxiliary_balance * share * auxiliary_loss(routing, live, whole)
    return total


def live_of(depths: Sequence[int], micro: Microbatch) -> list[Tensor | None]:
    """Which tokens each gate routes; None: all."""
    return [micro.live[d - 1] if d else None for d in depths]
