"""Each rank's piece of a microbatch: which tokens, and how its attention finds the rest of their documents.

Over `cp` the batch is cut into equal chunks, several a rank, dealt out so that all have as many tokens and about as
much of attention's work: for a token the length of what it sees, and for each run of a document's tokens the expansion
of the document up to its end. Over `tp` a rank's tokens are cut once more, into as many runs; attention gathers those
again, so its packing is of all of them.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from abyssal.model.balance import Sequences
from abyssal.model.objective import Microbatch
from abyssal.model.packing import Packing
from abyssal.ops.paged import cumulative
from abyssal.parallel.mesh import Mesh

CHUNKS = (1, 2, 4, 8)  # a rank's: with more, work is more even, and more runs expand the same context
# Expanding a latent is C(N + V) products a head, a query and a key are N + R + V: 410 times fewer with DeepSeek-V3's
# widths. But plain products are about twice as fast as attention.
EXPANSION = 200


def cut(micro: Microbatch, mesh: Mesh) -> Microbatch:
    """The tokens that this rank has of a batch, on the CPU, that its `cp` and `tp` share. Raises ValueError where they
    cannot be cut evenly."""
    return piece(micro, mesh.shape.cp, mesh.place("cp"), mesh.shape.tp, mesh.place("tp"))


def piece(micro: Microbatch, cp: int, cp_place: int, tp: int, tp_place: int) -> Microbatch:
    """`cut`, at a place of the two axes."""
    total, packing = micro.tokens.shape[0], micro.packing
    if cp * tp == 1:
        return micro
    if total % (cp * tp):
        raise ValueError(f"batch_tokens: expected a multiple of cp·tp = {cp * tp}, got {total}")
    rows = deal(packing.positions, cp)
    document = packing.sequence_of_token()
    own = rows[cp_place].chunk(tp)[tp_place]
    return dataclasses.replace(
        micro,
        tokens=micro.tokens[own],
        packing=packing if cp == 1 else context_packing(packing, document, rows, cp_place),
        targets=[t[own] for t in micro.targets],
        weights=[w[own] for w in micro.weights],
        live=[l[own] for l in micro.live],
        spans=Sequences(document[own], packing.sequences),
        cut_from=total,
        real=None if micro.real is None else micro.real[own],
    )


def padded(micro: Microbatch, multiple: int) -> Microbatch:
    """A batch to be measured, with a document behind it that has no weight, for tokens to be a multiple of so many."""
    total = micro.tokens.shape[0]
    missing = -total % multiple
    if not missing:
        return micro

    def longer(t: Tensor) -> Tensor:
        return torch.cat((t, t.new_zeros(missing)))

    tokens = longer(micro.tokens)
    return dataclasses.replace(
        micro,
        tokens=tokens,
        packing=Packing.of([*micro.packing.cu_seqlens.diff().tolist(), missing], tokens),
        targets=[longer(t) for t in micro.targets],
        weights=[longer(w) for w in micro.weights],
        live=[longer(l) for l in micro.live],
        real=torch.arange(total + missing) < total,
    )


def deal(positions: Tensor, ranks: int) -> Tensor:
    """`[ranks, T/ranks]` int64: the tokens of each rank, in order; the same wherever it is computed. `positions [T]` of
    the tokens in their documents."""
    total = positions.shape[0]
    best: tuple[int, Tensor] | None = None
    for chunks in CHUNKS if ranks > 1 else (1,):
        if total % (ranks * chunks) == 0:
            hands, most = _hands(chunk_work(positions, ranks * chunks), ranks)
            if best is None or most < best[0]:
                best = most, torch.tensor(hands)
    assert best is not None
    return torch.arange(total).view(best[1].numel(), -1)[best[1]].flatten(1)


def chunk_work(positions: Tensor, chunks: int) -> list[int]:
    """Attention's work in each of `chunks` chunks, in pairs of a query and a key."""
    seen = (positions + 1).view(chunks, -1)
    ends = torch.ones_like(seen, dtype=torch.bool)  # of a document or of the chunk
    ends[:, :-1] = seen[:, 1:] == 1
    work: list[int] = (seen.sum(1) + EXPANSION * (seen * ends).sum(1)).tolist()
    return work


def _hands(work: Sequence[int], ranks: int) -> tuple[list[list[int]], int]:
    """The chunks of each rank, as many for all, and the work of the busiest: the largest first, each to the rank that
    has least and has room."""
    hands: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for chunk in sorted(range(len(work)), key=lambda c: (-work[c], c)):
        rank = min((r for r in range(ranks) if len(hands[r]) < len(work) // ranks), key=lambda r: (loads[r], r))
        hands[rank].append(chunk)
        loads[rank] += work[chunk]
    return [sorted(hand) for hand in hands], max(loads)


def context_packing(packing: Packing, document: Tensor, rows: Tensor, place: int) -> Packing:
    """The packing of the tokens `rows[place]`. Its sequences are runs of one document's tokens; `context_rows` are each
    run's document from its start to the run's end, as places in `rows`, which is the order tokens are gathered in."""
    own = rows[place]
    begins = torch.ones(own.shape[0], dtype=torch.bool)
    begins[1:] = (own[1:] != own[:-1] + 1) | (document[own[1:]] != document[own[:-1]])
    first = begins.nonzero().flatten()
    last = torch.cat((first[1:], torch.tensor([own.shape[0]]))) - 1
    lengths = last - first + 1
    seen = packing.positions[own[last]] + 1  # tokens of the document up to a run's end
    cu_context = cumulative(seen.tolist())
    count = int(cu_context[-1])
    # The l-th row of a context is the l-th token of the document.
    offset = own[last] + 1 - seen - cu_context[:-1]
    tokens = torch.arange(count) + offset.repeat_interleave(seen, output_size=count)
    gathered_at = torch.empty(rows.numel(), dtype=torch.int64)
    gathered_at[rows.flatten()] = torch.arange(rows.numel())
    return Packing(
        cumulative(lengths.tolist()),
        packing.positions[own],
        int(lengths.max()),
        fresh=False,
        context_rows=gathered_at[tokens],
        cu_context=cu_context,
        max_context=int(seen.max()),
    )
