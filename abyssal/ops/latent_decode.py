"""Absorbed attention: queries taken into the latent space, scored against the cached rows as they lie.

With W_UK absorbed into the query, a token's score is q_latent·c + q_rope·k_rope and its value is c itself: one row
of C + R numbers a token serves every head as key and as value (DeepSeek-V2, section 2.1.2 and appendix C). The two
products are summed, never concatenated.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from abyssal.ops.device import capability
from abyssal.ops.latent_rows import row_bytes, unpack_rows
from abyssal.ops.paged import gather_pages

# PyTorch's flash attention for a CPU, with the log-sum-exp that its public face does not return.
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

# Of the two Hopper kernels for bf16 rows, one is for up to so many queries times heads a sequence, and where the block
# table cannot name more cached rows than this (docs/kernels.md).
FEW_ROWS, FEW_CACHED = 64, 1 << 15

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
    max_q: int | None = None,
) -> Tensor:
    """`[T, H, C]`: softmax(scale · (q_latent cᵀ + q_rope k_ropeᵀ)) c, each sequence by itself.

    `q_latent [T, H, C]`, `q_rope [T, H, R]` or None; `rows [pages * page_size, C + R]`, the latent first, or uint8
    rows of `latent_rows.pack_rows`; `cu_q [S+1]`, `block_table [S, P]`, `context_lens [S]` int32. A sequence's
    queries are the last tokens of its context, causal among themselves. Sequences without queries cost nothing.
    No sequence brings more than `max_q` queries: a GPU reserves its work by it, None being T.

    Paths: "reference" (products, any device), "flash" (PyTorch's flash attention on a CPU, for contexts of one page
    each; its kernel takes one query, so that latent and rotary part lie side by side, and one row as key and value),
    "triton" (any NVIDIA GPU), "hopper" (compute capability 9, C = 512 and R = 64 in bf16, rows in bf16 or packed,
    pages of a multiple of 64). None chooses.
    """
    q_rope = q_latent[..., :0] if q_rope is None else q_rope
    return torch.ops.abyssal.latent_decode(
        q_latent, q_rope, rows, cu_q, block_table, context_lens, page_size, scale, path, max_q
    )[0]  # fmt: skip


def latent_decode_lse(
    q_latent: Tensor,
    q_rope: Tensor | None,
    rows: Tensor,
    cu_q: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    page_size: int,
    scale: float,
    path: str | None = None,
    max_q: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`latent_decode`, and beside it `[T, H]` the natural logarithm of each softmax's denominator, in float32 or
    wider: what merging with attention over other rows takes."""
    q_rope = q_latent[..., :0] if q_rope is None else q_rope
    return torch.ops.abyssal.latent_decode(
        q_latent, q_rope, rows, cu_q, block_table, context_lens, page_size, scale, path, max_q, True
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
    max_q: int | None = None,
    with_lse: bool = False,
) -> tuple[Tensor, Tensor]:
    """The second result is empty unless asked for: on a CPU it costs a decoding step more than nothing."""
    packed = rows.dtype == torch.uint8
    if packed and row_bytes(q_latent.shape[-1], q_rope.shape[-1]) != rows.shape[1]:
        raise ValueError(
            f"rows of {rows.shape[1]} bytes: expected {row_bytes(q_latent.shape[-1], q_rope.shape[-1])} for "
            f"{q_latent.shape[-1]} latents and a rotary width of {q_rope.shape[-1]}"
        )
    where = (rows, cu_q, block_table, context_lens, page_size)
    path = path or _choose(q_latent, q_rope, rows, context_lens, page_size)
    if path in ("triton", "hopper"):
        most = q_latent.shape[0] if max_q is None else max_q
        few = most * q_latent.shape[1] <= FEW_ROWS or block_table.numel() * page_size <= FEW_CACHED
        out, lse = _kernel(path, packed, few)(q_latent, q_rope, *where, most, scale)
    elif path == "reference":
        out, lse = _reference(q_latent, q_rope, *where, scale)
    elif path == "flash" and _one_page(rows, context_lens, page_size):
        lists = cu_q.tolist(), block_table.tolist(), context_lens.tolist()
        out, lse = _flash_path(q_latent, q_rope, rows, *lists, page_size, scale, with_lse)
    else:
        raise ValueError(
            f"path: expected 'reference', 'triton', 'hopper', or 'flash' for contexts of one page, got {path!r}"
        )
    return out, lse if with_lse else lse.new_empty(0)


def _one_page(rows: Tensor, context_lens: Tensor, page_size: int) -> bool:
    return rows.dtype != torch.uint8 and max(context_lens.tolist(), default=0) <= page_size


def _choose(q_latent: Tensor, q_rope: Tensor, rows: Tensor, context_lens: Tensor, page_size: int) -> str:
    if rows.device.type == "cpu":
        return "flash" if _one_page(rows, context_lens, page_size) else "reference"
    generation = capability(rows)
    if generation == (0, 0) or q_latent.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return "reference"
    shape = (q_latent.shape[-1], q_rope.shape[-1], q_latent.dtype)
    fits = shape == (512, 64, torch.bfloat16) and rows.dtype in (torch.uint8, torch.bfloat16) and page_size % 64 == 0
    if generation[0] == 9 and fits:
        return "hopper"
    if rows.dtype == torch.uint8:
        # Older devices have no e4m3 in hardware, and Triton's own conversion wants it.
        return "triton" if generation >= (8, 9) else "reference"
    return "triton" if rows.dtype == q_latent.dtype else "reference"


