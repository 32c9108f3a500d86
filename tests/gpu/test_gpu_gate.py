"""The gate's kernels on a GPU against the reference in float64."""

import pytest
import torch
from torch import Tensor

from abyssal.ops.gate import gate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

V2_LITE = ("softmax", 1, 1, 6, False, 1.0, "best")
V2 = ("softmax", 8, 3, 6, False, 16.0, "best")
V3 = ("sigmoid", 8, 4, 8, True, 2.5, "best two")
CASES = [(1, 2048, 64, V2_LITE), (64, 2048, 64, V2_LITE), (5, 300, 160, V2), (1, 7168, 256, V3), (33, 7168, 256, V3),
         (500, 512, 256, V3), (7, 33, 9, ("sigmoid", 3, 2, 4, True, 1.0, "best two"))]  # fmt: skip


def by_expert(weights: Tensor, indices: Tensor, E: int) -> Tensor:
    return torch.zeros(indices.shape[0], E, dtype=weights.dtype, device="cuda").scatter_(1, indices, weights)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_the_reference_s_choice(case: tuple, dtype: torch.dtype) -> None:  # type: ignore[type-arg]
    T, D, E, rest = case
    x, weight = torch.randn(T, D, device="cuda").to(dtype), (torch.randn(E, D, device="cuda") / D**0.5).to(dtype)
    bias = torch.randn(E, device="cuda") / 10 if rest == V3 else None
    weights, indices, scores = gate(x, weight, bias, *rest, path="kernel")
    exact = gate(x.double(), weight.double(), None if bias is None else bias.double(), *rest, path="reference")
    torch.testing.assert_close(scores.double(), exact[2], atol=2e-6, rtol=2e-5)
    # Where a score lies within rounding of another's the two may differ; that is rare, and the rest must agree.
    same = (indices.sort(-1).values == exact[1].sort(-1).values).all(-1)
    assert same.float().mean() > 0.98
    out, expected = by_expert(weights.double(), indices, E), by_expert(exact[0], exact[1], E)
    torch.testing.assert_close(out[same], expected[same], atol=1e-5, rtol=5e-5)
    assert all(torch.equal(a, b) for a, b in zip((weights, indices, scores), gate(x, weight, bias, *rest)))


def test_training_picks_as_decoding_does_and_gradients_are_the_reference_s() -> None:
    x = torch.randn(200, 512, device="cuda", requires_grad=True)
    weight = (torch.randn(256, 512, device="cuda") / 512**0.5).requires_grad_()
    bias = torch.randn(256, device="cuda") / 10
    grads = []
    for path in ("reference", "kernel"):
        weights, indices, scores = gate(x, weight, bias, *V3, path=path)
        spread = torch.arange(256, device="cuda").cos()
        loss = (weights * spread[indices]).sum() + (scores * spread).sum()
        grads.append(torch.autograd.grad(loss, (x, weight)))
    for a, b in zip(*grads):
        assert float((a - b).norm() / b.norm()) < 1e-4


def test_scores_that_are_not_numbers_pick_experts_that_exist() -> None:
    x = torch.full((3, 64), float("nan"), device="cuda")
    _, indices, _ = gate(x, torch.ones(18, 64, device="cuda"), None, "sigmoid", 3, 2, 4, True, 1.0, "best two")
    assert ((indices >= 0) & (indices < 18)).all()
