"""The experts' kernels on a Hopper GPU against float64: forward, every gradient, odd shapes, empty experts."""

import pytest
import torch
from torch import Tensor

from abyssal.ops.experts import experts, sum_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="no Hopper GPU"
    ),
]


def error(out: Tensor, exact: Tensor) -> float:
    out, exact = out.detach().double(), exact.detach().double()
    assert out.isfinite().all()
    return float((out - exact).norm() / exact.norm().clamp_min(1e-30))


def inputs(T: int, D: int, F: int, E: int, K: int, busy: int, seed: int = 0, dtype=torch.bfloat16) -> list[Tensor]:
    """`busy`: how many experts are ever picked. The others' rows are none."""
    g = torch.Generator("cuda").manual_seed(seed)
    shapes = (T, D), (E, F, D), (E, D, F), (E, F, D)
    floats = [torch.randn(s, device="cuda", generator=g) / s[-1] ** 0.5 for s in shapes]
    floats[0] = floats[0] * D**0.5
    picked = torch.randperm(E, device="cuda", generator=g)[:busy]
    indices = picked[torch.rand(T, busy, device="cuda", generator=g).topk(K).indices]
    weights = torch.rand(T, K, device="cuda", generator=g) + 0.1
    return [*[t.to(dtype).requires_grad_() for t in floats], indices, weights.requires_grad_()]


def run(args: list[Tensor], path: str | None, dy: Tensor, choices: int | None = None) -> list[Tensor]:
    y = experts(*args, path=path, choices=choices)  # type: ignore[arg-type]
    tensors = [*args[:4], args[5]]
    return [y.detach(), *torch.autograd.grad(y, tensors, dy.to(y.dtype))]


CASES = {
    "plain": (512, 256, 128, 8, 2, 8),
    "odd widths": (333, 136, 72, 7, 3, 4),
    "narrow": (77, 8, 16, 4, 2, 3),
    "wider than a tile": (700, 520, 392, 5, 2, 5),
    "one token": (1, 128, 64, 16, 3, 16),
    "one expert": (300, 64, 64, 1, 1, 1),
    "one has all": (300, 128, 192, 6, 1, 1),
    "many experts": (900, 128, 64, 256, 8, 200),
    "more tiles than programs": (6000, 512, 256, 16, 4, 15),
}


def poison() -> None:
    """Freed memory, which the next outputs are made of, holds NaN."""
    for size in (1 << 20, 1 << 24, 1 << 26):
        spoiled = [torch.full((size,), float("nan"), dtype=torch.bfloat16, device="cuda") for _ in range(6)]
        del spoiled


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_fused_path_and_its_gradients_are_the_references(case: tuple[int, ...]) -> None:
    args = inputs(*case)
    dy = torch.randn(args[0].shape, device="cuda")
    exact = [a.detach().double().requires_grad_() if a.is_floating_point() else a for a in args]
    expected = run(exact, "reference", dy)
    poison()
    found = run(args, "fused", dy)
    again = run(args, "fused", dy)
    for name, a, b, twice in zip(["y", "x", "w1", "w2", "w3", "weights"], found, expected, again, strict=True):
        assert error(a, b) < 1e-2, name
        assert torch.equal(a, twice), name


SILENT = {  # T, D, F, E, K, busy, how many of the choices are none
    "a few": (512, 256, 128, 8, 2, 8, 0.1),
    "most": (700, 520, 392, 5, 3, 4, 0.9),
    "none is left": (300, 128, 64, 4, 2, 4, 1.0),
    "odd widths": (333, 136, 72, 7, 3, 4, 0.5),
    "more tiles than programs": (6000, 512, 256, 16, 4, 15, 0.5),
}


@pytest.mark.parametrize("path", ["fused", "grouped"])
@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("case", SILENT.values(), ids=SILENT)
def test_an_index_that_is_no_experts_adds_nothing(case: tuple, told: bool, path: str) -> None:
    """Rows that no choice has are never read, or never count: memory holds NaN."""
    args = inputs(*case[:6])
    out = torch.rand(args[4].shape, device="cuda") < case[6]
    outside = torch.tensor([-1, -9, case[3], 1000], device="cuda")[torch.arange(out.numel(), device="cuda") % 4]
    args[4] = torch.where(out, outside.view(out.shape), args[4])
    choices = int((~out).sum()) if told else None
    dy = torch.randn(args[0].shape, device="cuda")
    exact = [a.detach().double().requires_grad_() if a.is_floating_point() else a for a in args]
    expected = run(exact, "reference", dy)
    poison()
    found = run(args, path, dy, choices)
    for name, a, b in zip(["y", "x", "w1", "w2", "w3", "weights"], found, expected, strict=True):
        assert error(a, b) < 1e-2 if b.any() else (a == 0).all(), name
    assert (found[-1][out] == 0).all()


