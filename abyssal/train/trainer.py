"""Model, optimizer, data and balance of a run, and one optimizer step with them."""

import math
import platform
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import abyssal
from abyssal.config import ConfigError, ModelConfig
from abyssal.data import TokenSet
from abyssal.model.balance import Balance
from abyssal.model.transformer import Transformer
from abyssal.train.config import TrainConfig
from abyssal.train.diagnose import NotFinite, first_not_finite
from abyssal.train.lanes import Lanes
from abyssal.train.loss import Microbatch, Totals, losses
from abyssal.train.optimizer import Optimizer
from abyssal.train.schedule import bias_speed, learning_rate, mtp_weight
from abyssal.train.state import load_state, read_trainer, save_state
from abyssal.train.wrap import wrap_blocks

# Settings that may change when a run is resumed: none alters the curve, or what they name is compared itself.
FREE = {"log_every", "save_every", "keep_states", "out", "data", "tokenizer", "model", "model_overrides"}
DATA_KEYS = ("source_sha256", "tokenizer_sha256", "validation", "shard_tokens", "seed")


class Step(NamedTuple):
    """What one optimizer step came to; `max_violation` stays on the device."""

    loss: float  # everything that was differentiated
    main_loss: float  # nats a token
    mtp_losses: list[float]  # nats a token, a module
    balance_loss: float
    grad_norm: float  # before clipping
    max_violation: Tensor  # [gates] float64


def resolve_device(config: TrainConfig) -> tuple[torch.device, torch.dtype]:
    """Where the run computes, and in what. Raises ConfigError naming a device that torch does not have."""
    name = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device: {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return device, getattr(torch, config.dtype or ("float32" if device.type == "cpu" else "bfloat16"))


class Trainer:
    """A run in memory. `done` steps have been taken, in `seconds` of training.

    Raises ConfigError naming the key for settings that do not fit the model.
    """

    def __init__(self, config: TrainConfig, model: ModelConfig, token_set: TokenSet) -> None:
        if config.sequence > model.max_position_embeddings:
            raise ConfigError(
                f"sequence: {config.sequence}, the model's max_position_embeddings is {model.max_position_embeddings}"
            )
        self.config = config
        self.device, self.dtype = resolve_device(config)
        if config.compile and self.device.type == "cpu" and model.n_routed_experts is not None:
            raise ConfigError("compile: on a CPU the experts' product cannot be compiled for training; say false")
        self.done, self.seconds = 0, 0.0
        generator = torch.Generator().manual_seed(config.seed)
        # Always initialised on the CPU and in float32, so that a seed means one model everywhere.
        self.model = Transformer(model).init_weights(generator).to(self.device)
        self.optimizer = Optimizer(self.model, config, self.dtype)
        wrap_blocks(self.model, config)
        self.balance = Balance(self.model.gates())
        self.token_set = token_set
        self.lanes = Lanes(token_set.split("train"), config, len(self.model.mtp))

    @contextmanager
    def stream(self) -> Iterator[Iterator[list[Microbatch]]]:
        """The microbatches of step `done + 1` and of all that follow, read ahead, on the CPU."""
        with closing(self.lanes.following(self.done)) as steps:
            yield steps

    def step(self, microbatches: Sequence[Microbatch]) -> Step:
        """Takes one optimizer step. Raises NotFinite, and changes nothing, if a loss or the gradient is not finite."""
        number = self.done + 1
        micros = [micro.to(self.device) for micro in microbatches]
        totals = Totals.of(micros)
        weight = mtp_weight(self.config, number)
        parts = []
        for micro in micros:
            loss = losses(self.model, micro, totals, self.config, weight)
            loss.total.backward()
            self.optimizer.collect()
            if self.balance.gates:
                self.balance.observe(loss.routings, loss.live)
            parts.append(torch.stack([loss.total.detach(), loss.main, loss.balance, *loss.mtp]))
        # The one value a step that the host waits for: an update with a NaN cannot be taken back.
        total, main, balance, *rest = torch.cat([torch.stack(parts).sum(0), self.optimizer.norm()[None]]).tolist()
        mtp, norm = rest[:-1], rest[-1]
        if not (math.isfinite(total) and math.isfinite(norm)):
            where = first_not_finite(self.model, micros, self.optimizer.gradients())
            self.optimizer.drop_gradients()
            self.balance.counts.zero_()
            raise NotFinite(f"step {number}: the loss is {total:g} and the gradient's norm {norm:g}; first: {where}")
        self.optimizer.update(learning_rate(self.config, number), norm)
        violation = torch.zeros(0)
        if self.balance.gates:
            violation = self.balance.update(bias_speed(self.config, number))
        self.done = number
        return Step(total, main, mtp, balance, norm, violation)

    def save(self, folder: Path) -> None:
        """Writes the state after `done` steps."""
        save_state(folder, self.model, self.optimizer, self._identity() | {"seconds": self.seconds})

    def restore(self, folder: Path) -> list[str]:
        """Goes on from a state. Returns what makes the curve differ in its last bits, in words.

        Raises ConfigError naming the key if the run is another one than the state is of.
        """
        then, now = read_trainer(folder), self._identity()
        for group, prefix in (("config", ""), ("model", "model."), ("data", "data: "), ("machine", "")):
            before, after = then[group], now[group]
            for key in sorted(before.keys() | after.keys()):
                if before.get(key) != after.get(key) and not (group == "config" and key in FREE):
                    raise ConfigError(
                        f"{prefix}{key}: was {before.get(key)!r} and is {after.get(key)!r}; a run is resumed with "
                        f"the settings it began with; only log_every, save_every, keep_states and paths may change"
                    )
        load_state(folder, self.model, self.optimizer)
        self.done, self.seconds = then["step"], then["seconds"]
        names = sorted(key for key in now["made_by"] if then["made_by"].get(key) != now["made_by"][key])
        return [f"{key} was {then['made_by'].get(key)} and is {now['made_by'][key]}" for key in names]

    def _identity(self) -> dict[str, Any]:
        return {
            "step": self.done,
            "config": self.config.to_dict() | {"device": None, "dtype": None},
            "model": self.model.config.to_dict(),
            "data": {key: self.token_set.index.get(key) for key in DATA_KEYS},
            "machine": {"device": self.device.type, "dtype": str(self.dtype).removeprefix("torch.")},
            "made_by": {
                "abyssal": abyssal.__version__,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
                "processor": torch.backends.cpu.get_cpu_capability(),
            },
        }
