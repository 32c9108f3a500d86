"""The algebra of latent attention at work: the same result by different orders of multiplication, each timed.

DeepSeek-V2, sections 2.1.2 and 2.1.3, appendix C. Shapes are one layer's of DeepSeek-V3, with fewer heads.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from abyssal.ops.attention import causal
from abyssal.study.attention_clock import Time, times, work

EQUAL = 1e-12  # what float64 may leave between two orders, of the largest number


@dataclass(frozen=True)
class Shape:
    """H heads of N + R and V, a latent of C, a query's of Q."""

    heads: int
    nope: int = 128
    rope: int = 64
    value: int = 128
    latent: int = 512
    query: int = 1536


class Tensors(NamedTuple):
    """Of one layer. `compressed` and `q_rope` are T tokens', the last of the L whose rows are cached."""

    compressed: Tensor  # [T, Q]
    q_nope: Tensor  # [T, H, N]
    q_rope: Tensor  # [T, H, R]
    rows: Tensor  # [L, C + R]
    w_uq: Tensor  # [H, N, Q]
    w_uk: Tensor  # [H, N, C]
    w_uv: Tensor  # [H, V, C]
    w_quk: Tensor  # [H, C, Q]: the first two multiplied out, laid out as one matrix
    k_nope: Tensor  # [L, H, N]

    @property
    def latent(self) -> Tensor:
        return self.rows[:, : self.w_uk.shape[-1]]

    @property
    def k_rope(self) -> Tensor:
        return self.rows[:, self.w_uk.shape[-1] :]


class Way(NamedTuple):
    """One order of multiplication for one task."""

    task: str
    name: str
    flops: int
    weights: int  # bytes of the matrices that it reads, float32
    made: int  # bytes of what it makes on the way, its result included, float32
    time: Time
    apart_64: float  # from the task's first way: the largest difference, of the largest number
    apart_32: float


def draw(shape: Shape, tokens: int, context: int, seed: int) -> Tensors:
    """Random, float64, about as large as a trained layer's."""
    H, N, R, V, C, Q = shape.heads, shape.nope, shape.rope, shape.value, shape.latent, shape.query
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.float64) * scale

    compressed, rows = normal(tokens, Q), normal(context, C + R)
    w_uq, w_uk, w_uv = normal(H, N, Q, scale=Q**-0.5), normal(H, N, C, scale=C**-0.5), normal(H, V, C, scale=C**-0.5)
    q_nope = torch.einsum("tq,hnq->thn", compressed, w_uq)
    w_quk = torch.einsum("hnq,hnc->hcq", w_uq, w_uk).contiguous()
    k_nope = torch.einsum("lc,hnc->lhn", rows[:, :C], w_uk)
    return Tensors(compressed, q_nope, normal(tokens, H, R), rows, w_uq, w_uk, w_uv, w_quk, k_nope)


# ---- attention ----------------------------------------------------------------------------------------------------


def expanded(t: Tensors) -> Tensor:
    """[T, H, V]: keys and values of every head are made of the latents (equations 2, 4, 5, 10)."""
    k_nope = torch.einsum("lc,hnc->lhn", t.latent, t.w_uk)
    v = torch.einsum("lc,hvc->lhv", t.latent, t.w_uv)
    probs = softmax(torch.einsum("thn,lhn->htl", t.q_nope, k_nope), t)
    return torch.einsum("htl,lhv->thv", probs, v)


def absorbed(t: Tensors) -> Tensor:
    """[T, H, V]: W_UK multiplied into the query, W_UV into the result; the rows are read as they lie."""
    q_latent = torch.einsum("thn,hnc->thc", t.q_nope, t.w_uk)
    probs = softmax(torch.einsum("thc,lc->htl", q_latent, t.latent), t)
    return torch.einsum("thc,hvc->thv", torch.einsum("htl,lc->thc", probs, t.latent), t.w_uv)


