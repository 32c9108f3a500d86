"""The loss kernel through Triton's interpreter, against torch in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from abyssal.kernels.cross_entropy import logits_buffer, loss_and_gradient
from abyssal.ops import cross_entropy


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 7), st.sampled_from([1, 2, 8, 17, 300, 2049, 20000]), st.floats(0.1, 50), st.booleans())
def test_loss_and_gradient_in_place(tokens, vocab, spread, gradient) -> None:
    g = torch.Generator().manual_seed(vocab)
    logits = logits_buffer(tokens, torch.empty(vocab, 1))
    logits.copy_(spread * torch.randn(tokens, vocab, generator=g))
    before = logits.clone()
    targets = torch.randint(0, vocab, (tokens,), generator=g)
    weights = torch.rand(tokens, generator=g) * (torch.rand(tokens, generator=g) > 0.3)
    losses = torch.full((tokens,), float("nan"))
    loss_and_gradient(logits, targets, weights, losses, gradient)
    exact = before.double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(exact, targets, reduction="none") * weights
    expected.sum().backward()
    torch.testing.assert_close(losses.double(), expected.detach(), atol=2e-5, rtol=1e-5)
    assert (losses[weights == 0] == 0).all()
    if gradient:
        torch.testing.assert_close(logits.double(), exact.grad, atol=2e-6, rtol=1e-4)
        assert (logits[weights == 0] == 0).all()
    else:
        assert torch.equal(logits, before)


def test_a_position_without_a_target_costs_nothing_whatever_its_logits() -> None:
    logits = torch.full((2, 16), float("nan"))
    losses = torch.full((2,), float("nan"))
    loss_and_gradient(logits, torch.zeros(2, dtype=torch.int64), torch.zeros(2), losses, True)
    assert (losses == 0).all() and (logits == 0).all()


@pytest.mark.parametrize("shift", [-3e4, 3e4])
def test_large_logits_do_not_overflow(shift) -> None:
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)) + shift
    expected = torch.nn.functional.cross_entropy(logits.double(), torch.arange(3), reduction="none")
    losses = torch.empty(3)
    loss_and_gradient(logits, torch.arange(3), torch.ones(3), losses, True)
    torch.testing.assert_close(losses.double(), expected, atol=2e-2, rtol=0)  # of float32 at 30,000
    torch.testing.assert_close(logits.sum(1), torch.zeros(3), atol=2e-2, rtol=0)


@pytest.mark.parametrize("tokens, chunk", [(1, 4096), (300, 128), (300, 4096)])
def test_the_fused_path_is_the_reference(monkeypatch, tokens, chunk) -> None:
    """One chunk or several, and what comes back is not always 1."""
    monkeypatch.setattr(cross_entropy, "CHUNK_TOKENS", chunk)
    monkeypatch.setattr(cross_entropy, "HELD_LOGITS", 1)
    results = []
    for path in ("reference", "fused"):
        g = torch.Generator().manual_seed(0)
        hidden = torch.randn(tokens, 9, generator=g).requires_grad_()
        head = torch.randn(17, 9, generator=g).requires_grad_()
        targets, weights = torch.randint(0, 17, (tokens,), generator=g), torch.rand(tokens, generator=g)
        loss = cross_entropy.linear_cross_entropy(hidden, head, targets, weights, path)
        (loss * 0.3).backward()
        results.append((loss.detach(), hidden.grad, head.grad))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_the_fused_path_makes_only_the_gradients_that_are_wanted() -> None:
    hidden, head = torch.randn(5, 8), torch.randn(16, 8)
    targets, weights = torch.arange(5), torch.ones(5)
    for wanted in ((True, False), (False, True), (False, False)):
        leaves = [t.clone().requires_grad_(w) for t, w in zip((hidden, head), wanted)]
        loss = cross_entropy.linear_cross_entropy(*leaves, targets, weights, "fused")
        assert loss.requires_grad == any(wanted)
        if any(wanted):
            loss.backward()
        assert tuple(t.grad is not None for t in leaves) == wanted
    nothing = cross_entropy.linear_cross_entropy(hidden[:0], head.requires_grad_(), targets[:0], weights[:0], "fused")
    nothing.backward()
    assert nothing == 0 and (head.grad == 0).all()
