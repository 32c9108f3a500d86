"""What a run tells of its steps, and to whom: the display, `metrics.jsonl`, trackers, and a profile if asked."""

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from rich.console import Console

from abyssal.costs import inspect
from abyssal.train.metrics import Metrics, Record
from abyssal.train.profile import Profile
from abyssal.train.progress import Display
from abyssal.train.schedule import bias_speed, learning_rate, mtp_weight
from abyssal.train.track import flat, trackers
from abyssal.train.trainer import Step, Trainer
from abyssal.train.validation import Validation

# Dense bf16 products, FLOP a second, as the maker says: what a model's FLOP utilisation is a share of.
PEAKS = {"H100": 989e12, "H200": 989e12, "H800": 989e12}


class Teller:
    """Made before a run's steps; a context that lasts as long as they do."""

    def __init__(self, trainer: Trainer, metrics: Path, console: Console) -> None:
        """Raises ConfigError if a tracker's package is missing."""
        config = trainer.config
        self.trainer, self.config, self.console = trainer, config, console
        self.trackers = trackers(config, trainer.done)
        self.metrics = Metrics(metrics, trainer.done)
        self.display = Display(console, config.steps, trainer.done)
        self._step_tokens = config.batch_tokens * config.accumulate
        self._since = (trainer.done, trainer.seconds)
        flops = inspect(trainer.model.config, config.sequence).flops
        self._flops = flops.training + flops.training_mtp  # a token of the longest sequence
        peak = peak_of(trainer.device) if trainer.dtype == torch.bfloat16 else None
        self._peak = None if peak is None else peak * trainer.ranks
        self.profile = Profile(config.out / "profile", trainer.device) if config.profile else None
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._stack.enter_context(self.display)
        self._steps = None if self.profile is None else self._stack.enter_context(self.profile.steps())
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, trace)
        if self.profile is not None:
            self.console.print(f"profile: {self.profile.told}", highlight=False, soft_wrap=True)

    def tell(self, step: Step, validation: Validation | None) -> None:
        """Tells of the step just taken. Waits for the device."""
        trainer, config = self.trainer, self.config
        elapsed = trainer.seconds - self._since[1]
        speed = (trainer.done - self._since[0]) * self._step_tokens / max(elapsed, 1e-9)
        self._since = (trainer.done, trainer.seconds)
        record = self.record(step, speed) | {"validation": None if validation is None else validation.to_dict()}
        self.metrics.write(record)
        for tracker in self.trackers:
            tracker.log(trainer.done, flat(record))
        self.display.show(record, (config.steps - trainer.done) * self._step_tokens / speed)

    def advance(self) -> None:
        """Another step has been taken."""
        self.display.advance(self.trainer.done)
        if self._steps is not None:
            self._steps.step()

    def record(self, step: Step, speed: float) -> Record:
        """A step as `metrics.jsonl` has it; `speed` in tokens a second."""
        trainer, config, number = self.trainer, self.config, self.trainer.done
        tokens = number * self._step_tokens
        cuda = trainer.device.type == "cuda"
        c = trainer.model.config
        layers = c.num_hidden_layers - c.first_k_dense_replace if c.has_experts else 0  # the MTP modules' see fewer
        return {
            "step": number,
            "tokens": tokens,
            "epoch": tokens / trainer.token_set.split("train").tokens,  # of the data, how often it has been read
            "loss": step.loss,
            "main_loss": step.main_loss,
            "mtp_losses": step.mtp_losses,
            "balance_loss": step.balance_loss,
            "grad_norm": step.grad_norm,
            "grad_norms": step.grad_norms,
            "lr": learning_rate(config, number),
            "mtp_weight": mtp_weight(config, number),
            "bias_speed": bias_speed(config, number),
            "max_violation": step.max_violation,
            "idlest_load": step.idlest_load,
            "tokens_dropped": sum(self._step_tokens * (c.num_experts_per_tok or 0) - n for n in step.picks[:layers]),
            "tokens_per_second": speed,
            "mfu": None if self._peak is None else speed * self._flops / self._peak,
            "memory_gib": torch.cuda.max_memory_allocated(trainer.device) / 2**30 if cuda else None,
            "seconds": trainer.seconds,
        }

    def close(self) -> None:
        """Ends the files, each whether or not another fails."""
        with ExitStack() as stack:
            stack.callback(self.metrics.close)
            for tracker in self.trackers:
                stack.callback(tracker.close)


def peak_of(device: torch.device) -> float | None:
    """What a device's dense bf16 products can reach, FLOP a second; None where it isn't known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAKS.items() if key in name), None)
