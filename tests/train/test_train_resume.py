"""Stopped at any moment and resumed, a run's curve is the one that was never stopped, bit for bit."""

import io
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from abyssal.checkpoint import CheckpointError
from abyssal.checkpoint.distributed import FILES
from abyssal.config import ConfigError
from abyssal.train import TrainConfig, read_metrics, train
from abyssal.train.metrics import Metrics
from abyssal.train.state import OPTIMIZER, newest_state, prune_states, read_trainer, save_state, state_folder
from abyssal.train.trainer import Trainer

CURVE = ["step", "tokens", "loss", "main_loss", "mtp_losses", "balance_loss", "grad_norm", "lr", "max_violation"]
CURVE += ["validation"]
SCRIPT = """
import sys, torch
torch.set_num_threads(1)
from abyssal.train import TrainConfig, train
result = train(TrainConfig.read(sys.argv[1]), resume=True)
sys.exit(128 + result.interrupted if result.interrupted else 0)
"""  # fmt: skip


@pytest.fixture
def quiet():
    return Console(file=io.StringIO(), width=200)


def curve(out):
    return [{key: record[key] for key in CURVE} for record in read_metrics(out / "metrics.jsonl")]


def start(config, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config.to_dict()))
    return subprocess.Popen([sys.executable, "-c", SCRIPT, file], stdout=subprocess.PIPE, text=True)


def lines(out):
    return len(read_metrics(out / "metrics.jsonl"))


def wait(process, condition, seconds=120):
    """Until the condition holds or the process has ended."""
    end = time.monotonic() + seconds
    while process.poll() is None and not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.001)


def kill(process):
    if process.poll() is None:
        os.kill(process.pid, signal.SIGKILL)
    process.wait()


def killed_and_resumed(config, tmp_path, kills, draw):
    """Kills the run `kills` times, in turn while a state is being written and at a random moment after some steps,
    and lets it end. Returns how often a state was left half written."""
    states, torn = config.out / "state", 0
    for number in range(kills):
        process = start(config, tmp_path)
        reached = lines(config.out)
        if number % 2 == 0:
            wait(process, lambda reached=reached: lines(config.out) > reached + draw.randint(1, 3))
            wait(process, lambda: any(states.glob(".step-*.tmp")))
            time.sleep(draw.random() * 0.004)
        else:
            wait(process, lambda reached=reached: lines(config.out) > reached + draw.randint(1, 4))
            time.sleep(draw.random() * 0.1)
        kill(process)
        torn += any(states.glob(".step-*.tmp"))
        process.stdout.close()
    process = start(config, tmp_path)
    process.communicate(timeout=300)
    assert process.returncode == 0
    return torn


