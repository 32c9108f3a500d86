"""Model, optimizer, data and balance of a run, and one optimizer step with them."""

import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import abyssal
from abyssal.checkpoint.distributed import StateWriter
from abyssal.config import ConfigError, ModelConfig
from abyssal.data import TokenSet
from abyssal.model.balance import Balance
from abyssal.model.objective import LossScales, Microbatch
from abyssal.model.transformer import Transformer
from abyssal.parallel import Mesh, MeshShape, Spread
from abyssal.parallel.accord import LONG, Accord
from abyssal.parallel.mesh import start
from abyssal.parallel.replay import Replay, own_stream
from abyssal.parallel.state import described
from abyssal.train.alone import Alone, spread_as
from abyssal.train.config import TrainConfig
from abyssal.train.diagnose import NotFinite, bad_gradient, first_not_finite, first_of_ranks, watched
from abyssal.train.lanes import Lanes
from abyssal.train.optimizer import Optimizer
from abyssal.train.parts import PARTS
from abyssal.train.schedule import bias_speed, learning_rate, mtp_weight
from abyssal.train.state import Part, begin_state, load_state, read_trainer, save_state, whole
from abyssal.train.wrap import unwrapped

# Settings that may change when a run is resumed: none alters the curve, or what they name is compared itself.
FREE = {
    "log_every", "save_every", "keep_states", "out", "data", "tokenizer", "model", "model_overrides", "track",
    "profile", "mesh", "reshard", "schedule", "graphs", "recompute",
}  # fmt: skip
DATA_KEYS = ("source_sha256", "tokenizer_sha256", "validation", "shard_tokens", "seed")


class Step:
    """What one optimizer step came to. Its numbers stay on the device until one of them is read, all at once."""

    def __init__(self, sums: Tensor, norms: Tensor, violation: Tensor, idlest: Tensor, picks: Tensor) -> None:
        self._sums = sums  # loss, main, balance, then the MTP modules'
        self._norms = norms  # of the gradient before clipping, by PARTS, and over all of it
        self._violation = violation  # [gates] float64
        self._idlest = idlest  # [gates] float64
        self._picks = picks  # [gates] int64

    @cached_property
    def _read(self) -> list[float]:
        pieces = (self._sums, self._norms, self._violation, self._idlest, self._picks)
        numbers: list[float] = torch.cat([t.double() for t in pieces]).tolist()
        return numbers

    @property
    def loss(self) -> float:
        """Everything that was differentiated."""
        return self._read[0]

    @property
    def main_loss(self) -> float:
        """Nats a token."""
        return self._read[1]

    @property
    def balance_loss(self) -> float:
        return self._read[2]

    @property
    def mtp_losses(self) -> list[float]:
        """Nats a token, a module."""
        return self._read[3 : len(self._sums)]

    @property
    def grad_norm(self) -> float:
        """Of the whole gradient, before clipping."""
        return self._read[len(self._sums) + len(PARTS)]

    @property
    def grad_norms(self) -> dict[str, float]:
        """Before clipping, by the parts of the model that there are."""
        start = len(self._sums)
        return {part: x for part, x in zip(PARTS, self._read[start:]) if x > 0}

    @property
    def max_violation(self) -> list[float]:
        """MaxVio of every gate, in the order of `Transformer.gates`."""
        return self._of_gates(0)

    @property
    def idlest_load(self) -> list[float]:
        """The load of every gate's idlest expert, in mean loads."""
        return self._of_gates(1)

    @property
    def picks(self) -> list[int]:
        """How often every gate picked an expert: its tokens times K, if it dropped none."""
        return [int(x) for x in self._of_gates(2)]

    def _of_gates(self, which: int) -> list[float]:
        gates, start = len(self._violation), len(self._sums) + len(self._norms)
        return self._read[start + which * gates : start + (which + 1) * gates]


