"""The gate's kernels through Triton's interpreter."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from abyssal.ops.gate import gate


def by_expert(weights: Tensor, indices: Tensor, E: int) -> Tensor:
    """`[T, E]`: each expert's weight, 0 where it was not picked; the order of the choices does not matter."""
    return torch.zeros(indices.shape[0], E, dtype=weights.dtype).scatter_(1, indices, weights)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_the_reference_s_choice(data: st.DataObject) -> None:
    """Random scores are never within rounding of each other at these sizes."""
    T, D, size, n_group = (data.draw(st.integers(1, most)) for most in (5, 140, 6, 5))
    two = data.draw(st.booleans()) and (size > 1 or n_group == 1)
    topk_group = data.draw(st.integers(1, n_group))
    top_k, E = data.draw(st.integers(1, min(8, topk_group * size))), n_group * size
    scoring = data.draw(st.sampled_from(["sigmoid", "softmax"]))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    x, weight = torch.randn(T, D, generator=g), torch.randn(E, D, generator=g) / D**0.5
    bias = torch.randn(E, generator=g) if data.draw(st.booleans()) else None
    rest = (scoring, n_group, topk_group, top_k, data.draw(st.booleans()), 2.5, "best two" if two else "best")
    expected = gate(x, weight, bias, *rest, path="reference")
    weights, indices, scores = gate(x, weight, bias, *rest, path="kernel")
    assert indices.dtype == torch.int64 and weights.dtype == scores.dtype == torch.float32
    torch.testing.assert_close(by_expert(weights, indices, E), by_expert(expected[0], expected[1], E))
    torch.testing.assert_close(scores, expected[2])
    leaf = x.clone().requires_grad_()
    out = gate(leaf, weight, bias, *rest, path="kernel")
    torch.testing.assert_close(by_expert(out[0].detach(), out[1], E), by_expert(expected[0], expected[1], E))
    out[0].sum().backward()
    assert leaf.grad is not None


def test_more_tokens_than_the_logits_kernel_takes() -> None:
    x, weight = torch.randn(70, 24), torch.randn(12, 24)
    rest = ("softmax", 1, 1, 3, True, 1.0, "best")
    a, b = (gate(x, weight, None, *rest, path=path) for path in ("reference", "kernel"))
    torch.testing.assert_close(by_expert(b[0], b[1], 12), by_expert(a[0], a[1], 12))


def test_of_equals_the_lowest_is_picked() -> None:
    """All scores equal, in groups: the first groups' first experts."""
    rest = ("sigmoid", 4, 2, 3, True, 1.0, "best two")
    _, indices, _ = gate(torch.ones(2, 8), torch.zeros(8, 8), torch.full((8,), -3.0), *rest, path="kernel")
    assert indices.tolist() == [[0, 1, 2]] * 2


def test_no_expert_twice_and_none_beyond_the_last_whatever_comes() -> None:
    """Scores that are not numbers may pick anything that exists, so that nothing is read out of bounds."""
    x = torch.full((2, 8), float("nan"))
    rest = ("softmax", 3, 2, 4, False, 1.0, "best two")
    _, indices, _ = gate(x, torch.ones(9, 8), None, *rest, path="kernel")
    assert ((indices >= 0) & (indices < 9)).all()
