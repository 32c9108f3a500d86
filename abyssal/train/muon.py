"""Muon for stacks of matrices, such as the experts' `[E, F, D]` (Jordan et al. 2024; Liu et al. 2025).

`torch.optim.Muon` takes matrices alone. This is its arithmetic, one matrix of the stack at a time in meaning and
all of them at once in execution.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.775, 2.0315)
ITERATIONS = 5
EPS = 1e-7


def orthogonalize(stack: Tensor) -> Tensor:
    """`[E, M, N]` -> `[E, M, N]` bfloat16: each matrix's nearest semi-orthogonal one, approximately (U Vᵀ of its
    singular value decomposition, with singular values of 0.5 to 1.5), by five Newton-Schulz iterations."""
    a, b, c = COEFFICIENTS
    tall = stack.shape[-2] > stack.shape[-1]
    x = stack.bfloat16()
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=EPS)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class StackedMuon(torch.optim.Optimizer):
    """`torch.optim.Muon` with Nesterov's momentum and `adjust_lr_fn="match_rms_adamw"`, for `[E, M, N]` parameters.

    Raises ValueError for a parameter of another rank.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim != 3:
                    raise ValueError(f"expected stacks of matrices [E, M, N], got a parameter {list(p.shape)}")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update from the gradients that are there."""
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                buffer = state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
                update = orthogonalize(p.grad.lerp(buffer, momentum))
                p.mul_(1 - lr * group["weight_decay"])
                p.add_(update, alpha=-lr * 0.2 * math.sqrt(max(p.shape[1:])))
