"""Expert parallel against one process: odd routings in float64, what lies between a start and its wait, whole runs."""

import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from steps import Steps, compare, settings, take
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from abyssal.config import ModelConfig
from abyssal.model.experts import MoE, Routing
from abyssal.ops import experts
from abyssal.parallel import dispatch
from abyssal.parallel import experts as parallel_experts
from abyssal.parallel.dispatch import Plan, Return, Way, sizes
from abyssal.parallel.experts import SpreadMoE, check
from abyssal.train.diagnose import watched

D, E = 12, 4
CONFIG = ModelConfig(
    hidden_size=D, moe_intermediate_size=8, n_routed_experts=E, num_experts_per_tok=2, n_shared_experts=1,
    num_hidden_layers=1, num_attention_heads=2, vocab_size=16, intermediate_size=16, qk_nope_head_dim=4, v_head_dim=4,
    kv_lora_rank=4, qk_rope_head_dim=2, first_k_dense_replace=0,
)  # fmt: skip

# On each of two ranks, of which the first holds experts 0 and 1: its tokens' choices.
ROUTINGS: dict[str, tuple[list[list[int]], list[list[int]]]] = {
    "everywhere": ([[0, 3], [2, 1], [1, 0], [3, 2]], [[1, 2], [0, 2]]),
    "all to the first": ([[0, 1], [1, 0], [1, 0]], [[0, 1], [1, 0]]),
    "all to the last": ([[2, 3], [3, 2]], [[3, 2], [3, 2], [2, 3]]),
    "each to its own": ([[1, 0], [0, 1]], [[2, 3]]),
    "each to the other": ([[3, 2]], [[0, 1], [1, 0]]),
    "one expert for all": ([[1], [1], [1]], [[1], [1]]),
    "one token": ([[3, 0]], [[1, 0]]),
    "a rank without tokens": ([[0, 2], [3, 1]], []),
    "no tokens": ([], []),
    "as many tokens": ([[0, 1], [1, 0], [2, 3]], [[0, 1], [3, 0], [1, 0]]),
    "every expert": ([[3, 1, 0, 2]], [[0, 1, 2, 3], [2, 3, 0, 1]]),
}


class Fixed(nn.Module):
    """A gate whose mind is made up; its weight is there to be counted."""

    def __init__(self, weights: Tensor, indices: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(E, D))
        self.weights, self.indices = weights, indices
        self.config = CONFIG.replace(num_experts_per_tok=weights.shape[1])

    def forward(self, x: Tensor) -> Routing:
        return Routing(self.weights, self.indices, self.weights)


def make(shared: bool) -> MoE:
    g = torch.Generator().manual_seed(0)
    moe = MoE(CONFIG if shared else CONFIG.replace(n_shared_experts=None)).double()
    with torch.no_grad():
        for p in moe.parameters():
            p.normal_(generator=g)
    return moe