@torch.no_grad()
@pytest.mark.parametrize("path", ["decode", "fused"])
def test_no_choice_without_gradients(path: str) -> None:
    args = [a.detach() for a in inputs(60, 128, 64, 8, 4, 8)]
    out = torch.rand(args[4].shape, device="cuda") < 0.5
    args[4] = torch.where(out, -1, args[4])
    exact = experts(*(a.double() if a.is_floating_point() else a for a in args), path="reference")  # type: ignore[arg-type]
    poison()
    assert error(experts(*args, path=path, choices=int((~out).sum())), exact) < 1e-2  # type: ignore[arg-type]


@pytest.mark.parametrize("first", [0, 100, 5000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_of_two_parts_are_summed(first: int, dtype: torch.dtype) -> None:
    T, K, D, N = 3000, 4, 1000, 5000
    rows = torch.randn(N, D, device="cuda", dtype=dtype)
    place = torch.full((T * K,), -1, device="cuda")
    place[torch.randperm(T * K, device="cuda")[:N]] = torch.arange(N, device="cuda")
    place, plus = place.view(T, K).int(), torch.randn(T, D, device="cuda", dtype=dtype)
    parts = rows[:first], rows[first:]
    expected = sum_rows([p.double() for p in parts], place, plus.double(), "reference")
    assert error(sum_rows(parts, place, plus), expected) < 5e-3


def test_float16_too() -> None:
    args = inputs(300, 192, 136, 6, 2, 5, dtype=torch.float16)
    dy = torch.randn(args[0].shape, device="cuda")
    exact = [a.detach().double().requires_grad_() if a.is_floating_point() else a for a in args]
    for a, b in zip(run(args, "fused", dy), run(exact, "reference", dy), strict=True):
        assert error(a, b) < 5e-3


def test_nothing_waits_for_the_host_and_a_graph_replays() -> None:
    args = [a.detach() for a in inputs(400, 128, 64, 8, 2, 6)]
    expected = experts(*args, path="fused")
    torch.cuda.set_sync_debug_mode("error")
    try:
        experts(*args, path="fused")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = experts(*args, path="fused")
    y.fill_(float("nan"))
    graph.replay()
    assert torch.equal(y, expected)


def test_compiled_with_gradients() -> None:
    args = inputs(256, 128, 64, 8, 2, 8)
    dy = torch.randn(args[0].shape, device="cuda")
    expected = run(args, "fused", dy)
    compiled = torch.compile(experts, fullgraph=True)
    y = compiled(*args)  # chooses the path itself
    found = [y.detach(), *torch.autograd.grad(y, [*args[:4], args[5]], dy.to(y.dtype))]
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@torch.no_grad()
def test_compiled_for_few_tokens() -> None:
    args = [a.detach() for a in inputs(4, 128, 64, 8, 2, 8)]
    compiled = torch.compile(experts, fullgraph=True)
    assert torch.equal(compiled(*args), experts(*args, path="decode"))  # type: ignore[arg-type]


def test_the_choice_follows_the_tensors() -> None:
    args = inputs(100, 128, 64, 8, 2, 8)
    assert torch.equal(experts(*args), experts(*args, path="fused"))


@pytest.mark.parametrize("T", [1, 300, 3000])
def test_shared_experts_are_added_where_the_choices_are_summed(T: int) -> None:
    from abyssal.ops.experts import experts, with_shared
    from abyssal.ops.linear import linear

    D, F, E, K, S = 256, 128, 16, 4, 2
    x = torch.randn(T, D, device="cuda").bfloat16()
    shapes = (E, F, D), (E, D, F), (E, F, D), (S * F, D), (D, S * F), (S * F, D)
    w1, w2, w3, s1, s2, s3 = ((torch.randn(s, device="cuda") / s[-1] ** 0.5).bfloat16() for s in shapes)
    indices, weights = torch.rand(T, E, device="cuda").topk(K).indices, torch.rand(T, K, device="cuda")
    with torch.inference_mode():
        y = with_shared(x, w1, w2, w3, indices, weights, s1, s2, s3, path="fused").float()
        shared = linear(torch.nn.functional.silu(linear(x, s1)) * linear(x, s3), s2).float()
        expected = experts(x, w1, w2, w3, indices, weights, path="fused").float() + shared
    assert (y - expected).norm() < 1e-2 * expected.norm()
