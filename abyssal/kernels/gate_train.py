"""The gate in training: `kernels.gate`'s logits and choice forward, and the gradients of weights and scores.

Backward, a kernel turns the gradients of the weights and of the scores into those of the logits, and two products make
x's and the weight's of them. With bf16 the products are of bf16: a logit's gradient is cut into two halves of it, 16
bits of mantissa in all, which lie side by side as if they were 2 E experts. x is not held in float32.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import linear

from abyssal.kernels.gate import choose, logits

TOKENS = 32  # a program
FEW_TOKENS = 64  # beyond it logits in float32 are a library's product


@triton.jit
def _logit_gradients(
    d_weights, d_scores, indices, scores, out, T, scaling,
    E: tl.constexpr, EP: tl.constexpr, K: tl.constexpr, SIGMOID: tl.constexpr, NORM: tl.constexpr,
    WEIGHTS: tl.constexpr, SCORES: tl.constexpr, HALVES: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """out `[T, E]`: the logits' gradients; or `[T, 2 E]`, bf16 halves of them."""
    t = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    e = tl.arange(0, EP)
    there = t < T
    mask = there[:, None] & (e < E)[None, :]
    score = tl.load(scores + t[:, None] * E + e[None, :], mask=mask, other=0.0)
    grad = tl.zeros([TOKENS, EP], tl.float32)
    if SCORES:
        grad += tl.load(d_scores + t[:, None] * E + e[None, :], mask=mask, other=0.0)
    if WEIGHTS:
        # A weight is scaling · s_k / Σ s, or scaling · s_k.
        total = tl.zeros([TOKENS], tl.float32)
        inner = tl.zeros([TOKENS], tl.float32)
        for k in tl.static_range(K):
            own = tl.load(indices + t * K + k, mask=there, other=-1)[:, None] == e[None, :]
            d = tl.load(d_weights + t * K + k, mask=there, other=0.0) * scaling
            if NORM:
                s = tl.sum(tl.where(own, score, 0.0), 1)
                total += s
                inner += d * s
            else:
                grad += tl.where(own, d[:, None], 0.0)
        if NORM:
            total = total + 1e-20
            for k in tl.static_range(K):
                own = tl.load(indices + t * K + k, mask=there, other=-1)[:, None] == e[None, :]
                d = tl.load(d_weights + t * K + k, mask=there, other=0.0) * scaling
                grad += tl.where(own, ((d - inner / total) / total)[:, None], 0.0)
    if SIGMOID:
        grad = grad * score * (1 - score)
    else:
        grad = score * (grad - tl.sum(grad * score, 1)[:, None])
    if HALVES:
        high = grad.to(tl.bfloat16)
        low = (grad - high.to(tl.float32)).to(tl.bfloat16)
        tl.store(out + t[:, None] * (2 * E) + e[None, :], high, mask=mask)
        tl.store(out + t[:, None] * (2 * E) + E + e[None, :], low, mask=mask)
    else:
        tl.store(out + t[:, None] * E + e[None, :], grad, mask=mask)


def pieces_of_logits(x: Tensor, weight: Tensor) -> Tensor:
    """`[P, T, E]` float32, whose sum over P is the logits: by our kernel for bf16 and for few tokens."""
    bf16 = x.dtype == weight.dtype == torch.bfloat16
    ours = x.shape[0] > 0 and (bf16 or x.shape[0] <= FEW_TOKENS)
    return logits(x.contiguous(), weight) if ours else linear(x.float(), weight.float())[None]


@torch.library.custom_op("abyssal::gate", mutates_args=())
def gate(
    x: Tensor, weight: Tensor, bias: Tensor | None, scoring: str, n_group: int, topk_group: int, top_k: int,
    norm_topk_prob: bool, scaling: float, group_worth: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As the operation, for `x [T, D]`, `weight [E, D]` of at most 32 bits, differentiable in both."""
    rest = (scoring, n_group, topk_group, top_k, norm_topk_prob, scaling, group_worth)
    tokens = max(1, 256 // triton.next_power_of_2(weight.shape[0]))  # a warp is kept busy by 256 scores
    return choose(pieces_of_logits(x, weight), bias, *rest, tokens=tokens)


@gate.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, scoring: str, n_group: int, topk_group: int, top_k: int,
    norm_topk_prob: bool, scaling: float, group_worth: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    weights, scores = (x.new_empty(x.shape[0], n, dtype=torch.float32) for n in (top_k, weight.shape[0]))
    return weights, x.new_empty(x.shape[0], top_k, dtype=torch.int64), scores


@torch.library.custom_op("abyssal::gate_backward", mutates_args=())
def _backward(
    d_weights: Tensor | None, d_scores: Tensor | None, x: Tensor, weight: Tensor, indices: Tensor, scores: Tensor,
    scoring: str, norm_topk_prob: bool, scaling: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    (T, E), K = scores.shape, indices.shape[1]
    if not T:
        return torch.zeros_like(x), torch.zeros_like(weight)
    halves = x.dtype == weight.dtype == torch.bfloat16
    out = x.new_empty(T, 2 * E) if halves else torch.empty_like(scores)
    d_weights, d_scores = (None if d is None else d.contiguous() for d in (d_weights, d_scores))
    _logit_gradients[(triton.cdiv(T, TOKENS),)](
        scores if d_weights is None else d_weights, scores if d_scores is None else d_scores, indices, scores, out,
        T, scaling, E, triton.next_power_of_2(E), K, scoring == "sigmoid", norm_topk_prob, d_weights is not None,
        d_scores is not None, halves, TOKENS, num_warps=4,
    )  # fmt: skip
    if not halves:
        return (out @ weight.float()).to(x.dtype), (out.T @ x.float()).to(weight.dtype)
    wide = torch.mm(out.T, x, out_dtype=torch.float32) if x.is_cuda else out.T.float() @ x.float()
    return out @ torch.cat((weight, weight)), (wide[:E] + wide[E:]).to(weight.dtype)


@_backward.register_fake
def _(
    d_weights: Tensor | None, d_scores: Tensor | None, x: Tensor, weight: Tensor, indices: Tensor, scores: Tensor,
    scoring: str, norm_topk_prob: bool, scaling: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, scoring, _, _, _, norm_topk_prob, scaling, _ = inputs
    _, indices, scores = output
    ctx.save_for_backward(x, weight, indices, scores)
    ctx.rest = (scoring, norm_topk_prob, scaling)
    ctx.mark_non_differentiable(indices)
    ctx.set_materialize_grads(False)


def _gradients(
    ctx: Any, d_weights: Tensor | None, _: Tensor | None, d_scores: Tensor | None
) -> tuple[Tensor | None, ...]:
    dx, dw = None, None
    if d_weights is not None or d_scores is not None:
        dx, dw = _backward(d_weights, d_scores, *ctx.saved_tensors, *ctx.rest)
    return dx, dw, *[None] * 8


gate.register_autograd(_gradients, setup_context=_keep)
