"""DeepSeekMoE (DeepSeek-V3, section 2.1.2): gate, routed experts, shared experts.

The gate scores every expert, picks K of them for each token, within the best groups where experts are grouped, and
weights them. A bias steers which are picked and nothing else: a gate value is made of the unbiased score.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from abyssal.config import ModelConfig
from abyssal.model.layers import MLP, Pinned
from abyssal.ops.experts import experts, read_together, with_shared
from abyssal.ops.fork import fork
from abyssal.ops.fp8_linear import fp8_experts
from abyssal.ops.gate import gate


class Routing(NamedTuple):
    """What a gate decided, for balancing and for study."""

    weights: Tensor  # [T, K] gate values, float32 or wider
    indices: Tensor  # [T, K] int64 the experts picked
    scores: Tensor  # [T, E] unbiased scores of all experts, float32 or wider


class Gate(Pinned):
    """Scores, picks and weights. `bias` `[E]` float32, where balancing is auxiliary-loss-free, is a buffer: it is
    moved by the balance update, not by a gradient, and stays float32 through `.to(dtype)`."""

    bias: Tensor | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.n_routed_experts is not None
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        bias = torch.zeros(config.n_routed_experts, dtype=torch.float32) if config.router_bias else None
        self.register_buffer("bias", bias)

    def pinned(self) -> list[str]:
        return ["bias"] if self.bias is not None else []

    def forward(self, x: Tensor) -> Routing:
        """`x [T, D]` -> Routing (equations 13-16). A group is worth its best two (V3) or its best one (V2)."""
        c = self.config
        return Routing(*gate(
            x, self.weight, self.bias, c.scoring_func, c.n_group, c.topk_group, c.num_experts_per_tok,
            c.norm_topk_prob, c.routed_scaling_factor, "best" if self.bias is None else "best two",
        ))  # fmt: skip


class Experts(Pinned):
    """The routed experts' weights, stacked: w1, w3 `[E, F, D]`, w2 `[E, D, F]`; if FP8, a scale a 128x128 block."""

    w1_scale: Tensor | None
    w2_scale: Tensor | None
    w3_scale: Tensor | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.n_routed_experts is not None
        E, D, F = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.w1 = nn.Parameter(torch.empty(E, F, D))
        self.w2 = nn.Parameter(torch.empty(E, D, F))
        self.w3 = nn.Parameter(torch.empty(E, F, D))
        for name in ("w1_scale", "w2_scale", "w3_scale"):
            self.register_buffer(name, None)

    def pinned(self) -> list[str]:
        return [*super().pinned(), *(name for name, t in self._buffers.items() if t is not None)]

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """`[T, D]` -> `[T, D]`: the weighted sum of each token's experts."""
        if self.w1_scale is not None and self.w2_scale is not None and self.w3_scale is not None:
            return fp8_experts(
                x, self.w1, self.w1_scale, self.w2, self.w2_scale, self.w3, self.w3_scale, routing.indices,
                routing.weights,
            )  # fmt: skip
        return experts(x, self.w1, self.w2, self.w3, routing.indices, routing.weights)


class MoE(nn.Module):
    """Routed experts and, beside them, shared ones that see every token (equation 12)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Gate(config)
        self.experts = Experts(config)
        shared = config.n_shared_experts or 0
        self.shared_experts = MLP(config.hidden_size, shared * config.moe_intermediate_size) if shared else None

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        """`[T, D]` -> `[T, D]` and what the gate decided."""
        e, s = self.experts, self.shared_experts
        x, for_gate, for_shared = fork(x, 3) if s is not None else (x, x, x)
        routing = self.gate(for_gate)
        if s is not None and read_together(x, e.w1, e.w2, e.w3, routing.indices, s.w1.weight) and s.plain:
            shared = s.w1.weight, s.w2.weight, s.w3.weight
            return with_shared(x, e.w1, e.w2, e.w3, routing.indices, routing.weights, *shared), routing
        y = e(x, routing)
        return (y if s is None else s.add_to(y, for_shared)), routing
