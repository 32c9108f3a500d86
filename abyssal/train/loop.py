"""A training run from its configuration to a saved model: `train`."""

import signal
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from abyssal.data import Tokenizer
from abyssal.data.tokenizer import write_file
from abyssal.ops.startup import announced
from abyssal.train.config import SAVED, TrainConfig
from abyssal.train.corpus import open_corpus
from abyssal.train.diagnose import NotFinite
from abyssal.train.metrics import Record, read_metrics
from abyssal.train.picture import draw_curves
from abyssal.train.signals import StopSignals
from abyssal.train.state import newest_state, prune_states, read_trainer, state_folder
from abyssal.train.tell import Teller
from abyssal.train.trainer import Trainer
from abyssal.train.validation import Validator
from abyssal.train.wrap import unwrapped

STATES, STATE_NAN, METRICS, MODEL, CURVES = "state", "state-nan", "metrics.jsonl", "model", "curves.png"


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
    console = console or Console()
    config = config.anchored()
    model = config.model_settings()
    out, states = config.out, config.out / STATES
    newest = newest_state(states)
    if newest is not None and not resume:
        raise FileExistsError(f"{out}: has a run, saved after step {_step_of(newest)}; resume it ({_again(config)}), "
                              "name another folder with out=FOLDER, or remove this one")  # fmt: skip
    _tell(config, console)
    out.mkdir(parents=True, exist_ok=True)
    made = False
    if newest is not None:
        before = read_trainer(newest)["config"]
        made = all(before[key] == config.to_dict()[key] for key in ("data", "tokenizer", "data_max_bytes"))
    token_set = open_corpus(config, model, console, made)
    trainer = Trainer(config, model, token_set)
    if newest is not None:
        for difference in trainer.restore(newest):
            console.print(f"{difference}: the curve may differ in its last bits", highlight=False)
        console.print(f"resuming after step {trainer.done}", highlight=False)
    elif resume:
        console.print(f"{out} has no state yet: beginning", highlight=False, soft_wrap=True)
    write_file(out / SAVED, (config.model_dump_json(indent=2) + "\n").encode())
    count = sum(p.numel() for p in trainer.model.parameters())
    split = token_set.split("train")
    console.print(
        f"{count / 1e6:.1f}M parameters in {trainer.dtype} on {trainer.device}; {split.tokens:,} tokens in "
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
        return RunResult(out, trainer.done, trainer.seconds, None, out / METRICS, None, last, interrupted)

    with unwrapped(trainer.model):
        trainer.model.save(out / MODEL)
    Tokenizer.load(token_set.tokenizer).save(out / MODEL)
    draw_curves(records, out / CURVES, f"{config.model}: {count / 1e6:.1f}M parameters")
    for name, path in (("model", MODEL), ("metrics", METRICS), ("curves", CURVES)):
        console.print(f"{name + ':':9}{out / path}", highlight=False, soft_wrap=True)
    return RunResult(out, trainer.done, trainer.seconds, out / MODEL, out / METRICS, out / CURVES, last, None)


def _run(trainer: Trainer, console: Console) -> signal.Signals | None:
    """Takes the steps that are left. Returns the signal that ended it before the last one."""
    config, states = trainer.config, trainer.config.out / STATES
    states.mkdir(exist_ok=True)
    prune_states(states, config.keep_states)
    validator = Validator(trainer.token_set, config.validation_tokens, config.batch_tokens, config.sequence)
    teller = Teller(trainer, config.out / METRICS, console)

    def save() -> None:
        teller.metrics.sync()
        trainer.save(state_folder(states, trainer.done))
        prune_states(states, config.keep_states)

    try:
        with StopSignals() as stop, trainer.stream() as stream, teller, announced(console.print):
            while trainer.done < config.steps and stop.received is None:
                start = time.perf_counter()
                step = trainer.step(next(stream))
                last = trainer.done == config.steps
                validates = last or trainer.done % config.validate_every == 0
                saves = last or trainer.done % config.save_every == 0
                tells = validates or trainer.done % config.log_every == 0
                if tells or saves or stop.received is not None:
                    trainer.check()  # the only place where the host waits for a GPU
                trainer.seconds += time.perf_counter() - start
                if tells:
                    measured = validator.measure(trainer.spread.measure) if validates else None
                    teller.tell(step, measured)
                teller.advance()
                if saves:
                    save()
            if trainer.done < config.steps and newest_state(states) != state_folder(states, trainer.done):
                save()
            return stop.received if trainer.done < config.steps else None
    except NotFinite as error:
        saved = config.out / STATE_NAN
        trainer.save(saved)
        raise NotFinite(f"{error}. The state before this step is in {saved}") from None
    finally:
        teller.close()


def _tell(config: TrainConfig, console: Console) -> None:
    for key, value in config.to_dict().items():
        console.print(f"{key:22}{value}", highlight=False, markup=False, soft_wrap=True)


def _again(config: TrainConfig) -> str:
    return f"abyssal train {config.out} --resume"


def _step_of(state: Path) -> int:
    return int(state.name.removeprefix("step-"))
