"""Runs under the real torchrun: ranks that are killed, states that are cut off, signals to one rank alone."""

import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from rich.console import Console
from steps import settings

import abyssal
from abyssal.train import loop, read_metrics, train
from abyssal.train.state import newest_state
from abyssal.train.trainer import Trainer

CURVE = ("loss", "main_loss", "balance_loss", "lr")


def told(out: Path) -> int:
    return len(read_metrics(out / "metrics.jsonl"))


def prepare(tokens: Path, out: Path, mesh: str, **changes: Any) -> list[str]:
    """The command of a run in `out`."""
    often = {"log_every": 1, "validate_every": 1000, "validation_tokens": 256, "save_every": 4, "keep_states": 1}
    config = settings(tokens, out, mesh, {}, **(often | changes))
    out.mkdir(parents=True, exist_ok=True)
    file = out.with_suffix(".json")
    file.write_text(json.dumps(config.to_dict()))
    return ["-m", "abyssal", "train", str(file), "--resume"]


@contextmanager
def torchrun(command: list[str], log: Path, restarts: int = 0) -> Iterator[subprocess.Popen]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launch += ["--max-restarts", str(restarts), "--monitor-interval", "0.1", *command]
    with log.open("a") as stream:
        process = subprocess.Popen(launch, stdout=stream, stderr=stream, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        yield process
    finally:
        for pid in [*ranks(process).values(), process.pid]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        process.wait()


def ranks(process: subprocess.Popen) -> dict[int, int]:
    """The processes that torchrun started, by rank."""
    found = {}
    try:
        for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            found |= {int(v[5:]): int(pid) for v in variables if v.startswith(b"RANK=")}
    except OSError:
        pass
    return found


def until(process: subprocess.Popen, condition: Callable[[], bool], seconds: float = 400) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "it ended before that"
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.002)


def undisturbed(tokens: Path, out: Path, steps: int) -> Path:
    """A run of one process."""
    config = settings(tokens, out, "", {}, steps=steps, log_every=1, validation_tokens=256)
    train(config, console=Console(file=io.StringIO()))
    return out


def same(out: Path, whole: Path) -> None:
    """Every step's losses are one process's; its gradient's norm, which errors move more, nearly."""
    ours, theirs = (read_metrics(folder / "metrics.jsonl") for folder in (out, whole))
    assert [r["step"] for r in ours] == [r["step"] for r in theirs]
    for keys, rtol in ((CURVE, 1e-5), (("grad_norm",), 1e-3)):
        a, b = (torch.tensor([[r[key] for key in keys] for r in records]) for records in (ours, theirs))
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-6)


