"""What FP8 training rounds, through Triton's interpreter: tiles, edges, both layouts, scales. The interpreter's own
rounding to FP8 is coarser than a device's (a mantissa that rounds up loses its carry): it is for `tests/gpu`."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import pad, silu

from abyssal.kernels import fp8_train as kernels

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
    torch.testing.assert_close(scale.T, wide.abs().amax(-1).clamp(min=1e-30) / 448, rtol=1e-5, atol=0)
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


def test_shapes_are_known_without_running() -> None:
    """For compilation: the fake operators agree with the real ones."""
    inner, dh, w = normal(130, 256), normal(130, 128), normal(100, 200)
    ops = torch.ops.abyssal
    for op, arguments in (
        (ops.fp8_round_rows, (w, True)),
        (ops.fp8_round_rows, (w, False)),
        (ops.fp8_round_gated, (inner, True)),
        (ops.fp8_round_gated_gradient, (inner, dh, True)),
        (ops.fp8_round_weights, ([w, w], True)),
        (ops.fp8_round_weights, ([w], False)),
    ):
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))
