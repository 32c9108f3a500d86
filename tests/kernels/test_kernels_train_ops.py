"""The kernels of a training step in the interpreter, forward and backward, against the references in float64."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from abyssal.kernels.experts_sort import by_load
from abyssal.ops.counts import count_picks
from abyssal.ops.fork import fork
from abyssal.ops.gate import gate
from abyssal.ops.gated import gated, gated_halves
from abyssal.ops.norm import add_norm, norm_beside, rms_norm
from abyssal.ops.rotary import norm_rotate, rotate

DTYPES = {torch.float32: 2e-6, torch.bfloat16: 1.2e-2}
widths = st.sampled_from([1, 3, 8, 24, 33])
rows = st.sampled_from([0, 1, 2, 5, 9])


def error(out: Tensor, exact: Tensor) -> float:
    assert out.isfinite().all() and out.shape == exact.shape
    return float((out.double() - exact).norm() / exact.norm().clamp(min=1e-2))


def same(run: Callable[..., tuple[Tensor, ...]], leaves: list[Tensor], fast: str, slow: str = "reference") -> None:
    """Outputs and gradients on the path `fast` are those of `slow` in float64, of the same numbers."""
    tolerance = DTYPES[leaves[0].dtype]
    outs = []
    for path, inputs in ((fast, leaves), (slow, [t.double() for t in leaves])):
        inputs = [t.detach().requires_grad_() for t in inputs]
        out = run(*inputs, path)
        g = torch.Generator().manual_seed(7)
        above = [torch.randn(t.shape, generator=g).to(leaves[0].dtype).to(t.dtype) for t in out]
        outs.append([*(t.detach() for t in out), *torch.autograd.grad(out, inputs, above)])
    for a, b in zip(*outs, strict=True):
        assert error(a, b) < tolerance


def draw(g: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=g).to(dtype)


@settings(max_examples=15, deadline=None)
@given(rows, widths, st.sampled_from(list(DTYPES)), st.booleans())
def test_norm(n: int, D: int, dtype: torch.dtype, sliced: bool) -> None:
    g = torch.Generator().manual_seed(n)
    x, y, weight = draw(g, n, D + 5, dtype=dtype), draw(g, n, D, dtype=dtype), draw(g, D, dtype=dtype)
    x = x[:, 2 : 2 + D] if sliced else x[:, :D].contiguous()
    same(lambda x, w, path: (rms_norm(x, w, 0.1, path),), [x, weight], "triton")
    same(lambda x, y, w, path: add_norm(x, y, w, 0.1, path), [x, y, weight], "triton")


@pytest.mark.parametrize("used", [(0,), (1,), (0, 1)], ids=str)
def test_norm_beside_what_it_normalises(used: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(0)
    for dtype in DTYPES:
        same(lambda x, w, path: tuple(norm_beside(x, w, 0.1, path)[i] + 0 * w for i in used),
             [draw(g, 5, 24, dtype=dtype), draw(g, 24, dtype=dtype)], "triton")  # fmt: skip


@pytest.mark.parametrize("readers", [2, 3, 4])
@pytest.mark.parametrize("used", [1, 2, 3, 4])
def test_gradients_of_several_readers_are_added(readers: int, used: int) -> None:
    g = torch.Generator().manual_seed(0)
    for dtype in DTYPES:
        same(lambda x, path: tuple((i + 1) * t for i, t in enumerate(fork(x, readers, path)[:used])),
             [draw(g, 3, 700, dtype=dtype)], "triton")  # fmt: skip


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=40))
def test_experts_by_load(rows: list[int]) -> None:
    starts = torch.tensor([0, *rows], dtype=torch.int32).cumsum(0).to(torch.int32)
    expected = sorted(range(len(rows)), key=lambda e: (-rows[e], e))
    assert by_load(starts).tolist() == expected


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 40), st.integers(1, 3), st.integers(1, 20), st.booleans())
def test_picks_are_counted(T: int, K: int, E: int, some: bool) -> None:
    g = torch.Generator().manual_seed(T)
    indices = torch.randint(0, E, (T, K), generator=g)
    live = torch.rand(T, generator=g) > 0.4 if some else None
    assert torch.equal(count_picks(indices, E, live, "triton"), count_picks(indices, E, live, "reference"))


def test_norm_of_long_batches_adds_up_every_row() -> None:
    """More rows than the programs take at once."""
    g = torch.Generator().manual_seed(0)
    same(lambda x, w, path: (rms_norm(x, w, 0.1, path),), [draw(g, 700, 40), draw(g, 40)], "triton")


def test_only_one_of_the_two_results_of_add_norm_is_used() -> None:
    g = torch.Generator().manual_seed(0)
    for used in (0, 1):
        same(lambda x, y, w, path: (add_norm(x, y, w, 0.1, path)[used] + 0 * w,),  # noqa: B023
             [draw(g, 3, 8) for _ in range(2)] + [draw(g, 8)], "triton")  # fmt: skip


@settings(max_examples=15, deadline=None)
@given(rows, widths, st.sampled_from(list(DTYPES)))
def test_gated(n: int, F: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(n)
    ab = draw(g, n, 2 * F + 3, dtype=dtype)
    same(lambda a, b, path: (gated(a, b, path),), [ab[:, :F], ab[:, F : 2 * F]], "triton")
    same(lambda ab, path: (gated_halves(ab, path),), [ab[:, : 2 * F]], "triton")


@settings(max_examples=15, deadline=None)
@given(rows, st.sampled_from([2, 4, 6, 16]), st.integers(1, 3), st.sampled_from(list(DTYPES)))
def test_rotation_of_slices(n: int, R: int, H: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(n)
    q, kv, weight = draw(g, n, H, 5 + R, dtype=dtype), draw(g, n, 7 + R, dtype=dtype), draw(g, 7, dtype=dtype)
    angles = draw(g, n, R // 2)
    cos, sin = angles.cos(), angles.sin()
    same(lambda q, path: (rotate(q[..., 5:], cos, sin, path),), [q], "triton")
    same(lambda kv, path: (rotate(kv[:, 7:], cos, sin, path),), [kv], "triton")
    same(lambda kv, w, path: norm_rotate(kv, w, 0.1, cos, sin, path), [kv, weight], "triton")


V3 = ("sigmoid", 4, 2, 3, True, 2.5, "best two")
V2 = ("softmax", 1, 1, 2, False, 1.5, "best")


@pytest.mark.parametrize("rest", [V3, V2])
@pytest.mark.parametrize("T, E, D", [(1, 8, 16), (37, 12, 24), (70, 8, 16), (0, 8, 16)])
@pytest.mark.parametrize("used", [("weights",), ("scores",), ("weights", "scores")], ids=str)
def test_gate(rest: tuple, T: int, E: int, D: int, used: tuple[str, ...]) -> None:  # type: ignore[type-arg]
    g = torch.Generator().manual_seed(T)
    x, weight, bias = draw(g, T, D), draw(g, E, D) / 4, draw(g, E) / 10 if rest is V3 else None
    outs = []
    for path, wide in (("kernel", torch.float32), ("reference", torch.float64)):
        inputs = [t.to(wide).requires_grad_() for t in (x, weight)]
        weights, indices, scores = gate(*inputs, None if bias is None else bias.to(wide), *rest, path=path)
        spread = torch.zeros(T, E, dtype=wide).scatter_add(1, indices, weights)
        made = {"weights": spread, "scores": scores}
        loss = sum((made[name] * torch.arange(E).cos()).sum() for name in used)
        outs.append([spread.detach(), scores.detach(), *torch.autograd.grad(loss, inputs)])
    for a, b in zip(*outs, strict=True):
        assert error(a, b) < 1e-5


@pytest.mark.parametrize("rest", [V3, V2])
def test_gradients_of_a_gate_in_bf16_lose_little(rest: tuple) -> None:  # type: ignore[type-arg]
    """The logits' gradients go through products of bf16 in halves: what is lost is the rounding of the result."""
    g, T, E, D = torch.Generator().manual_seed(0), 300, 8, 16
    x, weight = draw(g, T, D, dtype=torch.bfloat16), draw(g, E, D, dtype=torch.bfloat16)
    d_weights, d_scores = draw(g, T, rest[3]), draw(g, T, E)
    exact = [t.double().requires_grad_() for t in (x, weight)]
    weights, indices, scores = gate(*exact, None, *rest, path="reference")
    expected = torch.autograd.grad((weights, scores), exact, (d_weights.double(), d_scores.double()))
    more = (indices, scores.float().detach(), rest[0], rest[4], rest[5])
    found = torch.ops.abyssal.gate_backward(d_weights, d_scores, x, weight, *more)
    for a, b in zip(found, expected, strict=True):
        assert error(a, b) < 3e-3
