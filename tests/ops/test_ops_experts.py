"""The experts' paths against the reference, and the reference against an explicit loop."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import silu

from abyssal.ops import experts as module
from abyssal.ops.experts import experts


def inputs(T=7, D=16, F=24, E=5, K=2, dtype=torch.float64, seed=0, among: list[int] | None = None):
    """`among`: the experts that are ever picked; the others get no token."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(T, D, dtype=torch.float64, generator=g)
    w1, w3 = (torch.randn(E, F, D, dtype=torch.float64, generator=g) / D**0.5 for _ in range(2))
    w2 = torch.randn(E, D, F, dtype=torch.float64, generator=g) / F**0.5
    choices = torch.tensor(among if among is not None else range(E))
    picked = torch.rand(T, len(choices), generator=g).topk(K).indices
    weights = torch.rand(T, K, dtype=torch.float64, generator=g) + 0.1
    floats = [t.to(dtype).requires_grad_() for t in (x, w1, w2, w3)]
    return [*floats, choices[picked], weights.to(torch.promote_types(dtype, torch.float32)).requires_grad_()]


def by_loop(x, w1, w2, w3, indices, weights):
    rows = []
    for t in range(x.shape[0]):
        y = torch.zeros_like(x[t])
        for e, g in zip(indices[t].tolist(), weights[t]):
            y = y + g * (w2[e] @ (silu(w1[e] @ x[t]) * (w3[e] @ x[t])))
        rows.append(y)
    return torch.stack(rows)


def wave(y):
    return torch.arange(y.numel()).view(y.shape).cos().to(y.dtype)


def grads(args, path, choices=None):
    tensors = [*args[:4], args[5]]
    y = experts(*args, path=path, choices=choices)
    return y, torch.autograd.grad((y * wave(y)).sum(), tensors)


CASES = {
    "all busy": {"T": 12},
    "some empty": {"among": [1, 3]},
    "one has all": {"K": 1, "among": [4]},
    "first and last empty": {"among": [1, 2, 3], "K": 3},
    "one token": {"T": 1},
    "every expert": {"K": 5},
    "one expert": {"E": 1, "K": 1},
}
PATHS = ["loop", "rowwise", None]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_reference_is_the_sum_of_each_tokens_experts(case) -> None:
    args = inputs(**case)
    torch.testing.assert_close(experts(*args, path="reference"), by_loop(*args), atol=1e-12, rtol=0)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_path_is_the_reference_and_so_are_its_gradients(case, path) -> None:
    args = inputs(**case)
    expected, found = grads(args, "reference"), grads(args, path)
    torch.testing.assert_close(found[0], expected[0], atol=1e-12, rtol=0)
    for a, b in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@pytest.mark.parametrize("path", ["loop", "rowwise", "reference"])