@pytest.mark.slow  # half a minute
def test_a_rank_killed_in_mid_step_costs_the_steps_since_the_last_state(tokens: Path, tmp_path: Path) -> None:
    whole = undisturbed(tokens, tmp_path / "whole", steps=18)
    out, log = tmp_path / "killed", tmp_path / "log"
    with torchrun(prepare(tokens, out, "dp=2", steps=18), log, restarts=2) as process:
        until(process, lambda: told(out) >= 6 and newest_state(out / "state") is not None)
        os.kill(ranks(process)[1], signal.SIGKILL)
        reached = told(out)
        assert process.wait(400) == 0
    text = log.read_text()
    assert "has no state yet: beginning" in text  # --resume begins a run, too
    resumed = re.findall(r"resuming after step (\d+)", text)
    # A state that was being written when the rank died is lost, and with it its steps; no more.
    assert len(resumed) == 1 and reached - 8 < int(resumed[0]) <= reached + 1
    same(out, whole)
    assert not list((out / "state").glob(".step-*"))
    ours, theirs = abyssal.load(out / "model"), abyssal.load(tmp_path / "whole" / "model")
    for (name, p), (_, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.slow
def test_sigterm_to_one_rank_stops_all_at_the_same_step(tokens: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    with torchrun(prepare(tokens, out, "dp=2", steps=4000, save_every=4000), log) as process:
        until(process, lambda: told(out) >= 3)
        os.kill(ranks(process)[1], signal.SIGTERM)
        assert process.wait(400) != 0
    done = told(out)
    assert 3 <= done < 4000
    assert newest_state(out / "state") == out / "state" / f"step-{done:08d}"
    again = f"torchrun --nproc-per-node 2 -m abyssal train {out} --resume"
    assert f"stopped by SIGTERM after step {done} of 4000; go on with: {again}" in log.read_text()


def stopped_while_saving(tokens: Path, out: Path) -> tuple[int, list[str]]:
    """The steps of a run that is told to stop in the step before its first state, and the states that it saved. The
    first rank is slow to look into the folder."""
    step, save, saved = Trainer.step, Trainer.save, []

    def slow(states: Path) -> Path | None:
        time.sleep(2.0 * saved.count("step-00000002") * (dist.get_rank() == 0))
        return newest_state(states)

    def told_step(trainer: Trainer, microbatches: Any) -> Any:
        if trainer.done == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, microbatches)

    def told_save(trainer: Trainer, folder: Path, *others: Any) -> None:
        saved.append(folder.name)
        save(trainer, folder, *others)

    loop.newest_state, Trainer.step, Trainer.save = slow, told_step, told_save  # type: ignore[method-assign]
    quiet = Console(file=io.StringIO())
    result = train(settings(tokens, out, "dp=2", {}, save_every=2, validation_tokens=256), console=quiet)
    return result.steps, saved


@pytest.mark.slow
def test_all_ranks_know_whether_the_last_step_is_saved_already(tokens: Path, tmp_path: Path) -> None:
    """Where each looks for the state, which another thread is just giving its name, one may save it alone: and wait."""
    for found in on_ranks(2, stopped_while_saving, tokens, tmp_path / "run"):
        assert found == (2, ["step-00000002"])


@pytest.mark.slow
def test_sigterm_to_torchrun_saves_the_state(tokens: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    with torchrun(prepare(tokens, out, "dp=2", steps=4000, save_every=4000), log) as process:
        until(process, lambda: told(out) >= 3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(400) != 0
    assert newest_state(out / "state") == out / "state" / f"step-{told(out):08d}"


@pytest.mark.slow
def test_killed_whole_many_times_while_a_state_is_written(tokens: Path, tmp_path: Path) -> None:
    whole, out, log, draw, torn = tmp_path / "whole", tmp_path / "killed", tmp_path / "log", random.Random(), 0
    # Of as many ranks: over so many steps the errors of sums in another order grow beyond any bound worth testing.
    with torchrun(prepare(tokens, whole, "dp=2", steps=120, save_every=1000), log) as process:
        assert process.wait(300) == 0
    command = prepare(tokens, out, "dp=2", steps=120, save_every=1)
    for _ in range(8):
        reached = told(out)
        with torchrun(command, log) as process:
            until(process, lambda reached=reached: told(out) > reached + draw.randint(1, 4))
            until(process, lambda: any((out / "state").glob(".step-*.tmp")))
            time.sleep(draw.random() * 0.02)
        torn += any((out / "state").glob(".step-*.tmp"))
    with torchrun(command, log) as process:
        assert process.wait(300) == 0
    assert torn > 0, "no state was left half written: the test has shown nothing"
    ours, theirs = ([[r["step"], *(r[key] for key in (*CURVE, "grad_norm"))] for r in read_metrics(f / "metrics.jsonl")]
                    for f in (out, whole))  # fmt: skip
    assert ours == theirs


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_stops_every_rank_alike(tokens: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    with torchrun(prepare(tokens, out, "dp=2", steps=20, lr=1e30, clip=None), log) as process:
        assert process.wait(400) != 0
    text = log.read_text()
    assert len(re.findall(r"abyssal: step \d+: the loss is \S+ and the gradient's norm \S+; first: the ", text)) == 1
    assert (out / "state-nan" / "trainer.json").is_file()


@pytest.mark.slow
def test_what_the_first_rank_finds_wrong_is_told_once(tokens: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    config = settings(tokens, out, "dp=2", {"vocab_size": 264})
    out.with_suffix(".json").write_text(json.dumps(config.to_dict()))
    with torchrun(["-m", "abyssal", "train", str(out.with_suffix(".json"))], log) as process:
        assert process.wait(400) != 0
    text = log.read_text()
    assert len(re.findall(r"abyssal: model.vocab_size: the tokenizer has \d+ ids, the model 264", text)) == 1
