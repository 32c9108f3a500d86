"""Head and loss in chunks against all logits at once."""

import math

import pytest
import torch

from abyssal.ops import cross_entropy
from abyssal.ops.cross_entropy import linear_cross_entropy


def inputs(T=23, D=9, vocab=17, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(T, D, dtype=torch.float64, generator=g).to(dtype).requires_grad_()
    head = torch.randn(vocab, D, dtype=torch.float64, generator=g).to(dtype).requires_grad_()
    targets = torch.randint(0, vocab, (T,), generator=g)
    weights = torch.rand(T, generator=g) * (torch.rand(T, generator=g) > 0.3)  # a third of them 0
    assert T < 2 or ((weights == 0).any() and (weights > 0).any())
    return hidden, head, targets, weights


def test_the_reference_by_hand() -> None:
    hidden, head, targets, weights = inputs()
    total = 0.0
    for t in range(23):
        logits = [(head[v] @ hidden[t]).item() for v in range(17)]
        total -= weights[t].item() * (logits[targets[t]] - math.log(sum(math.exp(x) for x in logits)))
    assert linear_cross_entropy(hidden, head, targets, weights, "reference").item() == pytest.approx(total)


@pytest.mark.parametrize("at_once", [1, 17, 40, 17 * 7, 17 * 23, 1 << 24])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_chunks_of_any_size_are_the_reference(monkeypatch, at_once, dtype, tolerance) -> None:
    """One token, several, a ragged last chunk, all."""
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", at_once)
    results = []
    for path in ("reference", "chunked"):
        hidden, head, targets, weights = inputs(dtype=dtype)
        loss = linear_cross_entropy(hidden, head, targets, weights, path)
        (loss * 0.3).backward()  # what comes back is not always 1
        results.append((loss.detach(), hidden.grad, head.grad))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)
    assert (results[1][1][inputs()[3] == 0] == 0).all()  # a weight of 0 teaches nothing


def test_bfloat16_is_near_and_sums_the_heads_gradient_wide(monkeypatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", 17)
    hidden, head, targets, weights = inputs(T=300, dtype=torch.bfloat16)
    loss = linear_cross_entropy(hidden, head, targets, weights)
    loss.backward()
    exact = [t.detach().double().requires_grad_() for t in (hidden, head)]
    expected = linear_cross_entropy(*exact, targets, weights, "reference")
    expected.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=0.01)
    assert head.grad.dtype == torch.bfloat16
    for mine, theirs in zip((hidden.grad, head.grad), (e.grad for e in exact)):
        assert (mine.double() - theirs).norm() < 0.02 * theirs.norm()


def test_nothing_is_kept_where_no_gradient_is_wanted() -> None:
    hidden, head, targets, weights = inputs()
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, head, targets, weights).requires_grad
    frozen = linear_cross_entropy(hidden.detach(), head.detach(), targets, weights)
    assert not frozen.requires_grad
    only_head = linear_cross_entropy(hidden.detach(), head, targets, weights)
    only_head.backward()
    assert head.grad is not None and hidden.grad is None


def test_no_tokens_and_no_weight() -> None:
    hidden, head, targets, weights = inputs(T=1)
    assert linear_cross_entropy(hidden[:0], head, targets[:0], weights[:0]).item() == 0
    loss = linear_cross_entropy(hidden, head, targets, torch.zeros(1))
    loss.backward()
    assert loss.item() == 0 and (head.grad == 0).all()


def test_gradcheck(monkeypatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", 10)
    hidden, head, targets, weights = inputs(T=5, D=3, vocab=4)
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, targets, weights), [hidden, head])


def test_an_unknown_path_is_refused() -> None:
    with pytest.raises(ValueError, match="path: expected 'reference', 'chunked' or 'fused', got 'best'"):
        linear_cross_entropy(*inputs(), "best")


@pytest.mark.parametrize(
    "tokens, width, vocab, chunk",
    [(1, 64, 9, 1), (5000, 2048, 150000, 2560), (8192, 2048, 150000, 4096), (8192, 7168, 150000, 8192),
     (32768, 1024, 32768, 16384)],
)  # fmt: skip
def test_chunks_on_a_gpu_are_even(tokens, width, vocab, chunk) -> None:
    """As many tokens as CHUNK_TOKENS, or as make the logits as large as the float32 gradient they are added to, or as
    have HELD_LOGITS."""
    assert cross_entropy._chunk_tokens(tokens, width, vocab) == chunk
