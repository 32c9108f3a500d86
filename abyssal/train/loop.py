"""A training run from its configuration to a saved model: `train`."""

import os
import signal
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from safetensors import SafetensorError

from abyssal.checkpoint import CheckpointError
from abyssal.data import Tokenizer
from abyssal.files import write_file
from abyssal.model.transformer import Transformer
from abyssal.ops.startup import announced
from abyssal.parallel.accord import Accord
from abyssal.parallel.check import check_mesh
from abyssal.parallel.mesh import MeshShape, start
from abyssal.train.config import SAVED, TrainConfig
from abyssal.train.corpus import open_corpus
from abyssal.train.diagnose import NotFinite
from abyssal.train.export import export
from abyssal.train.metrics import Record, read_metrics
from abyssal.train.picture import draw_curves
from abyssal.train.signals import StopSignals
from abyssal.train.state import newest_state, prune_states, read_trainer, state_folder
from abyssal.train.tell import Teller
from abyssal.train.trainer import Trainer, resolve_device
from abyssal.train.validation import Validator
from abyssal.train.wrap import unwrapped

STATES, STATE_NAN, METRICS, MODEL, CURVES = "state", "state-nan", "metrics.jsonl", "model", "curves.png"
UNWRITTEN = (OSError, CheckpointError, SafetensorError)  # what saving a state raises


@dataclass(frozen=True)
class RunResult:
    """Where a run came to. Paths do not exist yet where it was interrupted."""

    out: Path
    steps: int  # taken so far, earlier starts counted
    seconds: float  # of training, earlier starts counted
    model: Path | None  # the folder in the public format, with the tokenizer
    metrics: Path
    curves: Path | None
    last: Record | None  # the last record of the metrics
    interrupted: signal.Signals | None  # what stopped it; a process says so by exit code 128 + its number


def train(config: TrainConfig, resume: bool = False, console: Console | None = None) -> RunResult:
    """Trains, and saves the model to `out/model`.

    The run's folder gets `train.json` (the configuration), `tokens/`, `metrics.jsonl`, `state/`, `curves.png` and
    `model/`. With `resume` the run in it goes on from its newest state, on a CPU with the same bits; where there is
    none yet it begins. Ctrl-C and SIGTERM end it after the step at hand, with its state saved.

    Raises ConfigError naming the key that cannot be, or that differs from the run to be resumed; FileExistsError if
    `out` has a run and `resume` is false; NotFinite, the state before the step saved in `out/state-nan`, if a loss
    or a gradient is not finite.
    """
    config = config.anchored()
    model = config.model_settings()
    check_mesh(config, model)
    if config.mesh:
        start(resolve_device(config)[0])
    accord = Accord(bool(config.mesh))
    console = (console or Console()) if accord.first else Console(quiet=True)
    out, states = config.out, config.out / STATES
    newest: Path | None = accord.told(newest_state(states))
    if newest is not None and not resume:
        raise FileExistsError(f"{out}: has a run, saved after step {_step_of(newest)}; resume it ({_again(config)}), "
                              "name another folder with out=FOLDER, or remove this one")  # fmt: skip
    _tell(config, console)
    out.mkdir(parents=True, exist_ok=True)
    made = False
    if newest is not None:
        before = read_trainer(newest)["config"]
        made = all(before[key] == config.to_dict()[key] for key in ("data", "tokenizer", "data_max_bytes"))
    with accord.in_turn():  # the first may have to make the tokens
        token_set = open_corpus(config, model, console, made or not accord.first)
    trainer = Trainer(config, model, token_set, accord)
    if newest is not None:
        for difference in trainer.restore(newest):
            console.print(f"{difference}: the curve may differ in its last bits", highlight=False)
        console.print(f"resuming after step {trainer.done}", highlight=False)
    elif resume:
        console.print(f"{out} has no state yet: beginning", highlight=False, soft_wrap=True)
    elif int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")):
        console.print("torchrun may restart this run: with --resume it would then go on from its newest state",
                      highlight=False, soft_wrap=True)  # fmt: skip
    if accord.first:
        write_file(out / SAVED, (config.model_dump_json(indent=2) + "\n").encode())
    with torch.device("meta"):
        count = sum(p.numel() for p in Transformer(model).parameters())
    split = token_set.split("train")
    console.print(
        f"{count / 1e6:.1f}M parameters in {trainer.dtype} on {_where(trainer)}; {split.tokens:,} tokens in "
        f"{split.documents:,} documents, {config.batch_tokens * config.accumulate:,} a step",
        highlight=False,
        soft_wrap=True,
    )
    interrupted = _run(trainer, console)
    records = read_metrics(out / METRICS)
    last = records[-1] if records else None
    if interrupted is not None:
        console.print(f"stopped by {interrupted.name} after step {trainer.done} of {config.steps}; go on with: "
                      f"{_again(config)}", highlight=False, soft_wrap=True)  # fmt: skip
        accord.wait()  # torchrun ends all ranks as soon as one has ended
        return RunResult(out, trainer.done, trainer.seconds, None, out / METRICS, None, last, interrupted)

    if accord.first:
        if config.mesh:
            export(states, out / MODEL)
        else:
            with unwrapped(trainer.model):
                trainer.model.save(out / MODEL)
        Tokenizer.load(token_set.tokenizer).save(out / MODEL)
        draw_curves(records, out / CURVES, f"{config.model}: {count / 1e6:.1f}M parameters")
        for name, path in (("model", MODEL), ("metrics", METRICS), ("curves", CURVES)):
            console.print(f"{name + ':':9}{out / path}", highlight=False, soft_wrap=True)
    accord.wait()
    return RunResult(out, trainer.done, trainer.seconds, out / MODEL, out / METRICS, out / CURVES, last, None)


