"""Multi-token prediction (DeepSeek-V3, section 2.2): D modules in sequence, each one token further.

Module d joins, at every position, the state of depth d-1 with the embedding of the token d places on, and passes
them through a block of its own; embedding and head are the main model's. Depth 0 is the main model's state after its
final norm, and a depth hands on its state after its own.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from abyssal.config import ModelConfig
from abyssal.model.experts import Routing
from abyssal.model.layers import Linear, RMSNorm
from abyssal.model.packing import Packing, shift
from abyssal.model.positions import Rotary, rotary

if TYPE_CHECKING:
    from abyssal.model.transformer import Transformer


class Prediction(NamedTuple):
    """What one module makes of a batch."""

    states: Tensor  # [T, D] after the module's norm: what the head and the next module read
    routing: Routing | None
    live: Tensor  # [T] bool: the position has the token that the module joins; other rows are undefined


class PredictionModule(nn.Module):
    """h' = block(eh_proj [enorm(embedding of the token ahead); hnorm(state)]) (equations 21-22)."""

    def __init__(self, config: ModelConfig, block: nn.Module) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.enorm = RMSNorm(width, eps)
        self.hnorm = RMSNorm(width, eps)
        self.eh_proj = Linear(2 * width, width)
        self.block = block
        self.norm = RMSNorm(width, eps)

    def forward(
        self,
        states: Tensor,
        ahead: Tensor,
        angles: Rotary | None,
        packing: Packing,
        cache: dict[str, Tensor] | None = None,
        path: str | None = None,
    ) -> tuple[Tensor, Routing | None]:
        """`states [T, D]` of the depth before, `ahead [T, D]` embeddings of the tokens ahead -> `[T, D]` normed."""
        joined = self.eh_proj(torch.cat((self.enorm(ahead), self.hnorm(states)), -1))
        x, routing = self.block(joined, angles, packing, cache, path)
        return self.norm(x), routing


def predict_further(
    model: "Transformer", states: Tensor, tokens: Tensor, packing: Packing,
    ahead: Sequence[tuple[Tensor, Tensor]] | None = None,
) -> list[Prediction]:  # fmt: skip
    """The modules in sequence over whole sequences. A row that lacks its token ahead joins token 0; being causal,
    no row before it sees what comes of that.

    `ahead`: for module d, from 1, `shift(tokens, packing, d)`, where a caller has it; where these tokens are only a
    piece of their sequences, it must.
    """
    angles = rotary(model.config, packing.positions)
    predictions = []
    for d, module in enumerate(model.mtp, start=1):
        further, live = shift(tokens, packing, d) if ahead is None else ahead[d - 1]
        states, routing = module(states, model.enter(further, packing), angles, packing)
        predictions.append(Prediction(states, routing, live))
    return predictions
