"""What the trained studies share: small models of several variants, trained alike, one after the other.

All variants have the same texts, steps and seeds; a seed means the same first weights (where the shapes are the same)
and the same order of the texts. A run is what `abyssal train` makes of the same settings, through its `Trainer`. Each
leaves a folder with its model and, when all of it is there, its numbers; a study that is begun again takes those that
are there and trains the others.
"""

import dataclasses
import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from abyssal.checkpoint import load
from abyssal.config import ModelConfig
from abyssal.files import write_file
from abyssal.model.objective import Measured, Microbatch
from abyssal.model.transformer import Transformer
from abyssal.source import code_digest, short_digest
from abyssal.study.texts import Texts
from abyssal.train.config import TrainConfig
from abyssal.train.trainer import Trainer, resolve_device
from abyssal.train.validation import Validator
from abyssal.train.wrap import unwrapped

RUN, MODEL = "run.json", "model"
# What a trained model hangs on. Other pictures of it do not make it another.
TRAINED_BY = (
    "config.py", "data", "kernels", "model", "ops", "parallel", "train",
    "study/small.py", "study/texts.py", "study/trained.py",
)  # fmt: skip
CHECKS = 4  # times that the held-out texts are measured in a run


@dataclass(frozen=True)
class Variant:
    """One of the things compared: a model and the settings of its training that differ."""

    name: str  # of its folders
    label: str
    model: ModelConfig
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of TrainConfig
    embeddings: float = 1.0  # times the first embeddings are as they are drawn (Vaswani et al. 2017, 3.4: sqrt(D))


class Check(NamedTuple):
    """The held-out texts after some steps."""

    step: int
    bits_per_byte: float
    by_kind: dict[str, float]  # bits a byte


@dataclass(frozen=True)
class Trained:
    """One run: a variant with a seed."""

    variant: str
    seed: int
    loss: list[float]  # a step: nats a token, the main loss
    violation: list[list[float]]  # a step, a gate: MaxVio of the step's batch
    checks: list[Check]
    counts: dict[str, list[list[list[int]]]]  # a kind, a held-out sequence, a gate: how often each expert was picked
    tokens: int  # trained on
    parameters: int
    seconds: float  # of the clock, its checks counted
    folder: Path

    def model(self) -> Transformer:
        """As it was when the run ended."""
        return load(self.folder / MODEL)

    @property
    def bits_per_byte(self) -> float:
        return self.checks[-1].bits_per_byte

    def to_json(self) -> str:
        return json.dumps({**dataclasses.asdict(self), "folder": None}, allow_nan=False)

    @staticmethod
    def read(folder: Path) -> "Trained":
        plain = json.loads((folder / RUN).read_text("utf-8"))
        return Trained(**{**plain, "checks": [Check(*check) for check in plain["checks"]], "folder": folder})


@dataclass(frozen=True)
class Plan:
    """What is trained. `settings` of TrainConfig hold for every variant, its own over them."""

    variants: Sequence[Variant]
    seeds: Sequence[int]
    texts: Texts
    settings: Mapping[str, Any]
    folder: Path

    def config(self, variant: Variant, seed: int) -> TrainConfig:
        """Raises ConfigError naming the key."""
        own = {"model": variant.name, "out": str(self.folder), "seed": seed, "validate_every": 1}
        return TrainConfig.of({**own, **self.settings, **variant.settings}, where=variant.name)

    def folder_of(self, variant: Variant, seed: int) -> Path:
        """Of other settings, texts, or code that computes, a run is another one."""
        config = self.config(variant, seed)
        device, dtype = resolve_device(config)
        made = {
            "config": {**config.to_dict(), "out": None, "device": None, "dtype": None},
            "model": variant.model.to_dict(),
            "texts": self.texts.fingerprint,
            "made_by": [str(device), str(dtype), code_digest(*TRAINED_BY), str(torch.__version__), platform.machine()],
            **({"embeddings": variant.embeddings} if variant.embeddings != 1 else {}),
        }
        return self.folder / f"{variant.name}-{seed}-{short_digest(made)}"


