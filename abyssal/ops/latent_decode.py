"""Absorbed attention: queries taken into the latent space, scored against the cached rows as they lie.

With W_UK absorbed into the query, a token's score is q_latent·c + q_rope·k_rope and its value is c itself: one row
of C + R numbers a token serves every head as key and as value (DeepSeek-V2, section 2.1.2 and appendix C). The two
products are summed, never concatenated.
"""

import torch
from torch import Tensor

from abyssal.ops.paged import gather_pages

# A context's products take up to this many rows more than there are, so that the library, which prepares a kernel
# for each new shape in bf16, sees a new shape once in so many tokens.
ROUND = 64


def latent_decode(
    q_latent: Tensor,
    q_rope: Tensor | None,
    rows: Tensor,
    cu_q: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    page_size: int,
    scale: float,
) -> Tensor:
    """`[T, H, C]`: softmax(scale · (q_latent cᵀ + q_rope k_ropeᵀ)) c, each sequence by itself.

    `q_latent [T, H, C]`, `q_rope [T, H, R]` or None; `rows [pages * page_size, C + R]`, the latent first;
    `cu_q [S+1]`, `block_table [S, P]`, `context_lens [S]` int32. A sequence's queries are the last tokens of its
    context, causal among themselves. Sequences without queries cost nothing.
    """
    q_rope = q_latent[..., :0] if q_rope is None else q_rope
    return torch.ops.abyssal.latent_decode(
        q_latent, q_rope, rows, cu_q, block_table, context_lens, page_size, scale
    )  # fmt: skip


def _context(rows: Tensor, pages: list[int], length: int, page_size: int) -> Tensor:
    """`[l or more, W]`: a sequence's rows; the rows past its length are there to be masked."""
    if length <= page_size:
        first = pages[0] * page_size
        return rows[first : first + min(-(-length // ROUND) * ROUND, page_size)]
    table, lens = torch.tensor([pages], dtype=torch.int32), torch.tensor([length])
    return gather_pages(rows, table, lens, page_size)[0]


def _latent_decode(
    q_latent: Tensor,
    q_rope: Tensor,
    rows: Tensor,
    cu_q: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    page_size: int,
    scale: float,
) -> Tensor:
    _, heads, rank = q_latent.shape
    wide = torch.promote_types(q_latent.dtype, torch.float32)
    out = torch.empty_like(q_latent, memory_format=torch.contiguous_format)
    starts, lens, tables = cu_q.tolist(), context_lens.tolist(), block_table.tolist()
    for q0, q1, length, pages in zip(starts, starts[1:], lens, tables):
        if q0 == q1:
            continue
        context = _context(rows, pages, length, page_size)
        latent, k_rope = context[:, :rank], context[:, rank:]
        scores = torch.mm(q_latent[q0:q1].reshape(-1, rank), latent.T)  # [t·H, l or more]
        if k_rope.shape[1]:
            scores.addmm_(q_rope[q0:q1].reshape(scores.shape[0], -1), k_rope.T)
        scores = scores.to(wide).mul_(scale)
        # Query j of the last t sees all but the t - 1 - j that come after it, and none of the rows past the length.
        by_query = scores.view(q1 - q0, heads, -1)
        for j, visible in enumerate(range(length - (q1 - q0) + 1, length + 1)):
            if visible < by_query.shape[2]:
                by_query[j, :, visible:] = float("-inf")
        probs = scores.softmax(-1).to(rows.dtype)
        torch.mm(probs, latent, out=out[q0:q1].view(-1, rank))
    return out


def _fake(
    q_latent: Tensor,
    q_rope: Tensor,
    rows: Tensor,
    cu_q: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    page_size: int,
    scale: float,
) -> Tensor:
    return torch.empty_like(q_latent, memory_format=torch.contiguous_format)


# Opaque to torch.compile: the loop over sequences reads their lengths, and a compiled step must not depend on them.
# Registered without autograd, which absorbed attention never needs and a decoding step should not pay for.
torch.library.define(
    "abyssal::latent_decode",
    "(Tensor q_latent, Tensor q_rope, Tensor rows, Tensor cu_q, Tensor block_table, Tensor context_lens, "
    "int page_size, float scale) -> Tensor",
)
torch.library.impl("abyssal::latent_decode", "CompositeExplicitAutograd", _latent_decode)
torch.library.register_fake("abyssal::latent_decode", _fake)
