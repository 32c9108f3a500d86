"""A run in FP8, by its configuration; on a CPU through the reference."""

import io

import pytest
import torch
from rich.console import Console

from abyssal.checkpoint import load
from abyssal.config import ConfigError
from abyssal.train import read_metrics, train
from abyssal.train.fp8 import Fp8Linear, Fp8MLP
from abyssal.train.trainer import Trainer

WIDE = {"hidden_size": 2048, "intermediate_size": 2048, "num_hidden_layers": 2, "num_nextn_predict_layers": 0}


@pytest.fixture
def quiet():
    return Console(file=io.StringIO())


def test_maps_that_are_large_enough_compute_in_fp8(make_config, token_set, quiet):
    config = make_config(WIDE, fp8=True, steps=2, batch_tokens=64, validate_every=2, validation_tokens=64)
    result = train(config, console=quiet)
    trainer = Trainer(config, config.model_settings(), token_set)
    kinds = {type(m) for m in trainer.model.modules()}
    assert Fp8MLP in kinds or Fp8Linear in kinds
    plain = train(make_config(WIDE, steps=2, batch_tokens=64, out=str(config.out) + "-plain"), console=quiet)
    ours, theirs = (read_metrics(r.metrics)[0]["loss"] for r in (result, plain))
    assert ours != theirs
    assert ours == pytest.approx(theirs, rel=1e-3)
    saved = load(result.model)
    assert all(p.dtype == torch.float32 for p in saved.parameters())


def test_a_model_too_small_for_it_is_refused(make_config, token_set):
    config = make_config(fp8=True)
    with pytest.raises(ConfigError, match="fp8: no map of the model has sizes"):
        Trainer(config, config.model_settings(), token_set)
