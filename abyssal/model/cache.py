"""What one token leaves behind: for latent attention the latent and the rotary key, and nothing a head.

A cache is a row a token and layer; pages of rows are handed to sequences by whoever owns the cache (the engine).
A contiguous cache is one long page a sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from abyssal.model.packing import Packing
from abyssal.ops.paged import cumulative

Leaves = dict[str, tuple[int, torch.dtype | None]]
"""What an attention layer declares a token leaves behind: {name: (elements, dtype or the model's own)}."""


@dataclass(frozen=True)
class Cache:
    """`layers[l][name]` is `[rows, W]`; row `page * page_size + i` is the i-th token of a page."""

    layers: list[dict[str, Tensor]]
    page_size: int

    @staticmethod
    def allocate(
        leaves: Sequence[Leaves],
        pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> "Cache":
        """Room for `pages * page_size` tokens in every layer, zeroed: a row never written may be multiplied
        by a weight of 0, and 0 · NaN is NaN."""
        rows = pages * page_size
        return Cache(
            [
                {name: torch.zeros(rows, width, dtype=own or dtype, device=device)
                 for name, (width, own) in layer.items()}
                for layer in leaves
            ],
            page_size,
        )  # fmt: skip

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for layer in self.layers for t in layer.values())

    def contiguous_packing(
        self,
        lengths: Sequence[int],
        before: Sequence[int],
        pages: Sequence[int],
        device: torch.device | str = "cpu",
    ) -> Packing:
        """The packing of a batch in which sequence s brings `lengths[s]` new tokens after the `before[s]` that
        already stand in its one page `pages[s]`. Raises ValueError if a page is too short."""
        for s, (new, old) in enumerate(zip(lengths, before, strict=True)):
            if new + old > self.page_size:
                raise ValueError(f"sequence {s}: {new + old} tokens, the cache has room for {self.page_size}")
        positions = [torch.arange(old, old + new) for new, old in zip(lengths, before)]
        slots = [place + page * self.page_size for place, page in zip(positions, pages, strict=True)]
        none = torch.zeros(0, dtype=torch.int64)
        return Packing(
            cu_seqlens=cumulative(lengths).to(device),
            positions=(torch.cat(positions) if positions else none).to(device),
            max_len=max(lengths, default=0),
            slots=(torch.cat(slots) if slots else none).to(device),
            block_table=torch.tensor(list(pages), dtype=torch.int32, device=device).view(-1, 1),
            context_lens=torch.tensor([n + o for n, o in zip(lengths, before)], dtype=torch.int32, device=device),
            page_size=self.page_size,
            fresh=not any(before),
        )