def tokens_of(rank: int, choices: list[list[int]], K: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, gate values, indices and the gradient of what comes out."""
    g = torch.Generator().manual_seed(1 + rank)
    indices = torch.tensor(choices, dtype=torch.int64).view(-1, K)
    T = indices.shape[0]
    x, dy = (torch.randn(T, D, generator=g, dtype=torch.float64) for _ in range(2))
    return x.requires_grad_(), torch.rand(T, K, generator=g, dtype=torch.float64).requires_grad_(), indices, dy


def one_rank(names: list[tuple[str, bool, bool]]) -> list[dict[str, Tensor]]:
    """What a rank's tokens come to, and its gradients: of a routing, with shared experts or without, and with all
    tokens sent to both ranks or those that must."""
    found = []
    chosen = experts._chosen
    # As on a GPU, where experts that get nothing keep nothing for the backward pass.
    experts._chosen = lambda x, *others: chosen(x, *others) if x.shape[0] else "grouped"
    for name, shared, all_go in names:
        both = ROUTINGS[name]
        K = max(len(row) for choices in both for row in [*choices, [0]])
        x, weights, indices, dy = tokens_of(dist.get_rank(), both[dist.get_rank()], K)
        group = dist.group.WORLD
        assert group is not None
        spread = SpreadMoE(make(shared), group)
        spread.gate = Fixed(weights, indices)
        spread.all_go = all_go
        y, _ = spread(x)
        y.backward(dy)
        assert x.grad is not None and weights.grad is not None
        found.append({"y": y.detach(), "x": x.grad, "weights": weights.grad} | gradients(spread))
        with torch.no_grad():
            torch.testing.assert_close(spread(x)[0], y)
        x.grad = weights.grad = None
        spread.zero_grad()
        y, _ = checkpoint(spread, x, use_reentrant=False)
        y.backward(dy)
        for key, gradient in ({"x": x.grad, "weights": weights.grad} | gradients(spread)).items():
            torch.testing.assert_close(gradient, found[-1][key], msg=f"{name}, recomputed: {key}")
    return found


def gradients(moe: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in moe.named_parameters() if p.grad is not None}


def test_any_routing_comes_to_what_one_process_makes_of_it() -> None:
    alike = [name for name, both in ROUTINGS.items() if len(both[0]) == len(both[1])]
    cases = [(name, shared, False) for name in ROUTINGS for shared in (True, False)]
    cases += [(name, shared, True) for name in alike for shared in (True, False)]
    results = on_ranks(2, one_rank, cases)
    for number, (name, shared, _) in enumerate(cases):
        both = ROUTINGS[name]
        K = max(len(row) for choices in both for row in [*choices, [0]])
        pieces = [tokens_of(rank, choices, K) for rank, choices in enumerate(both)]
        x, weights, indices, dy = (torch.cat(parts).detach() for parts in zip(*pieces))
        whole = make(shared)
        whole.gate = Fixed(weights.requires_grad_(), indices)  # type: ignore[assignment]
        y, _ = whole(x.requires_grad_())
        y.backward(dy)
        assert x.grad is not None and weights.grad is not None
        first, second = (found[number] for found in results)
        for key, expected in {"y": y.detach(), "x": x.grad, "weights": weights.grad}.items():
            torch.testing.assert_close(torch.cat((first[key], second[key])), expected, msg=f"{name}: {key}")
        for key, expected in gradients(whole).items():
            joined = torch.cat if key.startswith("experts") else sum
            torch.testing.assert_close(joined([first[key], second[key]]), expected, msg=f"{name}: {key}")


class Marked(torch.autograd.Function):
    """Tells when something was computed, and when its backward pass begins."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, events: list[str]) -> Tensor:
        ctx.events = events
        events.append("experts")
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        ctx.events.append("experts")
        return dy, None


class Seen(NamedTuple):
    orders: list[tuple[list[str], list[str]]]  # of events, where rows are counted and where all go
    blamed: list[str]  # modules whose output was said not to be finite, where all is


def seen() -> Seen:
    return Seen([order_of_events(all_go) for all_go in (False, True)], blamed())


@pytest.fixture(scope="module")
def both() -> list[Seen]:
    """What two ranks saw."""
    return on_ranks(2, seen)


def blamed() -> list[str]:
    """Of a rank that watches its modules while the other's rows are not there yet, and their memory is NaN."""
    plain = parallel_experts.give_back

    def slow(y: Tensor, plan: Plan) -> Return:
        time.sleep(dist.get_rank())
        return plain(y, plan)

    group = dist.group.WORLD
    assert group is not None
    x, weights, indices, _ = tokens_of(0, [[0, 3], [2, 1]], 2)
    spread = SpreadMoE(make(True), group)
    spread.gate = Fixed(weights, indices)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what is not computed yet with NaN
    parallel_experts.give_back = slow
    try:
        with torch.no_grad(), watched(nn.ModuleDict({"ffn": spread})) as found:  # type: ignore[arg-type]
            y, _ = spread(x)
    finally:
        parallel_experts.give_back = plain
        torch.use_deterministic_algorithms(False)
    assert y.isfinite().all()
    return found


def order_of_events(all_go: bool) -> tuple[list[str], list[str]]:
    """What happens in a forward and in a backward pass: starts of exchanges, waits, the shared experts' products."""
    events: list[str] = []
    send, wait = Way.send, Way.wait

    def told_send(self: Way, *args: Any) -> None:
        events.append("start")
        send(self, *args)

    def told_wait(self: Way) -> None:
        events.append("wait")
        wait(self)

    Way.send, Way.wait = told_send, told_wait  # type: ignore[method-assign]
    group = dist.group.WORLD
    assert group is not None
    x, weights, indices, dy = tokens_of(0, [[0, 3], [2, 1]], 2)
    spread = SpreadMoE(make(True), group)
    spread.gate = Fixed(weights, indices)
    spread.all_go = all_go
    spread.gate.register_forward_hook(lambda *_: events.append("gate"))
    shared = spread.shared_experts
    assert shared is not None
    for name in ("w1", "w2"):
        module = getattr(shared, name)
        module.register_forward_hook(lambda *_, name=name: events.append(name))
        module.register_full_backward_hook(lambda *_, name=name: events.append(name))
    plain = parallel_experts.experts
    parallel_experts.experts = lambda x, *rest, **more: Marked.apply(plain(x, *rest, **more), events)
    y, _ = spread(x)
    parallel_experts.experts = plain
    split = len(events)
    y.backward(dy)
    Way.send, Way.wait = send, wait  # type: ignore[method-assign]
    return events[:split], events[split:]


def test_rows_on_their_way_are_not_blamed(both: list[Seen]) -> None:
    assert [found.blamed for found in both] == [[], []]


def test_shared_experts_and_own_rows_are_computed_between_a_start_and_its_wait(both: list[Seen]) -> None:
    counts, rest = ["start", "wait"], ["w1", "wait", "wait", "experts", "start", "experts", "w2", "wait"]
    back = ["start", "w2", "experts", "wait", "experts", "start", "start", "w1", "wait", "wait"]
    for counted, all_go in (found.orders for found in both):
        assert counted == (["gate", *counts, "start", "start", *rest], back)
        assert all_go == (["start", "gate", "start", *rest], back)


def test_experts_that_ranks_cannot_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="mesh ep=3: n_routed_experts: expected a multiple of 3, got 4"):
        check(CONFIG, 3)
    with pytest.raises(ValueError, match="got None"):
        check(CONFIG.replace(n_routed_experts=None), 2)


