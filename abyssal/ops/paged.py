"""Reading a paged cache into one packed row of tokens."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def cumulative(sizes: Sequence[int]) -> Tensor:
    """[S+1] int32: the running sum of `sizes`, from 0."""
    return torch.tensor([0, *sizes], dtype=torch.int64).cumsum(0).to(torch.int32)


def gather_pages(rows: Tensor, block_table: Tensor, context_lens: Tensor, page_size: int) -> tuple[Tensor, Tensor, int]:
    """Every sequence's rows of one layer's cache, packed: (`[L, W]`, cu_seqlens `[S+1]` int32, longest).

    `rows [pages * page_size, W]`, `block_table [S, P]`, `context_lens [S]`. The reference's way to see a cache:
    it reads the lengths on the host, and copies unless all is one run of consecutive pages.
    """
    lens, tables = context_lens.tolist(), block_table.cpu().numpy()
    parts = []
    for length, table in zip(lens, tables, strict=True):
        pages = table[: -(-length // page_size)]
        starts = np.flatnonzero(np.diff(pages, prepend=-2) != 1)  # where a page doesn't follow the one before it
        for start, stop in zip(starts.tolist(), [*starts[1:].tolist(), len(pages)]):
            first = int(pages[start]) * page_size
            parts.append(rows[first : first + min(stop * page_size, length) - start * page_size])
    packed = parts[0] if len(parts) == 1 else torch.cat(parts) if parts else rows[:0]
    return packed, cumulative(lens).to(rows.device), max(lens, default=0)
