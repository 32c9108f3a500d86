"""The output head and its cross-entropy, without ever holding the logits of all tokens."""

from typing import Any

import torch
from torch import Tensor

CHUNK_LOGITS = 1 << 24  # logits held at once


def linear_cross_entropy(
    hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor, path: str | None = None
) -> Tensor:
    """Σ_t weights[t] · −log softmax(head · hidden_t)[targets[t]], a scalar, float32 or wider.

    `hidden [T, D]`, `head [vocab, D]`, `targets [T]` int64 (any valid id where the weight is 0), `weights [T]`
    float. Divide by Σ weights for the mean over positions that have a target.

    Paths: "reference" (all logits at once), "chunked" (logits and their gradient a chunk of tokens at a time).
    """
    if path == "reference":
        wide = torch.promote_types(hidden.dtype, torch.float32)
        logits = torch.nn.functional.linear(hidden, head).to(wide)
        loss = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        return (loss * weights.to(wide)).sum()
    return _Chunked.apply(hidden, head, targets, weights)


class _Chunked(torch.autograd.Function):
    """The gradient is made in the forward pass, while the chunk's logits are there, and scaled in the backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        with_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        d_hidden = torch.empty_like(hidden) if with_grad else None
        d_head = torch.zeros(head.shape, dtype=wide, device=head.device) if with_grad else None
        total = torch.zeros((), dtype=wide, device=hidden.device)
        step = max(CHUNK_LOGITS // head.shape[0], 1)
        for start in range(0, hidden.shape[0], step):
            part = slice(start, start + step)
            x, weight = hidden[part], weights[part].to(wide)[:, None]
            log_probs = (x @ head.T).to(wide).log_softmax(-1)
            target = targets[part, None]
            total -= (log_probs.gather(1, target) * weight).sum()
            if d_hidden is not None and d_head is not None:
                d_logits = log_probs.exp_()
                d_logits.scatter_add_(1, target, torch.full_like(weight, -1.0))
                narrow = d_logits.mul_(weight).to(x.dtype)
                torch.mm(narrow, head, out=d_hidden[part])
                if d_head.dtype == x.dtype:
                    d_head.addmm_(narrow.T, x)
                else:
                    d_head += narrow.T @ x
        if d_hidden is not None and d_head is not None:
            ctx.save_for_backward(d_hidden, d_head.to(head.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_head = ctx.saved_tensors
        return d_hidden * d_loss.to(d_hidden.dtype), d_head * d_loss.to(d_head.dtype), None, None
