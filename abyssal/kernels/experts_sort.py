"""Brings the (token, choice) pairs into the order of their experts, on the device: a counting sort in three kernels.

Each program counts its chunk's choices by expert; one program turns the counts into every chunk's first places, each
expert's first row and the list of row tiles; then each program puts its chunk in place. Stable and deterministic.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 1024  # choices of a program
TILE = 128  # rows of a tile


class Order(NamedTuple):
    """N rows in the order of their experts, at least as many as there are choices. Everything but `weight` is int32."""

    token: Tensor  # [N] the row's token
    weight: Tensor  # [N] float32, the row's weight
    place: Tensor  # [T·K] the row of choice t * K + k, -1 where that is none
    starts: Tensor  # [E + 1] each expert's first row; the number of choices at the end
    table: Tensor  # [1 + ⌈N / 128⌉ + E, 4] first the number of row tiles, then each tile's expert, first row and end


@triton.jit
def _expert(indices, at, N, E):
    """The choices' experts; -1 past the last choice, and where an index is no expert's."""
    expert = tl.load(indices + at, mask=at < N, other=-1)
    return tl.where((expert >= 0) & (expert < E), expert, -1).to(tl.int32)


@triton.jit
def _count(indices, counts, N, E, EP: tl.constexpr, PART: tl.constexpr, CHUNK: tl.constexpr):
    experts = tl.arange(0, EP)
    total = tl.zeros([EP], tl.int32)
    for i in range(0, CHUNK, PART):
        at = tl.program_id(0) * CHUNK + i + tl.arange(0, PART)
        expert = _expert(indices, at, N, E)
        total += tl.sum((expert[:, None] == experts[None, :]).to(tl.int32), 0)
    tl.store(counts + tl.program_id(0) * EP + experts, total)


@triton.jit
def _offsets(counts, starts, table, chunks, tiles, E, EP: tl.constexpr, PART: tl.constexpr, TILE: tl.constexpr):
    """Turns counts `[chunks, EP]` into each chunk's first places, in their own room; writes starts and table."""
    experts = tl.arange(0, EP)
    total = tl.zeros([EP], tl.int32)
    i = 0
    while i < chunks:
        at = i + tl.arange(0, PART)
        block = tl.load(counts + at[:, None] * EP + experts[None, :], mask=(at < chunks)[:, None], other=0)
        total += tl.sum(block, 0)
        i += PART
    ends = tl.cumsum(total, 0)
    first = ends - total
    tl.store(starts + experts, first, mask=experts < E)
    tl.store(starts + E, tl.sum(total, 0))
    base = first
    i = 0
    while i < chunks:
        at = i + tl.arange(0, PART)
        spot = counts + at[:, None] * EP + experts[None, :]
        block = tl.load(spot, mask=(at < chunks)[:, None], other=0)
        tl.store(spot, base[None, :] + tl.cumsum(block, 0) - block, mask=(at < chunks)[:, None])
        base += tl.sum(block, 0)
        i += PART
    mine = (total + TILE - 1) // TILE
    tile_ends = tl.cumsum(mine, 0)
    tl.store(table, tl.sum(mine, 0))
    i = 0
    while i < tiles:
        tile = i + tl.arange(0, PART)
        expert = tl.sum((tile_ends[None, :] <= tile[:, None]).to(tl.int32), 1)  # EP where there is no such tile
        own = expert[:, None] == experts[None, :]
        row = tl.sum(tl.where(own, (first - (tile_ends - mine) * TILE)[None, :], 0), 1) + tile * TILE
        end = tl.sum(tl.where(own, ends[None, :], 0), 1)
        spot = table + 4 + tile * 4
        tl.store(spot, expert, mask=tile < tiles)
        tl.store(spot + 1, row, mask=tile < tiles)
        tl.store(spot + 2, end, mask=tile < tiles)
        i += PART


