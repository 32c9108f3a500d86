"""The decoding experts on a GPU: right for odd shapes, every output written, bitwise repeatable, in a CUDA graph."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from abyssal.ops.fp8 import dequantize, quantize

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

# T, D, F, E, K, shared experts
SHAPES = [
    (1, 2048, 1408, 64, 6, 2),
    (5, 2048, 1408, 64, 6, 2),
    (64, 2048, 1408, 64, 6, 2),
    (3, 7168, 2048, 16, 8, 1),
    (7, 72, 40, 5, 3, 0),
    (64, 264, 136, 8, 8, 1),
    (33, 136, 200, 4, 4, 2),
    (20, 100, 36, 4, 2, 1),
    (17, 33, 15, 4, 2, 0),
]


def inputs(T: int, D: int, F: int, E: int, K: int, S: int) -> tuple[list[Tensor], list[Tensor]]:
    def normal(*shape: int) -> Tensor:
        return (torch.randn(shape, device="cuda") / shape[-1] ** 0.5).bfloat16()

    indices = torch.rand(T, E, device="cuda").topk(K).indices
    routed = [torch.randn(T, D, device="cuda").bfloat16(), normal(E, F, D), normal(E, D, F), normal(E, F, D)]
    shared = [normal(S * F, D), normal(D, S * F), normal(S * F, D)]
    return [*routed, indices, torch.rand(T, K, device="cuda")], shared


def exact(routed: list[Tensor], shared: list[Tensor]) -> Tensor:
    x, w1, w2, w3, indices, weights = routed
    x, y = x.double(), torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for e in indices.unique().tolist():
        a, b, c = (w[e].double() for w in (w1, w2, w3))
        y += (weights * (indices == e)).sum(-1, keepdim=True).double() * ((silu(x @ a.T) * (x @ c.T)) @ b.T)
    a, b, c = (w.double() for w in shared)
    return y + (silu(x @ a.T) * (x @ c.T)) @ b.T


def error(out: Tensor, expected: Tensor) -> float:
    assert out.isfinite().all()
    return float((out.double() - expected).norm() / expected.norm())


def poison() -> None:
    """NaN in the memory that the next allocations get."""
    for size in (1 << 9, 1 << 12, 1 << 16, 1 << 20, 1 << 23):
        torch.full((size,), float("nan"), device="cuda")


def decode(routed: list[Tensor], shared: list[Tensor], **more: object) -> Tensor:
    from abyssal.kernels.experts_decode import moe_decode

    poison()
    return moe_decode(*routed, *(shared if shared[0].numel() else [None] * 3), **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", SHAPES)
def test_parity_and_repeatability(shape: tuple[int, ...]) -> None:
    routed, shared = inputs(*shape)
    out = decode(routed, shared)
    assert error(out, exact(routed, shared)) < 1e-2
    for _ in range(5):
        assert torch.equal(out, decode(routed, shared))


def test_every_token_to_the_same_experts() -> None:
    routed, shared = inputs(64, 256, 128, 16, 4, 1)
    routed[4].copy_(torch.tensor([3, 0, 15, 7]))
    assert error(decode(routed, shared), exact(routed, shared)) < 1e-2


def test_a_token_may_choose_an_expert_twice() -> None:
    routed, shared = inputs(40, 256, 128, 16, 4, 0)
    routed[4].fill_(9)
    assert error(decode(routed, shared), exact(routed, shared)) < 1e-2


@pytest.mark.parametrize("shape", [(1, 2048, 1408, 16, 6, 2), (4, 256, 384, 8, 2, 1), (64, 512, 256, 8, 4, 0)])
def test_fp8_weights(shape: tuple[int, ...]) -> None:
    routed, shared = inputs(*shape)
    narrow = [quantize(w) for w in (*routed[1:4], *shared)]
    wide = [dequantize(*pair, torch.float32) for pair in narrow]
    w, scales = [[pair[i] for pair in narrow] for i in (0, 1)]
    more = {"scales": tuple(scales[:3]), "shared_scales": tuple(scales[3:]) if shape[-1] else None}
    out = decode([routed[0], *w[:3], *routed[4:]], w[3:], **more)
    assert error(out, exact([routed[0], *wide[:3], *routed[4:]], wide[3:])) < 1e-2


@pytest.mark.parametrize("T", [1, 16, 48])
def test_a_graph_replayed_with_other_tokens_and_choices(T: int) -> None:
    """With the gate before it, each launch depending on the one before: another routing, the right sum."""
    from abyssal.kernels.experts_decode import moe_decode
    from abyssal.kernels.gate import choose, logits

    routed, shared = inputs(T, 512, 256, 32, 4, 1)
    router = torch.randn(32, 512, device="cuda").bfloat16()
    x, w1, w2, w3 = routed[:4]

    def layer() -> tuple[Tensor, Tensor, Tensor]:
        weights, indices, _ = choose(logits(x, router), None, "softmax", 1, 1, 4, True, 1.0, "best")
        return moe_decode(x, w1, w2, w3, indices, weights, *shared), indices, weights

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        layer()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(5):  # one layer after another, as in a model: buffers are used again
            out, indices, weights = layer()
    for _ in range(20):
        x.copy_(torch.randn_like(x))
        graph.replay()
        torch.cuda.synchronize()
        assert error(out, exact([x, w1, w2, w3, indices, weights], shared)) < 1e-2
