"""Absorbed attention: queries taken into the latent space, scored against the cached rows as they lie.

With W_UK absorbed into the query, a token's score is q_latent·c + q_rope·k_rope and its value is c itself: one row
of C + R numbers a token serves every head as key and as value (DeepSeek-V2, section 2.1.2 and appendix C). The two
products are summed, never concatenated.
"""

import torch
from torch import Tensor

from abyssal.ops.paged import gather_pages

# PyTorch's flash attention for a CPU, with the log-sum-exp that its public face does not return.
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

# Contexts are cut in blocks of this many rows: a sequence's rows past its length, within its page, are masked.
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
    path: str | None = None,
) -> Tensor:
    """`[T, H, C]`: softmax(scale · (q_latent cᵀ + q_rope k_ropeᵀ)) c, each sequence by itself.

    `q_latent [T, H, C]`, `q_rope [T, H, R]` or None; `rows [pages * page_size, C + R]`, the latent first;
    `cu_q [S+1]`, `block_table [S, P]`, `context_lens [S]` int32. A sequence's queries are the last tokens of its
    context, causal among themselves. Sequences without queries cost nothing.

    Paths: "reference" (products, any device), "flash" (PyTorch's flash attention on a CPU, for contexts of one page
    each; its kernel takes one query, so that latent and rotary part lie side by side, and one row as key and value).
    None chooses.
    """
    q_rope = q_latent[..., :0] if q_rope is None else q_rope
    return torch.ops.abyssal.latent_decode(
        q_latent, q_rope, rows, cu_q, block_table, context_lens, page_size, scale, path
    )  # fmt: skip


def _latent_decode(
    q_latent: Tensor,
    q_rope: Tensor,
    rows: Tensor,
    cu_q: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    page_size: int,
    scale: float,
    path: str | None = None,
) -> Tensor:
    starts, lens, tables = cu_q.tolist(), context_lens.tolist(), block_table.tolist()
    out = torch.empty_like(q_latent, memory_format=torch.contiguous_format)
    one_page = max(lens, default=0) <= page_size
    if path is None:
        path = "flash" if rows.device.type == "cpu" and one_page else "reference"
    if path == "reference":
        for s, (q0, q1) in enumerate(zip(starts, starts[1:])):
            if q0 < q1:
                context, _, _ = gather_pages(rows, block_table[s : s + 1], context_lens[s : s + 1], page_size)
                out[q0:q1] = _products(q_latent[q0:q1], q_rope[q0:q1], context, scale)
        return out
    if path != "flash" or not one_page:
        raise ValueError(f"path: expected 'reference', or 'flash' for contexts of one page, got {path!r}")
    pages = [table[0] if table else 0 for table in tables]
    q, by_page = torch.cat((q_latent, q_rope), -1), rows.view(-1, page_size, rows.shape[1])
    together = _alike(starts, lens, pages)
    for first, last in [(0, len(lens))] if together else [(s, s + 1) for s in range(len(lens))]:
        q0, q1 = starts[first], starts[last]
        if q0 < q1:
            contexts = by_page[pages[first] : pages[first] + last - first]
            queries = q[q0:q1].unflatten(0, (last - first, -1))
            found = _flashed(queries, contexts, lens[first:last], q_latent.shape[-1], scale)
            out[q0:q1] = found.flatten(0, 1)
    return out


def _products(q_latent: Tensor, q_rope: Tensor, context: Tensor, scale: float) -> Tensor:
    """One sequence: `[t, H, C]`, `[t, H, R]`, `[l, C + R]` -> `[t, H, C]`."""
    wide = torch.promote_types(q_latent.dtype, torch.float32)
    t, l, rank = q_latent.shape[0], context.shape[0], q_latent.shape[-1]
    latent, k_rope = context[:, :rank], context[:, rank:]
    scores = q_latent @ latent.T + q_rope @ k_rope.T  # [t, H, l]
    hidden = ~torch.ones(t, l, dtype=torch.bool, device=context.device).tril(l - t)
    probs = (scores.to(wide) * scale).masked_fill(hidden[:, None], float("-inf")).softmax(-1)
    return probs.to(context.dtype) @ latent


def _alike(starts: list[int], lens: list[int], pages: list[int]) -> bool:
    """Whether one call can serve all: equally many queries, pages in a row, and little to mask."""
    queries = {q1 - q0 for q0, q1 in zip(starts, starts[1:])}
    in_a_row = pages == list(range(pages[0], pages[0] + len(pages))) if pages else False
    return len(queries) == 1 and in_a_row and max(lens) * len(lens) <= 2 * sum(lens)


def _flashed(q: Tensor, contexts: Tensor, lens: list[int], rank: int, scale: float) -> Tensor:
    """`q [S, t, H, C + R]`, `contexts [S, page_size, C + R]` with `lens` rows each -> `[S, t, H, C]`.

    The kernel runs a thread a sequence and head. Heads, which share the rows, are laid out as queries of one head;
    a lone sequence's context is split into as many parts as there are threads, merged by their log-sum-exps.
    """
    S, t, H, W = q.shape
    most, page_size = max(lens), contexts.shape[1]
    parts = max(min(torch.get_num_threads() // S, most // (2 * ROUND)), 1)
    length = -(-most // (ROUND * parts)) * ROUND
    if length * parts > page_size:
        parts, length = 1, min(length * parts, page_size)
    keys = contexts[:, : length * parts].unflatten(1, (parts, length))
    queries = q.reshape(S, 1, t * H, W).expand(S, parts, t * H, W)
    mask = None
    if t > 1 or min(lens) < length * parts:
        # Query j of t sees all but the t - 1 - j that come after it.
        seen = torch.tensor(lens).view(-1, 1) - torch.arange(t - 1, -1, -1)
        hidden = torch.arange(length * parts) >= seen[..., None]  # [S, t, l]
        mask = torch.zeros(hidden.shape, dtype=q.dtype).masked_fill_(hidden, float("-inf"))
        mask = mask.unflatten(-1, (parts, length)).transpose(1, 2).repeat_interleave(H, 2)
    out, lse = _flash(queries, keys, keys, 0.0, False, attn_mask=mask, scale=scale)
    out = out[..., :rank]
    if parts > 1:
        out = (out * lse.softmax(1).to(out.dtype)[..., None]).sum(1, keepdim=True)
    return out.reshape(S, t, H, rank)


def _fake(
    q_latent: Tensor,
    q_rope: Tensor,
    rows: Tensor,
    cu_q: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    page_size: int,
    scale: float,
    path: str | None = None,
) -> Tensor:
    return torch.empty_like(q_latent, memory_format=torch.contiguous_format)


# Opaque to torch.compile: the loop over sequences reads their lengths, and a compiled step must not depend on them.
# Registered without autograd, which absorbed attention never needs and a decoding step should not pay for.
torch.library.define(
    "abyssal::latent_decode",
    "(Tensor q_latent, Tensor q_rope, Tensor rows, Tensor cu_q, Tensor block_table, Tensor context_lens, "
    "int page_size, float scale, str? path=None) -> Tensor",
)
torch.library.impl("abyssal::latent_decode", "CompositeExplicitAutograd", _latent_decode)
torch.library.register_fake("abyssal::latent_decode", _fake)
