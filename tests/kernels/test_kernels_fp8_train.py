"""What FP8 training rounds, through Triton's interpreter: tiles, edges, both layouts, scales. The interpreter's own
rounding to FP8 is coarser than a device's (a mantissa that rounds up loses its carry): it is for `tests/gpu`."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import pad, silu

from abyssal.kernels import fp8_train as kernels
from abyssal.ops.device import assumed
from abyssal.ops.fp8_train import fp8_train_linear, fp8_train_mlp, serves

few = settings(max_examples=6, deadline=None)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def near(numbers, exact) -> None:
    """Within what three bits after the first lose, but for few whose carry is lost: those are halved."""
    floor = float(exact.abs().max()) * 2**-9
    torch.testing.assert_close(numbers, exact, rtol=0.51, atol=floor)
    assert ((numbers - exact).abs() > 0.13 * exact.abs() + floor).float().mean() < 0.05


def check(q, scale, x) -> None:
    """That `q`, `scale` are `x` in whole blocks, rounded along its columns, zeros past its edges."""
    rows, columns = -(-x.shape[0] // 128), -(-x.shape[1] // 128)
    assert q.shape == (rows * 128, columns * 128) and scale.shape == (columns, rows * 128)
    wide = pad(x, (0, columns * 128 - x.shape[1], 0, rows * 128 - x.shape[0])).unflatten(1, (columns, 128))
    torch.testing.assert_close(scale.T, wide.abs().amax(-1).clamp(min=1e-30) / 448, rtol=1e-4, atol=1e-9)
    numbers = q.float().unflatten(1, (columns, 128))
    near(numbers * scale.T[..., None], wide)
    assert not numbers[wide == 0].any()


@few
@given(st.integers(1, 200), st.integers(1, 300))
def test_rows_and_turned(tokens, width) -> None:
    x = normal(tokens, width + 3)[:, :width]
    q, scale, turned, turned_scale = kernels.round_rows(x, True)
    check(q, scale, x)
    check(turned, turned_scale, x.T)
    alone = kernels.round_rows(x, False)
    assert torch.equal(alone[0].view(torch.uint8), q.view(torch.uint8)) and not alone[2].numel()


@few
@given(st.integers(1, 150), st.sampled_from([128, 256]))
def test_gated(tokens, width) -> None:
    inner, dh = normal(tokens, 2 * width), normal(tokens, width, seed=1)
    a, b = (t.clone().requires_grad_() for t in inner.chunk(2, -1))
    hidden = silu(a) * b
    hidden.backward(dh)
    q, scale, turned, turned_scale = kernels.round_gated(inner, True)
    check(q, scale, hidden.detach())
    check(turned, turned_scale, hidden.detach().T)
    gradient = torch.cat((a.grad, b.grad), -1)
    q, scale, turned, turned_scale = kernels.round_gated_gradient(inner, dh, True)
    check(q, scale, gradient)
    check(turned, turned_scale, gradient.T)


@pytest.mark.parametrize("shapes", [[(100, 130)], [(128, 128), (256, 128)], [(128, 640), (128, 640)]])
def test_weights_one_below_the_other_and_turned(shapes) -> None:
    weights = [normal(*shape, seed=i) for i, shape in enumerate(shapes)]
    width = -(-shapes[0][1] // 128) * 128
    wide = torch.cat([pad(w, (0, width - w.shape[1], 0, -w.shape[0] % 128)) for w in weights])
    blocks = wide.unflatten(1, (-1, 128)).unflatten(0, (-1, 128)).abs().amax((1, 3)) / 448
    q, scale = kernels.round_weights(weights, False)
    turned, turned_scale = kernels.round_weights(weights, True)
    assert torch.equal(turned.view(torch.uint8), q.view(torch.uint8).T)
    for s, expected in ((scale, blocks), (turned_scale, blocks.T)):
        assert s.shape[1] % 4 == 0 and not s[:, expected.shape[1] :].any()
        torch.testing.assert_close(s[:, : expected.shape[1]], expected, rtol=1e-5, atol=0)
    spread = blocks.repeat_interleave(128, 0).repeat_interleave(128, 1)
    near(q.float() * spread, wide)


# The maps, with the library's scaled products replaced by wide ones of the same rounded numbers.


def rows(q, scale):
    return (q.float().unflatten(1, (-1, 128)) * scale.T[..., None]).flatten(1)


def product(q, scale, weight, weight_scale):
    spread = weight_scale[:, : weight.shape[1] // 128].repeat_interleave(128, 0).repeat_interleave(128, 1)
    return (rows(q, scale) @ (weight.float() * spread).T).bfloat16()


def product_of_rows(a, a_scale, b, b_scale, dtype):
    return (rows(a, a_scale) @ rows(b, b_scale).T).to(dtype)


@pytest.fixture
def wide_products(monkeypatch):
    monkeypatch.setattr(kernels, "product", product)
    monkeypatch.setattr(kernels, "product_of_rows", product_of_rows)


def leaves(*shapes):
    return [normal(*shape, seed=i).bfloat16().requires_grad_() for i, shape in enumerate(shapes)]


def gradients(run, inputs):
    y = run(*inputs)
    return y, *torch.autograd.grad(y, inputs, normal(*y.shape, seed=9).bfloat16())


def error(out, exact) -> float:
    out, exact = out.detach(), exact.detach()
    assert out.isfinite().all() and out.shape == exact.shape
    return float((out.double() - exact.double()).norm() / exact.double().norm())


@pytest.mark.parametrize("tokens, inputs, outputs", [(1, 128, 128), (150, 200, 300)])
def test_a_map_and_its_gradients(wide_products, tokens, inputs, outputs) -> None:
    """As the reference, but for the interpreter's own rounding: 0.05 of a number here, and not 0.026."""
    both = leaves((tokens, inputs), (outputs, inputs))
    own = gradients(lambda x, w: fp8_train_linear(x, w, "fp8"), both)
    exact = gradients(lambda x, w: fp8_train_linear(x, w, "reference"), both)
    assert all(error(a, b) < 0.15 for a, b in zip(own, exact))


