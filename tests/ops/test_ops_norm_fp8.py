"""RMS norm and FP8 blocks by hand."""

import pytest
import torch

from abyssal.ops.experts import experts
from abyssal.ops.fp8 import dequantize, quantize, scale_shape
from abyssal.ops.fp8_linear import fp8_experts, fp8_linear
from abyssal.ops.linear import linear
from abyssal.ops.norm import rms_norm


def test_rms_norm_by_hand() -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.float64)
    weight = torch.tensor([2.0, -1.0], dtype=torch.float64)
    root = (12.5 + 0.5) ** 0.5
    out = rms_norm(x, weight, eps=0.5)
    torch.testing.assert_close(out, torch.tensor([[6 / root, -4 / root], [0, 0]], dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rms_norm_of_narrow_numbers_is_computed_wide(dtype) -> None:
    """Squares of 300 overflow float16 and lose what bfloat16 has; rounded before the weight, as DeepSeek's is."""
    g = torch.Generator().manual_seed(0)
    x, weight = (300 * torch.randn(4, 64, generator=g)).to(dtype), torch.randn(64, generator=g).to(dtype)
    out = rms_norm(x, weight, 1e-6)
    normal = (x.float() / (x.float().square().mean(-1, keepdim=True) + 1e-6).sqrt()).to(dtype)
    assert out.dtype == dtype
    torch.testing.assert_close(out, normal * weight, atol=0, rtol=1e-2)
    assert torch.isfinite(out).all()


def test_rms_norm_gradients() -> None:
    x, weight = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 5), (5,)))
    assert torch.autograd.gradcheck(lambda a, b: rms_norm(a, b, 0.1), [x, weight])


@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (576, 200), (1, 1), (127, 129), (3, 130, 257)])
def test_each_block_of_128_by_128_has_its_scale(shape) -> None:
    """Ragged edges too: V3's own kv_a projection has 576 rows."""
    g = torch.Generator().manual_seed(0)
    rows, cols = shape[-2:]
    values = torch.randn(shape, generator=g).to(torch.float8_e4m3fn)
    scale = torch.rand(*shape[:-2], *scale_shape(rows, cols), generator=g) + 0.5
    out = dequantize(values, scale, torch.float32)
    for r in range(0, rows, 37):
        for c in range(0, cols, 41):
            expected = values[..., r, c].float() * scale[..., r // 128, c // 128]
            assert torch.equal(out[..., r, c], expected)


def test_dequantised_is_multiplied_in_float32_and_rounded_once() -> None:
    """In bfloat16 the scale would be rounded before the product, and then the product again."""
    g = torch.Generator().manual_seed(0)
    values = torch.randn(128, 128, generator=g).to(torch.float8_e4m3fn)
    scale = torch.tensor([[1.00375]])
    out = dequantize(values, scale, torch.bfloat16)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, (values.float() * 1.00375).bfloat16())
    assert not torch.equal(out, values.bfloat16() * scale.bfloat16())


@pytest.mark.parametrize("shape", [(128, 256), (130, 200), (2, 129, 64)])
def test_quantised_comes_back_within_half_a_step(shape) -> None:
    """e4m3 has 3 bits behind the point: 1/16 of a value, or half the smallest step of its block."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weight[..., :5, :5] *= 100  # one block is much larger than the others
    values, scale = quantize(weight)
    assert values.dtype == torch.float8_e4m3fn and values.shape == weight.shape
    assert scale.dtype == torch.float32 and scale.shape[-2:] == scale_shape(*shape[-2:])
    back = dequantize(values, scale, torch.float32)
    step = scale.repeat_interleave(128, -2).repeat_interleave(128, -1)[..., : shape[-2], : shape[-1]] * 2.0**-10
    assert ((back - weight).abs() <= torch.maximum(weight.abs() / 16, step) * 1.001).all()


def test_the_largest_of_a_block_is_448_and_exact() -> None:
    weight = torch.zeros(128, 256)
    weight[3, 4], weight[5, 200] = -7.0, 0.25
    values, scale = quantize(weight)
    assert values[3, 4].float() == -448 and values[5, 200].float() == 448
    assert scale.tolist() == [[pytest.approx(7 / 448), pytest.approx(0.25 / 448)]]
    assert dequantize(values, scale, torch.float64)[3, 4].item() == pytest.approx(-7)


def test_a_block_of_zeros_stays_zero() -> None:
    values, scale = quantize(torch.zeros(130, 5))
    assert torch.isfinite(scale).all()
    assert (dequantize(values, scale, torch.float32) == 0).all()


def test_a_scale_that_does_not_cover_the_weight_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected \[2, 1\] blocks of 128x128 for a weight \[129, 128\]"):
        dequantize(torch.zeros(129, 128).to(torch.float8_e4m3fn), torch.ones(1, 1), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_on_a_cpu_a_weight_is_dequantised_and_multiplied(dtype) -> None:
    """V3's kv_a projection has 576 rows; any leading dimensions."""
    g = torch.Generator().manual_seed(0)
    weight, scale = quantize(torch.randn(576, 200, generator=g))
    x = torch.randn(2, 3, 200, generator=g).to(dtype).requires_grad_()
    out = fp8_linear(x, weight, scale)
    assert out.dtype == dtype and torch.equal(out, linear(x, dequantize(weight, scale, dtype)))
    out.sum().backward()  # through the weight to x
    assert x.grad is not None


def test_on_a_cpu_experts_are_dequantised() -> None:
    g = torch.Generator().manual_seed(0)
    (w1, s1), (w2, s2), (w3, s3) = (
        quantize(torch.randn(s, generator=g) / 10) for s in ((4, 130, 70), (4, 70, 130), (4, 130, 70))
    )
    x, gate = torch.randn(9, 70, generator=g), torch.rand(9, 2, generator=g)
    indices = torch.randint(0, 4, (9, 2), generator=g)
    dense = [dequantize(w, s, torch.float32) for w, s in ((w1, s1), (w2, s2), (w3, s3))]
    expected = experts(x, *dense, indices, gate)
    assert torch.equal(fp8_experts(x, w1, s1, w2, s2, w3, s3, indices, gate), expected)


def test_an_unknown_path_is_refused() -> None:
    weight, scale = quantize(torch.zeros(4, 4))
    with pytest.raises(ValueError, match="path: expected 'reference', 'weight only' or 'fp8', got 'best'"):
        fp8_linear(torch.zeros(1, 4), weight, scale, "best")
    stacked = (weight[None], scale[None]) * 3
    with pytest.raises(ValueError, match="path: expected 'reference', 'weight only' or 'fp8', got 'best'"):
        fp8_experts(torch.zeros(1, 4), *stacked, torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1), "best")