def test_killed_twice_the_curve_is_the_same(make_config, quiet, tmp_path):
    settings = {"steps": 24, "validate_every": 8, "save_every": 2}
    train(make_config(out=str(tmp_path / "whole"), **settings), console=quiet)
    config = make_config(out=str(tmp_path / "killed"), **settings)
    killed_and_resumed(config, tmp_path, kills=2, draw=random.Random())
    assert curve(config.out) == curve(tmp_path / "whole")
    assert not any((config.out / "state").glob(".*"))
    whole, killed = (load_file(out / "model" / "model.safetensors") for out in (tmp_path / "whole", config.out))
    assert whole.keys() == killed.keys()
    assert all(torch.equal(tensor, killed[name]) for name, tensor in whole.items())


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"optimizer": "muon", "dtype": "bfloat16", "accumulate": 2}])
def test_killed_many_times(make_config, quiet, tmp_path, changes):
    settings = {"steps": 150, "validate_every": 10, "save_every": 1, "keep_states": 1} | changes
    train(make_config(out=str(tmp_path / "whole"), **settings), console=quiet)
    config = make_config(out=str(tmp_path / "killed"), **settings)
    torn = killed_and_resumed(config, tmp_path, kills=20, draw=random.Random())
    assert torn > 0
    assert curve(config.out) == curve(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_the_state_and_says_how_to_go_on(make_config, quiet, tmp_path, number):
    config = make_config(out=str(tmp_path / "stopped"), steps=500, save_every=500, validate_every=500)
    process = start(config, tmp_path)
    wait(process, lambda: lines(config.out) >= 3)
    process.send_signal(number)
    told = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + number
    done = lines(config.out)
    assert 3 <= done < 500
    assert read_trainer(newest_state(config.out / "state"))["step"] == done
    assert f"stopped by {number.name} after step {done} of 500; go on with: abyssal train {config.out} --resume" in told
    assert not (config.out / "model").exists()


def run_until(config, quiet, monkeypatch, steps, resume=False):
    """A run that a signal reaches during step `steps`."""
    step = Trainer.step

    def signalled(trainer, micros):
        if trainer.done + 1 == steps:
            signal.raise_signal(signal.SIGTERM)
        return step(trainer, micros)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", signalled)
        result = train(config, resume=resume, console=quiet)
    assert (result.interrupted, result.steps, result.model) == (signal.SIGTERM, steps, None)


@pytest.mark.parametrize(
    "changes",
    [{}, {"accumulate": 2, "recompute": "block"}, {"dtype": "bfloat16"}, {"optimizer": "muon"}],
    ids=["plain", "accumulate", "bf16", "muon"],
)
def test_resumed_twice_in_one_process(make_config, quiet, tmp_path, monkeypatch, changes):
    train(make_config(out=str(tmp_path / "whole"), **changes), console=quiet)
    config = make_config(out=str(tmp_path / "parts"), **changes)
    for steps in (3, 6):
        run_until(config, quiet, monkeypatch, steps, resume=steps > 3)
    again = TrainConfig.read(config.out, ["log_every=1", "keep_states=5", "recompute=up"])
    result = train(again, resume=True, console=quiet)
    assert result.steps == 8
    assert curve(config.out) == curve(tmp_path / "whole")


def test_a_finished_run_resumed_only_writes_its_model_again(make_config, quiet):
    config = make_config(steps=3)
    before = train(config, console=quiet)
    told = curve(config.out)
    after = train(config, resume=True, console=quiet)
    assert (after.steps, after.seconds) == (before.steps, before.seconds)
    assert curve(config.out) == told


def test_a_run_is_not_overwritten(make_config, quiet):
    train(make_config(steps=2), console=quiet)
    with pytest.raises(FileExistsError, match=r"has a run, saved after step 2; resume it .*out=FOLDER"):
        train(make_config(), console=quiet)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 1e-4}, r"lr: was 0.003 and is 0.0001; a run is resumed with the settings it began with"),
        ({"steps": 9}, "steps: was 2 and is 9"),
        ({"model": {"hidden_size": 64}}, "model.hidden_size: was 32 and is 64"),
        ({"dtype": "bfloat16"}, "dtype: was 'float32' and is 'bfloat16'"),
        ({"seed": 1}, "seed: was 0 and is 1"),
    ],
)
def test_a_changed_curve_is_refused_by_name(make_config, quiet, changes, message):
    train(make_config(steps=2), console=quiet)
    with pytest.raises(ConfigError, match=message):
        train(make_config(**({"steps": 2} | changes)), resume=True, console=quiet)


def test_a_setting_newer_than_the_state_is_its_default(make_config, quiet):
    """So that a run begun before there was FP8 goes on without it."""
    config = make_config(steps=4)
    train(config, console=quiet)
    file = newest_state(config.out / "state") / "trainer.json"
    about = json.loads(file.read_text())
    del about["config"]["fp8"], about["config"]["betas"]
    file.write_text(json.dumps(about).ljust(file.stat().st_size))
    with pytest.raises(ConfigError, match=r"betas: was \[0.9, 0.95\] and is \[0.5, 0.9\]"):
        train(config.model_copy(update={"betas": (0.5, 0.9)}), resume=True, console=quiet)
    assert train(config, resume=True, console=quiet).steps == 4


