"""Expert parallel: each rank of `ep` holds some of the routed experts, and works for the tokens of all.

Gate and shared experts stay as they are, over a rank's own tokens. The shared experts are computed while rows are on
their way: the inner products on the way to the routed experts, the outer one on the way back, where nothing replaced
them, and so are the routed experts of the rank's own rows; in the backward pass likewise.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from abyssal.config import ModelConfig
from abyssal.model.experts import Experts, MoE, Routing
from abyssal.model.layers import MLP, Pinned
from abyssal.model.transformer import Transformer
from abyssal.ops.experts import experts
from abyssal.ops.fork import fork
from abyssal.parallel.dispatch import (
    Arrived,
    Plan,
    Return,
    arrive,
    collect,
    depart,
    depart_choices,
    give_back,
    plan,
    plan_of_all,
    reached,
    stays,
)
from abyssal.parallel.mesh import Mesh
from abyssal.parallel.shard import Split, Splits

NEARLY_ALL = 0.9  # of a rank's tokens


def check(config: ModelConfig, ep: int) -> None:
    """Raises ValueError if `ep` ranks cannot divide the experts evenly."""
    if ep > 1 and (not config.n_routed_experts or config.n_routed_experts % ep):
        raise ValueError(f"mesh ep={ep}: n_routed_experts: expected a multiple of {ep}, got {config.n_routed_experts}")


class HeldExperts(Pinned):
    """The experts from `first` on that a rank holds, copied from all: w1, w3 `[held, F, D]`, w2 `[held, D, F]`."""

    def __init__(self, whole: Experts, first: int, held: int) -> None:
        """Raises ValueError if the weights are FP8, which cannot be trained."""
        super().__init__()
        if whole.w1_scale is not None:
            raise ValueError("experts: expected weights to train, got FP8 with scales")
        self.first, self.held = first, held
        self.w1, self.w2, self.w3 = (
            nn.Parameter(w.detach()[first : first + held].clone()) for w in (whole.w1, whole.w2, whole.w3)
        )

    def forward(self, theirs: Arrived, own: Arrived, plan: Plan) -> tuple[Return, Tensor]:
        """Each row's sum over its experts that are held here: other ranks' rows first, which are on their way back when
        this returns, then this rank's own, `[own, D]`."""
        returned = give_back(self._sums(theirs, plan.sizes.choices), plan)
        return returned, self._sums(own, plan.sizes.own_choices)

    def _sums(self, rows: Arrived, choices: int) -> Tensor:
        held = rows.indices - self.first
        return experts(rows.x, self.w1, self.w2, self.w3, held, rows.weights, choices=choices)


class SpreadMoE(nn.Module):
    """An `MoE` whose routed experts lie on several ranks; the same names, and the same result."""

    def __init__(self, moe: MoE, group: dist.ProcessGroup, alike: bool = False) -> None:
        """`alike`: the ranks always have equally many tokens; where nearly all of them go everywhere, all do then."""
        super().__init__()
        self.group = group
        self.count = moe.gate.weight.shape[0]  # of all experts
        held = self.count // group.size()
        chosen = moe.gate.config.num_experts_per_tok
        self.all_go = alike and group.size() == 2 and reached(self.count, held, chosen) >= NEARLY_ALL
        self.gate = moe.gate
        self.experts = HeldExperts(moe.experts, group.rank() * held, held)
        self.shared_experts = moe.shared_experts

    @torch.compiler.disable
    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        """`[T, D]` -> `[T, D]` and what the gate decided, of this rank's tokens. Every rank of the group calls it."""
        x, for_own, for_gate, for_shared = fork(x, 4)
        if self.all_go:
            route = plan_of_all(x.shape[0], self.gate.config.num_experts_per_tok, self.group, x.device)
            departed = depart(x, route)  # while the gate makes its choices
            routing: Routing = self.gate(for_gate)
        else:
            routing = self.gate(for_gate)
            route = plan(routing.indices, self.count, self.experts.held, self.group)
            departed = depart(x, route)
        choices = depart_choices(routing.weights, routing.indices, route)
        s = self.shared_experts
        # Where another way of spreading, or FP8, has replaced an MLP's forward it goes as one.
        in_two = s is not None and type(s).forward is MLP.forward and "forward" not in s.__dict__
        shared = None if s is None else s.hidden(for_shared) if in_two else s(for_shared)
        own = stays(for_own, routing.weights, routing.indices, route)
        returned, y = self.experts(arrive(departed, choices, route), own, route)
        if s is not None and in_two:
            shared = s.w2(shared)
        return collect(returned, y, route, shared), routing


def spread_experts(model: Transformer, mesh: Mesh) -> Splits:
    """Leaves this rank its share of the routed experts of a whole model.

    Raises ValueError if the ranks cannot divide them evenly.
    """
    check(model.config, mesh.shape.ep)
    splits: Splits = {}
    for name, module in list(model.named_modules()):
        if type(module) is MoE:
            parent, _, own = name.rpartition(".")
            spread = SpreadMoE(module, mesh.exchange, alike=True)
            setattr(model.get_submodule(parent), own, spread)
            splits[spread.experts] = Split("ep", {"w1": 0, "w2": 0, "w3": 0})
    return splits
