"""The order in which a run reads: every token of its stretch of the stream once, from many places at once."""

import threading

import pytest
import torch

from abyssal.data import Batches
from abyssal.train.lanes import AHEAD, Lanes


@pytest.mark.parametrize(("batch_tokens", "sequence", "lanes"), [(128, 32, 4), (96, 50, 1), (90, 40, 2), (20, 64, 1)])
def test_the_steps_read_what_the_stream_has(make_config, token_set, batch_tokens, sequence, lanes):
    config = make_config(batch_tokens=batch_tokens, sequence=sequence, steps=3, accumulate=2)
    split = token_set.split("train")
    reader = Lanes(split, config, modules=1)
    assert reader.lanes == lanes
    block = batch_tokens // lanes
    steps = [reader.step(number) for number in (1, 2, 3)]
    assert all(m.tokens.shape[0] == batch_tokens and m.packing.max_len <= sequence for s in steps for m in s)
    by_lane = torch.stack([torch.cat([m.tokens for m in s]).view(-1, block) for s in steps], 1).flatten()
    stream = Batches(split, block, sequence, config.seed)
    assert torch.equal(by_lane, torch.cat([stream.batch(i).tokens for i in range(6 * lanes)]))


def test_reading_ahead_begins_anywhere(make_config, token_set):
    reader = Lanes(token_set.split("train"), make_config(steps=5), modules=0)
    for done in (0, 3):
        ahead = [s[0].tokens for s in reader.following(done)]
        assert len(ahead) == 5 - done
        for number, tokens in enumerate(ahead, done + 1):
            assert torch.equal(tokens, reader.step(number)[0].tokens)


def test_lanes_in_one_epoch_share_its_order_and_a_run_of_many_epochs_keeps_few(make_config, token_set, monkeypatch):
    made = []
    make = Batches._make_epoch
    monkeypatch.setattr(Batches, "_make_epoch", lambda self, number: made.append(number) or make(self, number))
    split = token_set.split("train")
    few = Lanes(split, make_config(batch_tokens=128, sequence=16, steps=split.tokens // 128 // 2), modules=0)
    for number in range(1, few.steps + 1):
        few.step(number)
    assert few.lanes == 8 and made == [0]  # half an epoch, read from eight places
    made.clear()
    many = Lanes(split, make_config(batch_tokens=64, sequence=64, steps=split.tokens // 64 * 6), modules=0)
    for number in range(1, many.steps + 1):
        many.step(number)
    assert made == list(range(6))  # in turn, and each once
    assert many._stream._epoch.cache_info().currsize == 2


def test_reading_ahead_ends_when_nobody_wants_more(make_config, token_set, monkeypatch):
    reader = Lanes(token_set.split("train"), make_config(steps=50), modules=0)
    read = []
    step = reader.step
    monkeypatch.setattr(reader, "step", lambda number: read.append(number) or step(number))
    stream = reader.following(10)
    next(stream)
    stream.close()
    assert read == list(range(11, 11 + len(read))) and len(read) <= 1 + AHEAD
    count = len(read)
    assert not [t for t in threading.enumerate() if t.name.startswith("lanes")] and len(read) == count


def test_an_error_while_reading_ahead_reaches_who_asks_for_that_step(make_config, token_set, monkeypatch):
    reader = Lanes(token_set.split("train"), make_config(steps=9), modules=0)
    step = reader.step

    def failing(number):
        if number == 4:
            raise OSError("the disk is gone")
        return step(number)

    monkeypatch.setattr(reader, "step", failing)
    stream = reader.following(0)
    assert [next(stream) is not None for _ in range(3)] == [True] * 3
    with pytest.raises(OSError, match="the disk is gone"):
        next(stream)
