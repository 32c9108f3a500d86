"""A decoding step's bookkeeping (`ops/step.py`), a program a sequence, or a few tokens' experts (Triton)."""

import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 1024  # of a block table at a time


@triton.jit(do_not_specialize=["P", "last_stride"])
def _step_rows(
    order, known, last, tables, own, tokens, positions, slots, lens, table, P, last_stride,
    W: tl.constexpr, WP: tl.constexpr, PAGE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(0).to(tl.int64)
    slot = tl.load(order + s)
    n = tl.load(known + slot)
    i = tl.arange(0, WP)
    place = tl.maximum(n - 1, 0) + i
    page = tl.load(tables + slot * P + place // PAGE, mask=i < W, other=0).to(tl.int64)
    tl.store(positions + s * W + i, place, mask=i < W)
    tl.store(slots + s * W + i, page * PAGE + place % PAGE, mask=i < W)
    tl.store(tokens + s * W + i, tl.load(last + slot * last_stride + i, mask=i < W, other=0), mask=i < W)
    tl.store(own + s, n)
    tl.store(lens + s, (tl.maximum(n - 1, 0) + W).to(tl.int32))
    column = tl.arange(0, COLUMNS)
    for first in range(0, P, COLUMNS):
        inside = first + column < P
        row = tl.load(tables + slot * P + first + column, mask=inside, other=0)
        tl.store(table + s * P + first + column, row, mask=inside)


@triton.jit(do_not_specialize=["P"])
def _place_rows(
    table, start, positions, slots, lens, P, W: tl.constexpr, WP: tl.constexpr, PAGE: tl.constexpr
):  # fmt: skip
    s = tl.program_id(0).to(tl.int64)
    first = tl.maximum(tl.load(start + s), 0)
    i = tl.arange(0, WP)
    place = first + i
    page = tl.load(table + s * P + place // PAGE, mask=i < W, other=0).to(tl.int64)
    tl.store(positions + s * W + i, place, mask=i < W)
    tl.store(slots + s * W + i, page * PAGE + place % PAGE, mask=i < W)
    tl.store(lens + s, (first + W).to(tl.int32))


@triton.jit(do_not_specialize=["stride"])
def _follow(drafts, stride, accepted, token, out, W: tl.constexpr, N: tl.constexpr, NP: tl.constexpr):
    s = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, NP)
    draft = tl.load(drafts + s * stride + i, mask=i < W - 1, other=0)
    took = tl.maximum(tl.load(token + s), 0)
    tl.store(out + s * N + i, tl.where(i < tl.load(accepted + s), draft, took), mask=i < N)


@triton.jit(do_not_specialize=["idle", "stride", "following_stride", "last_stride"])
def _finish(
    order, idle, known, last, accepted, token, drafts, stride, following, following_stride, told, last_stride,
    W: tl.constexpr, K: tl.constexpr, L: tl.constexpr, NP: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(0).to(tl.int64)
    slot = tl.load(order + s)
    a = tl.load(accepted + s)
    if slot != idle:
        tl.store(known + slot, tl.load(known + slot) + a + 1)
    i = tl.arange(0, NP)
    N: tl.constexpr = 1 + W + K
    new = tl.load(following + s * following_stride + a + tl.where(i <= K, i, 0), mask=i < L, other=0)
    tl.store(last + slot * last_stride + i, new, mask=i < L)
    tl.store(told + s * N, a)
    tl.store(told + s * N + 1, tl.load(token + s))
    tl.store(told + s * N + 2 + i, tl.load(drafts + s * stride + i, mask=i < W - 1, other=0), mask=i < W - 1)
    tl.store(told + s * N + W + i, new, mask=(i >= 1) & (i <= K))


@triton.jit(do_not_specialize=["T", "layers", "width", "idle"])
def _count(
    load, slots, picks, accepted, T, layers, width, idle, E, K: tl.constexpr, KP: tl.constexpr, LP: tl.constexpr,
    SOME: tl.constexpr,
):  # fmt: skip
    """One token, every layer."""
    t = tl.program_id(0).to(tl.int64)
    s = t // width
    slot = tl.load(slots + s)
    live = True
    if SOME:
        live = (t % width <= tl.load(accepted + s)) & (slot != idle)
    if live:
        l, k = tl.arange(0, LP)[:, None], tl.arange(0, KP)[None, :]
        real = (l < layers) & (k < K)
        expert = tl.load(picks + (l * T + t) * K + k, mask=real, other=0)
        tl.atomic_add(load + (slot * layers + l) * E + expert, 1, mask=real, sem="relaxed")


def step_rows(
    order: Tensor, known: Tensor, last: Tensor, tables: Tensor, width: int, page_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As the operation."""
    S, P = order.shape[0], tables.shape[1]
    own = order.new_empty(S)
    tokens, positions, slots = (order.new_empty(S, width) for _ in range(3))
    lens, table = tables.new_empty(S), tables.new_empty(S, P)
    _step_rows[(S,)](
        order, known, last, tables, own, tokens, positions, slots, lens, table, P, last.stride(0),
        W=width, WP=triton.next_power_of_2(width), PAGE=page_size, COLUMNS=COLUMNS, num_warps=4,
    )  # fmt: skip
    return own, tokens, positions, slots, lens, table


def place_rows(table: Tensor, start: Tensor, width: int, page_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """As the operation."""
    S, P = table.shape
    positions, slots = (start.new_empty(S, width) for _ in range(2))
    lens = table.new_empty(S)
    _place_rows[(S,)](
        table, start, positions, slots, lens, P, W=width, WP=triton.next_power_of_2(width), PAGE=page_size, num_warps=1
    )
    return positions, slots, lens


def follow(drafts: Tensor, accepted: Tensor, token: Tensor, further: int) -> Tensor:
    """As the operation."""
    S, W = drafts.shape[0], drafts.shape[1] + 1
    out = token.new_empty(S, W + further)
    _follow[(S,)](
        drafts, drafts.stride(0), accepted, token, out, W=W, N=W + further, NP=triton.next_power_of_2(W + further),
        num_warps=1,
    )  # fmt: skip
    return out


def finish(
    order: Tensor, idle: int, known: Tensor, last: Tensor, accepted: Tensor, token: Tensor, drafts: Tensor,
    following: Tensor, further: int,
) -> Tensor:  # fmt: skip
    """As the operation."""
    S, W, L = order.shape[0], drafts.shape[1] + 1, last.shape[1]
    told = order.new_empty(S, 1 + W + further)
    _finish[(S,)](
        order, idle, known, last, accepted, token, drafts, drafts.stride(0), following, following.stride(0), told,
        last.stride(0), W=W, K=further, L=L, NP=triton.next_power_of_2(max(W, L, 1 + further)), num_warps=1,
    )  # fmt: skip
    return told


def count_experts(load: Tensor, slots: Tensor, picks: Tensor, accepted: Tensor | None) -> None:
    """As the operation."""
    layers, T, K = picks.shape
    _count[(T,)](
        load, slots, picks, slots if accepted is None else accepted, T, layers, T // slots.shape[0], load.shape[0] - 1,
        load.shape[2], K=K, KP=triton.next_power_of_2(K), LP=triton.next_power_of_2(layers), SOME=accepted is not None,
        num_warps=4,
    )  # fmt: skip
