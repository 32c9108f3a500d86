"""The bookkeeping of a decoding step on the device: where its rows lie, what follows a text, which experts it met.

Each is a dozen small operations in plain PyTorch and one kernel on a GPU: in a step of a small model, or of one
sequence, they would take longer than a layer.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from abyssal.ops.device import capability


class Rows(NamedTuple):
    """`width` rows of each of S sequences."""

    known: Tensor  # [S] int64: tokens of each sequence, as the step begins
    tokens: Tensor  # [S, width] int64: its last token and its drafts
    positions: Tensor  # [S, width] int64, from known - 1 on
    slots: Tensor  # [S, width] int64: rows of the cache
    context_lens: Tensor  # [S] int32, with these rows
    table: Tensor  # [S, P] int32: pages


def step_rows(
    order: Tensor, known: Tensor, last: Tensor, tables: Tensor, width: int, page_size: int, path: str | None = None
) -> Rows:
    """The rows that sequences in the slots `order [S]` int64 bring to a step.

    `known [n]` int64, `last [n, W]` int64 and `tables [n, P]` int32 are of all slots; W is at least `width`. Paths:
    "reference", "triton"; None chooses.
    """
    if _path(order, path) == "triton":
        from abyssal.kernels import step as kernels

        return Rows(*kernels.step_rows(order, known, last, tables, width, page_size))
    own, table = known[order], tables[order]
    positions, slots, lens = place_rows(table, own - 1, width, page_size, "reference")
    return Rows(own, last[order, :width], positions, slots, lens, table)


def place_rows(
    table: Tensor, start: Tensor, width: int, page_size: int, path: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Positions and slots `[S, width]` int64 of rows from `start [S]` int64 on (from 0 where it is less), and the
    lengths `[S]` int32 of the contexts that end with them. `table [S, P]` int32."""
    if _path(table, path) == "triton":
        from abyssal.kernels import step as kernels

        return kernels.place_rows(table, start, width, page_size)
    start = start.clamp(min=0)
    positions = start[:, None] + torch.arange(width, device=start.device)
    slots = table.gather(1, positions // page_size) * page_size + positions % page_size
    return positions, slots, (start + width).to(torch.int32)


def follow(drafts: Tensor, accepted: Tensor, token: Tensor, further: int, path: str | None = None) -> Tensor:
    """`[S, W + further]` int64: what follows the known tokens. The first `accepted [S]` of `drafts [S, W - 1]`, then
    `token [S]`, again and again where nothing is known yet; 0 for a token of -1."""
    if _path(drafts, path) == "triton":
        from abyssal.kernels import step as kernels

        return kernels.follow(drafts, accepted, token, further)
    took = token.clamp(min=0)
    place = torch.arange(drafts.shape[1] + 1 + further, device=drafts.device)
    padded = torch.cat((drafts, took[:, None].expand(-1, 1 + further)), 1)
    return torch.where(place < accepted[:, None], padded, took[:, None])


def finish(
    order: Tensor, idle: int, known: Tensor, last: Tensor, accepted: Tensor, token: Tensor, drafts: Tensor,
    following: Tensor, further: int, path: str | None = None,
) -> Tensor:  # fmt: skip
    """Moves the slots on: `known[order] += accepted + 1`, but for the slot `idle`; `last[order]` becomes the new token
    and `further` drafts from `following [S, W + further]` (the last of them again where `last` is wider).

    Returns what the host is told, `[S, 2 + (W - 1) + further]` int64: accepted, token, `drafts [S, W - 1]`, new drafts.
    """
    if _path(order, path) == "triton":
        from abyssal.kernels import step as kernels

        return kernels.finish(order, idle, known, last, accepted, token, drafts, following, further)
    own = known[order]
    known.index_copy_(0, order, torch.where(order == idle, own, own + accepted + 1))
    ahead = torch.arange(1 + further, device=order.device)
    new = following.gather(1, accepted[:, None] + ahead)
    wider = last.shape[1] - 1 - further
    last.index_copy_(0, order, torch.cat((new, new[:, :1].expand(-1, wider)), 1))
    return torch.cat([accepted[:, None], token[:, None], drafts, new[:, 1:]], 1)


def count_experts(
    load: Tensor, slots: Tensor, picks: Tensor, accepted: Tensor | None = None, path: str | None = None
) -> None:
    """Adds to `load [n, layers, E]` int32 the experts that tokens were sent to, `picks [layers, T, K]` int64.

    `slots [S]` int64 are those of T / S tokens each, in order; with `accepted [S]` only the first accepted + 1 of
    them count, and none of the last slot, n - 1.
    """
    layers, T, K = picks.shape
    if not picks.numel():
        return
    if _path(picks, path) == "triton":
        from abyssal.kernels import step as kernels

        return kernels.count_experts(load, slots, picks, accepted)
    width = T // slots.shape[0]
    each = slots.repeat_interleave(width)
    live = torch.ones_like(each, dtype=torch.bool)
    if accepted is not None:
        live = torch.arange(width, device=slots.device) <= accepted[:, None]
        live = (live & (slots < load.shape[0] - 1)[:, None]).flatten()
    layer = torch.arange(layers, device=picks.device)[:, None, None]
    at = (each[None, :, None] * layers + layer) * load.shape[2] + picks
    load.view(-1).scatter_add_(0, at.flatten(), live[None, :, None].expand(layers, T, K).flatten().to(load.dtype))


def _path(x: Tensor, path: str | None) -> str:
    path = path or ("triton" if capability(x) > (0, 0) else "reference")
    if path not in ("reference", "triton"):
        raise ValueError(f"path: expected 'reference' or 'triton', got {path!r}")
    return path
