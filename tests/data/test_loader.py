"""Packed batches: every token, in its place, from the step number alone."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from abyssal.data import Batches, Split, validation_batches

EXPECTED = ((0, 43, 38, 21, 2, 11, 20, 17), (34, 4, 11, 25, 39, 27, 2, 38))


def split_of(lengths, shards=1):
    """A split whose every token says which document it is of and where: document · 1000 + place."""
    tokens, offsets = [], []
    for part in np.array_split(np.arange(len(lengths)), min(shards, len(lengths))):
        documents = [int(i) * 1000 + np.arange(lengths[i]) for i in part]
        tokens.append(np.concatenate(documents).astype(np.uint32))
        offsets.append(np.cumsum([0, *(lengths[i] for i in part)]))
    return Split("train", tokens, offsets, 0)


def check(batch, tokens, max_len):
    assert batch.tokens.dtype == torch.int64 and batch.tokens.shape == (tokens,)
    assert batch.weights.dtype == torch.float32 and batch.weights.shape == (tokens,)
    assert batch.weights.eq(1).all()
    assert sum(batch.lengths) == tokens and all(1 <= n <= max_len for n in batch.lengths)
    for piece in batch.tokens.split(batch.lengths):  # one document each, without a gap
        assert torch.equal(piece, torch.arange(int(piece[0]), int(piece[0]) + len(piece)))
        assert piece[0] // 1000 == piece[-1] // 1000


sizes = st.lists(st.integers(1, 40), min_size=1, max_size=25)


@settings(deadline=None, max_examples=150)
@given(sizes, st.integers(1, 4), st.integers(1, 90), st.integers(1, 50), st.integers(0, 2**64 - 1), st.booleans())
def test_every_token_once_an_epoch(lengths, shards, tokens, max_len, seed, shuffle):
    split = split_of(lengths, shards)
    total, epochs = sum(lengths), 3
    batches = Batches(split, tokens, max_len, seed, shuffle)
    count = -(-total * epochs // tokens)
    stream = []
    for step in range(count):
        batch = batches.batch(step)
        check(batch, tokens, max_len)
        stream += batch.tokens.tolist()
    everything = [i * 1000 + j for i, n in enumerate(lengths) for j in range(n)]
    for epoch in range(epochs):
        seen = stream[epoch * total : (epoch + 1) * total]
        assert sorted(seen) == everything
        assert shuffle or seen == everything
        order = [token // 1000 for token in seen]
        assert len(list(itertools.groupby(order))) == len(lengths)  # a document's tokens stay together


@settings(deadline=None, max_examples=60)
@given(sizes, st.integers(1, 90), st.lists(st.integers(0, 60), max_size=12))
def test_a_batch_depends_on_its_step_alone(lengths, tokens, steps):
    split = split_of(lengths)
    used = Batches(split, tokens, 16, 7)
    for step in steps:
        fresh = Batches(split_of(lengths, 3), tokens, 16, 7).batch(step)
        batch = used.batch(step)
        assert torch.equal(batch.tokens, fresh.tokens) and batch.lengths == fresh.lengths


@settings(deadline=None, max_examples=60)
@given(sizes, st.integers(1, 90), st.integers(1, 3), st.lists(st.integers(0, 60), max_size=12))
def test_the_orders_that_are_kept_change_nothing(lengths, tokens, kept, steps):
    few, many = (Batches(split_of(lengths), tokens, 16, 7, kept=n) for n in (kept, 100))
    for step in steps:
        a, b = few.batch(step), many.batch(step)
        assert torch.equal(a.tokens, b.tokens) and a.lengths == b.lengths


@settings(deadline=None, max_examples=100)
@given(sizes, st.integers(1, 3), st.integers(1, 90), st.integers(1, 50))
def test_validation_covers_every_token_once_in_order(lengths, shards, tokens, max_len):
    batches = list(validation_batches(split_of(lengths, shards), tokens, max_len))
    for batch in batches[:-1]:
        check(batch, tokens, max_len)
    check(batches[-1], sum(lengths) - tokens * (len(batches) - 1), max_len)
    stream = torch.cat([batch.tokens for batch in batches]).tolist()
    assert stream == [i * 1000 + j for i, n in enumerate(lengths) for j in range(n)]


def test_lengths_are_the_documents_cut_at_max_len_and_at_the_edge():
    batches = Batches(split_of([5, 12, 3]), 10, 4, 0, shuffle=False)
    assert batches.batch(0).lengths == [4, 1, 4, 1]
    assert batches.batch(1).lengths == [4, 3, 3]
    assert batches.batch(1).tokens.tolist() == [*range(1005, 1012), *range(2000, 2003)]
    assert Batches(split_of([2, 3]), 12, 9, 0, shuffle=False).batch(0).lengths == [2, 3, 2, 3, 2]


def test_orders_differ_by_epoch_and_seed_and_never_change():
    split = split_of([1] * 50)
    orders = {
        (seed, epoch): tuple((Batches(split, 50, 9, seed).batch(epoch).tokens // 1000).tolist())
        for seed in (0, 1, 2**64 - 1)
        for epoch in range(3)
    }
    assert len(set(orders.values())) == 9
    # Written down: another order under another NumPy or platform would silently break every resumed run.
    assert orders[0, 0][:8] == EXPECTED[0] and orders[1, 2][:8] == EXPECTED[1]


def test_from_step_is_batch_after_batch_and_stops_cleanly():
    batches = Batches(split_of([7, 30, 11, 2]), 9, 6, 5)
    for start in (0, 4):
        stream = batches.from_step(start)
        for step, batch in zip(range(start, start + 20), stream):
            assert torch.equal(batch.tokens, batches.batch(step).tokens)
        stream.close()
    with pytest.raises(ValueError, match="step -1: expected 0 or more"):
        next(batches.from_step(-1))


def test_bad_arguments_by_message():
    split = split_of([3])
    for call, message in (
        (lambda: Batches(split, 0, 5, 0), "tokens 0, max_len 5: expected at least 1"),
        (lambda: Batches(split, 5, 0, 0), "tokens 5, max_len 0: expected at least 1"),
        (lambda: Batches(split, 5, 5, -1), "seed -1: expected 0 to"),
        (lambda: Batches(split, 5, 5, 2**64), "expected 0 to"),
        (lambda: next(validation_batches(split, 0, 1)), "tokens 0"),
        (lambda: Batches(split, 5, 5, 0).batch(-1), "step -1"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
