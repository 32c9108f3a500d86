"""The report of a run that has ended: its figures are those of the run, and of transformers on the same folder."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from rich.console import Console

from abyssal.checkpoint import load
from abyssal.data import validation_batches
from abyssal.train import read_metrics, train
from abyssal.train.loop import METRICS

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import stories_report
from stories_report import QUICK, agreements, held_out, markdown, report


@pytest.fixture
def run(make_config):
    config = make_config(steps=4, validate_every=2)
    train(config, console=Console(quiet=True))
    return config


def test_it_tells_what_the_run_came_to(run, token_set) -> None:
    pytest.importorskip("transformers")
    split = token_set.split("validation")
    found = report(run.out, None, "cpu", QUICK._replace(held_out=512, texts=2, tokens=8, sample=4))
    last = read_metrics(run.out / METRICS)[-1]
    assert (found.steps, found.tokens, found.seconds) == (4, last["tokens"], last["seconds"])
    assert found.epochs == pytest.approx(last["tokens"] / token_set.split("train").tokens)
    assert found.bits_per_byte == pytest.approx(last["validation"]["bits_per_byte"], abs=1e-6)  # the same tokens
    assert len(found.balance.held_out) == 1 and len(found.balance.training) == 2  # the MTP module's gate is the second
    assert found.balance.held_out[0] == pytest.approx(max(last["validation"]["expert_load"][0]) - 1, abs=1e-3)
    a = found.acceptance
    assert a is not None and len(a.accuracy) == 2 and len(a.agreement) == 1
    for shares in (a.greedy, a.sampled):
        assert len(shares) == 3 and shares == sorted(shares, reverse=True)  # a draft counts with those before it
    assert all(1 <= n <= 4 for n in a.tokens_a_step)
    assert len(found.samples) == 2 * len(stories_report.PROMPTS)
    p = found.parity
    assert p is not None and p.tokens > 0 and p.largest_difference < 2e-5 < p.largest_logit
    assert split.tokens > 0 and json.loads(json.dumps(asdict(found)))["parity"]["tokens"] == p.tokens
    told = markdown(found)
    assert f"{found.bits_per_byte:.4f} bits a byte" in told and "4 steps" in told


def test_agreement_is_that_of_the_token_that_both_foretell(run, token_set) -> None:
    """Counted one place at a time from logits."""
    model = load(run.out / "model")
    agreed = right = places = targets = 0
    most = 2 * run.batch_tokens
    batches = list(validation_batches(token_set.split("validation"), run.batch_tokens, run.sequence))[:2]
    with torch.no_grad():
        for batch in batches:
            main, further = model(batch.tokens, batch.lengths), model.predict(batch.tokens, batch.lengths)[0]
            start = 0
            for n in batch.lengths:
                for t in range(start, start + n - 1):
                    agreed += int(further[t].argmax() == main[t + 1].argmax())
                    places += 1
                for t in range(start, start + n - 2):
                    right += int(further[t].argmax() == batch.tokens[t + 2])
                    targets += 1
                start += n
    found, accuracy = agreements(model, token_set, run, most)
    assert found == [pytest.approx(agreed / places)] and accuracy[1] == pytest.approx(right / targets)


def test_held_out_sequences_are_beginnings_of_documents_long_enough(token_set) -> None:
    split = token_set.split("validation")
    length = int(split.lengths.max()) - 1
    found = list(held_out(token_set, length, 3))
    assert 1 <= len(found) <= 3 and all(len(ids) == length for ids in found)
    assert found[0].tolist() in [split.document(i)[:length].tolist() for i in range(split.documents)]


def test_a_run_that_has_not_ended_is_refused(run) -> None:
    (run.out / "model/config.json").unlink()
    with pytest.raises(FileNotFoundError, match="expected a run that has ended"):
        report(run.out, None, "cpu", QUICK)
