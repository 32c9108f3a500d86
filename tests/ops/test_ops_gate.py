"""The gate's reference, by hand; `tests/model/test_gate.py` has more of it through the model."""

import pytest
import torch

from abyssal.ops.gate import gate, pick


def test_groups_left_out_stay_out_when_every_biased_score_is_negative() -> None:
    biased = torch.tensor([[-0.4, -0.3, -0.5, -0.6]])
    assert pick(biased, 2, 1, 2, "best two").sort().values.tolist() == [[0, 1]]


def test_a_group_is_worth_its_best_two_or_its_best() -> None:
    biased = torch.tensor([[3.0, -9.0, 1.0, 1.0]])
    assert pick(biased, 2, 1, 2, "best two").sort().values.tolist() == [[2, 3]]
    assert pick(biased, 2, 1, 2, "best").sort().values.tolist() == [[0, 1]]


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
@pytest.mark.parametrize("norm", [True, False])
def test_weights_are_unbiased_scores(scoring: str, norm: bool) -> None:
    x, weight = torch.randn(5, 8, dtype=torch.float64), torch.randn(6, 8, dtype=torch.float64)
    bias = torch.tensor([9.0, 0, 0, 0, 0, 8.0])
    weights, indices, scores = gate(x, weight, bias, scoring, 1, 1, 2, norm, 2.5, "best two")  # type: ignore[arg-type]
    logits = x @ weight.T
    expected = logits.sigmoid() if scoring == "sigmoid" else logits.softmax(-1)
    torch.testing.assert_close(scores, expected)
    assert indices.sort().values.tolist() == [[0, 5]] * 5
    both = expected[:, [0, 5]].sum(-1) if norm else 1.0
    torch.testing.assert_close(weights.sum(-1), 2.5 * expected[:, [0, 5]].sum(-1) / both)


def test_gradients_reach_the_router_through_the_weights() -> None:
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)

    def weights(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return gate(x, weight, None, "sigmoid", 2, 1, 2, True, 2.5, "best")[0]

    assert torch.autograd.gradcheck(weights, (x, weight))


def test_bf16_is_routed_in_float32() -> None:
    x, weight = torch.randn(5, 8).bfloat16(), torch.randn(6, 8).bfloat16()
    weights, _, scores = gate(x, weight, None, "softmax", 1, 1, 2, True, 1.0, "best")
    assert weights.dtype == scores.dtype == torch.float32
    torch.testing.assert_close(scores, (x.float() @ weight.float().T).softmax(-1))


def test_an_unknown_path_is_refused() -> None:
    with pytest.raises(ValueError, match="path: expected 'reference' or 'kernel', got 'fast'"):
        gate(torch.ones(1, 2), torch.ones(2, 2), None, "softmax", 1, 1, 1, True, 1.0, "best", path="fast")