def train_all(plan: Plan, console: Console) -> dict[str, list[Trained]]:
    """Every variant with every seed: those that are in the plan's folder are read, the others trained; a list in the
    order of the seeds for each variant's name.

    Raises ConfigError naming the key before anything is trained, NotFinite where a loss is not.
    """
    runs = [(variant, seed) for seed in plan.seeds for variant in plan.variants]  # a part of them is a comparison
    folders = {(v.name, seed): plan.folder_of(v, seed) for v, seed in runs}
    there = [key for key, folder in folders.items() if (folder / RUN).is_file()]
    if there:
        told = f"{len(there)} of {len(runs)} runs are in {plan.folder} already"
        console.print(told, highlight=False, soft_wrap=True)
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("left"), TimeRemainingColumn())
    found: dict[str, list[Trained]] = {variant.name: [] for variant in plan.variants}
    with (
        _told(plan, runs, folders, console),
        Progress(*columns, console=console, disable=not console.is_terminal) as bar,
    ):
        steps = sum(plan.config(v, seed).steps for v, seed in runs if (v.name, seed) not in there)
        task = bar.add_task("", total=steps)

        def advance(title: str, text: str) -> None:
            bar.update(task, advance=1, description=f"{title}: {text}")

        for number, (variant, seed) in enumerate(runs, 1):
            folder = folders[variant.name, seed]
            if (variant.name, seed) not in there:
                title = f"{number}/{len(runs)} {variant.label}, seed {seed}"
                made = _train(plan, variant, seed, folder, partial(advance, title))
                if not console.is_terminal:
                    told = f"{title}: {made.bits_per_byte:.3f} bits/B in {made.seconds:.0f} s"
                    console.print(told, highlight=False, soft_wrap=True)
            found[variant.name].append(Trained.read(folder))
    return found


@contextmanager
def _told(
    plan: Plan, runs: Sequence[tuple[Variant, int]], folders: Mapping[tuple[str, int], Path], console: Console
) -> Iterator[None]:
    """Says of an interruption what is kept."""
    try:
        yield
    except KeyboardInterrupt:
        kept = sum((folders[v.name, seed] / RUN).is_file() for v, seed in runs)
        told = f"{kept} of {len(runs)} runs are whole and kept in {plan.folder}: the same command goes on"
        console.print(told, highlight=False, soft_wrap=True)
        raise


def _train(plan: Plan, variant: Variant, seed: int, folder: Path, advance: Callable[[str], None]) -> Trained:
    start = time.perf_counter()
    config = plan.config(variant, seed)
    trainer = Trainer(config, variant.model, plan.texts.tokens)
    _scale_embeddings(trainer, variant.embeddings)
    loss: list[float] = []
    violation: list[list[float]] = []
    checks: list[Check] = []
    counts: dict[str, list[list[list[int]]]] = {}
    at = {-(-config.steps * i // CHECKS) for i in range(1, CHECKS + 1)}
    with trainer.stream() as stream:
        for microbatches in stream:
            step = trainer.step(microbatches)
            trainer.check()
            loss.append(step.main_loss)
            violation.append(step.max_violation[: _gates(variant.model)])
            if trainer.done in at:
                check, counts = measure(trainer, plan.texts)
                checks.append(check)
            advance(f"loss {loss[-1]:.3f}" + (f", {checks[-1].bits_per_byte:.3f} bits/B" if checks else ""))
    folder.mkdir(parents=True, exist_ok=True)
    with unwrapped(trainer.model):
        trainer.model.save(folder / MODEL)
    plan.texts.tokenizer.save(folder / MODEL)
    tokens = config.steps * config.batch_tokens * config.accumulate
    parameters = sum(p.numel() for p in trainer.model.parameters())
    seconds = time.perf_counter() - start
    made = Trained(
        variant.name, seed, loss, violation, checks, counts, tokens, parameters, seconds, folder
    )  # fmt: skip
    write_file(folder / RUN, made.to_json().encode())  # last: where it is, the run is whole
    return made


def measure(trainer: Trainer, texts: Texts) -> tuple[Check, dict[str, list[list[list[int]]]]]:
    """The held-out texts kind by kind, and how often each gate of the main model picked each expert for each of their
    sequences."""
    by_kind: dict[str, float] = {}
    counts: dict[str, list[list[list[int]]]] = {}
    bits = size = 0.0
    for kind, batches in texts.held_out.items():
        picked: list[Tensor] = []

        def counted(micro: Microbatch, into: list[Tensor] = picked) -> Measured:
            found = trainer.spread.measure(micro)
            into.append(found.counts)
            return found

        found = Validator.of(batches, texts.tokenizer).measure(counted)
        by_kind[kind], counts[kind] = found.bits_per_byte, [c.tolist() for c in picked]
        bits += found.bits_per_byte * found.bytes
        size += found.bytes
    return Check(trainer.done, bits / max(size, 1), by_kind), counts


@torch.no_grad()
def _scale_embeddings(trainer: Trainer, times: float) -> None:
    """Before the first step; the optimizer's original of them, too, where the model has a rounded copy."""
    own = trainer.optimizer.names.index("embed.weight")
    param, master = trainer.optimizer.params[own], trainer.optimizer.masters[own]
    master.mul_(times)
    if master is not param:
        param.copy_(master)


def _gates(model: ModelConfig) -> int:
    """Of the main model, the MTP modules' not counted."""
    return model.num_hidden_layers - model.first_k_dense_replace if model.has_experts else 0
