"""Sequences as a tree, in which what several of them begin with is once.

Examples before many questions, and a question before its choices, so cost one pass: a segment's tokens attend to the
rows that the segments before it have left in a cache.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from abyssal.engine.prefill import packed
from abyssal.model.cache import Cache
from abyssal.model.packing import Packing
from abyssal.model.transformer import Transformer

LEAST = 16  # tokens that two sequences begin with, from which they are computed once: a further pass has its cost, too

Ids = tuple[int, ...]


class Segment(NamedTuple):
    """Tokens `start` to `end` of a sequence, and of all that share them."""

    sequence: int
    start: int
    end: int
    before: int  # the segment that ends where this begins; -1: there is none


def common(one: Ids, other: Ids) -> int:
    """How many tokens both begin with."""
    most = min(len(one), len(other))
    if one[:most] == other[:most]:
        return most
    return next(i for i, (a, b) in enumerate(zip(one, other)) if a != b)


def tree(sequences: Sequence[Ids], least: int = LEAST) -> tuple[list[Segment], list[int]]:
    """Segments, each behind the one before it, and every sequence's last. The sequences are sorted, and none is the
    beginning of another. Segments that have others behind them have `least` tokens or more."""
    shared = [common(a, b) for a, b in zip(sequences, sequences[1:])]
    segments: list[Segment] = []
    last = [-1] * len(sequences)
    left = [(0, len(sequences), 0, -1)]  # sequences from, to; the tokens of them that have a segment, and which
    while left:
        low, high, start, before = left.pop()
        if high - low == 1:
            last[low] = len(segments)
            segments.append(Segment(low, start, len(sequences[low]), before))
            continue
        fork = min(shared[low : high - 1])
        if fork - start >= least:
            segments.append(Segment(low, start, fork, before))
            start, before = fork, len(segments) - 1
        ends = [i + 1 for i in range(low, high - 1) if shared[i] == fork]
        left += [(a, b, start, before) for a, b in zip([low, *ends], [*ends, high])]
    return segments, last


@torch.no_grad()
def states_of(model: Transformer, sequences: Sequence[Ids], most: int) -> tuple[Tensor, list[NDArray[np.int64]]]:
    """The states `[n, D]` that the head reads, of each token of the tree once; and for each sequence which of them are
    its tokens'. `sequences` are those of `tree`. No pass attends to more than `most` tokens, or one sequence."""
    segments, last = tree(sequences)
    device = model.embed.weight.device
    if all(segment.before < 0 for segment in segments):
        return _alone(model, sequences, device)
    levels: list[list[int]] = []
    level_of: list[int] = []
    for i, segment in enumerate(segments):
        level_of.append(0 if segment.before < 0 else level_of[segment.before] + 1)
        if level_of[i] == len(levels):
            levels.append([])
        levels[level_of[i]].append(i)
    total = sum(s.end - s.start for s in segments)
    leaves = model.leaves()[: len(model.layers)]
    cache = Cache.allocate(leaves, total, 1, model.embed.weight.dtype, device)  # a token is a page of its own
    rows: list[NDArray[np.int64]] = [np.zeros(0, np.int64)] * len(segments)  # of all its sequence up to its end
    states, done = [], 0
    for some in (some for level in levels for some in _split(level, lambda i: segments[i].end, most)):
        ids: list[int] = []
        for i in some:
            sequence, start, end, before = segments[i]
            own = np.arange(done + len(ids), done + len(ids) + end - start)
            rows[i] = own if before < 0 else np.concatenate((rows[before], own))
            ids += sequences[sequence][start:end]
        packing = packed([(rows[i].tolist(), segments[i].start, segments[i].end) for i in some], 1, device)
        states.append(model.hidden(torch.tensor(ids, device=device), packing, cache, "expanded").states)
        done += len(ids)
    return torch.cat(states), [rows[i] for i in last]


def _alone(
    model: Transformer, sequences: Sequence[Ids], device: torch.device
) -> tuple[Tensor, list[NDArray[np.int64]]]:
    """Where nothing is shared: whole sequences, without a cache."""
    tokens = torch.tensor([id for own in sequences for id in own], device=device)
    lengths = [len(own) for own in sequences]
    starts = np.cumsum([0, *lengths])
    states = model.hidden(tokens, Packing.of(lengths, tokens)).states
    return states, [np.arange(a, b) for a, b in zip(starts, starts[1:])]


def _split(items: Sequence[int], size: Callable[[int], int], most: int) -> list[list[int]]:
    """The items in order, in lists of which no two or more are larger than `most` together."""
    lists: list[list[int]] = []
    total = 0
    for item in items:
        if not lists or total + size(item) > most:
            lists.append([])
            total = 0
        lists[-1].append(item)
        total += size(item)
    return lists
