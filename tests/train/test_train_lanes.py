"""The order in which a run reads: every token of its stretch of the stream once, from many places at once."""

import pytest
import torch

from abyssal.data import Batches
from abyssal.train.lanes import Lanes


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
