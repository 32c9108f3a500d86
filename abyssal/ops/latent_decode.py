"""Absorbed attention: queries taken into the latent space, scored against the cached rows as they lie.

With W_UK absorbed into the query, a token's score is q_latent·c + q_rope·k_rope and its value is c itself: one row
of C + R numbers a token serves every head as key and as value (DeepSeek-V2, section 2.1.2 and appendix C). The two
products are summed, never concatenated.
"""

import torch
from torch import Tensor

from abyssal.ops.paged import gather_pages


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
    return _latent_decode(
        q_latent,
        q_latent[..., :0] if q_rope is None else q_rope,
        rows,
        cu_q,
        block_table,
        context_lens,
        page_size,
        scale,
    )


# Opaque to torch.compile: its loop over sequences reads their lengths, and a compiled step must not depend on them.
@torch.library.custom_op("abyssal::latent_decode", mutates_args=())
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
    rank, wide = q_latent.shape[-1], torch.promote_types(q_latent.dtype, torch.float32)
    heads = q_latent.shape[1]
    out = torch.empty_like(q_latent, memory_format=torch.contiguous_format)
    starts, lens = cu_q.tolist(), context_lens.tolist()
    for s, (q0, q1) in enumerate(zip(starts, starts[1:])):
        if q0 == q1:
            continue
        context, _, _ = gather_pages(rows, block_table[s : s + 1], context_lens[s : s + 1], page_size)
        latent, k_rope = context[:, :rank], context[:, rank:]
        scores = q_latent[q0:q1].reshape(-1, rank) @ latent.T  # [t·H, l]
        if k_rope.shape[-1]:
            scores.addmm_(q_rope[q0:q1].reshape(-1, k_rope.shape[-1]), k_rope.T)
        scores = scores.to(wide).mul_(scale)
        t = q1 - q0
        if t > 1:
            seen = torch.ones(t, lens[s], dtype=torch.bool, device=rows.device).tril(lens[s] - t)
            scores.view(t, heads, -1).masked_fill_(~seen[:, None], float("-inf"))
        probs = scores.softmax(-1).to(rows.dtype)
        out[q0:q1] = (probs @ latent).view(t, heads, rank)
    return out


@_latent_decode.register_fake
def _(
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
