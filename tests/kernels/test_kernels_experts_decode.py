"""The decoding experts' kernels, interpreted: in float32, since Triton's interpreter multiplies bf16 as integers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import silu

from abyssal.kernels.experts_decode import Tile, experts_decode, moe_decode
from abyssal.ops.experts import experts
from abyssal.ops.fp8 import dequantize, quantize

SMALL = (Tile(16, 16, 2, 4), Tile(16, 32, 2, 4))


def inputs(T: int, D: int, F: int, E: int, K: int, S: int, seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """x, w1, w2, w3, indices, weights; and the shared experts' three."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g) / shape[-1] ** 0.5

    indices = torch.rand(T, E, generator=g).topk(K).indices
    routed = [torch.randn(T, D, generator=g), normal(E, F, D), normal(E, D, F), normal(E, F, D), indices]
    return [*routed, torch.rand(T, K, generator=g)], [normal(S * F, D), normal(D, S * F), normal(S * F, D)]


def exact(routed: list[Tensor], shared: list[Tensor]) -> Tensor:
    x, w1, w2, w3, indices, weights = (t.double() if t.is_floating_point() else t for t in routed)
    y = experts(x, w1, w2, w3, indices, weights, path="reference")
    a, b, c = (t.double() for t in shared)
    return y + (silu(x @ a.T) * (x @ c.T)) @ b.T


def error(out: Tensor, expected: Tensor) -> float:
    assert out.isfinite().all()
    return float((out.double() - expected).norm() / expected.norm())


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    T, D, F, E = (data.draw(st.integers(1, most)) for most in (20, 40, 40, 5))
    K, S = data.draw(st.integers(1, E)), data.draw(st.integers(0, 2))
    routed, shared = inputs(T, D, F, E, K, S, seed=data.draw(st.integers(0, 99)))
    assert error(moe_decode(*routed, *(shared if S else [None] * 3), cut=SMALL), exact(routed, shared)) < 1e-5


def test_one_expert_has_every_token() -> None:
    """More tokens than the columns of one product."""
    routed, shared = inputs(70, 16, 24, 3, 1, 0)
    routed[4].fill_(1)
    assert error(experts_decode(*routed, cut=SMALL), exact(routed, shared)) < 1e-5


def test_a_token_may_choose_an_expert_twice() -> None:
    routed, shared = inputs(20, 16, 24, 4, 3, 0)
    routed[4].fill_(2)
    assert error(experts_decode(*routed, cut=SMALL), exact(routed, shared)) < 1e-5


def test_no_token() -> None:
    routed, shared = inputs(0, 16, 24, 4, 3, 1)
    assert moe_decode(*routed, *shared).shape == (0, 16)


def test_widths_that_do_not_go_together_are_refused() -> None:
    routed, shared = inputs(2, 16, 24, 4, 3, 1)
    with pytest.raises(ValueError, match="shared_w1: expected a multiple of the 24 columns"):
        moe_decode(*routed, shared[0][:20], shared[1][:, :20], shared[2][:20])
    with pytest.raises(ValueError, match="scales: expected with e4m3 weights"):
        moe_decode(*routed, scales=(routed[1], routed[2], routed[3]))


@pytest.mark.parametrize("S", [0, 1])
def test_fp8_weights_are_the_dequantised_ones(S: int) -> None:
    routed, shared = inputs(3, 128, 256, 3, 2, S)
    narrow = [quantize(w) for w in (*routed[1:4], *shared)]
    wide = [dequantize(*pair, torch.float32) for pair in narrow]
    w, scales = [[pair[i] for pair in narrow] for i in (0, 1)]
    out = moe_decode(
        routed[0], *w[:3], *routed[4:], *(w[3:] if S else [None] * 3), scales=tuple(scales[:3]),
        shared_scales=tuple(scales[3:]) if S else None, cut=(Tile(64, 64, 2, 4), Tile(64, 128, 2, 4)),
    )  # fmt: skip
    assert error(out, exact([routed[0], *wide[:3], *routed[4:]], wide[3:])) < 1e-5
