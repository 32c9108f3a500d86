"""What the studies that train small models have in common: their settings, checked, and how they are trained."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from rich.console import Console

from abyssal.config import ModelConfig
from abyssal.study.texts import Texts, open_texts
from abyssal.study.trained import Plan, Trained, Variant, train_all
from abyssal.train.config import TrainConfig
from abyssal.train.trainer import resolve_device

LEARNT = 1.0  # nats that a loss falls at least in a run that says anything


@dataclass(frozen=True)
class Small:
    """A run is `steps` of `batch` tokens in sequences of `sequence`; `text` bytes at most of each kind are read, and
    `held_out` sequences of each measured. Raises ValueError naming the setting."""

    seeds: int = 3
    steps: int = 100
    batch: int = 2048
    sequence: int = 256
    text: int = 200_000
    held_out: int = 16
    layers: int = 4
    width: int = 128
    vocab: int = 2048
    lr: float = 3e-3
    device: str | None = None
    data: Path | None = None

    LEAST: ClassVar[Mapping[str, int]] = {
        "steps": 4, "batch": 1, "sequence": 2, "held_out": 1, "layers": 1, "width": 1, "vocab": 260, "text": 1000,
    }  # fmt: skip
    POSITIVE: ClassVar[Sequence[str]] = ("lr",)

    def __post_init__(self) -> None:
        if self.seeds < 2:
            raise ValueError(f"seeds: expected two or more, there is no spread of {self.seeds}")
        for name, number in self.LEAST.items():
            if getattr(self, name) < number:
                raise ValueError(f"{name}: expected {number} or more, got {getattr(self, name)}")
        for name in self.POSITIVE:
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")

    def in_small(self) -> ModelConfig:
        """DeepSeek-V3 with heads 32 wide, without MTP and without groups of experts."""
        heads = max(self.width // 32, 1)
        return ModelConfig.load("tiny").replace(
            vocab_size=self.vocab, hidden_size=self.width, num_hidden_layers=self.layers, num_attention_heads=heads,
            num_key_value_heads=heads, q_lora_rank=None, kv_lora_rank=max(self.width // 4, 1), qk_nope_head_dim=24,
            qk_rope_head_dim=8, v_head_dim=32, n_group=1, topk_group=1, routed_scaling_factor=1.0,
            num_nextn_predict_layers=0, max_position_embeddings=self.sequence,
        )  # fmt: skip

    def training(self) -> dict[str, Any]:
        """Settings of TrainConfig that all variants share."""
        return {
            "steps": self.steps, "batch_tokens": self.batch, "sequence": self.sequence, "lr": self.lr,
            "warmup_steps": self.steps // 10, "decay_fraction": 0.4, "final_lr": self.lr / 10, "device": self.device,
        }  # fmt: skip

    def trains_on(self) -> torch.device:
        """Raises ConfigError for a device that is none."""
        return resolve_device(TrainConfig.of({"model": "", "out": "", **self.training()}))[0]

    def read_texts(self, folder: Path, console: Console, tokens: int | None = None) -> Texts:
        """In pieces of `tokens`, or else of a training sequence."""
        pieces = tokens or self.sequence
        return open_texts(folder, self.data, self.text, self.vocab, pieces, self.held_out, console.print)

    def train(
        self, variants: Sequence[Variant], texts: Texts, folder: Path, console: Console
    ) -> dict[str, list[Trained]]:
        """See `train_all`."""
        return train_all(Plan(variants, range(self.seeds), texts, self.training(), folder), console)

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {**dataclasses.asdict(self), "data": self.data and str(self.data)}


def spent(runs: Mapping[str, Sequence[Trained]], began: float) -> float:
    """Seconds of the clock that a study is made of: training all its runs, those that were there already too, and what
    was measured and drawn since `began`, when they were trained or read. Reading texts is left out."""
    return sum(run.seconds for of_seeds in runs.values() for run in of_seeds) + time.perf_counter() - began


def losses(run: Trained) -> tuple[float, float]:
    """The first, and the mean over the last tenth, in nats."""
    last = run.loss[-max(len(run.loss) // 10, 1) :]
    return run.loss[0], sum(last) / len(last)


def unlearnt(run: Trained) -> tuple[str, ...]:
    """What is to be said where a loss hardly fell."""
    begun, ended = losses(run)
    if begun - ended >= LEARNT:
        return ()
    return (
        f"Anything of a trained model: the loss of {run.variant} fell from {begun:.2f} to {ended:.2f} nats only, and "
        "what is alike so early may yet part.",
    )
