"""Expanded ≡ absorbed ≡ cached token by token ≡ any chunking ≡ any batch mates ≡ any pages, in float64."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tiny import paged_packing, random_tokens, randomised, tiny_config, tiny_model

from abyssal.config import ModelConfig, Yarn
from abyssal.model.cache import Cache
from abyssal.model.packing import Packing
from abyssal.model.transformer import Transformer

TOLERANCE = {"atol": 1e-9, "rtol": 0.0}
LADDER = [
    (attention, position)
    for attention in ("mla", "mha", "gqa", "mqa")
    for position in ("none", "integer", "binary", "sinusoidal", "rope", "decoupled")
    if attention == "mla" or position != "decoupled"
]


def paths(config: ModelConfig) -> list[str | None]:
    """What may be asked of a model: absorption needs a latent, and no rotation between its two factors."""
    absorbs = config.attention == "mla" and config.position != "rope"
    return [None, "expanded", "absorbed"] if absorbs else [None, "expanded"]


@st.composite
def configs(draw: st.DrawFn, rungs: list[tuple[str, str]] = LADDER) -> ModelConfig:
    attention, position = draw(st.sampled_from(rungs))
    heads = draw(st.integers(1, 5))
    changes: dict[str, Any] = {
        "attention": attention,
        "position": position,
        "model_type": "abyssal",
        "hidden_size": draw(st.integers(3, 20)),
        "num_attention_heads": heads,
        "num_key_value_heads": draw(st.sampled_from([g for g in range(1, heads + 1) if heads % g == 0])),
        "num_hidden_layers": draw(st.integers(1, 2)),
        "kv_lora_rank": draw(st.sampled_from([1, 5, 7, 16])),
        "qk_nope_head_dim": draw(st.sampled_from([2, 4, 6, 12])),
        "v_head_dim": draw(st.sampled_from([1, 2, 6, 14])),
        "qk_rope_head_dim": draw(st.sampled_from([2, 4, 6])) if position == "decoupled" else 0,
        "q_lora_rank": draw(st.sampled_from([None, 1, 5, 8])),
        "rope_theta": draw(st.sampled_from([3.0, 10000.0])),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5])),
        "max_position_embeddings": 32,
        "rope_scaling": draw(st.sampled_from([None, Yarn(4.0, 4, mscale=0.7, mscale_all_dim=1.3)])),
        "tie_word_embeddings": draw(st.booleans()),
    }
    sigmoid = draw(st.booleans())
    groups, size = draw(st.sampled_from([(1, 1), (1, 4), (2, 3), (3, 2), (4, 2)]))
    topk_group = draw(st.integers(1, groups))
    changes |= {
        "n_routed_experts": draw(st.sampled_from([None, groups * size])),
        "n_group": groups,
        "topk_group": topk_group,
        "num_experts_per_tok": draw(st.integers(1, min(4, topk_group * size))),
        "moe_intermediate_size": draw(st.integers(1, 6)),
        "n_shared_experts": draw(st.integers(0, 2)),
        "first_k_dense_replace": draw(st.integers(0, 2)),
        "intermediate_size": draw(st.integers(1, 8)),
        "scoring_func": "sigmoid" if sigmoid else "softmax",
        "topk_method": "noaux_tc" if sigmoid else "group_limited_greedy",
        "norm_topk_prob": draw(st.booleans()),
    }
    return tiny_config(**changes)


LENGTHS = st.lists(st.one_of(st.sampled_from([0, 1]), st.integers(2, 9)), min_size=1, max_size=4)


@torch.no_grad()
def check_everything(config: ModelConfig, lengths: list[int], data: st.DataObject) -> None:
    model = randomised(Transformer(config), seed=data.draw(st.integers(0, 3), label="seed")).double()
    S = len(lengths)
    documents = [random_tokens(n, seed=s) for s, n in enumerate(lengths)]
    tokens = torch.cat(documents)
    whole = model.hidden(tokens, Packing.of(lengths, tokens)).states.split(lengths)
    assert all(torch.isfinite(states).all() for states in whole)

    # Batch mates: each document by itself.
    for document, expected in zip(documents, whole):
        alone = model.hidden(document, Packing.of([len(document)], document)).states
        torch.testing.assert_close(alone, expected, **TOLERANCE)

    # Small pages, scattered, and in every step a chunk of whichever documents the draw lets in: none, one token, many.
    size = data.draw(st.integers(1, 4), label="page size")
    pages = -(-max([1, *lengths]) // size)
    order = data.draw(st.permutations(range(S * pages)), label="pages")
    tables = [order[s * pages : (s + 1) * pages] for s in range(S)]
    cache = Cache.allocate(model.leaves(), S * pages, size, torch.float64)
    before = [0] * S
    while before != lengths:
        chunk = [data.draw(st.integers(0, n - old), label="chunk") for n, old in zip(lengths, before)]
        if not any(chunk):  # let one token in, so that it ends
            first = next(s for s in range(S) if before[s] < lengths[s])
            chunk[first] = 1
        rows = data.draw(st.permutations(range(S)), label="order in the batch")
        packing = paged_packing([chunk[s] for s in rows], [before[s] for s in rows], [tables[s] for s in rows], size)
        batch = torch.cat([documents[s][before[s] : before[s] + chunk[s]] for s in rows])
        path = data.draw(st.sampled_from(paths(config)), label="path")
        states = model.hidden(batch, packing, cache, path).states.split([chunk[s] for s in rows])
        for s, found in zip(rows, states):
            torch.testing.assert_close(found, whole[s][before[s] : before[s] + chunk[s]], **TOLERANCE)
        before = [old + n for old, n in zip(before, chunk)]

    # A contiguous cache, token by token, along each path.
    for path in paths(config):
        longest = max(lengths)
        cache = Cache.allocate(model.leaves(), S, max(longest, 1), torch.float64)
        for t in range(longest):
            now = [int(t < n) for n in lengths]
            packing = cache.contiguous_packing(now, [min(t, n) for n in lengths], list(range(S)))
            batch = torch.cat([d[t : t + 1] for d in documents])
            states = model.hidden(batch, packing, cache, path).states
            expected = torch.cat([w[t : t + 1] for w in whole])
            torch.testing.assert_close(states, expected, **TOLERANCE)


COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}


@settings(max_examples=200, derandomize=True, **COMMON)
@given(configs(), LENGTHS, st.data())
def test_every_way_through_the_ladder_is_the_same(config: ModelConfig, lengths: list[int], data) -> None:
    check_everything(config, lengths, data)


@settings(max_examples=200, derandomize=True, **COMMON)
@given(configs(rungs=[("mla", "decoupled")]), LENGTHS, st.data())
def test_every_way_through_latent_attention_is_the_same(config: ModelConfig, lengths: list[int], data) -> None:
    check_everything(config, lengths, data)


@pytest.mark.slow
@settings(max_examples=1500, **COMMON)
@given(configs(), LENGTHS, st.data())
def test_every_way_is_the_same_at_length(config: ModelConfig, lengths: list[int], data) -> None:
    check_everything(config, lengths, data)


@pytest.mark.parametrize("attention, position", LADDER)
def test_each_rung_decodes_as_it_trains(attention: str, position: str) -> None:
    """No rung is left to hypothesis' luck. Also in float32, at its tolerance."""
    R = 4 if position == "decoupled" else 0
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        model = tiny_model(
            dtype=dtype, attention=attention, position=position, qk_rope_head_dim=R, num_key_value_heads=1,
            num_attention_heads=2, model_type="abyssal",
        )  # fmt: skip
        tokens = random_tokens(7)
        with torch.no_grad():
            whole = model.hidden(tokens, Packing.of([7], tokens)).states
            cache = Cache.allocate(model.leaves(), 1, 7, dtype)
            for t in range(7):
                packing = cache.contiguous_packing([1], [t], [0])
                states = model.hidden(tokens[t : t + 1], packing, cache, paths(model.config)[-1]).states
                torch.testing.assert_close(states[0], whole[t], atol=tolerance, rtol=0)


