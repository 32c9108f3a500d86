"""What a run tells: records, trackers, a profile."""

import gzip
import json
import shutil
import sys
import time

import pytest
from rich.console import Console

from abyssal.config import ConfigError
from abyssal.train import read_metrics, train
from abyssal.train.track import flat


@pytest.fixture
def quiet():
    return Console(quiet=True)


def test_a_record_tells_every_part(make_config, quiet):
    config = make_config(steps=2, save_every=2)
    train(config, console=quiet)
    record = read_metrics(config.out / "metrics.jsonl")[-1]
    assert record["tokens_dropped"] == 0
    assert record["tokens"] == 2 * 128
    assert record["epoch"] == pytest.approx(256 / tokens_of(config).split("train").tokens)
    parts = record["grad_norms"]
    assert sum(x * x for x in parts.values()) ** 0.5 == pytest.approx(record["grad_norm"], rel=1e-5)
    assert {"embedding", "attention", "experts", "router", "norms", "head", "prediction", "dense"} <= parts.keys()
    assert len(record["max_violation"]) == len(record["idlest_load"]) == 2
    assert all(0 <= x <= 1 for x in record["idlest_load"])
    assert record["mfu"] is None  # no peak is known of a CPU


def tokens_of(config):
    from abyssal.data import TokenSet

    return TokenSet.open(config.data)


def test_a_profile_has_a_trace_and_a_table(make_config, quiet):
    config = make_config(steps=8, profile=True)
    train(config, console=quiet)
    folder = config.out / "profile"
    events = json.loads(gzip.decompress((folder / "trace-0.json.gz").read_bytes()))["traceEvents"]
    assert any("aten::mm" in event.get("name", "") for event in events)
    assert "aten::mm" in (folder / "table-0.txt").read_text()


def test_a_start_too_short_for_a_profile_says_so(make_config, tmp_path):
    config = make_config(steps=4, profile=True)
    console = Console(file=(tmp_path / "said").open("w+"), width=300)
    train(config, console=console)
    console.file.flush()
    assert "profile: none: it begins after 4 steps" in (tmp_path / "said").read_text()
    assert not list((config.out / "profile").iterdir())


def test_names_of_a_record_s_numbers():
    record = {"step": 3, "validation": {"loss": 1.5, "by": [1, 2]}, "mfu": None, "on": True}
    assert flat(record) == {"step": 3.0, "validation/loss": 1.5, "validation/by/0": 1.0, "validation/by/1": 2.0}


def test_tensorboard_gets_every_record(make_config, quiet):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = make_config(steps=4, track=["tensorboard"])
    train(config, console=quiet)
    seen = EventAccumulator(str(config.out / "tensorboard"))
    seen.Reload()
    told = [(e.step, e.value) for e in seen.Scalars("loss")]
    records = read_metrics(config.out / "metrics.jsonl")
    assert told == [(r["step"], pytest.approx(r["loss"], rel=1e-6)) for r in records]
    assert len(seen.Scalars("validation/bits_per_byte")) == 1


def test_a_resumed_run_goes_on_in_tensorboard_where_its_state_was(make_config, quiet):
    """What was told of the steps after the state is told anew, not twice."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = make_config(steps=4, track=["tensorboard"], save_every=2, keep_states=9)
    train(config, console=quiet)
    shutil.rmtree(config.out / "state" / "step-00000004")  # as if it had been killed while it was written
    time.sleep(1.1)  # event files are told apart by the second
    train(config, resume=True, console=quiet)
    seen = EventAccumulator(str(config.out / "tensorboard"))
    seen.Reload()
    assert [e.step for e in seen.Scalars("loss")] == [r["step"] for r in read_metrics(config.out / "metrics.jsonl")]


def test_no_tracker_begins_where_one_is_not_installed(make_config, quiet, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.setitem(sys.modules, "trackio", None)
    config = make_config(track=["tensorboard", "trackio"])
    with pytest.raises(ConfigError, match="trackio is not installed"):
        train(config, console=quiet)
    assert not (config.out / "tensorboard").exists()


def test_a_tracker_that_fails_at_the_end_keeps_no_other_from_ending(make_config, quiet, monkeypatch):
    ended = []

    class Failing:
        def init(self, **settings):
            pass

        def log(self, values, step):
            pass

        def finish(self):
            raise OSError("no network")

    class Fine(Failing):
        def finish(self):
            ended.append(True)

    for name, module in (("wandb", Failing()), ("trackio", Fine())):
        monkeypatch.setitem(sys.modules, name, module)
    for order in (["trackio", "wandb"], ["wandb", "trackio"]):
        config = make_config(steps=1, track=order)
        with pytest.raises(OSError, match="no network"):
            train(config.model_copy(update={"out": config.out / order[0]}), console=quiet)
    assert ended == [True, True]


def test_a_tracker_that_is_not_installed_is_named(make_config, quiet, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ConfigError, match="trackio is not installed: pip install trackio"):
        train(make_config(track=["trackio"]), console=quiet)


def test_trackio_and_wandb_are_told_alike(make_config, quiet, monkeypatch):
    """Neither package is needed here: what is called is recorded."""
    for name in ("trackio", "wandb"):
        calls = []

        class Recorder:
            def init(self, **settings):
                calls.append(("init", settings["name"], settings["config"]["steps"]))  # noqa: B023

            def log(self, values, step):
                calls.append(("log", step, values["loss"]))  # noqa: B023

            def finish(self):
                calls.append(("finish",))  # noqa: B023

        monkeypatch.setitem(sys.modules, name, Recorder())
        config = make_config(steps=2, track=[name])
        config = config.model_copy(update={"out": config.out / name})
        train(config, console=quiet)
        assert [c[0] for c in calls] == ["init", "log", "log", "finish"]
        assert calls[0][2] == 2
        assert calls[2][2] == read_metrics(config.out / "metrics.jsonl")[-1]["loss"]
