"""Who is picked and with what weight, where transformers is no oracle: by hand."""

import math

import pytest
import torch
from plain import route
from tiny import randomised, tiny_config, tiny_model

from abyssal.model.experts import Gate, MoE, Routing
from abyssal.model.transformer import Transformer


def gate_of(logits: list[float], bias: list[float] | None = None, **changes) -> Routing:
    """The routing of one token whose router logits are given."""
    config = tiny_config(n_routed_experts=len(logits), hidden_size=1, **changes)
    gate = Gate(config)
    with torch.no_grad():
        gate.weight.copy_(torch.tensor(logits)[:, None])
        if gate.bias is not None:
            gate.bias.copy_(torch.tensor(bias or [0.0] * len(logits)))
        return gate(torch.ones(1, 1))


def weight_of(routing: Routing) -> dict[int, float]:
    return dict(sorted(zip(routing.indices[0].tolist(), routing.weights[0].tolist())))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_groups_left_out_stay_out_when_all_biased_scores_are_negative() -> None:
    """Scores are 0.5, biases near -1: a group masked with 0.0 would beat every expert that is allowed."""
    routing = gate_of(
        [0.0] * 4, bias=[-0.9, -0.8, -1.0, -1.1], n_group=2, topk_group=1, num_experts_per_tok=2,
        routed_scaling_factor=1.0,
    )  # fmt: skip
    assert weight_of(routing) == pytest.approx({0: 0.5, 1: 0.5})


def test_a_group_is_worth_its_best_two_in_v3_and_its_best_one_in_v2() -> None:
    """The first group has the best expert, the second the better pair."""
    logits = [3.0, -9.0, 1.0, 1.0]
    settings = {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 2}
    assert set(weight_of(gate_of(logits, **settings))) == {2, 3}
    v2 = gate_of(logits, scoring_func="softmax", topk_method="group_limited_greedy", **settings)
    assert set(weight_of(v2)) == {0, 1}


def test_the_bias_steers_selection_and_leaves_gate_values_alone() -> None:
    logits = [2.0, 1.0, 0.0, -1.0]
    settings = {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "routed_scaling_factor": 2.5}
    scores = [sigmoid(x) for x in logits]
    plain = gate_of(logits, **settings)
    both = scores[0] + scores[1]
    assert weight_of(plain) == pytest.approx({0: 2.5 * scores[0] / both, 1: 2.5 * scores[1] / both})
    steered = gate_of(logits, bias=[-5.0, 0.0, 0.0, 7.0], **settings)
    both = scores[1] + scores[3]
    assert weight_of(steered) == pytest.approx({1: 2.5 * scores[1] / both, 3: 2.5 * scores[3] / both})
    assert steered.scores[0].tolist() == pytest.approx(scores)


def test_the_bias_steers_which_groups_too() -> None:
    routing = gate_of([1.0, 1.0, 0.0, 0.0], bias=[0.0, 0.0, 0.2, 0.4], n_group=2, topk_group=1, num_experts_per_tok=1)
    assert set(weight_of(routing)) == {3}


@pytest.mark.parametrize("norm", [True, False])
def test_v2_softmax_weights_are_normalised_only_if_asked(norm: bool) -> None:
    """transformers' V2 ignores `norm_topk_prob`."""
    logits = [1.0, 0.5, -0.5, 0.0]
    total = sum(math.exp(x) for x in logits)
    p = [math.exp(x) / total for x in logits]
    routing = gate_of(
        logits, n_group=1, topk_group=1, num_experts_per_tok=2, scoring_func="softmax", topk_method="greedy",
        norm_topk_prob=norm, routed_scaling_factor=3.0,
    )  # fmt: skip
    below = p[0] + p[1] if norm else 1.0
    assert weight_of(routing) == pytest.approx({0: 3 * p[0] / below, 1: 3 * p[1] / below})


def test_sigmoid_weights_may_go_unnormalised() -> None:
    routing = gate_of(
        [1.0, 0.0], n_group=1, topk_group=1, num_experts_per_tok=1, norm_topk_prob=False, routed_scaling_factor=1.0
    )
    assert weight_of(routing) == pytest.approx({0: sigmoid(1.0)})


def test_many_tokens_route_as_one_by_one_in_plain_loops() -> None:
    model = tiny_model(n_routed_experts=24, n_group=6, topk_group=3, num_experts_per_tok=5)
    gate = model.layers[1].ffn.gate
    x = torch.randn(200, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    routing = gate(x)
    for t in range(200):
        found = dict(zip(routing.indices[t].tolist(), routing.weights[t].tolist()))
        assert found == pytest.approx(route(gate, x[t], model.config), abs=1e-7)  # the bias is float32


def test_selection_carries_no_gradient_and_gate_values_do() -> None:
    gate = tiny_model().layers[1].ffn.gate
    routing = gate(torch.randn(5, 24, dtype=torch.float64))
    assert not routing.indices.requires_grad and routing.weights.requires_grad
    assert gate.bias is not None and not gate.bias.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_router_computes_in_float32_whatever_the_model_is(dtype: torch.dtype) -> None:
    """Logits that differ by less than a bfloat16 step: rounded logits or scores would tie."""
    gate = Gate(tiny_config(hidden_size=2, n_group=1, topk_group=1, num_experts_per_tok=1)).to(dtype)
    with torch.no_grad():
        gate.weight.zero_()
        gate.weight[:, 0] = 1.0
        gate.weight[5, 1] = 2.0**-12
    routing = gate(torch.tensor([[1.0, 1.0]], dtype=dtype))
    assert routing.scores.dtype == routing.weights.dtype == torch.float32
    assert routing.indices.tolist() == [[5]]
    assert routing.scores[0, 5] == torch.tensor(1 + 2.0**-12).sigmoid() != routing.scores[0, 0]
    wide = gate.double()(torch.ones(1, 2, dtype=torch.float64))
    assert wide.scores.dtype == torch.float64


def test_moe_is_equation_12_token_by_token() -> None:
    """Every expert's output times its gate, and the shared experts' on top."""
    from plain import moe

    model = tiny_model(n_shared_experts=2)
    ffn, c = model.layers[2].ffn, model.config
    x = torch.randn(17, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y, _ = ffn(x)
        torch.testing.assert_close(y, torch.stack([moe(ffn, x_t, c) for x_t in x]), atol=1e-6, rtol=0)


def test_a_conventional_moe_is_a_configuration_of_the_same_class() -> None:
    """8 experts, the best 2, none shared, softmax, no bias: Mixtral's layer, by hand."""
    config = tiny_config(
        n_routed_experts=8, num_experts_per_tok=2, n_shared_experts=None, n_group=1, topk_group=1,
        scoring_func="softmax", topk_method="greedy", norm_topk_prob=True, routed_scaling_factor=1.0,
    )  # fmt: skip
    model = randomised(Transformer(config)).double()
    ffn = model.layers[1].ffn
    assert isinstance(ffn, MoE) and ffn.shared_experts is None and ffn.gate.bias is None
    x = torch.randn(11, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y, _ = ffn(x)
    for x_t, y_t in zip(x, y):
        best = (ffn.gate.weight @ x_t).topk(2)
        expected = torch.zeros_like(y_t)
        for g, e in zip(best.values.softmax(0), best.indices):  # softmax over the chosen: the same, normalised
            h = torch.nn.functional.silu(ffn.experts.w1[e] @ x_t) * (ffn.experts.w3[e] @ x_t)
            expected = expected + g * (ffn.experts.w2[e] @ h)
        torch.testing.assert_close(y_t, expected, atol=1e-12, rtol=0)
