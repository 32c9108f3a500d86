"""What a training step's operations are on any device: the same as the plain ones, their gradients too."""

import pytest
import torch
from torch import Tensor

from abyssal.ops.attention import attention
from abyssal.ops.counts import count_picks
from abyssal.ops.cross_entropy import _scaled
from abyssal.ops.fork import fork
from abyssal.ops.gated import gated, gated_halves
from abyssal.ops.latent_attention import latent_attention
from abyssal.ops.linear import linears
from abyssal.ops.norm import norm_beside, rms_norm
from abyssal.ops.paged import cumulative
from abyssal.ops.rotary import norm_rotate, rotate


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def test_maps_of_one_input_have_the_gradients_of_each_by_itself() -> None:
    leaves = [draw(5, 4), draw(3, 4), draw(2, 4), draw(6, 4)]
    assert torch.autograd.gradcheck(linears, leaves)
    apart = [leaves[0] @ w.T for w in leaves[1:]]
    assert all(torch.equal(a, b) for a, b in zip(linears(*leaves), apart))


@pytest.mark.parametrize("unused", [0, 1])
def test_maps_of_one_input_of_which_one_is_not_read(unused: int) -> None:
    x, *weights = draw(5, 4), draw(3, 4), draw(2, 4)
    out = linears(x, *weights)[1 - unused]
    found = torch.autograd.grad(out.sum(), [x, *weights], allow_unused=True)
    assert found[1 + unused] is None
    torch.testing.assert_close(found[0], weights[1 - unused].sum(0).expand(5, 4))


def test_latent_attention_is_attention_of_what_it_is_made_of() -> None:
    lens, H, N, R, V = [3, 0, 5], 2, 6, 4, 5
    T, cu, angles = sum(lens), cumulative(lens), torch.randn(sum(lens), R // 2, dtype=torch.float64)
    q, kv, k_rope = draw(T, H, N + R), draw(T, H, N + V), draw(T, R)
    out = latent_attention(q, kv, k_rope, angles.cos(), angles.sin(), cu, 5, 0.3)
    q_rope = rotate(q[..., N:], angles.cos(), angles.sin(), "reference")
    parts = (q[..., :N], q_rope, kv[..., :N], k_rope, kv[..., N:])
    torch.testing.assert_close(out, attention(*parts, cu, cu, 5, 5, 0.3, "reference"))


def test_the_latent_and_its_rotary_key_are_normalised_and_rotated() -> None:
    kv, weight, angles = draw(3, 7), draw(3), torch.randn(3, 2, dtype=torch.float64)
    latent, key = norm_rotate(kv, weight, 0.1, angles.cos(), angles.sin())
    assert torch.equal(latent, rms_norm(kv[:, :3], weight, 0.1))
    assert torch.equal(key, rotate(kv[:, 3:], angles.cos(), angles.sin()))


def test_a_norm_beside_its_input_and_halves_of_a_product() -> None:
    x, weight = draw(3, 8), draw(8)
    same, normed = norm_beside(x, weight, 0.1)
    assert torch.equal(same, x) and torch.equal(normed, rms_norm(x, weight, 0.1))
    assert torch.equal(gated_halves(x), gated(x[:, :4], x[:, 4:]))


def test_picks_that_are_live_are_counted() -> None:
    indices = torch.tensor([[0, 2], [2, 3], [1, 2]])
    assert count_picks(indices, 5).tolist() == [1, 1, 3, 1, 0]
    assert count_picks(indices, 5, torch.tensor([True, False, True])).tolist() == [1, 1, 2, 0, 0]


def test_a_gradient_is_scaled_in_float32_and_rounded_once() -> None:
    by = torch.tensor(1 / 3)
    for dtype in (torch.bfloat16, torch.float32):
        d = torch.randn(40, 30).to(dtype)
        assert torch.equal(_scaled(d, by, torch.bfloat16), (d.float() * by).bfloat16())


@pytest.mark.parametrize("call", [
    lambda path: fork(torch.ones(2), 3, path),
    lambda path: rotate(torch.ones(1, 2), torch.ones(1, 1), torch.ones(1, 1), path),
    lambda path: count_picks(torch.zeros(1, 1, dtype=torch.int64), 1, None, path),
    lambda path: norm_beside(torch.ones(1, 2), torch.ones(2), 0.1, path),
    lambda path: gated_halves(torch.ones(1, 2), path),
], ids=["fork", "rotate", "count_picks", "norm_beside", "gated_halves"])  # fmt: skip
def test_an_unknown_path_is_refused(call) -> None:
    with pytest.raises(ValueError, match="path: expected 'reference' or 'triton', got 'best'"):
        call("best")
    with pytest.raises(ValueError, match="path: expected 'split' or 'hopper', got 'best'"):
        q = torch.ones(1, 1, 4)
        latent_attention(q, q, q[0, :, :2], q[0, :, :1], q[0, :, :1], cumulative([1]), 1, 1.0, "best")
