"""Products, head by head too: "rowwise" against "matmul", eager and compiled."""

import shutil

import pytest
import torch

from abyssal.ops.linear import FEW_ROWS, linear, per_head

TOLERANCES = [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 0.02)]


@pytest.mark.parametrize("shape", [(1, 8), (3, 8), (8,), (2, 3, 8), (0, 8)])
@pytest.mark.parametrize("dtype, tolerance", TOLERANCES)
def test_linear_is_x_times_the_transpose(shape, dtype, tolerance) -> None:
    x, weight = torch.randn(shape).to(dtype), torch.randn(5, 8).to(dtype)
    expected = torch.einsum("...i,oi->...o", x.double(), weight.double())
    for path in ("matmul", "rowwise", None):
        y = linear(x, weight, path)
        assert y.dtype == dtype and y.shape == (*shape[:-1], 5)
        torch.testing.assert_close(y.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("T", [0, 1, 6])
@pytest.mark.parametrize("dtype, tolerance", TOLERANCES)
def test_per_head_is_a_product_a_head(T, dtype, tolerance) -> None:
    x, weight = torch.randn(T, 3, 7).to(dtype), torch.randn(3, 5, 7).to(dtype)
    expected = torch.einsum("thi,hoi->tho", x.double(), weight.double())
    for path in ("matmul", "rowwise", None):
        y = per_head(x, weight, path)
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), expected, atol=tolerance, rtol=tolerance)
    views = per_head(x, weight.transpose(1, 2).contiguous().transpose(1, 2), "rowwise")
    torch.testing.assert_close(views.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("rows", [1, FEW_ROWS, FEW_ROWS + 1, 33])
def test_a_compiled_graph_equals_eager(rows: int) -> None:
    """Either side of FEW_ROWS. `aot_eager` needs no compiler and takes the path that a compiled graph takes."""
    torch._dynamo.reset()
    x, weight, heads = torch.randn(rows, 12), torch.randn(9, 12), torch.randn(3, 5, 4)
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(compiled(x, weight), linear(x, weight, "matmul"), atol=1e-5, rtol=0)
    x = x.view(rows, 3, 4)
    compiled = torch.compile(per_head, backend="aot_eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(compiled(x, heads), per_head(x, heads, "matmul"), atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("dtype, tolerance", TOLERANCES)
@pytest.mark.parametrize("rows", [1, FEW_ROWS, 33])
def test_inductors_code_equals_eager(rows, dtype, tolerance) -> None:
    torch._dynamo.reset()
    x, weight = torch.randn(rows, 96).to(dtype), (torch.randn(72, 96) / 10).to(dtype)
    y = torch.compile(linear, fullgraph=True, dynamic=False)(x, weight)
    torch.testing.assert_close(y, linear(x, weight, "matmul"), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("path", ["matmul", "rowwise"])
def test_gradients(path) -> None:
    x, weight = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 4), (5, 4)))
    assert torch.autograd.gradcheck(lambda a, b: linear(a, b, path), [x, weight])
    x, weight = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 4), (3, 5, 4)))
    assert torch.autograd.gradcheck(lambda a, b: per_head(a, b, path), [x, weight])
