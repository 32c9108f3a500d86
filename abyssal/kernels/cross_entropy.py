"""Logits into losses and the logits' gradient, in place: one program a row, no float32 copy of the row anywhere.

The first pass keeps, for each lane of eight logits, the largest so far and the sum of exponentials below it, so that
the row is met once and no lane waits for another until the end. The second pass goes backwards, to find in the L2 cache
what the first one read last, and writes softmax minus one-hot over it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _loss_and_gradient(logits, targets, weights, losses, stride, vocab, GRADIENT: tl.constexpr, LANES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(weights + row).to(tl.float32)
    target = tl.load(targets + row)
    logits += row * stride
    lanes = tl.arange(0, LANES)[:, None] * 8 + tl.arange(0, 8)[None, :]

    # Not -inf at first: two of them differ by NaN.
    peak, total = tl.full([LANES], -1e30, tl.float32), tl.zeros([LANES], tl.float32)
    for start in range(0, vocab, LANES * 8):
        at = start + lanes
        x = tl.load(logits + at, mask=at < vocab, other=float("-inf"), eviction_policy="evict_last")
        x = x.to(tl.float32) * LOG2E
        higher = tl.maximum(peak, tl.max(x, 1))
        total = total * tl.exp2(peak - higher) + tl.sum(tl.exp2(x - higher[:, None]), 1)
        peak = higher
    top = tl.max(peak, 0)
    log_sum = top + tl.log2(tl.sum(total * tl.exp2(peak - top), 0))  # in powers of 2
    picked = tl.load(logits + target).to(tl.float32)
    # A position without a target costs exactly 0, whatever its logits are.
    tl.store(losses + row, tl.where(weight == 0, 0.0, (log_sum / LOG2E - picked) * weight))

    if GRADIENT:
        tl.debug_barrier()  # the target's logit is read by every warp before one of them overwrites it
        steps = tl.cdiv(vocab, LANES * 8)
        for step in range(steps):
            at = (steps - 1 - step) * (LANES * 8) + lanes
            x = tl.load(logits + at, mask=at < vocab, other=float("-inf"), eviction_policy="evict_first")
            share = tl.exp2(x.to(tl.float32) * LOG2E - log_sum) - tl.where(at == target, 1.0, 0.0)
            share = tl.where(weight == 0, 0.0, share * weight)
            tl.store(logits + at, share.to(logits.dtype.element_ty), mask=at < vocab)


@torch.library.custom_op("abyssal::loss_and_gradient", mutates_args=("logits", "losses"))
def loss_and_gradient(logits: Tensor, targets: Tensor, weights: Tensor, losses: Tensor, gradient: bool) -> None:
    """`losses[t] = -weights[t] · log softmax(logits[t])[targets[t]]`; with `gradient`, `logits` becomes its gradient.

    `logits [T, vocab]` bf16, fp16 or float32, rows contiguous; `targets [T]` int64; `weights [T]` float; `losses [T]`
    float32, written.
    """
    tokens, vocab = logits.shape
    if not tokens:
        return
    lanes = min(2048, triton.next_power_of_2(triton.cdiv(vocab, 8)))
    _loss_and_gradient[(tokens,)](
        logits, targets, weights, losses, logits.stride(0), vocab,
        GRADIENT=gradient, LANES=lanes, num_warps=16 if lanes >= 1024 else 4,
    )  # fmt: skip


@loss_and_gradient.register_fake
def _(logits: Tensor, targets: Tensor, weights: Tensor, losses: Tensor, gradient: bool) -> None:
    return None


def logits_buffer(tokens: int, head: Tensor) -> Tensor:
    """`[tokens, vocab]`, uninitialised, its rows 16 bytes aligned whatever the vocabulary, as wide loads need."""
    vocab = head.shape[0]
    return torch.empty(tokens, -(-vocab // 8) * 8, dtype=head.dtype, device=head.device)[:, :vocab]
