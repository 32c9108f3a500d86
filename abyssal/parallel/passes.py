"""Forward and backward over a step's microbatches, on one device or on each of many."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from abyssal.model.balance import Balance
from abyssal.model.objective import LossScales, Microbatch, Objective, Totals
from abyssal.parallel.replay import Replay


def passes(
    objective: Objective, microbatches: Sequence[Microbatch], totals: Totals, scales: LossScales, balance: Balance,
    device: torch.device, after_each: Callable[[], None] = lambda: None, replay: Replay | None = None,
) -> Tensor:  # fmt: skip
    """Forward and backward over microbatches, each brought to `device` for its pass, which `replay` may know already.
    Returns the sums of loss, main loss, balance loss and the MTP modules' losses, `[3 + modules]`."""

    def work(micro: Microbatch, totals: Totals) -> Tensor:
        loss = objective(micro, totals, scales)
        loss.total.backward()
        if balance.gates:
            balance.observe(loss.routings, loss.live)
        return torch.stack([loss.total.detach(), loss.main, loss.balance, *loss.mtp])

    sums = []
    for number, micro in enumerate(microbatches if replay is None else replay.alike(microbatches)):
        if replay is None:
            sums.append(work(micro.to(device), totals))
        else:
            sums.append(replay(work, micro, totals, scales, number == 0, device))
        after_each()
    return torch.stack(sums).sum(0)
