"""FP8 weights on a GPU: every path against float64, odd shapes, poisoned outputs, the same bits each time."""

import pytest
import torch

from abyssal.kernels import fp8 as kernels
from abyssal.ops.experts import experts
from abyssal.ops.fp8 import dequantize, quantize
from abyssal.ops.fp8_linear import fp8_experts, fp8_linear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
native = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="no FP8 on this device"
)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory that a launcher asks for holds NaN until it is written."""
    empty = torch.empty

    def poison(*size, **options):
        t = empty(*size, **options)
        return t.fill_(float("nan")) if t.is_floating_point() and t.is_cuda else t

    monkeypatch.setattr(torch, "empty", poison)


def error(out, exact):
    assert out.isfinite().all()
    return float((out.double() - exact.double()).norm() / exact.double().norm())


def weight(*shape):
    return quantize(torch.randn(shape, device="cuda") / shape[-1] ** 0.5)


@pytest.mark.parametrize("rows, width", [(576, 1024), (130, 200), (1, 1), (4100, 256)])
@pytest.mark.parametrize("tokens", [1, 17, 64, 300])
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 4e-3), (torch.float16, 1e-3), (torch.float32, 1e-5)])
def test_weight_only(tokens, rows, width, dtype, tolerance) -> None:
    w, s = weight(rows, width)
    x = torch.randn(tokens, width, device="cuda").to(dtype)
    out = fp8_linear(x, w, s, "weight only")
    assert out.dtype == dtype and out.shape == (tokens, rows)
    assert error(out, x.double() @ dequantize(w, s, torch.float64).T) < tolerance
    assert torch.equal(out, fp8_linear(x, w, s, "weight only"))


def test_bytes_are_widened_where_the_device_has_no_fp8(monkeypatch) -> None:
    monkeypatch.setattr(kernels, "weight_bytes", lambda w: w.view(torch.uint8))
    w, s = weight(576, 384)
    x = torch.randn(20, 384, device="cuda", dtype=torch.bfloat16)
    assert error(fp8_linear(x, w, s, "weight only"), x.double() @ dequantize(w, s, torch.float64).T) < 4e-3


@native
@pytest.mark.parametrize("tokens, width", [(1, 128), (5, 200), (300, 1000), (129, 7168)])
def test_rows_are_rounded_as_torch_does(tokens, width) -> None:
    x = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
    x[0] = 0
    q, scale = kernels.quantize_rows(x)
    q, scale = q[:tokens], scale[:, :tokens]
    blocks = -(-width // 128)
    wide = torch.nn.functional.pad(x.float(), (0, blocks * 128 - width)).view(tokens, blocks, 128)
    expected = wide.abs().amax(-1).clamp(min=1e-12) / 448
    torch.testing.assert_close(scale.T, expected, rtol=1e-6, atol=0)
    exact = (wide / expected[..., None]).to(torch.float8_e4m3fn).view(tokens, -1)
    # A quotient off by its last bit may fall on the other side of a midpoint.
    assert (q.float() != exact.float()).float().mean() < 1e-3
    assert (q[0].float() == 0).all() and (q[:, width:].float() == 0).all()


@native
@pytest.mark.parametrize(
    "rows, width", [(576, 1024), (130, 200), (128, 128), (300, 144), (512, 384), (2048, 7168), (4096, 512)]
)
@pytest.mark.parametrize("tokens", [1, 65, 1001])
@pytest.mark.parametrize("by", ["choice", "hopper", "triton"])
def test_both_in_fp8(monkeypatch, by, tokens, rows, width) -> None:
    """Against the product of what x was rounded to, near bf16's own rounding; against x's, within FP8's. By cuBLAS
    where it serves, by the kernel for Hopper, by the one for any device with FP8."""
    if by != "choice":
        monkeypatch.setattr(kernels, "library_serves", lambda weight: False)
    if by == "triton":
        monkeypatch.setattr(kernels, "hopper", lambda weight: False)
    w, s = weight(rows, width)
    x = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
    out, dense = fp8_linear(x, w, s, "fp8"), dequantize(w, s, torch.float64)
    q, scale = kernels.quantize_rows(x)
    q, scale = q[:tokens], scale[:, :tokens]
    rounded = (q.double().view(tokens, -1, 128) * scale.T.double()[..., None]).view(tokens, -1)[:, :width]
    assert error(out, rounded @ dense.T) < 5e-3
    assert error(out, x.double() @ dense.T) < 0.04
    assert torch.equal(out, fp8_linear(x, w, s, "fp8"))


@native
@pytest.mark.parametrize("path, tolerance", [("weight only", 6e-3), ("fp8", 0.06)])
@pytest.mark.parametrize(
    "T, D, F, E, K", [(1, 256, 128, 16, 4), (7, 200, 130, 9, 3), (33, 256, 256, 100, 8), (900, 384, 272, 9, 3)]
)
def test_experts(path, tolerance, T, D, F, E, K) -> None:
    """Uneven and empty experts, ragged blocks, both ways of sorting."""
    w1, w2, w3 = weight(E, F, D), weight(E, D, F), weight(E, F, D)
    x = torch.randn(T, D, device="cuda", dtype=torch.bfloat16)
    indices = torch.stack([torch.randperm(E - E // 8, device="cuda")[:K] for _ in range(T)])
    gate = torch.rand(T, K, device="cuda")
    dense = [dequantize(*w, torch.float64) for w in (w1, w2, w3)]
    exact = experts(x.double(), *dense, indices, gate.double(), path="reference")
    out = fp8_experts(x, *w1, *w2, *w3, indices, gate, path)
    assert error(out, exact) < tolerance
    assert torch.equal(out, fp8_experts(x, *w1, *w2, *w3, indices, gate, path))
    if path == "weight only":
        wide = fp8_experts(x.float(), *w1, *w2, *w3, indices, gate)
        assert wide.dtype == torch.float32 and error(wide, exact) < 2e-5


@native
@pytest.mark.parametrize("tokens, path", [(3, "weight only"), (700, "weight only"), (3, "fp8"), (700, "fp8")])
def test_no_host_synchronisation_and_a_graph_is_replayed(tokens, path) -> None:
    w, s = weight(4096, 512)
    w1, w2, w3 = weight(9, 128, 384), weight(9, 384, 128), weight(9, 128, 384)
    x = torch.randn(tokens, 512, device="cuda", dtype=torch.bfloat16)
    indices = torch.randint(0, 9, (tokens, 2), device="cuda")
    gate = torch.rand(tokens, 2, device="cuda")

    def both():
        return fp8_linear(x, w, s, path), fp8_experts(x[:, :384], *w1, *w2, *w3, indices, gate, path)

    both()
    torch.cuda.set_sync_debug_mode("error")
    try:
        both()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = both()
    x.copy_(torch.randn_like(x))
    indices.copy_(torch.randint(0, 9, (tokens, 2), device="cuda"))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(outs, both()))


def test_a_gradient_goes_through_the_dequantised_weight() -> None:
    w, s = weight(128, 128)
    x = torch.randn(2, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    fp8_linear(x, w, s).sum().backward()
    assert error(x.grad, dequantize(w, s, torch.float64).sum(0).expand(2, -1)) < 1e-2