class Ranks:
    """A group, as far as `sizes` asks."""

    def size(self) -> int:
        return 4

    def rank(self) -> int:
        return 1


def test_sizes_without_values_are_those_of_an_even_draw() -> None:
    with FakeTensorMode():
        counts = torch.zeros(4, 2, dtype=torch.int64)
    found = sizes(counts, counts, 1000, 2, 16, Ranks())  # type: ignore[arg-type]
    reached = round(1000 * (1 - 12 / 16 * 11 / 15))
    others = [reached, 0, reached, reached]
    assert found == dispatch.Sizes(others, others, reached, 1500, 500)


RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # changes of the model, and of the run
    "recomputed": ({}, {"recompute": "block"}),
    "recomputed, gathered once": ({"num_hidden_layers": 2}, {"recompute": "block", "reshard": False}),
    "two MTP modules, four shared experts": ({"num_nextn_predict_layers": 2, "n_shared_experts": 4}, {}),
    "classic balance loss, no shared experts": (
        {"num_hidden_layers": 2, "topk_method": "greedy", "n_group": 1, "scoring_func": "softmax",
         "n_shared_experts": None}, {"auxiliary_balance": 0.2, "sequence_balance": 0.0}
    ),
}  # fmt: skip


def runs(tokens: Path, out: Path, mesh: str) -> list[Steps]:
    exact = {"dtype": "float64", "accumulate": 2}
    return [take(settings(tokens, out, mesh, model, **exact, **run), 2) for model, run in RUNS.values()]


def test_odd_models_take_the_steps_of_one_process(tokens: Path, tmp_path: Path) -> None:
    expected = runs(tokens, tmp_path, "")
    for found in on_ranks(2, runs, tokens, tmp_path, "ep=2"):
        for name, ours, one in zip(RUNS, found, expected, strict=True):
            for key, gradient in ours.gradients.items():
                torch.testing.assert_close(gradient, one.gradients[key], rtol=1e-7, atol=1e-10, msg=f"{name}: {key}")
            a, b = (torch.tensor(s.losses, dtype=torch.float64) for s in (ours, one))
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10, msg=name)
            assert ours.violations == one.violations, name


def spread_run(tokens: Path, out: Path, mesh: str) -> Steps:
    return take(settings(tokens, out, mesh, {}))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["dp=2,ep=2", "ep=4", "pp=2,ep=2"])
def test_four_ranks_take_the_steps_of_one(mesh: str, tokens: Path, tmp_path: Path) -> None:
    alone = take(settings(tokens, tmp_path, "", {}))
    for found in on_ranks(4, spread_run, tokens, tmp_path, mesh):
        compare(found, alone)
