"""Expanded attention's paths against the reference, and the reference against an explicit loop."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from abyssal.ops.attention import attention
from abyssal.ops.paged import cumulative

# (queries, keys) a sequence.
PACKINGS = {
    "one": [(5, 5)],
    "alike": [(4, 4), (4, 4), (4, 4)],
    "ragged": [(5, 5), (1, 1), (8, 8)],
    "empty among them": [(0, 0), (3, 3), (0, 0), (2, 2), (0, 0)],
    "continued": [(2, 7), (1, 9), (3, 3), (0, 4)],
    "alike, continued": [(2, 5), (2, 5)],
    "decoding": [(1, 6), (1, 1), (1, 3)],
    "nothing": [(0, 0), (0, 0)],
    "no sequence": [],
}


def inputs(packing, dtype=torch.float64, H=4, G=4, N=6, R=4, V=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    T, L = sum(t for t, _ in packing), sum(l for _, l in packing)
    shapes = [(T, H, N), (T, H, R), (L, G, N), (L, R), (L, G, V)]
    q_nope, q_rope, k_nope, k_rope, v = (
        torch.randn(s, dtype=torch.float64, generator=g).to(dtype).requires_grad_() for s in shapes
    )
    if R == 0:
        q_rope = k_rope = None
    cu_q, cu_k = cumulative([t for t, _ in packing]), cumulative([l for _, l in packing])
    longest = [max((n for n, _ in packing), default=0), max((n for _, n in packing), default=0)]
    return (q_nope, q_rope, k_nope, k_rope, v), (cu_q, cu_k, *longest, 0.37)


def by_loop(q_nope, q_rope, k_nope, k_rope, v, packing, scale):
    H, G = q_nope.shape[1], k_nope.shape[1]
    outs, q0, k0 = [], 0, 0
    for t, l in packing:
        for j in range(t):
            for h in range(H):
                g = h // (H // G)
                seen = range(k0, k0 + l - t + j + 1)
                scores = [q_nope[q0 + j, h] @ k_nope[s, g] for s in seen]
                if q_rope is not None:
                    scores = [a + q_rope[q0 + j, h] @ k_rope[s] for a, s in zip(scores, seen)]
                weights = [math.exp(scale * a.item()) for a in scores]
                outs.append(sum(w / sum(weights) * v[s, g] for w, s in zip(weights, seen)))
        q0, k0 = q0 + t, k0 + l
    return torch.stack(outs).view(-1, H, v.shape[-1]) if outs else v.new_zeros(0, H, v.shape[-1])


SHAPES = {
    "latent": {},
    "one head": {"H": 1, "G": 1},
    "odd widths": {"H": 3, "G": 3, "N": 5, "R": 2, "V": 7},
    "wide values": {"V": 17},
    "nothing decoupled": {"R": 0},
    "groups": {"H": 6, "G": 2, "R": 0},
    "groups and wide values": {"H": 6, "G": 3, "R": 0, "V": 9},
    "one key head": {"H": 5, "G": 1, "R": 0},
}


@pytest.mark.parametrize("packing", PACKINGS.values(), ids=PACKINGS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@torch.no_grad()
def test_the_reference_is_the_sum_of_two_scores_in_a_loop(packing, shape) -> None:
    tensors, rest = inputs(packing, **shape)
    out = attention(*tensors, *rest, path="reference")
    torch.testing.assert_close(out, by_loop(*tensors, packing, rest[-1]), atol=1e-12, rtol=0)


@pytest.mark.parametrize("packing", PACKINGS.values(), ids=PACKINGS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_sdpa_is_the_reference_and_so_are_its_gradients(packing, shape, dtype, tolerance) -> None:
    outs, grads = [], []
    for path in ("reference", "sdpa"):
        tensors, rest = inputs(packing, dtype, **shape)
        out = attention(*tensors, *rest, path=path)
        assert out.dtype == dtype
        if out.requires_grad and out.numel():
            (out * torch.arange(out.numel(), dtype=dtype).cos().view(out.shape)).sum().backward()
        outs.append(out)
        grads.append([t.grad for t in tensors if t is not None])
    torch.testing.assert_close(outs[0], outs[1], atol=tolerance, rtol=0)
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


def test_a_cpu_takes_sdpa_and_a_wrong_name_is_refused() -> None:
    tensors, rest = inputs([(3, 3)])
    assert torch.equal(attention(*tensors, *rest), attention(*tensors, *rest, path="sdpa"))
    with pytest.raises(ValueError, match="expected 'reference', 'sdpa', 'varlen' or 'hopper', got 'flash'"):
        attention(*tensors, *rest, path="flash")


def test_the_reference_accumulates_a_narrow_dtype_in_float32() -> None:
    tensors, rest = inputs([(40, 40)], torch.bfloat16)
    wide = [t.detach().double() for t in tensors]
    out = attention(*tensors, *rest, path="reference")
    exact = attention(*wide, *rest, path="reference").bfloat16()
    assert (out == exact).double().mean() > 0.99  # one rounding apart at most


def test_extreme_scores_do_not_overflow() -> None:
    tensors, rest = inputs([(6, 6)], torch.float32)
    big = [t.detach() * 300 for t in tensors[:4]] + [tensors[4].detach()]
    for path in ("reference", "sdpa"):
        assert torch.isfinite(attention(*big, *rest, path=path)).all()


@pytest.mark.parametrize("R", [4, 0])
def test_hopper_s_operations_can_be_traced(R) -> None:
    """Shapes and dtypes of outputs and gradients, as torch.compile asks for them, without a GPU."""
    with FakeTensorMode():
        shapes = [(7, 4, 6), (7, 4, R), (7, 4, 6), (7, R), (7, 4, 5)]
        tensors = [torch.empty(s, dtype=torch.bfloat16, requires_grad=True) for s in shapes]
        if not R:
            tensors[1] = tensors[3] = None
        cu = torch.empty(3, dtype=torch.int32)
        out = attention(*tensors, cu, cu, 5, 5, 0.3, path="hopper")
        assert out.shape == (7, 4, 5) and out.dtype == torch.bfloat16
        out.sum().backward()
        for t in tensors:
            assert t is None or (t.grad.shape == t.shape and t.grad.dtype == torch.bfloat16)