def _kernel(path: str, packed: bool, few: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    if path == "triton":
        from abyssal.kernels.latent_decode import latent_decode

        return latent_decode
    if packed:
        from abyssal.kernels.latent_decode_fp8 import latent_decode_fp8

        return latent_decode_fp8
    if few:
        from abyssal.kernels.latent_decode_few import latent_decode_few

        return latent_decode_few
    from abyssal.kernels.latent_decode_hopper import latent_decode_hopper

    return latent_decode_hopper


def _reference(
    q_latent: Tensor,
    q_rope: Tensor,
    rows: Tensor,
    cu_q: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    page_size: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    out, lse = _outputs(q_latent)
    starts = cu_q.tolist()
    for s, (q0, q1) in enumerate(zip(starts, starts[1:])):
        if q0 < q1:
            context, _, _ = gather_pages(rows, block_table[s : s + 1], context_lens[s : s + 1], page_size)
            if rows.dtype == torch.uint8:
                context = unpack_rows(context, q_latent.shape[-1], q_latent.dtype)
            out[q0:q1], lse[q0:q1] = _products(q_latent[q0:q1], q_rope[q0:q1], context, scale)
    return out, lse


def _flash_path(
    q_latent: Tensor,
    q_rope: Tensor,
    rows: Tensor,
    starts: list[int],
    tables: list[list[int]],
    lens: list[int],
    page_size: int,
    scale: float,
    with_lse: bool,
) -> tuple[Tensor, Tensor]:
    out, lse = _outputs(q_latent, with_lse)
    pages = [table[0] if table else 0 for table in tables]
    q, by_page = torch.cat((q_latent, q_rope), -1), rows.view(-1, page_size, rows.shape[1])
    together = _alike(starts, lens, pages)
    for first, last in [(0, len(lens))] if together else [(s, s + 1) for s in range(len(lens))]:
        q0, q1 = starts[first], starts[last]
        if q0 < q1:
            contexts = by_page[pages[first] : pages[first] + last - first]
            queries = q[q0:q1].unflatten(0, (last - first, -1))
            found, sums = _flashed(queries, contexts, lens[first:last], q_latent.shape[-1], scale, with_lse)
            out[q0:q1] = found.flatten(0, 1)
            if with_lse:
                lse[q0:q1] = sums.flatten(0, 1)
    return out, lse


def _outputs(q_latent: Tensor, with_lse: bool = True) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q_latent.dtype, torch.float32)
    out = torch.empty_like(q_latent, memory_format=torch.contiguous_format)
    return out, torch.empty(q_latent.shape[:2] if with_lse else 0, dtype=wide, device=q_latent.device)


def _products(q_latent: Tensor, q_rope: Tensor, context: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """One sequence: `[t, H, C]`, `[t, H, R]`, `[l, C + R]` -> `[t, H, C]`, `[t, H]`."""
    wide = torch.promote_types(q_latent.dtype, torch.float32)
    t, l, rank = q_latent.shape[0], context.shape[0], q_latent.shape[-1]
    latent, k_rope = context[:, :rank], context[:, rank:]
    scores = q_latent @ latent.T + q_rope @ k_rope.T  # [t, H, l]
    hidden = ~torch.ones(t, l, dtype=torch.bool, device=context.device).tril(l - t)
    scores = (scores.to(wide) * scale).masked_fill(hidden[:, None], float("-inf"))
    return scores.softmax(-1).to(context.dtype) @ latent, scores.logsumexp(-1)


def _alike(starts: list[int], lens: list[int], pages: list[int]) -> bool:
    """Whether one call can serve all: equally many queries, pages in a row, and little to mask."""
    queries = {q1 - q0 for q0, q1 in zip(starts, starts[1:])}
    in_a_row = pages == list(range(pages[0], pages[0] + len(pages))) if pages else False
    return len(queries) == 1 and in_a_row and max(lens) * len(lens) <= 2 * sum(lens)


def _flashed(
    q: Tensor, contexts: Tensor, lens: list[int], rank: int, scale: float, with_lse: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`q [S, t, H, C + R]`, `contexts [S, page_size, C + R]` with `lens` rows each -> `[S, t, H, C]`, `[S, t, H]`.

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
        lse = lse.logsumexp(1, keepdim=True) if with_lse else lse[:, :1]
    return out.reshape(S, t, H, rank), lse.reshape(S, t, H)


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
    max_q: int | None = None,
    with_lse: bool = False,
) -> tuple[Tensor, Tensor]:
    return _outputs(q_latent, with_lse)


# Opaque to torch.compile: the loop over sequences reads their lengths, and a compiled step must not depend on them.
# Registered without autograd, which absorbed attention never needs and a decoding step should not pay for.
torch.library.define(
    "abyssal::latent_decode",
    "(Tensor q_latent, Tensor q_rope, Tensor rows, Tensor cu_q, Tensor block_table, Tensor context_lens, "
    "int page_size, float scale, str? path=None, SymInt? max_q=None, bool with_lse=False) -> (Tensor, Tensor)",
)
torch.library.impl("abyssal::latent_decode", "CompositeExplicitAutograd", _latent_decode)
torch.library.register_fake("abyssal::latent_decode", _fake)