@pytest.mark.parametrize("attention, position", LADDER)
def test_a_later_token_changes_nothing_before_it_and_an_earlier_one_everything_after(attention, position) -> None:
    """Causality, and that attention attends at all."""
    model = tiny_model(
        attention=attention, position=position, qk_rope_head_dim=4 if position == "decoupled" else 0,
        num_key_value_heads=3, model_type="abyssal", n_routed_experts=None,
    )  # fmt: skip
    tokens = random_tokens(8)
    other = tokens.clone()
    other[4] = (other[4] + 1) % 61
    with torch.no_grad():
        changed = (model(tokens, [8]) - model(other, [8])).abs().amax(-1)
    assert changed[:4].max() == 0
    assert changed[4:].min() > 1e-6


@pytest.mark.parametrize("position", ["none", "integer", "binary", "sinusoidal", "rope", "decoupled"])
def test_order_matters_but_without_positions(position: str) -> None:
    """With one layer the last state sees a set without positions, and a sequence with them."""
    model = tiny_model(
        position=position, qk_rope_head_dim=4 if position == "decoupled" else 0, model_type="abyssal",
        num_hidden_layers=1, first_k_dense_replace=1,
    )  # fmt: skip
    with torch.no_grad():
        last = model(torch.tensor([3, 9, 20, 7]), [4])[-1]
        swapped = model(torch.tensor([9, 3, 20, 7]), [4])[-1]
    changed = (last - swapped).abs().max()
    assert changed < 1e-10 if position == "none" else changed > 1e-4


@pytest.mark.parametrize("attention", ["mha", "gqa", "mqa"])
def test_absorption_is_refused_where_nothing_is_latent(attention: str) -> None:
    model = tiny_model(attention=attention, position="rope", qk_rope_head_dim=0, num_key_value_heads=1)
    tokens = random_tokens(3)
    with pytest.raises(ValueError, match=f"path 'absorbed': {attention} has no latent"):
        model.hidden(tokens, Packing.of([3], tokens), path="absorbed")


