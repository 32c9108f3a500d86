"""How often the MTP modules guess right."""

import pytest
import torch

from abyssal.data import Batch
from abyssal.model import objective
from abyssal.model.objective import Measured, Microbatch, Objective
from abyssal.model.transformer import Transformer
from abyssal.train.validation import Validator

MODULES = 2


@pytest.fixture
def model(make_config):
    config = make_config({"num_nextn_predict_layers": MODULES, "vocab_size": 5}).model_settings()
    return Transformer(config).init_weights(torch.Generator().manual_seed(0)).double()


def by_hand(model, batch):
    """Position by position, from the logits of every depth."""
    rows = [model(batch.tokens, batch.lengths), *model.predict(batch.tokens, batch.lengths)]
    guesses = [logits.argmax(-1).tolist() for logits in rows]
    tokens, found = batch.tokens.tolist(), [[0, 0, 0, 0] for _ in range(MODULES)]
    start = 0
    for length in batch.lengths:
        for t in range(start, start + length):
            for d in range(1, MODULES + 1):
                if t + 1 + d < start + length and batch.weights[t + 1 + d] > 0:
                    right = [guesses[k][t] == tokens[t + 1 + k] for k in range(d + 1)]
                    counts = (True, right[d], all(right[:d]), all(right))
                    found[d - 1] = [n + int(count) for n, count in zip(found[d - 1], counts)]
        start += length
    return found


def test_hits_are_counted_as_by_hand_and_logits_are_held_a_chunk_at_a_time(model, monkeypatch):
    generator = torch.Generator().manual_seed(1)
    lengths = [40, 1, 2, 3, 60, 94]
    tokens = torch.randint(0, 5, (200,), generator=generator)
    weights = (torch.rand(200, generator=generator) > 0.2).float()
    batch = Batch(tokens, lengths, weights)
    micro = Microbatch.of(batch, MODULES)
    whole = Objective(model).measure(micro)
    assert whole.hits.tolist() == by_hand(model, batch)
    assert all(n > 0 for row in whole.hits.tolist() for n in row)
    monkeypatch.setattr(objective, "CHUNK_LOGITS", 5 * 7)
    held = []
    logits = model.logits
    monkeypatch.setattr(model, "logits", lambda states: held.append(len(states)) or logits(states))
    assert torch.equal(Objective(model).measure(micro).hits, whole.hits)
    assert max(held) == 7


def test_a_batch_for_the_main_model_alone_does_not_ask_the_modules(model, monkeypatch):
    monkeypatch.setattr(model, "predict_states", None)
    micro = Microbatch.of(Batch(torch.tensor([1, 2, 3]), [3], torch.ones(3)), 0)
    assert Measured.of(model, micro).hits.shape == (0, 4)


def test_validation_tells_shares_by_module(make_config, token_set):
    model = Transformer(make_config({"num_nextn_predict_layers": MODULES}).model_settings()).init_weights()
    validator = Validator(token_set, 512, 128, 64, MODULES)
    counts = sum(by_hand_of(model, batch) for batch in validator.batches)
    found = validator.measure(Objective(model).measure).to_dict()
    assert found["mtp_accuracy"] == [right / count for count, right, _, _ in counts.tolist()]
    assert found["mtp_accepted"] == [kept / max(before, 1) for _, _, before, kept in counts.tolist()]
    without = Validator(token_set, 512, 128, 64).measure(Objective(model).measure)
    assert without.mtp_accuracy == without.mtp_accepted == [] and without.loss == found["loss"]


def by_hand_of(model, batch):
    return torch.tensor(by_hand(model, batch))
