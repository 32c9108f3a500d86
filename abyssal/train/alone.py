"""A step's forward and backward passes on one device. `abyssal.parallel` has the same over many."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from abyssal.model.balance import Balance
from abyssal.model.objective import LossScales, Measured, Microbatch, Objective, Totals
from abyssal.model.transformer import Transformer
from abyssal.parallel.spread import place
from abyssal.train.config import TrainConfig
from abyssal.train.optimizer import Kept
from abyssal.train.wrap import wrap_blocks


def wide_of(dtype: torch.dtype) -> torch.dtype:
    """What sums are kept in: float32 or wider."""
    return torch.promote_types(dtype, torch.float32)


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
        parts = []
        for micro in microbatches:
            loss = self.objective(micro.to(self.device), totals, scales)
            loss.total.backward()
            collect()
            if balance.gates:
                balance.observe(loss.routings, loss.live)
            parts.append(torch.stack([loss.total.detach(), loss.main, loss.balance, *loss.mtp]))
            del loss  # and what its routings hold, before the next forward pass
        return torch.stack(parts).sum(0)

    def measure(self, micro: Microbatch) -> Measured:
        """Of a batch on the CPU."""
        return self.objective.measure(micro.to(self.device))

    def _here(self, sums: Tensor) -> Tensor:
        sums = sums.to(wide_of(self.dtype))
        # From memory that is not pinned a copy would first wait for all that the GPU has yet to do.
        return (sums.pin_memory() if self.device.type == "cuda" else sums).to(self.device, non_blocking=True)

    def norms(self, squares: Tensor) -> Tensor:
        """The norms by part and over all, `[parts + 1]`, from the sums of squares by part."""
        return torch.cat((squares, squares.sum()[None])).sqrt()

    def add_up(self, counts: Tensor) -> None:
        """Adds a tensor up, in place, over everything that saw tokens of the step."""

    def of_all_gates(self, violation: Tensor) -> Tensor:
        """What is known of this rank's gates, of all gates."""
        return violation
