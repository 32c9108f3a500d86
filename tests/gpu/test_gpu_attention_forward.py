"""The Hopper attention forward against the float64 reference: widths, packings, continuation, and no leaks."""

import pytest
import torch
from torch import Tensor

from abyssal.ops.attention import attention, causal

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
if torch.cuda.is_available():
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("not Hopper", allow_module_level=True)
    from abyssal.kernels.attention_forward import attention_forward, supports

Five = tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor]
WIDTHS = [(128, 64, 128), (192, 64, 256), (64, 32, 64), (128, 0, 128), (64, 0, 64), (16, 8, 16), (96, 32, 96)]


def views(t: int, l: int, H: int, G: int, N: int, R: int, V: int, dtype: torch.dtype = torch.bfloat16) -> Five:
    """The five as a model has them: parts of wider rows."""
    q_nope, q_rope = torch.randn(t, H, N + R, device="cuda").to(dtype).split((N, R), -1)
    k_nope, v = torch.randn(l, G, N + V, device="cuda").to(dtype).split((N, V), -1)
    k_rope = torch.randn(l, 512 + R, device="cuda").to(dtype)[:, 512:]
    return (q_nope, q_rope, k_nope, k_rope, v) if R else (q_nope, None, k_nope, None, v)


def starts(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).cuda()


def error(out: Tensor, exact: Tensor) -> float:
    assert out.isfinite().all()
    return float((out.double() - exact).norm() / exact.norm())


def exact_lse(five: Five, lens_q: list[int], lens_k: list[int], scale: float) -> Tensor:
    q_nope, q_rope, k_nope, k_rope, _ = (None if x is None else x.double() for x in five)
    assert q_nope is not None and k_nope is not None
    group, parts, a, b = q_nope.shape[1] // k_nope.shape[1], [], 0, 0
    for t, l in zip(lens_q, lens_k):
        keys = k_nope[b : b + l].repeat_interleave(group, 1)
        s = torch.einsum("thn,lhn->htl", q_nope[a : a + t], keys)
        if q_rope is not None and k_rope is not None:
            s = s + torch.einsum("thr,lr->htl", q_rope[a : a + t], k_rope[b : b + l])
        parts.append((s * scale).masked_fill(~causal(t, l, s.device), float("-inf")).logsumexp(-1))
        a, b = a + t, b + l
    return torch.cat(parts, 1)


def check(five: Five, lens_q: list[int], lens_k: list[int], scale: float = 0.08) -> None:
    assert supports(*five)
    cu_q, cu_k = starts(lens_q), starts(lens_k)
    out, lse = attention_forward(*five, cu_q, cu_k, max(lens_q), max(lens_k), scale)
    wide = [None if x is None else x.double() for x in five]
    expected = attention(*wide, cu_q, cu_k, max(lens_q), max(lens_k), scale, path="reference")  # type: ignore[arg-type]
    assert error(out, expected) < 5e-3
    assert (lse.double() - exact_lse(five, lens_q, lens_k, scale)).abs().max() < 5e-3


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("lengths", [[1], [64], [128], [129, 127], [1, 0, 300, 77, 513], [2048]])
def test_documents(widths: tuple[int, int, int], lengths: list[int]) -> None:
    check(views(sum(lengths), sum(lengths), 3, 3, *widths), lengths, lengths)


@pytest.mark.parametrize("widths", WIDTHS[:2])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (5, 1)])
def test_prefix_continuation(widths: tuple[int, int, int], heads: tuple[int, int]) -> None:
    """Queries are the last keys; a cache without queries of its own is legal."""
    lens_q, lens_k = [64, 0, 7, 130, 1, 200], [64, 5, 300, 1000, 513, 263]
    check(views(sum(lens_q), sum(lens_k), *heads, *widths), lens_q, lens_k)


def test_half_precision() -> None:
    check(views(300, 300, 2, 2, 128, 64, 128, torch.float16), [100, 200], [100, 200])


def test_layouts_the_copy_engine_refuses() -> None:
    """A view off its 16 bytes is copied, and the answer does not change."""
    q_nope, q_rope, k_nope, k_rope, v = views(200, 200, 2, 2, 128, 64, 128)
    odd = torch.empty(200, 2, 129, device="cuda", dtype=v.dtype)[..., 1:].copy_(v)
    cu = starts([200])
    a, _ = attention_forward(q_nope, q_rope, k_nope, k_rope, v, cu, cu, 200, 200, 0.07)
    b, _ = attention_forward(q_nope, q_rope, k_nope, k_rope, odd, cu, cu, 200, 200, 0.07)
    assert torch.equal(a, b)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("widths", WIDTHS[:2])
def test_neighbours_do_not_leak(widths: tuple[int, int, int], poison: float) -> None:
    five, cu = views(1000, 1000, 2, 2, *widths), starts([300, 333, 367])
    clean, lse = attention_forward(*five, cu, cu, 367, 367, 0.07)
    for x in five:
        if x is not None:
            x[:300], x[633:] = poison, poison
    out, lse_out = attention_forward(*five, cu, cu, 367, 367, 0.07)
    assert torch.equal(out[300:633], clean[300:633]) and torch.equal(lse_out[:, 300:633], lse[:, 300:633])


def test_repeats_bit_by_bit_and_in_a_graph() -> None:
    """Tiles are handed out as processors ask for them, which must not show; lengths may change under a graph."""
    five, cu = views(3000, 3000, 4, 4, 128, 64, 128), starts([1000, 2000])

    def run() -> tuple[Tensor, Tensor]:
        return attention_forward(*five, cu, cu, 3000, 3000, 0.07)

    first = run()
    assert all(torch.equal(x, y) for x, y in zip(first, run()))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    cu.copy_(starts([2999, 1]))
    for x in captured:
        x.fill_(float("nan"))
    graph.replay()
    assert all(torch.equal(x, y) for x, y in zip(captured, run()))