def resolve_device(config: TrainConfig) -> tuple[torch.device, torch.dtype]:
    """Where the run computes, and in what. Raises ConfigError naming a device that torch does not have."""
    name = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device: {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return device, getattr(torch, config.dtype or ("float32" if device.type == "cpu" else "bfloat16"))


class Trainer:
    """A run in memory. `done` steps have been taken, in `seconds` of training. On a GPU it computes on a stream of its
    own, which becomes this thread's (`own_stream`): another thread that reads the model waits for it.

    Raises ConfigError naming the key for settings that do not fit the model.
    """

    def __init__(
        self, config: TrainConfig, model: ModelConfig, token_set: TokenSet, accord: Accord | None = None
    ) -> None:
        """`accord`: that of the run's ranks, where there is one already."""
        if config.sequence > model.max_position_embeddings:
            raise ConfigError(
                f"sequence: {config.sequence}, the model's max_position_embeddings is {model.max_position_embeddings}"
            )
        self.config = config
        self.device, self.dtype = resolve_device(config)
        if config.mesh:
            self.device = start(self.device)
        graphs = config.graphs and self.device.type == "cuda" and not config.compile
        if graphs:
            own_stream(self.device)
        if config.compile and self.device.type == "cpu" and model.n_routed_experts is not None:
            raise ConfigError("compile: on a CPU the experts' product cannot be compiled for training; say false")
        self.done, self.seconds = 0, 0.0
        generator = torch.Generator().manual_seed(config.seed)
        # Always initialised on the CPU and in float32, so that a seed means one model everywhere.
        self.model = Transformer(model).init_weights(generator)
        self.accord = accord or Accord(bool(config.mesh))
        self._writer: StateWriter | None = None
        self._part: Part = whole
        mesh = Mesh(MeshShape.parse(config.mesh), self.device.type) if config.mesh else None
        self.spread = spread_as(config, self.model, mesh, self.device, self.dtype)
        self.optimizer = Optimizer(self.spread.parameters(), config)
        if graphs:
            self.spread.replay = Replay(self.optimizer.snapshot, self.accord.most)
        if mesh is not None and isinstance(self.spread, Spread):
            pieces = {p.name: p for p in self.spread.parameters()}
            self._part = lambda name, local: described(local, pieces[name], mesh)
            self._writer = StateWriter(dist.new_group(backend="gloo", timeout=LONG), self.device)
        self.balance = Balance(self.model.gates(), self.device)
        self.token_set = token_set
        self.lanes = Lanes(token_set.split("train"), config, len(self.model.mtp), *self.spread.reader)
        # The first step whose loss or gradient was not finite, 0 if there was none: from then on nothing is changed.
        self._bad = torch.zeros((), dtype=torch.int64, device=self.device)

    @property
    def ranks(self) -> int:
        """Devices that the run computes on."""
        return MeshShape.parse(self.config.mesh).ranks

    @contextmanager
    def stream(self) -> Iterator[Iterator[list[Microbatch]]]:
        """The microbatches of step `done + 1` and of all that follow, read ahead, on the CPU."""
        with closing(self.lanes.following(self.done)) as steps:
            yield steps

    def step(self, microbatches: Sequence[Microbatch]) -> Step:
        """Takes one optimizer step, without waiting for a GPU. If a loss or the gradient is not finite, it and every
        later one change nothing; `check` tells, and on a CPU it is called here."""
        number = self.done + 1
        sums = self._gradients(microbatches, number)
        norms = self.spread.norms(self.optimizer.squares())
        bad = ~(sums[0].isfinite() & norms[-1].isfinite())
        self._bad = torch.where((self._bad == 0) & bad, number, self._bad)
        stopped = (self._bad > 0).float()
        self.optimizer.update(learning_rate(self.config, number), norms[-1], stopped)
        self.spread.add_up(self.balance.counts)
        counts = self.balance.counts.double()
        picks = self.balance.counts.sum(-1)
        idlest = counts.amin(-1) / counts.mean(-1).clamp(min=1e-9)
        violation = self.balance.update(bias_speed(self.config, number) * (1 - stopped))
        of_gates = [self.spread.of_all_gates(x) for x in (violation, idlest, picks)]
        self.done = number
        if self.device.type == "cpu":
            self.check(microbatches)
        return Step(sums, norms, *of_gates)

    def check(self, microbatches: Sequence[Microbatch] | None = None) -> None:
        """Raises NotFinite, the state being that before the step, if a step so far had a loss or a gradient that is not
        finite. Waits for the device. `microbatches`: of that step; None: as the run reads them."""
        number = int(self._bad)
        if not number:
            return
        self._bad.zero_()
        replay, self.spread.replay = self.spread.replay, None  # what is replayed tells nothing
        micros = microbatches or self.lanes.step(number)
        # The model of a mesh runs only as a step runs it, so it is watched there.
        with unwrapped(self.model), watched(self.model) as found:
            loss = float(self._gradients(micros, number)[0])
        norm = float(self.spread.norms(self.optimizer.squares())[-1])
        if isinstance(self.spread, Alone):
            where = first_not_finite(self.model, [m.to(self.device) for m in micros], self.optimizer.gradients())
        else:
            outputs = self.accord.all(found[0] if found else None)
            where = first_of_ranks(outputs, self.accord.all(bad_gradient(self.optimizer.gradients())))
        self.optimizer.drop_gradients()
        self.balance.counts.zero_()
        self.done = number - 1
        self.spread.replay = replay
        raise NotFinite(f"step {number}: the loss is {loss:g} and the gradient's norm {norm:g}; first: {where}")

    def _gradients(self, microbatches: Sequence[Microbatch], number: int) -> Tensor:
        """Forward and backward over a step's microbatches; the sums of its losses."""
        c = self.config
        scales = LossScales(mtp_weight(c, number), c.sequence_balance, c.auxiliary_balance)
        return self.spread.run(microbatches, scales, self.optimizer.collect, self.balance)

    def save(self, folder: Path, then: Callable[[], None] = lambda: None) -> None:
        """Writes the state after `done` steps; the first rank calls `then` when it is there. Of many ranks each writes
        its part while the run goes on: `saved` waits for it. Where an earlier one was not written, this one is waited
        for here, and then that is raised."""
        about = self._identity() | {"seconds": self.seconds}
        if self._writer is None:
            save_state(folder, self.model, self.optimizer, about)
            then()
        else:
            begin_state(self._writer, folder, self.model, self.optimizer, self._part, about, then)
            if self._writer.failed:
                self._writer.wait()

    def release(self) -> None:
        """Lets go of captured passes, without which ranks cannot part; a further step would capture them again."""
        if self.spread.replay is not None:
            self.spread.replay.clear()

    def saved(self) -> None:
        """Returns when no state is being written. Raises what went wrong."""
        if self._writer is not None:
            self._writer.wait()

    def restore(self, folder: Path) -> list[str]:
        """Goes on from a state. Returns what makes the curve differ in its last bits, in words.

        Raises ConfigError naming the key if the run is another one than the state is of.
        """
        then, now = read_trainer(folder), self._identity()
        # A setting that is newer than the state was what it is where nobody sets it.
        then["config"] = TrainConfig.defaults() | then["config"]
        for group, prefix in (("config", ""), ("model", "model."), ("data", "data: "), ("machine", "")):
            before, after = then[group], now[group]
            for key in sorted(before.keys() | after.keys()):
                if before.get(key) != after.get(key) and not (group == "config" and key in FREE):
                    raise ConfigError(
                        f"{prefix}{key}: was {before.get(key)!r} and is {after.get(key)!r}; a run is resumed with "
                        f"the settings it began with; only log_every, save_every, keep_states, recompute, "
                        f"graphs, mesh, reshard, schedule and paths may change"
                    )
        load_state(folder, self.model, self.optimizer, self._part)
        self.done, self.seconds = then["step"], then["seconds"]
        before, after = then["made_by"], now["made_by"]
        names = sorted(key for key in after if (before.get(key) or None) != (after[key] or None))
        return [f"{key} was {before.get(key) or 'none'} and is {after[key] or 'none'}" for key in names]

    def _identity(self) -> dict[str, Any]:
        return {
            "step": self.done,
            "config": self.config.to_dict() | {"device": None, "dtype": None},
            "model": self.model.config.to_dict(),
            "data": {key: self.token_set.index.get(key) for key in DATA_KEYS},
            "machine": {"device": self.device.type, "dtype": str(self.dtype).removeprefix("torch.")},
            "made_by": {
                "abyssal": abyssal.__version__,
                "mesh": self.config.mesh,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
                "processor": torch.backends.cpu.get_cpu_capability(),
            },
        }