def test_the_gated_mlp_and_its_gradients(wide_products) -> None:
    four = leaves((150, 128), (256, 128), (128, 256), (256, 128))
    own = gradients(lambda *a: fp8_train_mlp(*a, "fp8"), four)
    exact = gradients(lambda *a: fp8_train_mlp(*a, "reference"), four)
    assert all(error(a, b) < 0.25 for a, b in zip(own, exact))


def test_only_what_is_asked_for_is_computed(wide_products, monkeypatch) -> None:
    x, w = leaves((20, 128), (128, 128))
    monkeypatch.setattr(kernels, "product_of_rows", None)
    fp8_train_linear(x, w.detach(), "fp8").sum().backward()
    assert x.grad is not None
    monkeypatch.setattr(kernels, "product_of_rows", product_of_rows)
    fp8_train_linear(x.detach(), w, "fp8").sum().backward()
    assert w.grad is not None
    with torch.no_grad():
        assert not fp8_train_mlp(x, w, w, w, "fp8").requires_grad


def test_compiled_whole_it_is_the_same(wide_products) -> None:
    """Maps after one another, so that what lies between is no leaf."""

    def run(x, w1, w2, w3):
        return fp8_train_linear(2 * fp8_train_mlp(x, w1, w2, w3, "fp8"), 0.5 * w1, "fp8")

    four = leaves((150, 128), (256, 128), (128, 256), (256, 128))
    own = gradients(torch.compile(run, fullgraph=True, backend="aot_eager"), four)
    assert all(torch.equal(a, b) for a, b in zip(own, gradients(run, four)))


def test_a_step_is_walked_through_on_nothing() -> None:
    """With fake tensors that count as lying on Hopper: the maps are chosen, and nothing runs."""
    with FakeTensorMode(), assumed((9, 0)):
        x, w1, w2, w3 = (torch.empty(s, dtype=torch.bfloat16) for s in ((150, 128), (256, 128), (128, 256), (256, 128)))
        leaves = [t.requires_grad_() for t in (x, w1, w2, w3)]
        assert serves(x)
        y = fp8_train_linear(fp8_train_mlp(*leaves), w1)
        y.sum().backward()
        assert y.shape == (150, 256) and all(t.grad.shape == t.shape for t in leaves)


@pytest.mark.parametrize("learns", [True, False])
def test_shapes_are_known_without_running(wide_products, learns) -> None:
    x, dy, w = normal(150, 200).bfloat16(), normal(150, 300).bfloat16(), normal(300, 200)
    ops, checks = torch.ops.abyssal, {"test_utils": "test_faketensor"}
    torch.library.opcheck(ops.fp8_train_linear, (x, w, learns), **checks)
    _, turned, scale = ops.fp8_train_linear(x, w, learns)
    torch.library.opcheck(ops.fp8_train_linear_backward, (dy, w, turned, scale, not learns, learns), **checks)
    x, w1, w2, w3 = (t.detach() for t in leaves((150, 128), (256, 128), (128, 256), (256, 128)))
    torch.library.opcheck(ops.fp8_train_linear_mlp, (x, w1, w2, w3, learns), **checks)
    _, *kept = ops.fp8_train_linear_mlp(x, w1, w2, w3, learns)
    torch.library.opcheck(ops.fp8_train_linear_mlp_backward, (x, w1, w2, w3, *kept, not learns, learns), **checks)
