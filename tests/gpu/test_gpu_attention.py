"""Attention on a GPU, forward and backward, against the reference in float64 on the same GPU."""

import pytest
import torch
from torch import Tensor

from abyssal.ops.attention import attention
from abyssal.ops.paged import cumulative

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="no Hopper GPU"
    ),
]

UNEVEN = [[1, 0, 300, 77, 513], [128, 256, 64, 63, 65, 0, 0, 129], [0, 1], [1000]]
ALIKE = [[300, 300, 300], [512], [1, 1, 1]]
WIDTHS = [(128, 64, 128), (192, 64, 256), (16, 8, 16), (64, 0, 64), (128, 0, 128), (40, 24, 72)]


def name(widths: tuple[int, int, int]) -> str:
    return "x".join(str(w) for w in widths)


def error(out: Tensor, exact: Tensor) -> float:
    """Relative error in the Frobenius norm."""
    assert out.isfinite().all()
    return float((out.double() - exact).norm() / exact.norm().clamp(min=1e-30))


def inputs(
    lens: list[int], H: int, widths: tuple[int, int, int], dtype: torch.dtype = torch.bfloat16
) -> tuple[list[Tensor | None], Tensor, Tensor]:
    """Views such as the model's projections give, what comes in from above, and where the sequences begin."""
    (N, R, V), T = widths, sum(lens)
    q_nope, q_rope = torch.randn(T, H, N + R, device="cuda", dtype=dtype).split((N, R), -1)
    k_nope, v = torch.randn(T, H, N + V, device="cuda", dtype=dtype).split((N, V), -1)
    k_rope = torch.randn(T, 512 + R, device="cuda", dtype=dtype)[:, 512:]
    tensors = [q_nope, q_rope if R else None, k_nope, k_rope if R else None, v]
    return tensors, torch.randn(T, H, V, device="cuda", dtype=dtype), cumulative(lens).cuda()


