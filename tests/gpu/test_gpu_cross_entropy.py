"""The head's loss on a GPU: against float64, at its edges, and without the memory of all logits."""

import pytest
import torch

from abyssal.ops import cross_entropy
from abyssal.ops.cross_entropy import linear_cross_entropy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def inputs(tokens, width, vocab, dtype):
    hidden = torch.randn(tokens, width, device="cuda").to(dtype).requires_grad_()
    head = (torch.randn(vocab, width, device="cuda") * width**-0.5).to(dtype).requires_grad_()
    targets = torch.randint(0, vocab, (tokens,), device="cuda")
    weights = torch.rand(tokens, device="cuda") * (torch.rand(tokens, device="cuda") > 0.3)
    return hidden, head, targets, weights


def error(out, exact):
    assert out.isfinite().all()
    return float((out.double() - exact.double()).norm() / exact.double().norm())


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 1e-2), (torch.float16, 3e-3), (torch.float32, 1e-5)])
@pytest.mark.parametrize("tokens, width, vocab", [(1, 64, 129280), (300, 64, 1000), (300, 65, 1001), (257, 128, 50257)])
def test_loss_and_gradients(monkeypatch, tokens, width, vocab, dtype, tolerance) -> None:
    """Chunks of 128 tokens and a ragged last one; a vocabulary whose rows are not 16 bytes aligned."""
    monkeypatch.setattr(cross_entropy, "CHUNK_TOKENS", 128)
    monkeypatch.setattr(cross_entropy, "HELD_LOGITS", 1)
    hidden, head, targets, weights = inputs(tokens, width, vocab, dtype)
    weights[0] = 0.7
    exact = [t.detach().double().requires_grad_() for t in (hidden, head)]
    expected = linear_cross_entropy(*exact, targets, weights, "reference")
    (expected * 0.3).backward()
    loss = linear_cross_entropy(hidden, head, targets, weights)
    assert loss.dtype == torch.float32
    (loss * 0.3).backward()
    assert error(loss.detach(), expected.detach()) < tolerance / 3
    assert error(hidden.grad, exact[0].grad) < tolerance and error(head.grad, exact[1].grad) < tolerance
    assert (hidden.grad[weights == 0] == 0).all()


def test_the_same_each_time() -> None:
    results = []
    leaves = inputs(1000, 256, 5000, torch.bfloat16)
    for _ in range(2):
        loss = linear_cross_entropy(*leaves)
        results.append([loss, *torch.autograd.grad(loss, leaves[:2])])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_no_host_synchronisation_and_no_memory_of_all_logits() -> None:
    leaves = inputs(65536, 256, 20000, torch.bfloat16)
    linear_cross_entropy(*leaves).backward()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_cross_entropy(*leaves).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.max_memory_allocated() - before < 65536 * 20000 * 2 / 2
