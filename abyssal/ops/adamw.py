"""AdamW over float32 masters of bfloat16 parameters, or over float32 parameters that are their own masters: norms in
one pass over memory, the whole step in another.

The reference is `torch.optim.AdamW` on the masters, whose moments these are, followed by copies to the parameters.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from abyssal.ops.device import capability, sent

ALIGNED = 16  # bytes: kernels read so many at a time


class Stepped(NamedTuple):
    """Of one parameter, all of one shape, contiguous."""

    param: Tensor  # bfloat16; or the master itself
    master: Tensor  # float32, as the moments
    exp_avg: Tensor
    exp_avg_sq: Tensor


def fits(params: Sequence[Tensor], masters: Sequence[Tensor]) -> bool:
    """Whether the kernels take these: all bfloat16 with float32 masters, or all their own, on one NVIDIA GPU, whole."""
    same = all(p is m for p, m in zip(params, masters, strict=True))
    return bool(params) and all(
        p.dtype == (torch.float32 if same else torch.bfloat16) and m.dtype == torch.float32 and type(p.data) is Tensor
        and p.is_contiguous() and m.is_contiguous() and capability(p)[0] > 0 and m.device == p.device
        and p.device == params[0].device and not (p.data_ptr() | m.data_ptr()) % ALIGNED
        for p, m in zip(params, masters, strict=True)
    )  # fmt: skip


class OnePass:
    """Steps many parameters with two launches, a norm's and a step's, without waiting for the GPU."""

    def __init__(
        self, stepped: Sequence[Stepped], steps: Tensor, decays: Sequence[float], parts: Sequence[int]
    ) -> None:
        """`steps [n]` float32: how many a parameter has taken, counted on here; `decays`: weight decay a parameter;
        `parts`: of which sum of squares its gradient is. The tensors must live as long as this does."""
        from abyssal.kernels.adamw import Table

        device = steps.device
        # Parameters of a part come one behind the other, so that a part's sums do.
        self._order = sorted(range(len(stepped)), key=lambda i: parts[i])
        kept = [[t.data_ptr() for t in stepped[i]] for i in self._order]
        if any(address % ALIGNED for row in kept for address in row):
            raise ValueError(f"stepped: expected tensors at multiples of {ALIGNED} bytes")
        self._stepped = list(stepped)
        self._copied = any(s.param is not s.master for s in stepped)
        self._table = Table([stepped[i].param.numel() for i in self._order], device)
        self._kept = torch.tensor([[row[c] for row in kept] for c in (1, 2, 3, 0)], dtype=torch.int64).to(device)
        self._steps = steps
        self._places = torch.tensor(self._order).to(device)
        self._decays = torch.tensor([decays[i] for i in self._order], dtype=torch.float64).to(device)
        self._parts = [parts[i] for i in self._order]
        self._last: tuple[list[int], Tensor] | None = None

    def squares(self, gradients: Sequence[Tensor | None], count: int) -> Tensor:
        """`[count]` float32: the sum of squares by part. `gradients`: one of each parameter that has one, all
        bfloat16 or all float32."""
        from abyssal.kernels import adamw as kernels

        addresses, narrow, _alive = self._addresses(gradients)
        sums = kernels.squares(self._table, addresses, narrow)
        sizes = [sum(b for b, p in zip(self._table.blocks, self._parts) if p == part) for part in range(count)]
        return torch.stack([piece.sum() for piece in sums.split(sizes)])

    def step(
        self, gradients: Sequence[Tensor | None], lr: float, betas: tuple[float, float], eps: float, scale: Tensor,
        stopped: Tensor,
    ) -> None:  # fmt: skip
        """One step, the gradients divided by `scale`, a float32 scalar; where `stopped`, another, is not 0, none.
        `gradients` as in `squares`."""
        from abyssal.kernels import adamw as kernels

        addresses, narrow, _alive = self._addresses(gradients)
        on = 1 - stopped
        if any(g is None for g in gradients):
            on = on * sent(torch.tensor([g is not None for g in gradients], dtype=torch.float32), on.device)
        self._steps += on
        taken = self._steps[self._places].double()
        corrections = [-torch.expm1(taken * math.log(b)) if b > 0 else torch.ones_like(taken) for b in betas]
        numbers = torch.stack((lr / corrections[0], corrections[1].rsqrt(), lr * self._decays)).float()
        kernels.step(self._table, addresses, narrow, self._kept, numbers, scale, stopped, betas, eps, self._copied)
        # Autograd counts writes, to refuse a backward pass through what was overwritten. It cannot see a kernel's.
        torch.autograd.graph.increment_version([t for stepped in self._stepped for t in stepped])

    def _addresses(self, gradients: Sequence[Tensor | None]) -> tuple[Tensor, bool, list[Tensor | None]]:
        """Where the gradients lie, in the table's order; whether they are bfloat16; and what must live until they are
        read: on one stream, until the launch."""
        given = [gradients[i] for i in self._order]
        dtypes = {g.dtype for g in given if g is not None}
        if len(dtypes) > 1 or not dtypes <= {torch.bfloat16, torch.float32}:
            raise ValueError(f"gradients: expected all bfloat16 or all float32, got {sorted(map(str, dtypes))}")
        fit = [
            g if g is None or (g.is_contiguous() and not g.data_ptr() % ALIGNED) else g.clone(
                memory_format=torch.contiguous_format
            )
            for g in given
        ]  # fmt: skip
        found = [0 if g is None else g.data_ptr() for g in fit]
        if self._last is None or self._last[0] != found:  # mostly they lie where they lay a step before
            self._last = found, sent(torch.tensor(found, dtype=torch.int64), self._steps.device)
        return self._last[1], dtypes == {torch.bfloat16}, fit


def widen(total: Tensor, part: Tensor, add: bool, path: str | None = None) -> None:
    """total ← part, or total + part where `add`. Of one shape; `total` float32 or wider.

    Paths: "reference"; "triton" (float32 totals of narrower parts on a GPU, contiguous, at the speed of memory: torch's
    own sum of two dtypes is slower). None chooses.
    """
    if path is None:
        fast = total.dtype == torch.float32 and total.is_contiguous() and part.is_contiguous()
        path = "triton" if fast and type(part) is Tensor and capability(part)[0] > 0 else "reference"
    if path == "triton":
        from abyssal.kernels import adamw as kernels

        kernels.widen(total, part, add)
    elif path == "reference":
        total.add_(part) if add else total.copy_(part)
    else:
        raise ValueError(f"path: expected 'reference' or 'triton', got {path!r}")
