"""Where the sequences of a flat batch begin and end, and where a cache keeps them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from abyssal.ops.paged import cumulative


@dataclass(frozen=True)
class Packing:
    """The boundaries of S sequences packed into T tokens. Sequences of no tokens are legal.

    `model/` never reads a value of these tensors on the host: only `max_len` and `fresh` are known there.
    """

    cu_seqlens: Tensor  # [S+1] int32: sequence s is tokens cu_seqlens[s]:cu_seqlens[s+1]
    positions: Tensor  # [T] int64: a token's place in its sequence, counted from what the cache holds
    max_len: int  # no sequence has more tokens in this batch

    # With a cache:
    slots: Tensor | None = None  # [T] int64: the row of the cache that each token writes
    block_table: Tensor | None = None  # [S, P] int32: the pages of each sequence, in order
    context_lens: Tensor | None = None  # [S] int32: tokens of each sequence that stand in the cache, with these
    page_size: int = 0  # rows a page
    fresh: bool = True  # no sequence has anything in the cache before this batch

    # Where the host knows the context's lengths, so that nobody need ask the device for them (see `gathered`):
    context_rows: Tensor | None = None  # [L] int64: the cache's rows of every context, sequence after sequence
    cu_context: Tensor | None = None  # [S+1] int32: sequence s's context is context_rows[cu_context[s]:cu_context[s+1]]
    max_context: int = 0  # no context is longer

    # Several batches in one pass: all but attention takes their tokens together.
    parts: tuple["Packing", ...] = ()

    alone: bool = False  # no sequence's result may depend, not in a bit, on what else is in the batch

    @staticmethod
    def of(lengths: "Sequence[int] | Tensor | Packing", tokens: Tensor) -> "Packing":
        """The packing of whole sequences, without a cache. Raises ValueError unless `lengths` sum to T."""
        if isinstance(lengths, Packing):
            return lengths
        sizes = [int(n) for n in lengths]
        if tokens.ndim != 1 or sum(sizes) != tokens.shape[0] or min(sizes, default=0) < 0:
            raise ValueError(
                f"tokens {list(tokens.shape)} and lengths {sizes[:8]}{'...' if len(sizes) > 8 else ''} "
                f"(sum {sum(sizes)}): expected flat tokens [T] and lengths of 0 or more that sum to T"
            )
        cu_seqlens = cumulative(sizes)
        total, counts = tokens.shape[0], torch.tensor(sizes, dtype=torch.int64)
        positions = torch.arange(total) - cu_seqlens[:-1].long().repeat_interleave(counts, output_size=total)
        return Packing(cu_seqlens.to(tokens.device), positions.to(tokens.device), max(sizes, default=0))

    @staticmethod
    def joined(parts: "Sequence[Packing]") -> "Packing":
        """One pass over the tokens of all `parts`, whose sequences go on to attend each part by itself."""
        starts = [0, *accumulate(part.positions.shape[0] for part in parts)]
        sums = [part.cu_seqlens[:-1] + start for part, start in zip(parts, starts)]
        end = parts[-1].cu_seqlens[-1:] + starts[-2]
        positions = torch.cat([part.positions for part in parts])
        longest = max(part.max_len for part in parts)
        return Packing(torch.cat([*sums, end]), positions, longest, parts=tuple(parts))

    @property
    def sequences(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    def sequence_of_token(self) -> Tensor:
        """[T] int64: which sequence each token belongs to."""
        row = torch.arange(self.positions.shape[0], device=self.positions.device, dtype=torch.int32)
        return torch.searchsorted(self.cu_seqlens[1:], row, right=True)


def shift(tokens: Tensor, packing: Packing, by: int) -> tuple[Tensor, Tensor]:
    """The token `by` places further on in the same sequence, and whether there is one: ([T], [T] bool).

    Where there is none the token is 0. Targets of the next token are `shift(tokens, packing, 1)`, and those of
    the MTP module d `shift(tokens, packing, 1 + d)`: neither looks across the boundary of a document.
    """
    total = tokens.shape[0]
    row = torch.arange(total, device=tokens.device)
    end = packing.cu_seqlens[packing.sequence_of_token() + 1]
    inside = row + by < end
    further = tokens[(row + by).clamp(max=max(total - 1, 0))]
    return torch.where(inside, further, torch.zeros_like(further)), inside
