"""A step's forward and backward passes on one device. `abyssal.parallel` has the same over many."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from abyssal.model.balance import Balance
from abyssal.model.objective import LossScales, Measured, Microbatch, Objective, Totals
from abyssal.model.transformer import Transformer
from abyssal.ops.device import sent
from abyssal.parallel import Mesh, Spread
from abyssal.parallel.passes import passes
from abyssal.parallel.replay import Replay
from abyssal.parallel.spread import place
from abyssal.train.config import TrainConfig
from abyssal.train.optimizer import Kept
from abyssal.train.wrap import splits_backward, wrap_blocks


class Alone:
    """The model whole, on `device`, computing in `dtype`; float32 masters beside it where that is narrower."""

    def __init__(self, model: Transformer, config: TrainConfig, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        place(model, device)
        # What the parameters were before they are made narrow is not copied, but kept.
        wide = [p.detach().float() for p in model.parameters()] if dtype == torch.bfloat16 else None
        self.model = place(model, device, dtype)
        self._masters = wide
        wrap_blocks(model, config)
        self.objective = Objective(model)

    reader = (0, 1)  # it reads all of a step's microbatches
    replay: Replay | None = None  # of a microbatch's passes

    def parameters(self) -> list[Kept]:
        """What the optimizer steps."""
        named = list(self.model.named_parameters())
        if self._masters is None:
            return [Kept(name, p, p) for name, p in named]
        return [Kept(name, p, m) for (name, p), m in zip(named, self._masters, strict=True)]

    def run(
        self, microbatches: Sequence[Microbatch], scales: LossScales, collect: Callable[[], None], balance: Balance
    ) -> Tensor:
        """Forward and backward over all of a step's microbatches, which lie on the CPU; `collect` is called after each.
        Returns the sums of loss, main loss, balance loss and the MTP modules' losses, `[3 + modules]`."""
        totals = Totals.of(microbatches, self._here)
        return passes(self.objective, microbatches, totals, scales, balance, self.device, collect, self.replay)

    def measure(self, micro: Microbatch) -> Measured:
        """Of a batch on the CPU."""
        return self.objective.measure(micro.to(self.device))

    def _here(self, sums: Tensor) -> Tensor:
        return sent(sums.to(torch.promote_types(self.dtype, torch.float32)), self.device)

    def norms(self, squares: Tensor) -> Tensor:
        """The norms by part and over all, `[parts + 1]`, from the sums of squares by part."""
        return torch.cat((squares, squares.sum()[None])).sqrt()

    def add_up(self, counts: Tensor) -> None:
        """Adds a tensor up, in place, over everything that saw tokens of the step."""

    def of_all_gates(self, violation: Tensor) -> Tensor:
        """What is known of this rank's gates, of all gates."""
        return violation


def spread_as(
    config: TrainConfig, model: Transformer, mesh: Mesh | None, device: torch.device, dtype: torch.dtype
) -> Alone | Spread:
    """The model as a run has it: over a mesh, or on one device. Raises ConfigError or ValueError for what cannot be."""
    if mesh is None:
        return Alone(model, config, device, dtype)
    wrap = partial(wrap_blocks, config=config)
    return Spread(
        model, mesh, device, dtype, config.reshard, wrap, config.schedule, config.accumulate, splits_backward(config)
    )