def softmax(scores: Tensor, t: Tensors) -> Tensor:
    """[H, T, L]: of the scores and the rotary ones, causal."""
    scores = scores + torch.einsum("thr,lr->htl", t.q_rope, t.k_rope)
    scale = (t.q_nope.shape[-1] + t.q_rope.shape[-1]) ** -0.5
    T, L = scores.shape[1:]
    hidden = ~causal(T, L, scores.device)
    return (scores * scale).masked_fill(hidden, float("-inf")).softmax(-1)


# ---- scores -------------------------------------------------------------------------------------------------------


def summed(t: Tensors) -> Tensor:
    """[H, T, L]: q_nope·k_nope + q_rope·k_rope, the rotary key one for all heads."""
    return torch.einsum("thn,lhn->htl", t.q_nope, t.k_nope) + torch.einsum("thr,lr->htl", t.q_rope, t.k_rope)


def concatenated(t: Tensors) -> Tensor:
    """[H, T, L]: [q_nope; q_rope]·[k_nope; k_rope], the rotary key copied to each head (equations 8 and 9)."""
    k_rope = t.k_rope[:, None].expand(-1, t.k_nope.shape[1], -1)
    q, k = torch.cat((t.q_nope, t.q_rope), -1), torch.cat((t.k_nope, k_rope), -1)
    return torch.einsum("thd,lhd->htl", q, k)


# ---- the query in the latent space --------------------------------------------------------------------------------


def two_factors(t: Tensors) -> Tensor:
    """[T, H, C]: (c_q W_UQ) W_UK."""
    return torch.einsum("thn,hnc->thc", torch.einsum("tq,hnq->thn", t.compressed, t.w_uq), t.w_uk)


def multiplied(t: Tensors) -> Tensor:
    """[T, H, C]: c_q (W_UQ W_UK), the product made beforehand."""
    return torch.einsum("tq,hcq->thc", t.compressed, t.w_quk)


Function = Callable[[Tensors], Tensor]
# A task: its name, whether it is of one token (else of a prompt), and its ways with the matrices that they read.
TASKS: tuple[tuple[str, bool, tuple[tuple[str, Function, tuple[str, ...]], ...]], ...] = (
    ("attend: a token", True,
     (("absorbed", absorbed, ("w_uk", "w_uv")), ("expanded", expanded, ("w_uk", "w_uv")))),
    ("attend: a prompt", False,
     (("absorbed", absorbed, ("w_uk", "w_uv")), ("expanded", expanded, ("w_uk", "w_uv")))),
    ("scores: a token", True, (("sum", summed, ()), ("concatenation", concatenated, ()))),
    ("query: a token", True,
     (("two factors", two_factors, ("w_uq", "w_uk")), ("W_UQ·W_UK", multiplied, ("w_quk",)))),
    ("query: a prompt", False,
     (("two factors", two_factors, ("w_uq", "w_uk")), ("W_UQ·W_UK", multiplied, ("w_quk",)))),
)  # fmt: skip


@torch.inference_mode()
def algebra(shape: Shape, context: int, prompt: int, rounds: int, seed: int) -> list[Way]:
    """Every way of every task: a token at `context`, and a `prompt` of tokens without anything before it."""
    exact = {True: draw(shape, 1, context, seed), False: draw(shape, prompt, prompt, seed)}
    single = {one: Tensors(*(x.float() for x in t)) for one, t in exact.items()}
    made = []
    for task, one, ways in TASKS:
        double, narrow = exact[one], single[one]
        first_64, first_32 = ways[0][1](double), ways[0][1](narrow)
        clocks = times([partial(function, narrow) for _, function, _ in ways], rounds)
        for (name, function, weights), clock in zip(ways, clocks):
            done = work(partial(function, narrow))
            size = sum(getattr(narrow, matrix).nbytes for matrix in weights)
            apart = apart_of(function(double), first_64), apart_of(function(narrow), first_32)
            made.append(Way(task, name, done.flops, size, done.made, clock, *apart))
    return made


def apart_of(found: Tensor, expected: Tensor) -> float:
    """The largest difference, of the largest number that was expected."""
    return float((found - expected).abs().max() / expected.abs().max())
