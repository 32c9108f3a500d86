"""Block-scaled FP8 kernels through Triton's interpreter: its numbers, tiles and edges; speed and FP8's own rounding,
which the interpreter does not do (a mantissa that rounds up loses its carry), are for `tests/gpu`."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from abyssal.kernels import fp8, fp8_experts
from abyssal.ops.experts import experts
from abyssal.ops.fp8 import dequantize, quantize

few = settings(max_examples=8, deadline=None)


def error(out, exact):
    assert out.isfinite().all()
    return float((out.double() - exact.double()).norm() / exact.double().norm())


def weight(*shape, seed=0):
    return quantize(torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / shape[-1] ** 0.5)


def test_every_byte_is_widened_as_torch_does() -> None:
    """Subnormals, zeros of both signs and the largest; the two NaN, 0x7f and 0xff, are no weights."""
    values = torch.tensor([b for b in range(256) if b & 0x7F != 0x7F], dtype=torch.uint8)
    values = torch.nn.functional.pad(values, (0, 256 - len(values))).view(2, 128).view(torch.float8_e4m3fn)
    eye = torch.eye(128)
    assert torch.equal(fp8.few_rows(eye, values, torch.ones(1, 1)), values.float().T)


@few
@given(
    st.integers(1, 40), st.integers(1, 200), st.integers(1, 300), st.sampled_from([None, (32, 2, 4, 2), (64, 3, 4, 2)])
)
def test_weight_only_is_the_dequantised_product(tokens, rows, width, tuning) -> None:
    """Any sizes, ragged blocks, one part of the sum or several."""
    w, s = weight(rows, width)
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(1))
    assert error(fp8.few_rows(x, w, s, tuning), x.double() @ dequantize(w, s, torch.float64).T) < 1e-6


@few
@given(st.integers(1, 70), st.integers(1, 300))
def test_a_scale_a_token_and_block(tokens, width) -> None:
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(0))
    x[0] = 0
    q, scale = fp8.quantize_rows(x)
    blocks = -(-width // 128)
    assert q.shape == (-(-tokens // 16) * 16, blocks * 128) and scale.shape == (blocks, len(q))
    q, scale = q[:tokens], scale[:, :tokens]
    assert (q[:, width:].float() == 0).all()  # padded to whole blocks
    wide = torch.nn.functional.pad(x, (0, blocks * 128 - width)).unflatten(1, (blocks, 128))
    torch.testing.assert_close(scale.T, wide.abs().amax(-1).clamp(min=1e-12) / 448)
    assert (q.float().unflatten(1, (blocks, 128)) * scale.T[..., None])[0].abs().max() == 0


@pytest.mark.parametrize("tokens, rows, width", [(5, 70, 128), (130, 200, 256)])
def test_both_in_fp8(tokens, rows, width) -> None:
    w, s = weight(rows, width)
    q, scale = fp8.quantize_rows(torch.randn(tokens, width, generator=torch.Generator().manual_seed(1)))
    q, scale = q[:tokens], scale[:, :tokens]
    rounded = (q.double().unflatten(1, (-1, 128)) * scale.T[..., None]).flatten(1)
    out = fp8.many_rows(q, scale, w, s, torch.float32, (64, 4, 2))
    assert error(out, rounded @ dequantize(w, s, torch.float64).T) < 1e-6


def test_a_choice_is_sorted_by_its_expert_and_then_its_place() -> None:
    indices = torch.randint(0, 40, (23, 3), generator=torch.Generator().manual_seed(0))
    order, counts = fp8_experts._sorted(indices, 50)
    assert torch.equal(order.long(), indices.flatten().argsort(stable=True))
    assert torch.equal(counts.long(), torch.bincount(indices.flatten(), minlength=50))


@settings(max_examples=5, deadline=None)
@given(
    st.integers(1, 20),
    st.sampled_from([64, 130, 200]),
    st.sampled_from([40, 128, 130]),
    st.integers(1, 3),
    st.booleans(),
)
def test_experts(tokens, width, inner, chosen, by_counting) -> None:
    """Uneven and empty experts, tiles that end in the middle, ragged blocks."""
    g = torch.Generator().manual_seed(tokens)
    w1, w2, w3 = weight(5, inner, width), weight(5, width, inner, seed=1), weight(5, inner, width, seed=2)
    x, gate = torch.randn(tokens, width, generator=g), torch.rand(tokens, chosen, generator=g)
    indices = torch.stack([torch.randperm(4, generator=g)[:chosen] for _ in range(tokens)])
    dense = [dequantize(*w, torch.float64) for w in (w1, w2, w3)]
    exact = experts(x.double(), *dense, indices, gate.double(), path="reference")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fp8_experts, "SORT_FEW", 2048 if by_counting else 0)
        out = fp8_experts.experts(x, *w1, *w2, *w3, indices, gate, fp8=False)
    assert error(out, exact) < 1e-6


def test_experts_in_fp8() -> None:
    """The interpreter's rounding to FP8 is coarser than a device's (0.05 and not 0.026 a number)."""
    g = torch.Generator().manual_seed(0)
    w1, w2, w3 = weight(5, 128, 256), weight(5, 256, 128, seed=1), weight(5, 128, 256, seed=2)
    x, gate = torch.randn(33, 256, generator=g), torch.rand(33, 2, generator=g)
    indices = torch.stack([torch.randperm(4, generator=g)[:2] for _ in range(33)])
    dense = [dequantize(*w, torch.float64) for w in (w1, w2, w3)]
    exact = experts(x.double(), *dense, indices, gate.double(), path="reference")
    assert error(fp8_experts.experts(x, *w1, *w2, *w3, indices, gate, fp8=True), exact) < 0.15
