"""Reading a paged cache into one packed row of tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor


def cumulative(sizes: Sequence[int]) -> Tensor:
    """[S+1] int32: the running sum of `sizes`, from 0."""
    return torch.tensor([0, *sizes], dtype=torch.int64).cumsum(0).to(torch.int32)


def gather_pages(rows: Tensor, block_table: Tensor, context_lens: Tensor, page_size: int) -> tuple[Tensor, Tensor, int]:
    """Every sequence's rows of one layer's cache, packed: (`[L, W]`, cu_seqlens `[S+1]` int32, longest).

    `rows [pages * page_size, W]`, `block_table [S, P]`, `context_lens [S]`. The reference's way to see a cache:
    it reads the lengths on the host, and copies unless one page holds all.
    """
    lens = context_lens.tolist()
    parts = []
    for length, pages in zip(lens, block_table.tolist(), strict=True):
        for start in range(0, length, page_size):
            first = pages[start // page_size] * page_size
            parts.append(rows[first : first + min(page_size, length - start)])
    packed = parts[0] if len(parts) == 1 else torch.cat(parts) if parts else rows[:0]
    return packed, cumulative(lens).to(rows.device), max(lens, default=0)