def test_gradcheck(path) -> None:
    args = inputs(T=4, D=3, F=5, E=4, K=2, among=[0, 2, 3])
    assert torch.autograd.gradcheck(
        lambda x, w1, w2, w3, weights: experts(x, w1, w2, w3, args[4], weights, path), [*args[:4], args[5]]
    )


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_grouped_products_are_the_reference(case, dtype, tolerance) -> None:
    args = inputs(**case, dtype=dtype)
    try:
        y, found = grads(args, "grouped")
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"this torch has no grouped_mm for {dtype} on a CPU: {error}")
    assert y.dtype == dtype
    exact = [a.detach().double().requires_grad_() if a.is_floating_point() else a for a in args]
    expected_y, expected = grads(exact, "reference")
    torch.testing.assert_close(y.double(), expected_y, atol=tolerance, rtol=tolerance)
    for a, b in zip(found, expected, strict=True):
        assert (a.double() - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize("path", ["loop", "rowwise", "reference"])
def test_bfloat16_is_near(path) -> None:
    args = inputs(T=12, dtype=torch.bfloat16)
    y = experts(*args, path=path)
    assert y.dtype == torch.bfloat16
    expected = by_loop(*[a.double() if a.is_floating_point() else a for a in args])
    torch.testing.assert_close(y.double(), expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("path", ["reference", "loop", "rowwise", "grouped", None])
def test_no_tokens(path) -> None:
    args = inputs(dtype=torch.float32)
    none = [args[0][:0], *args[1:4], args[4][:0], args[5][:0]]
    y, found = grads(none, path)
    assert y.shape == (0, 16)
    assert all((g == 0).all() for g in found)


@pytest.mark.parametrize("path", ["reference", "loop", "rowwise", "grouped"])
@settings(max_examples=20, deadline=None)
@given(st.integers(0, 12), st.integers(1, 3), st.integers(0, 99), st.booleans())
def test_an_index_that_is_no_experts_adds_nothing(path: str, T: int, K: int, seed: int, told: bool) -> None:
    """And its weight has no gradient; the others' are those of the same choices with a weight of 0 in its place."""
    dtype = torch.float32 if path == "grouped" else torch.float64
    args = inputs(T=T, K=K, seed=seed, dtype=dtype)
    out = torch.rand(T, K, generator=torch.Generator().manual_seed(seed)) < 0.5
    outside = torch.tensor([-1, -7, 5, 1000])[torch.arange(T * K) % 4].view(T, K)
    args[4] = torch.where(out, outside, args[4])
    exact = [a.detach().double().requires_grad_() if a.is_floating_point() else a for a in args]
    silent = [*exact[:4], torch.where(out, 0, exact[4]), torch.where(out, 0, exact[5])]
    y = experts(*silent, path="reference")
    expected = torch.autograd.grad((y * wave(y)).sum(), [*exact[:4], exact[5]])
    found_y, found = grads(args, path, int((~out).sum()) if told else None)
    tolerance = 1e-4 if path == "grouped" else 1e-12
    torch.testing.assert_close(found_y.double(), y, atol=tolerance, rtol=0)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, atol=tolerance, rtol=tolerance)
    assert (found[4][out] == 0).all()


def test_a_wrong_name_is_refused() -> None:
    with pytest.raises(ValueError, match="got 'fast'"):
        experts(*inputs(), path="fast")


@pytest.mark.parametrize(
    "generation, T, learns, width, expected",
    [
        (9, 480, False, 16, "decode"),  # 960 choices
        (10, 480, False, 16, "decode"),
        (9, 481, False, 16, "fused"),
        (9, 480, True, 16, "fused"),
        (10, 481, False, 16, "grouped"),
        (0, 4, False, 16, "grouped"),  # no Triton
        (9, 0, False, 16, "grouped"),
        (9, 481, False, 12, "reference"),
    ],
)
def test_the_choice_on_a_gpu(monkeypatch, generation, T, learns, width, expected) -> None:
    monkeypatch.setattr(module, "capability", lambda x: (generation, 0))
    with FakeTensorMode():
        x = torch.empty(T, width, dtype=torch.bfloat16, device="cuda")
        w1, w3 = (torch.empty(4, 8, width, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        w2 = torch.empty(4, width, 8, dtype=torch.bfloat16, device="cuda", requires_grad=learns)
        indices, weights = torch.empty(T, 2, dtype=torch.int64, device="cuda"), torch.empty(T, 2, device="cuda")
    assert module._chosen(x, w1, w2, w3, indices, weights) == expected


@pytest.mark.parametrize("T", [1, 3, 40])
def test_a_compiled_graph_equals_eager(T: int) -> None:
    """Few choices, many: the graph takes another path on either side of FEW_CHOICES."""
    torch._dynamo.reset()
    args = [a.detach() for a in inputs(T=T, dtype=torch.float32)]
    assert (T * 2 <= module.FEW_CHOICES) == (T < 40)
    compiled = torch.compile(experts, backend="aot_eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(compiled(*args), experts(*args, path="reference"), atol=1e-5, rtol=0)
