"""How often each expert was picked."""

import torch
from torch import Tensor

from abyssal.ops.device import capability


def count_picks(indices: Tensor, experts: int, live: Tensor | None = None, path: str | None = None) -> Tensor:
    """`[E]` int64: how many of `indices [T, K]` are each expert, of those tokens where `live [T]` is true (None: all).

    Paths: "reference" (of experts alone, from 0 on), "triton" (on a GPU, where adding to few places one by one takes
    long). None chooses.
    """
    if path is None:
        path = "triton" if indices.numel() and capability(indices)[0] > 0 else "reference"
    if path == "triton":
        from abyssal.kernels.experts_sort import count

        return count(indices if live is None else indices.masked_fill(~live[:, None], -1), experts)
    if path != "reference":
        raise ValueError(f"path: expected 'reference' or 'triton', got {path!r}")
    one = torch.ones_like(indices) if live is None else live[:, None].expand_as(indices).long()
    counts = torch.zeros(experts, dtype=torch.int64, device=indices.device)
    return counts.scatter_add_(0, indices.flatten(), one.flatten())
