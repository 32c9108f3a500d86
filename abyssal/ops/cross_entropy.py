"""The output head and its cross-entropy, without ever holding the logits of all tokens."""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from abyssal.ops.device import capability

CHUNK_LOGITS = 1 << 24  # logits held at once on a CPU
CHUNK_TOKENS = 4096  # tokens whose logits are held at once on a GPU, and more where the head is wide or short
HELD_LOGITS = 1 << 29  # logits held at once on a GPU, a GiB in bf16, where that is more tokens than CHUNK_TOKENS


def linear_cross_entropy(
    hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor, path: str | None = None
) -> Tensor:
    """Σ_t weights[t] · −log softmax(head · hidden_t)[targets[t]], a scalar, float32 or wider.

    `hidden [T, D]`, `head [vocab, D]`, `targets [T]` int64 (any valid id where the weight is 0), `weights [T]`
    float. Divide by Σ weights for the mean over positions that have a target.

    Paths: "reference" (all logits at once), "chunked" (logits and their gradient a chunk of tokens at a time), "fused"
    (larger chunks of bf16, fp16 or float32 on a GPU, a kernel that turns logits into their gradient where they lie).
    None chooses. Raises ValueError for another name.
    """
    if path is None:
        kernels = capability(hidden)[0] > 0 and hidden.dtype == head.dtype != torch.float64
        path = "fused" if kernels else "chunked"
    if path == "reference":
        wide = torch.promote_types(hidden.dtype, torch.float32)
        logits = torch.nn.functional.linear(hidden, head).to(wide)
        loss = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        return (loss * weights.to(wide)).sum()
    if path == "fused":
        return _Fused.apply(hidden, head, targets, weights)
    if path == "chunked":
        return _Chunked.apply(hidden, head, targets, weights)
    raise ValueError(f"path: expected 'reference', 'chunked' or 'fused', got {path!r}")


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


def _chunk_tokens(tokens: int, width: int, vocab: int) -> int:
    """Even chunks. Several need a float32 sum of the head's gradient, twice the bytes of a head in bf16, which each
    reads and writes: as many logits again, 2 · width tokens' worth, are no more memory than that and make the products
    larger. With a small vocabulary it is few bytes to hold more."""
    most = max(CHUNK_TOKENS, 2 * width, HELD_LOGITS // vocab)
    chunks = -(-tokens // most)
    return min(-(-tokens // (chunks * 128)) * 128, tokens)


class _Fused(torch.autograd.Function):
    """As `_Chunked`; nothing of the logits' size is written but the logits, and they become their own gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        from abyssal.kernels.cross_entropy import logits_buffer, loss_and_gradient

        tokens = hidden.shape[0]
        for_hidden, for_head = ctx.needs_input_grad[:2]
        d_hidden = torch.empty_like(hidden) if for_hidden else None
        d_head = None
        losses = torch.empty(tokens, dtype=torch.float32, device=hidden.device)
        weights, targets = weights.contiguous(), targets.contiguous()
        step = _chunk_tokens(tokens, hidden.shape[1], head.shape[0]) if tokens else 1
        buffer = logits_buffer(step, head)
        for start in range(0, tokens, step):
            part = slice(start, start + step)
            x = hidden[part]
            logits = torch.mm(x, head.T, out=buffer[: x.shape[0]])
            loss_and_gradient(logits, targets[part], weights[part], losses[part], for_hidden or for_head)
            if d_hidden is not None:
                torch.mm(logits, head, out=d_hidden[part])
            if for_head:
                d_head = _add_product(d_head, logits.T, x, several=step < tokens)
            del logits  # a view of the buffer, which makes room for what follows
        del buffer
        if for_head and d_head is None:
            d_head = torch.zeros_like(head)
        ctx.save_for_backward(d_hidden, d_head)
        ctx.dtype = head.dtype
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        """Scaled and rounded in one pass: a sum in float32 is not rounded before."""
        scaled = (None if d is None else _scaled(d, d_loss, ctx.dtype) for d in ctx.saved_tensors)
        return *scaled, None, None


def _scaled(d: Tensor, by: Tensor, dtype: torch.dtype) -> Tensor:
    """A matrix by a scalar, which as a matrix of one makes the product wide, and is not rounded itself."""
    return torch.mul(d, by[None, None], out=torch.empty(d.shape, dtype=dtype, device=d.device))


def _add_product(total: Tensor | None, a: Tensor, b: Tensor, several: bool) -> Tensor:
    """total + a b. Of several products the sum is float32, added to by the products themselves."""
    if not several or a.dtype == torch.float32:
        return torch.mm(a, b) if total is None else total.addmm_(a, b)
    if total is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    if isinstance(total, FakeTensor):  # whose addition to a wider matrix torch 2.11 has wrong
        return total.add_(torch.mm(a, b, out_dtype=torch.float32))
    return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