@triton.jit
def _place(indices, weights, firsts, token, weight, place, N, K, E, EP: tl.constexpr, PART: tl.constexpr,
           CHUNK: tl.constexpr):  # fmt: skip
    experts = tl.arange(0, EP)
    base = tl.load(firsts + tl.program_id(0) * EP + experts)
    for i in range(0, CHUNK, PART):
        at = tl.program_id(0) * CHUNK + i + tl.arange(0, PART)
        expert = _expert(indices, at, N, E)
        live = expert >= 0
        own = expert[:, None] == experts[None, :]
        ones = own.to(tl.int32)
        row = tl.sum(tl.where(own, base[None, :] + tl.cumsum(ones, 0) - 1, 0), 1)
        base += tl.sum(ones, 0)
        tl.store(token + row, at // K, mask=live)
        tl.store(weight + row, tl.load(weights + at, mask=live).to(tl.float32), mask=live)
        tl.store(place + at, tl.where(live, row, -1), mask=at < N)


@torch.library.custom_op("abyssal::count_experts", mutates_args=())
def count(indices: Tensor, experts: int) -> Tensor:
    """`[E]` int64: how many of `indices` are each expert; those that are no expert's are not counted."""
    N, chunks = indices.numel(), triton.cdiv(indices.numel(), CHUNK)
    width = max(16, triton.next_power_of_2(experts))
    counts = torch.empty(chunks, width, dtype=torch.int32, device=indices.device)
    _count[(chunks,)](indices.contiguous(), counts, N, experts, width, max(16, min(128, 8192 // width)), CHUNK)
    return counts[:, :experts].sum(0)


@count.register_fake
def _(indices: Tensor, experts: int) -> Tensor:
    return indices.new_empty(experts, dtype=torch.int64)


@triton.jit
def _by_load(starts, busiest, E, PART: tl.constexpr):
    mine = tl.program_id(0) * PART + tl.arange(0, PART)
    rows = tl.load(starts + mine + 1, mask=mine < E, other=0) - tl.load(starts + mine, mask=mine < E, other=0)
    rank = tl.zeros([PART], tl.int32)
    for low in range(0, E, PART):
        other = low + tl.arange(0, PART)
        theirs = tl.load(starts + other + 1, mask=other < E, other=0) - tl.load(starts + other, mask=other < E, other=1)
        before = (theirs[None, :] > rows[:, None]) | (
            (theirs[None, :] == rows[:, None]) & (other[None, :] < mine[:, None])
        )
        rank += tl.sum(before.to(tl.int32), 1)
    tl.store(busiest + rank, mine, mask=mine < E)


def by_load(starts: Tensor) -> Tensor:
    """`[E]` int32: the experts, those with most rows first, of `Order.starts`."""
    experts = starts.numel() - 1
    busiest = torch.empty(experts, dtype=torch.int32, device=starts.device)
    _by_load[(triton.cdiv(experts, 16),)](starts, busiest, experts, 16, num_warps=1)
    return busiest


def order_by_expert(indices: Tensor, weights: Tensor, experts: int, rows: int | None = None) -> Order:
    """The order of `indices [T, K]` and `weights [T, K]`, without a word to the host. An index outside 0..experts - 1
    gets no row; there are `rows` rows, at least as many as choices (None: T·K), of which the last may be unused, and
    hold anything."""
    N, chosen = indices.numel(), indices.shape[1]
    rows = N if rows is None else rows
    chunks, tiles = -(-N // CHUNK), -(-rows // TILE) + experts
    width = max(16, triton.next_power_of_2(experts))
    part = max(16, min(128, 8192 // width))
    flat = indices.contiguous()
    new = {"dtype": torch.int32, "device": indices.device}
    counts = torch.empty(chunks * width, **new)
    order = Order(
        torch.empty(rows, **new),
        torch.empty(rows, dtype=torch.float32, device=indices.device),
        torch.empty(N, **new),
        torch.empty(experts + 1, **new),
        torch.empty(tiles + 1, 4, **new),
    )
    _count[(chunks,)](flat, counts, N, experts, width, part, CHUNK)
    _offsets[(1,)](counts, order.starts, order.table, chunks, tiles, experts, width, part, TILE, num_warps=8)
    _place[(chunks,)](
        flat, weights.contiguous(), counts, order.token, order.weight, order.place, N, chosen, experts, width, part,
        CHUNK,
    )  # fmt: skip
    return order
