"""The run's configuration: where it is read from, what it refuses, and by which words."""

import json
from pathlib import Path

import pytest

from abyssal.config import ConfigError, ModelConfig
from abyssal.train import TrainConfig, run_names

BASE = {"model": "tiny", "out": "run", "steps": 100}


def test_packaged_runs_are_read_and_fit_their_models():
    assert run_names() == ["small", "stories", "tiny"]
    for name in run_names():
        config = TrainConfig.read(name)
        assert config.sequence <= config.model_settings().max_position_embeddings


def test_toml_json_and_a_runs_folder(tmp_path):
    (tmp_path / "a.toml").write_text(
        'model = "tiny"\nout = "x"\nsteps = 5\nlr = 1\n[model_overrides]\nhidden_size = 32\n'
    )
    (tmp_path / "train.json").write_text(json.dumps(BASE | {"betas": [0.8, 0.9]}))
    toml = TrainConfig.read(tmp_path / "a.toml", ["lr=3e-4", "model.n_group=2", "out=/tmp/here", "clip=null"])
    assert (toml.lr, toml.out, toml.clip) == (3e-4, Path("/tmp/here"), None)
    assert toml.model_overrides == {"hidden_size": 32, "n_group": 2}
    assert toml.model_settings().hidden_size == 32
    folder = TrainConfig.read(tmp_path)
    assert folder.betas == (0.8, 0.9)
    assert folder.out == tmp_path  # wherever it has been moved to


def test_round_trip():
    config = TrainConfig.of(BASE | {"data": "corpus", "model_overrides": {"hidden_size": 32}})
    assert TrainConfig.of(config.to_dict()) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rat": 1}, "unknown key 'learning_rat'"),
        ({"warmup_step": 1}, "unknown key 'warmup_step'; did you mean 'warmup_steps'"),
        ({"steps": "8"}, "steps: .*valid integer, got '8'"),
        ({"steps": 0}, "steps: .*greater than or equal to 1, got 0"),
        ({"lr": -1.0}, "lr: .*greater than 0"),
        ({"lr": float("nan")}, "lr"),
        ({"betas": [0.9, 1.0]}, "betas.1: .*less than 1"),
        ({"optimizer": "sgd"}, "optimizer: .*'adamw' or 'muon', got 'sgd'"),
        ({"decay": "step"}, "decay: .*'cosine', 'linear' or 'sqrt'"),
        ({"warmup_steps": 80}, "warmup_steps: 80 and a decay over 0.3 of 100 steps do not fit"),
        ({"recompute": "norms"}, "recompute: unknown operation 'norms'"),
        ({"compile": True, "recompute": "up"}, "recompute: 'up' .*with compile, expected 'none' or 'block'"),
        ({"model_overrides": {"hidden_siz": 3}}, "unknown key 'model.hidden_siz'; did you mean 'model.hidden_size'"),
    ],
)  # fmt: skip
def test_refused_by_name(changes, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig.of(BASE | changes)


def test_missing_key_is_named():
    with pytest.raises(ConfigError, match="out: Field required"):
        TrainConfig.of({"model": "tiny", "steps": 1})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"hidden_size": "64"}, "model.hidden_size: .*integer, got '64'"),
        ({"num_experts_per_tok": 99}, "model: num_experts_per_tok"),
        (
            {"rope_scaling": {"type": "linear", "factor": 4}},
            "model.rope_scaling.type: abyssal implements 'default'",
        ),
        ({"rope_scaling": {"factor": 4, "mscale_all_dims": 1}}, "model.rope_scaling.mscale_all_dims: not a setting of"),
        ({"rope_scaling": {"factor": 4}}, "model.rope_scaling.original_max_position_embeddings: expected a number"),
    ],
)
def test_model_overrides_are_checked(overrides, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig.of(BASE | {"model_overrides": overrides}).model_settings()


def test_a_preset_comes_before_a_folder_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()  # as `out=tiny` leaves
    assert TrainConfig.read("tiny").anchored().model_settings() == ModelConfig.load("tiny")
    (tmp_path / "mine").mkdir()
    own = ModelConfig.load("tiny").replace(hidden_size=32).to_dict()
    (tmp_path / "mine" / "config.json").write_text(json.dumps(own))
    anchored = TrainConfig.read("tiny", ["model=mine"]).anchored()
    assert anchored.model == str(tmp_path / "mine") and anchored.model_settings().hidden_size == 32


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere: neither a run of the package \(small, stories, tiny\)"):
        TrainConfig.read("nowhere")
    (tmp_path / "bad.toml").write_text("= 3")
    with pytest.raises(ConfigError, match=r"bad\.toml: malformed"):
        TrainConfig.read(tmp_path / "bad.toml")
    with pytest.raises(ConfigError, match="override 'lr': expected KEY=VALUE"):
        TrainConfig.read("tiny", ["lr"])
