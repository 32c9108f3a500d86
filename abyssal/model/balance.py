"""Keeping the experts busy: the auxiliary-loss-free bias update, the sequence-wise loss, the classic loss.

DeepSeek-V3, section 2.1.2. Everything here works on the `Routing`s that a forward pass returns. A forward pass
repeated by activation recomputation returns its routings nowhere, so each token is counted once.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from abyssal.model.experts import Gate, Routing
from abyssal.model.packing import Packing
from abyssal.ops.counts import count_picks

Whole = Callable[[Tensor], Tensor]  # adds a tensor up over the pieces of a batch


def alone(counts: Tensor) -> Tensor:
    """`whole` of a batch that is in one piece."""
    return counts


def expert_counts(routing: Routing, live: Tensor | None = None) -> Tensor:
    """[E] int64: how many tokens picked each expert, of those where `live [T]` is true (None: all)."""
    return count_picks(routing.indices, routing.scores.shape[-1], live)


def max_violation(counts: Tensor) -> Tensor:
    """`[..., E]` -> `[...]`: MaxVio (Wang et al. 2024), how far the busiest expert is above the mean, in means."""
    mean = counts.double().mean(-1).clamp(min=1e-9)
    return counts.double().amax(-1) / mean - 1


class Balance:
    """Counts of an optimizer step's whole global batch, and the one update they lead to.

    Call `observe` for every microbatch; with several data ranks, sum `counts` over them; then call `update`
    once. Counts are integers: the sign of a difference must not be lost to rounding.
    """

    def __init__(self, gates: Sequence[Gate], device: torch.device | None = None) -> None:
        """`device`: of the counts; the gates' where it is not given."""
        self.gates = list(gates)
        if device is None:
            device = self.gates[0].weight.device if self.gates else torch.device("cpu")
        experts = self.gates[0].weight.shape[0] if self.gates else 1
        self.counts = torch.zeros(len(self.gates), experts, dtype=torch.int64, device=device)

    @torch.no_grad()
    def observe(self, routings: Sequence[Routing], live: Sequence[Tensor | None] | None = None) -> None:
        """Adds one microbatch: a routing a gate, in the gates' order, and for each which tokens count."""
        if len(routings) != len(self.gates):
            raise ValueError(f"routings: expected one for each of {len(self.gates)} gates, got {len(routings)}")
        masks = live if live is not None else [None] * len(routings)
        for row, routing, mask in zip(self.counts, routings, masks, strict=True):
            row += expert_counts(routing, mask)

    @torch.no_grad()
    def update(self, speed: float | Tensor) -> Tensor:
        """b_i ← b_i + speed · sign(mean load − load_i) for every gate; returns MaxVio a gate and starts afresh."""
        violation = max_violation(self.counts)
        experts = self.counts.shape[-1]
        below = torch.sign(self.counts.sum(-1, keepdim=True) - self.counts * experts)  # exact, in integers
        for gate, direction in zip(self.gates, below):
            if gate.bias is not None:
                gate.bias += speed * direction.to(gate.bias.dtype)
        self.counts.zero_()
        return violation


class Sequences(NamedTuple):
    """Which sequence each token belongs to."""

    of_token: Tensor  # [T] int64
    sequences: int

    @staticmethod
    def of(packing: Packing) -> "Sequences":
        return Sequences(packing.sequence_of_token(), packing.sequences)


def sequence_balance_loss(
    routing: Routing, spans: Sequences | Packing, live: Tensor | None = None, whole: Whole = alone
) -> Tensor:
    """Σ_i f_i P_i within each sequence, averaged over those that have tokens (equations 17-20); a scalar.

    f_i is E/(K·T_s) times how often sequence s picked expert i; P_i its mean normalised score, which carries the
    gradient. 1 when perfectly balanced. Multiply by α. Where the sequences are cut into pieces, `whole` adds a tensor
    up over them, and the pieces' losses add up to the loss.
    """
    scores, indices = routing.scores, routing.indices
    E, K = scores.shape[-1], indices.shape[-1]
    sequence, S = spans if isinstance(spans, Sequences) else Sequences.of(spans)
    one = torch.ones_like(scores[:, :1]) if live is None else live[:, None].to(scores.dtype)
    picked = torch.zeros_like(scores).scatter(1, indices, 1.0) * one
    share = scores / scores.sum(-1, keepdim=True) * one
    counts = scores.new_zeros(S, E + 1).index_add(0, sequence, torch.cat((picked, one), -1).detach())
    counts = whole(counts)
    tokens = counts[:, E:]
    f = counts[:, :E] * (E / K) / tokens.clamp(min=1)
    P = scores.new_zeros(S, E).index_add(0, sequence, share) / tokens.clamp(min=1)
    return (f * P).sum() / (tokens > 0).sum().clamp(min=1)


def auxiliary_loss(routing: Routing, live: Tensor | None = None, whole: Whole = alone) -> Tensor:
    """The classic loss, Σ_i f_i P_i over the whole batch (Fedus et al. 2021, equation 4); a scalar. Multiply by α.
    `whole` as in `sequence_balance_loss`."""
    scores, indices = routing.scores, routing.indices
    E, K = scores.shape[-1], indices.shape[-1]
    one = torch.ones_like(scores[:, :1]) if live is None else live[:, None].to(scores.dtype)
    counts = whole(torch.cat((expert_counts(routing, live).to(scores.dtype), one.sum()[None])))
    tokens = counts[E].clamp(min=1)
    P = (scores / scores.sum(-1, keepdim=True) * one).sum(0) / tokens
    return (counts[:E] * E / (K * tokens) * P).sum()
