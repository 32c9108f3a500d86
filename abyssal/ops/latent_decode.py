"""Absorbed attention: queries taken into the latent space, scored against the cached rows as they lie.

With W_UK absorbed into the query, a token's score is q_latent·c + q_rope·k_rope and its value is c itself: one row
of C + R numbers a token serves every head as key and as value (DeepSeek-V2, section 2.1.2 and appendix C). The two
products are summed, never concatenated.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from math import isfinite

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from abyssal.ops.device import capability
from abyssal.ops.latent_rows import row_bytes, unpack_rows
from abyssal.ops.linear import per_head
from abyssal.ops.paged import gather_pages

# PyTorch's flash attention for a CPU, with the log-sum-exp that its public face does not return.
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

# Of the two Hopper kernels for bf16 rows, one is for up to so many queries times heads a sequence, and where the block
# table cannot name more cached rows than this (docs/kernels.md).
FEW_ROWS, FEW_CACHED = 64, 1 << 15

# Up to so many queries times heads, merging and W_UV are one launch.
MERGED = 16

# On a CPU contexts are cut in blocks of this many rows; what lies past a sequence's length is masked. Contexts of up
# to SHORT rows are rather copied together than attended to one by one.
ROUND, SHORT = 64, 512


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
    alone: bool = False,
    w_uv: Tensor | None = None,
) -> Tensor:
    """`[T, H, C]`: softmax(scale · (q_latent cᵀ + q_rope k_ropeᵀ)) c, each sequence by itself. With `w_uv [H, V, C]`
    the result is taken out of the latent space: `[T, H, V]`.

    `q_latent [T, H, C]`, `q_rope [T, H, R]` or None; `rows [pages * page_size, C + R]`, the latent first, or uint8
    rows of `latent_rows.pack_rows`; `cu_q [S+1]`, `block_table [S, P]`, `context_lens [S]` int32. A sequence's
    queries are the last tokens of its context, causal among themselves. Sequences without queries cost nothing.
    No sequence brings more than `max_q` queries: a GPU reserves its work by it, None being T.

    Paths: "reference" (products, any device), "flash" (PyTorch's flash attention on a CPU; its kernel takes one query,
    so that latent and rotary part lie side by side, and one row as key and value: fastest where a context's pages
    follow each other),
    "triton" (any NVIDIA GPU), "hopper" (compute capability 9, C = 512 and R = 64 in bf16, rows in bf16 or packed,
    pages of a multiple of 64). None chooses.

    `alone`: a sequence's result is the same, bit by bit, whatever else is in the batch ("reference" and "triton").
    """
    q_rope = q_latent[..., :0] if q_rope is None else q_rope
    # On a CPU torch.compile may fuse the product with its neighbours; on a GPU kernels of ours do.
    inside = w_uv if rows.device.type != "cpu" else None
    out: Tensor = torch.ops.abyssal.latent_decode(
        q_latent, q_rope, rows, cu_q, block_table, context_lens, page_size, scale, path, max_q, False, alone, inside
    )[0]  # fmt: skip
    return per_head(out, w_uv) if w_uv is not None and inside is None else out


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
    alone: bool = False,
    w_uv: Tensor | None = None,
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
    if alone:
        path = "triton" if path == "hopper" else "reference" if path == "flash" else path
    if path in ("triton", "hopper"):
        T, H = q_latent.shape[:2]
        most = T if max_q is None else max_q
        attend: Callable[..., tuple[Tensor, Tensor]]
        if path == "triton":
            from abyssal.kernels.latent_decode import latent_decode as portable

            attend = partial(portable, alone=alone)
        else:
            few = most * H <= FEW_ROWS or block_table.numel() * page_size <= FEW_CACHED
            attend = _hopper(packed, few)
        if w_uv is not None and 0 < T * H <= MERGED and (path == "triton" or packed or few):
            out, lse = attend(q_latent, q_rope, *where, most, scale, w_uv=w_uv)
            w_uv = None
        else:
            out, lse = attend(q_latent, q_rope, *where, most, scale)
    elif path == "reference":
        out, lse = _reference(q_latent, q_rope, *where, scale)
    elif path == "flash" and _plain(q_latent, rows):
        out, lse = _flash_path(q_latent, q_rope, *where, scale, with_lse)
    else:
        raise ValueError(
            f"path: expected 'reference', 'triton', 'hopper', or 'flash' for rows of the queries' dtype on a CPU, "
            f"got {path!r}"
        )
    out = out if w_uv is None else per_head(out, w_uv)
    return out, lse if with_lse else lse.new_empty(0)


def _plain(q_latent: Tensor, rows: Tensor) -> bool:
    return rows.device.type == "cpu" and rows.dtype == q_latent.dtype


def _choose(q_latent: Tensor, q_rope: Tensor, rows: Tensor, context_lens: Tensor, page_size: int) -> str:
    if rows.device.type == "cpu":
        return "flash" if _plain(q_latent, rows) else "reference"
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


def _hopper(packed: bool, few: bool) -> Callable[..., tuple[Tensor, Tensor]]:
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
    cu_q: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    page_size: int,
    scale: float,
    with_lse: bool,
) -> tuple[Tensor, Tensor]:
    """A context whose pages follow each other is read where it lies. Any other is copied together first: attending
    to its runs one by one and merging takes as long, and would round otherwise for other pages."""
    out, lse = _outputs(q_latent, with_lse)
    starts, lens, tables = cu_q.tolist(), context_lens.tolist(), block_table.numpy()
    rank = q_latent.shape[-1]
    asked = [s for s in range(len(lens)) if starts[s] < starts[s + 1]]
    live = [s for s in asked if lens[s]]
    if len(live) < len(asked):
        out.zero_()  # nothing to attend to
        lse.fill_(float("-inf"))

    def attend(group: list[int], contexts: Tensor, parts: int, owned: int) -> bool:
        """`owned` rows of each context are surely its own. False if another's rows were no numbers, which weights
        of 0 don't hide."""
        q0, q1 = starts[group[0]], starts[group[-1] + 1]
        # Memory of its own: products round by where their operands lie.
        queries = torch.cat((q_latent[q0:q1], q_rope[q0:q1]), -1).unflatten(0, (len(group), -1))
        found, sums = _flashed(queries, contexts, parts, [lens[s] for s in group], rank, scale, with_lse)
        if contexts.shape[1] > owned and not isfinite(found.sum().item()):
            return False
        out[q0:q1] = found.flatten(0, 1)
        if with_lse:
            lse[q0:q1] = sums.flatten(0, 1)
        return True

    if len(live) > 1 and _alike([starts[s + 1] - starts[s] for s in live], [lens[s] for s in live]):
        own, t = [lens[s] for s in live], starts[live[0] + 1] - starts[live[0]]
        parts, length = _parts(len(live), max(own), min(own) + 1 - t)
        together = _together(rows, tables if len(live) == len(lens) else tables[live], own, page_size, parts * length)
        if together is not None and attend(live, together[0], parts, together[1]):
            return out, lse
    for s in live:
        pages = tables[s, : -(-lens[s] // page_size)]
        parts, length = _parts(1, lens[s], lens[s] + 1 - (starts[s + 1] - starts[s]))
        first, read, owned = int(pages[0]) * page_size, parts * length, len(pages) * page_size
        fits = (np.diff(pages) == 1).all() and first + read <= rows.shape[0]
        if not (fits and attend([s], rows[None, first : first + read], parts, owned)):
            attend([s], _copied(rows, pages[None], page_size, read), parts, read)
    return out, lse


def _alike(queries: list[int], lens: list[int]) -> bool:
    """Whether one call can serve all: equally many queries, and little to mask."""
    return len(set(queries)) == 1 and max(lens) * len(lens) <= 2 * sum(lens)


def _together(
    rows: Tensor, tables: NDArray[np.int32], lens: list[int], page_size: int, read: int
) -> tuple[Tensor, int] | None:  # fmt: skip
    """Several contexts as one `[S, read, W]`, and how many rows of each are surely its own: where they lie, if each
    is one run and these are equally far from each other; a copy, if they are short; else None."""
    counts, row = [-(-length // page_size) for length in lens], rows.stride(0)
    tables, column = tables[:, : max(counts)], np.arange(max(counts))
    first, step = int(tables[0, 0]), int(tables[1, 0]) - int(tables[0, 0])
    if step >= 0 and (first + step * (len(lens) - 1)) * page_size + read <= rows.shape[0]:
        as_hoped = tables == first + np.add.outer(step * np.arange(len(lens)), column)
        if min(counts) < max(counts):
            as_hoped |= column >= np.array(counts)[:, None]
        if as_hoped.all():
            strides, place = (step * page_size * row, row, rows.stride(1)), first * page_size * row
            contexts = rows.as_strided((len(lens), read, rows.shape[1]), strides, rows.storage_offset() + place)
            return contexts, min(counts) * page_size
    if max(lens) > SHORT:
        return None
    # In the place of a page that a shorter context lacks stands its last.
    pages = np.take_along_axis(tables, np.minimum(column, np.array(counts)[:, None] - 1), 1)
    return _copied(rows, pages, page_size, read), read


def _copied(rows: Tensor, pages: NDArray[np.int32], page_size: int, read: int) -> Tensor:
    """`pages [S, P]` -> `[S, read, W]`; where that is more than the pages have, the last one is there again."""
    over = max(-(-read // page_size) - pages.shape[1], 0)
    pages = np.concatenate((pages, np.repeat(pages[:, -1:], over, 1)), 1)
    by_page = rows.view(-1, page_size, rows.shape[1])
    contexts = by_page.index_select(0, torch.from_numpy(pages.ravel().astype(np.int64)))
    return contexts.view(len(pages), -1, rows.shape[1])[:, :read]


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


def _parts(S: int, most: int, least: int) -> tuple[int, int]:
    """Into how many parts each of S contexts of up to `most` rows is cut, and the rows of a part. The kernel runs a
    thread a sequence and head: a lone sequence is cut for each to have one. No query, which sees `least` rows or
    more, has a part of which it sees nothing: there the kernel has no log-sum-exp."""
    parts = max(min(torch.get_num_threads() // S, most // (2 * ROUND)), 1)
    length = -(-most // (ROUND * parts)) * ROUND
    parts = -(-most // length)
    return (parts, length) if length * (parts - 1) < least else (1, -(-most // ROUND) * ROUND)


@lru_cache(maxsize=2)  # it is the same in every layer of a step
def _mask(lens: tuple[int, ...], t: int, parts: int, length: int, dtype: torch.dtype) -> Tensor:
    """`[S, parts, t, 1, length]`: 0 where a query may look and -inf where not. Query j of t sees all of its context but
    the t - 1 - j rows that come after it."""
    seen = np.array(lens)[:, None] - np.arange(t - 1, -1, -1)
    hidden = np.where(np.arange(length * parts) < seen[..., None], np.float32(0), np.float32("-inf"))  # [S, t, l]
    return torch.from_numpy(hidden).to(dtype).view(len(lens), t, parts, 1, length).transpose(1, 2)


def _flashed(
    q: Tensor, contexts: Tensor, parts: int, lens: list[int], rank: int, scale: float, with_lse: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`q [S, t, H, C + R]`, `contexts [S, rows, C + R]` of which `lens` count -> `[S, t, H, C]`, `[S, t, H]`.

    Heads, which share the rows, are laid out as queries of one head; parts are merged by their log-sum-exps.
    """
    S, t, H, W = q.shape
    length = contexts.shape[1] // parts
    keys = contexts.unflatten(1, (parts, length))
    queries = q.reshape(S, 1, t * H, W).expand(S, parts, t * H, W)
    mask = None
    if t > 1 or min(lens) < length * parts:
        mask = _mask(tuple(lens), t, parts, length, q.dtype).expand(S, parts, t, H, length).flatten(2, 3)
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
    alone: bool = False,
    w_uv: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    out, lse = _outputs(q_latent, with_lse)
    return out if w_uv is None else out.new_empty(*out.shape[:2], w_uv.shape[1]), lse


# Opaque to torch.compile: the loop over sequences reads their lengths, and a compiled step must not depend on them.
# Registered without autograd, which absorbed attention never needs and a decoding step should not pay for.
torch.library.define(
    "abyssal::latent_decode",
    "(Tensor q_latent, Tensor q_rope, Tensor rows, Tensor cu_q, Tensor block_table, Tensor context_lens, "
    "int page_size, float scale, str? path=None, SymInt? max_q=None, bool with_lse=False, "
    "bool alone=False, Tensor? w_uv=None) -> (Tensor, Tensor)",
)
torch.library.impl("abyssal::latent_decode", "CompositeExplicitAutograd", _latent_decode)
torch.library.register_fake("abyssal::latent_decode", _fake)