def test_absorption_is_refused_under_coupled_rope_and_without_a_cache() -> None:
    tokens = random_tokens(3)
    coupled = tiny_model(position="rope", qk_rope_head_dim=0)
    cache = Cache.allocate(coupled.leaves(), 1, 3, torch.float64)
    with pytest.raises(ValueError, match="with coupled RoPE a rotation stands between W_UQ and W_UK"):
        coupled.hidden(tokens, cache.contiguous_packing([3], [0], [0]), cache, "absorbed")
    with pytest.raises(ValueError, match="expected a cache"):
        tiny_model().hidden(tokens, Packing.of([3], tokens), path="absorbed")
    with pytest.raises(ValueError, match="expected 'expanded' or 'absorbed', got 'fast'"):
        tiny_model().hidden(tokens, Packing.of([3], tokens), path="fast")


def test_absorbed_and_expanded_agree_in_any_batch_of_float32() -> None:
    """Greedy tokens do not change with batch mates, on either path."""
    from tiny import greedy

    model = tiny_model(dtype=torch.float32, num_nextn_predict_layers=1)
    prompts = [random_tokens(n, seed=n) for n in (1, 9, 4, 17)]
    for path in ("absorbed", "expanded"):
        together = greedy(model, prompts, 12, path)
        assert together == [greedy(model, [p], 12, path)[0] for p in prompts]
        assert len({tuple(t) for t in together}) == 4


def test_rows_that_other_sequences_left_in_a_page_do_not_show() -> None:
    """A page is reused without being cleared: what stands past a sequence's length is masked."""
    model = tiny_model()
    tokens = random_tokens(4)
    with torch.no_grad():
        whole = model.hidden(tokens, Packing.of([4], tokens)).states
        cache = Cache.allocate(model.leaves(), 1, 9, torch.float64)
        for layer in cache.layers:
            for rows in layer.values():
                rows.fill_(1e3)
        for t in range(4):
            packing = cache.contiguous_packing([1], [t], [0])
            states = model.hidden(tokens[t : t + 1], packing, cache, "absorbed").states
            torch.testing.assert_close(states[0], whole[t], atol=1e-10, rtol=0)


def test_the_cheaper_path_is_chosen() -> None:
    """A prefill expands; one token absorbs; a long chunk behind a cache expands once more; coupled RoPE never
    absorbs."""
    attn = tiny_model(kv_lora_rank=64).layers[0].attn

    def choice(module, new: int, old: int) -> str:
        return module.cheaper(paged_packing([new], [old], [[0]], 4096), cached=True)

    assert choice(attn, 9, 0) == "expanded"
    assert choice(attn, 1, 9) == "absorbed"
    wider, expansion = 2 * 64 - 6 - 10, 64 * 16
    assert choice(attn, expansion // wider, 9) == "absorbed"
    assert choice(attn, expansion // wider + 1, 9) == "expanded"
    assert attn.cheaper(paged_packing([1], [9], [[0]], 4096), cached=False) == "expanded"
    assert choice(tiny_model(position="rope", qk_rope_head_dim=0).layers[0].attn, 1, 9) == "expanded"


@given(st.lists(st.integers(0, 5), max_size=5), st.data())
@settings(max_examples=50, derandomize=True, deadline=None)
def test_contiguous_packing_is_one_long_page_a_sequence(lengths: list[int], data) -> None:
    before = [data.draw(st.integers(0, 4)) for _ in lengths]
    assume(lengths)
    cache = Cache.allocate([{"latent": (3, None)}], len(lengths), 9, torch.float32)
    pages = data.draw(st.permutations(range(len(lengths))))
    found = cache.contiguous_packing(lengths, before, pages)
    expected = paged_packing(lengths, before, [[p] for p in pages], 9)
    for name in ("cu_seqlens", "positions", "slots", "block_table", "context_lens"):
        a, b = getattr(found, name), getattr(expected, name)
        assert torch.equal(a, b) and a.dtype == b.dtype, name
    assert (found.max_len, found.page_size, found.fresh) == (expected.max_len, 9, not any(before))


def test_a_page_too_short_is_refused() -> None:
    cache = Cache.allocate([{"latent": (3, None)}], 2, 4, torch.float32)
    with pytest.raises(ValueError, match="sequence 1: 5 tokens, the cache has room for 4"):
        cache.contiguous_packing([1, 3], [0, 2], [0, 1])


def test_what_a_token_leaves_behind_is_what_the_papers_count() -> None:
    """C + R for the latent, 2·n·d for a ladder's rung; a cache allocates just that."""
    widths = {
        "mla": 7 + 4, "mha": 4 * (6 + 10), "gqa": 2 * (6 + 10), "mqa": 6 + 10,
    }  # fmt: skip
    for attention, width in widths.items():
        plain = {} if attention == "mla" else {"position": "rope", "qk_rope_head_dim": 0}
        model = tiny_model(
            attention=attention, num_attention_heads=4, num_key_value_heads=2, num_nextn_predict_layers=1, **plain
        )
        assert [sum(w for w, _ in leaves.values()) for leaves in model.leaves()] == [width] * 4
        assert Cache.allocate(model.leaves(), 3, 5, torch.bfloat16).bytes == 4 * 15 * width * 2