def run(tensors: list[Tensor | None], d_out: Tensor, cu: Tensor, longest: int, path: str | None) -> list[Tensor]:
    """The output and the gradients."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    scale = sum(t.shape[-1] for t in tensors[:2] if t is not None) ** -0.5
    out = attention(*leaves, cu, cu, longest, longest, scale, path=path)  # type: ignore[arg-type]
    return [out.detach(), *torch.autograd.grad(out, [t for t in leaves if t is not None], d_out)]


@pytest.mark.parametrize("lens", UNEVEN + ALIKE, ids=str)
@pytest.mark.parametrize("widths", WIDTHS, ids=name)
@pytest.mark.parametrize("deterministic", [False, True])
def test_gradients(lens: list[int], widths: tuple[int, int, int], deterministic: bool) -> None:
    tensors, d_out, cu = inputs(lens, 5, widths)
    wide = [None if t is None else t.double() for t in tensors]
    exact = run(wide, d_out.double(), cu, max(lens), "reference")
    torch.use_deterministic_algorithms(deterministic)
    try:
        found = run(tensors, d_out, cu, max(lens), "hopper")
        again = run(tensors, d_out, cu, max(lens), "hopper")
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b, c in zip(found, exact, again, strict=True):
        # One token attends to itself alone: the gradients of its query and key are 0, and what is found is rounding.
        small = b.norm() < 1e-6 * d_out.norm()
        assert a.norm() < 1e-2 * d_out.norm() if small else error(a, b) < 6e-3
        assert not deterministic or torch.equal(a, c)


@pytest.mark.parametrize("widths", WIDTHS[:3], ids=name)
def test_gradients_in_float16(widths: tuple[int, int, int]) -> None:
    tensors, d_out, cu = inputs([70, 200], 3, widths, torch.float16)
    exact = run([None if t is None else t.double() for t in tensors], d_out.double(), cu, 200, "reference")
    for a, b in zip(run(tensors, d_out, cu, 200, "hopper"), exact, strict=True):
        assert error(a, b) < 1e-3


@pytest.mark.parametrize("widths", WIDTHS, ids=name)
@pytest.mark.parametrize("once", [False, True])
def test_every_gradient_is_written(widths: tuple[int, int, int], once: bool) -> None:
    from abyssal.kernels.attention_backward import Buffers, attention_backward, one_pass
    from abyssal.kernels.attention_forward import attention_forward

    (N, R, V), lens, H = widths, [5, 0, 130, 259, 64], 3
    tensors, d_out, cu = inputs(lens, H, widths)
    q_nope, q_rope, _, _, v = tensors
    assert q_nope is not None and v is not None
    if once and not one_pass(q_nope, q_rope, v):
        pytest.skip("no kernel of one pass for these widths")
    out, lse = attention_forward(*tensors, cu, cu, 259, 259, 0.1)  # type: ignore[arg-type]
    buffers = Buffers(q_nope, sum(lens), H, N, R, V, len(lens), once).poison()
    for grad in attention_backward(d_out, *tensors, out, lse, cu, 0.1, not once, None, buffers):  # type: ignore[arg-type]
        assert grad.isfinite().all()


def test_queries_that_see_an_earlier_context() -> None:
    """A prefix continued: the sequence's queries are its last keys. Without gradients."""
    queries, keys = [3, 0, 200, 1], [130, 7, 200, 77]
    tensors, _, cu_k = inputs(keys, 4, (128, 64, 128))
    cu_q = cumulative(queries).cuda()
    q_nope, q_rope = torch.randn(sum(queries), 4, 192, device="cuda", dtype=torch.bfloat16).split((128, 64), -1)
    tensors[:2] = q_nope, q_rope
    wide = [t.double() for t in tensors if t is not None]
    exact = attention(*wide, cu_q, cu_k, 200, 200, 0.07, path="reference")
    assert error(attention(*tensors, cu_q, cu_k, 200, 200, 0.07, path="hopper"), exact) < 4e-3  # type: ignore[arg-type]
    leaf = q_nope.detach().requires_grad_()  # with gradients the library's kernel is chosen
    out = attention(leaf, *tensors[1:], cu_q, cu_k, 200, 200, 0.07)  # type: ignore[arg-type]
    assert error(out.detach(), exact) < 1e-2
    out.sum().backward()
    assert leaf.grad is not None and leaf.grad.isfinite().all()


@pytest.mark.parametrize("lens", [[300, 300], [1, 0, 300, 77, 513]], ids=str)
@pytest.mark.parametrize("widths", WIDTHS[:2], ids=name)
def test_nothing_waits_for_the_host(lens: list[int], widths: tuple[int, int, int]) -> None:
    tensors, d_out, cu = inputs(lens, 4, widths)
    run(tensors, d_out, cu, max(lens), None)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(tensors, d_out, cu, max(lens), None)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("lens", [[300, 300], [1, 0, 300, 77, 513]], ids=str)
def test_compiled(lens: list[int]) -> None:
    """The operation is one node of a compiled graph, and its gradients another."""
    tensors, d_out, cu = inputs(lens, 4, (128, 64, 128))
    leaves = [t.detach().requires_grad_() for t in tensors if t is not None]

    def twice(*leaves: Tensor) -> Tensor:
        return 2 * attention(*leaves, cu, cu, max(lens), max(lens), 0.07)  # type: ignore[arg-type]

    for a, b in zip(*(torch.autograd.grad(f(*leaves), leaves, d_out) for f in (twice, torch.compile(twice)))):
        assert error(a, b.double()) < 1e-3


def test_no_tokens() -> None:
    tensors, d_out, cu = inputs([0, 0], 4, (128, 64, 128))
    out, *grads = run(tensors, d_out, cu, 0, None)
    assert out.shape == (0, 4, 128) and [t.shape[0] for t in grads] == [0] * 5
