"""What inference does otherwise than training: joined maps, sums with their norms, rows and contexts that the host
knows. None of it changes a result."""

import dataclasses

import pytest
import torch
from tiny import random_tokens, tiny_model
from torch import Tensor

from abyssal.model.cache import Cache
from abyssal.model.packing import Packing
from abyssal.model.transformer import Transformer
from abyssal.ops.linear import adjoin, adjoining, linear
from abyssal.ops.norm import add_norm, rms_norm
from abyssal.ops.paged import cumulative


def in_chunks(model: Transformer, tokens: Tensor, told: bool, path: str | None = None) -> Tensor:
    """States of two prompts of 9 and 6 tokens, taken 4 and 3 at a time over pages that lie apart."""
    cache, pages = Cache.allocate(model.leaves(), 8, 3, model.embed.weight.dtype), [[5, 0, 3], [2, 7]]
    rows = [torch.tensor([p * 3 + i for p in own for i in range(3)]) for own in pages]
    prompts, done, states = tokens.split([9, 6]), [0, 0], [[], []]
    for sizes in ([4, 3], [4, 0], [1, 3]):
        after = [d + n for d, n in zip(done, sizes)]
        parts = [(d, a) for d, a in zip(done, after)]
        packing = Packing(
            cu_seqlens=cumulative(sizes), positions=torch.cat([torch.arange(d, a) for d, a in parts]),
            max_len=max(sizes), slots=torch.cat([r[d:a] for r, (d, a) in zip(rows, parts)]),
            block_table=torch.tensor([pages[0], [*pages[1], 0]], dtype=torch.int32),
            context_lens=torch.tensor(after, dtype=torch.int32), page_size=3, fresh=not any(done),
        )  # fmt: skip
        if told:
            context = torch.cat([r[:a] for r, a in zip(rows, after)])
            packing = dataclasses.replace(
                packing, context_rows=context, cu_context=cumulative(after), max_context=max(after)
            )
        batch = torch.cat([p[d:a] for p, (d, a) in zip(prompts, parts)])
        for own, part in zip(states, model.hidden(batch, packing, cache, path).states.split(sizes)):
            own.append(part)
        done = after
    return torch.cat([*states[0], *states[1]])


@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None}, {"position": "rope", "qk_rope_head_dim": 0}])
@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("graded", [False, True])
def test_chunks_of_prompts_are_the_whole_prompts(changes: dict[str, object], told: bool, graded: bool) -> None:
    model, tokens = tiny_model(**changes), random_tokens(15)
    expected = model.hidden(tokens, Packing.of([9, 6], tokens)).states
    with torch.set_grad_enabled(graded):
        found = in_chunks(model.requires_grad_(graded), tokens, told, "expanded")
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None}, {"n_routed_experts": None}])
@torch.no_grad()
def test_joined_maps_are_the_same_model(changes: dict[str, object]) -> None:
    model, tokens = tiny_model(**changes), random_tokens(15)
    expected, kept = in_chunks(model, tokens, True), {k: t.clone() for k, t in model.state_dict().items()}
    names = [name for name, _ in model.named_parameters()]
    assert model.join() is model
    attn = model.layers[0].attn
    first = attn.wq if attn.config.q_lora_rank is None else attn.wq_a
    assert adjoining([first.weight, attn.wkv_a.weight]) is not None
    assert [name for name, _ in model.named_parameters()] == names
    assert all(torch.equal(t, kept[k]) for k, t in model.state_dict().items())
    torch.testing.assert_close(in_chunks(model, tokens, True), expected)
    # Moved elsewhere, the maps are separate again.
    assert adjoining([first.weight, attn.wkv_a.weight]) is not None
    model.float().double()
    assert adjoining([first.weight, attn.wkv_a.weight]) is None
    torch.testing.assert_close(in_chunks(model, tokens, True), expected, atol=1e-5, rtol=1e-4)


def test_only_weights_that_lie_in_a_row_adjoin() -> None:
    a, b, c = (torch.nn.Parameter(torch.randn(n, 4)) for n in (3, 2, 5))
    assert adjoining([a.detach(), b.detach()]) is None
    adjoin([a, b, c])
    with torch.no_grad():
        joined = adjoining([a, b, c])
        assert joined is not None and torch.equal(joined, torch.cat([a, b, c]))
        assert adjoining([a, c]) is None and adjoining([b, a]) is None
        assert adjoining([b, c]) is not None
        assert torch.equal(linear(torch.ones(1, 4), joined), linear(torch.ones(1, 4), torch.cat([a, b, c])))
    assert adjoining([a, b]) is None  # a gradient may be asked for


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_sum_and_its_norm_are_two_operations(dtype: torch.dtype) -> None:
    x, y, weight = torch.randn(5, 8, dtype=dtype), torch.randn(5, 8, dtype=dtype), torch.randn(8)
    total, normed = add_norm(x, y, weight, 1e-6)
    assert torch.equal(total, x + y) and torch.equal(normed, rms_norm(x + y, weight, 1e-6))
    with pytest.raises(ValueError, match="path: expected 'reference' or 'triton', got 'best'"):
        add_norm(x, y, weight, 1e-6, "best")