def _run(trainer: Trainer, console: Console) -> signal.Signals | None:
    """Takes the steps that are left. Returns the signal that ended it before the last one."""
    config, states, accord = trainer.config, trainer.config.out / STATES, trainer.accord
    if accord.first:
        states.mkdir(exist_ok=True)
        prune_states(states, config.keep_states)
    validator = Validator(
        trainer.token_set, config.validation_tokens, config.batch_tokens, config.sequence, len(trainer.model.mtp)
    )
    teller = Teller(trainer, config.out / METRICS, console) if accord.first else None
    # The step of the latest state, which may be on its way: the folder would tell some ranks of it and others not yet.
    saved = trainer.done or None

    def save() -> None:
        nonlocal saved
        if teller is not None:
            teller.metrics.sync()
        trainer.save(state_folder(states, trainer.done), lambda: prune_states(states, config.keep_states))
        saved = trainer.done

    try:
        with StopSignals() as stop, trainer.stream() as stream, teller or nullcontext(), announced(console.print):
            wish = accord.stop(stop.received)
            while trainer.done < config.steps and wish is None:
                start = time.perf_counter()
                step = trainer.step(next(stream))
                last = trainer.done == config.steps
                validates = last or trainer.done % config.validate_every == 0
                saves = last or trainer.done % config.save_every == 0
                tells = validates or trainer.done % config.log_every == 0
                if tells or saves:
                    trainer.check()  # the only place where the host waits for a GPU
                trainer.seconds += time.perf_counter() - start
                measured = validator.measure(trainer.spread.measure) if validates else None
                if teller is not None:
                    if tells:
                        teller.tell(step, measured)
                    teller.advance()
                if saves:
                    save()
                wish = accord.stop(stop.received)
            if trainer.done < config.steps:
                trainer.check()
                if saved != trainer.done:
                    save()
            trainer.saved()
            return wish if trainer.done < config.steps else None
    except NotFinite as error:
        raise NotFinite(f"{error}. {_keep_before(trainer)}") from None
    finally:
        trainer.release()
        if teller is not None:
            teller.close()


def _keep_before(trainer: Trainer) -> str:
    """Saves the state before a step that was not finite, and says where. What goes wrong is said, and not raised: there
    is worse to tell."""
    folder, said = trainer.config.out / STATE_NAN, []
    try:
        trainer.saved()
    except UNWRITTEN as error:
        said.append(f"An earlier state could not be kept: {error}")
    try:
        trainer.save(folder)
        trainer.saved()
        said.append(f"The state before this step is in {folder}")
    except UNWRITTEN as error:
        said.append(f"The state before this step could not be kept: {error}")
    return ". ".join(said)


def _tell(config: TrainConfig, console: Console) -> None:
    for key, value in config.to_dict().items():
        console.print(f"{key:22}{value}", highlight=False, markup=False, soft_wrap=True)


def _where(trainer: Trainer) -> str:
    mesh = trainer.config.mesh
    return f"{trainer.ranks} ranks ({mesh}), {trainer.device.type}" if mesh else str(trainer.device)


def _again(config: TrainConfig) -> str:
    return f"{MeshShape.parse(config.mesh).launcher if config.mesh else 'abyssal'} train {config.out} --resume"


def _step_of(state: Path) -> int:
    return int(state.name.removeprefix("step-"))