def test_other_data_is_refused(make_config, quiet, text, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text(text.read_text("utf-8").replace("cat", "dog"), "utf-8")
    train(make_config(data=str(text), steps=2), console=quiet)
    moved = tmp_path / "corpus.jsonl"
    moved.write_bytes(text.read_bytes())
    assert train(make_config(data=str(moved), steps=2), resume=True, console=quiet).steps == 2
    with pytest.raises(ValueError, match="source_sha256 was"):
        train(make_config(data=str(other), steps=2), resume=True, console=quiet)


def test_metrics_past_the_step_and_torn_lines_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    metrics = Metrics(path, after=2)
    metrics.write({"step": 3, "loss": 1.5})
    metrics.close()
    assert read_metrics(path) == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 1.5}]


def test_states_are_pruned_and_remains_removed(make_config, token_set, tmp_path):
    trainer = Trainer(make_config(), make_config().model_settings(), token_set)
    states = tmp_path / "state"
    for step in (1, 2, 10):
        save_state(state_folder(states, step), trainer.model, trainer.optimizer, {"step": step})
    (states / ".step-00000011.tmp").mkdir()
    (states / ".step-00000001.old").mkdir()
    assert newest_state(states).name == "step-00000010"
    prune_states(states, keep=2)
    assert sorted(p.name for p in states.iterdir()) == ["step-00000002", "step-00000010"]


def test_a_state_of_another_model_is_refused_by_tensor(make_config, token_set, tmp_path):
    from abyssal.train.state import load_state

    config, other = make_config(), make_config({"num_nextn_predict_layers": 0})
    trainer = Trainer(config, config.model_settings(), token_set)
    trainer.save(tmp_path / "state")
    with pytest.raises(ValueError, match=r"tensor mtp\.0\..* is unknown"):
        load_state(tmp_path / "state", *_parts(Trainer(other, other.model_settings(), token_set)))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_what_the_optimizer_keeps_is_restored_in_its_dtypes(make_config, token_set, tmp_path, optimizer):
    """A fused AdamW on a GPU takes `step` for float32, whatever it is."""
    config = make_config(dtype="float64", optimizer=optimizer)
    fresh, again = (Trainer(config, config.model_settings(), token_set) for _ in range(2))
    with fresh.stream() as stream:
        fresh.step(next(stream))
    fresh.save(tmp_path / "state")
    again.restore(tmp_path / "state")
    kept = fresh.optimizer.state()
    assert {t.dtype for key, t in kept.items() if key.startswith("step/")} == {torch.float32}
    assert {key: t.dtype for key, t in again.optimizer.state().items()} == {key: t.dtype for key, t in kept.items()}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_what_the_optimizer_kept_is_missed_without_a_list_of_files_too(make_config, token_set, tmp_path, optimizer):
    config, state = make_config(optimizer=optimizer), tmp_path / "state"
    trainer = Trainer(config, config.model_settings(), token_set)
    trainer.save(state)
    (state / FILES).unlink()  # as earlier versions left it
    (state / OPTIMIZER).unlink()
    trainer.restore(state)  # before the first step an optimizer keeps nothing
    with trainer.stream() as stream:
        trainer.step(next(stream))
    trainer.save(state)
    (state / FILES).unlink()
    trainer.restore(state)
    kept = load_file(state / OPTIMIZER)
    for kind in {key.partition("/")[0] for key in kept}:
        first = next(key for key in kept if key.startswith(kind + "/"))
        save_file({key: t for key, t in kept.items() if key != first}, state / OPTIMIZER)
        with pytest.raises(CheckpointError, match=f"state: tensor {first} is missing"):
            trainer.restore(state)
    (state / OPTIMIZER).unlink()
    with pytest.raises(CheckpointError, match=r"state: tensor \S+/\S+ is missing"):
        trainer.restore(state)


def _parts(trainer):
    return trainer.model, trainer.optimizer
