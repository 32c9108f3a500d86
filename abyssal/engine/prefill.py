"""Prompts into the cache: chunks of several sequences in one pass, each token's row written in every layer.

All tokens of a sequence but its last go this way; the last is the first that is decoded, so that what follows a prompt
is chosen where everything else is. The MTP modules write their rows too: module d's row p joins the state of depth
d - 1 with token p + d, so after a chunk that ends before token e its rows reach to e - d, and the one state of depth
d - 1 that waits for its token is kept for the chunk to come.
"""

from collections.abc import Sequence as Several
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from abyssal.engine.decode import Head, Module
from abyssal.engine.slots import Slots, upload
from abyssal.model.packing import Packing
from abyssal.ops.sample import likeliest
from abyssal.ops.step import count_experts

LOGITS_AT_ONCE = 256  # rows whose logits are made together, where a prompt's log-probabilities are asked for


@dataclass(frozen=True)
class Chunk:
    """Tokens `start` to `end` of a sequence, of which those before `start` stand in the cache."""

    slot: int
    tokens: Several[int]  # of the whole sequence, as far as known
    pages: Several[int]
    start: int
    end: int
    origin: int  # what came from the prefix cache, where no state was kept
    logprobs: int | None = None  # of the prompt's tokens, and so many likeliest


@dataclass(frozen=True)
class PromptLogprobs:
    """Of tokens start + 1 to end of a chunk."""

    logprob: Tensor  # [t]
    top_ids: Tensor  # [t, n]
    top_logprobs: Tensor  # [t, n]


def packed(
    spans: Several[tuple[Several[int], int, int]], page_size: int, device: torch.device, fixed: int = 0
) -> Packing:
    """Rows `start` to `end` of sequences whose pages are given, everything counted on the host.

    With `fixed`, there are so many rows whatever is asked for, idle ones among them, and each is a sequence of its own.
    """
    alone = fixed > 0
    if alone:
        spans = [*spans, *[([0], 0, 1)] * (fixed - sum(end - start for _, start, end in spans))]
    lens = [end - start for _, start, end in spans]
    positions, slots, contexts = [], [], []
    fresh = not any(start for _, start, _ in spans)
    for pages, start, end in spans:
        place = np.arange(end if not fresh else end - start)
        rows = np.asarray(pages, dtype=np.int64)[place // page_size] * page_size + place % page_size
        positions.append(place[start:] if not fresh else place)
        slots.append(rows[start:] if not fresh else rows)
        contexts.append(rows)
    widest = max((-(-end // page_size) for _, _, end in spans), default=1)
    table = np.zeros((len(spans), widest), dtype=np.int64)
    for s, (pages, _, end) in enumerate(spans):
        used = -(-end // page_size)
        table[s, :used] = pages[:used]
    ends = [end for _, _, end in spans]
    if alone:  # every token a sequence of its own
        table = table.repeat(lens, 0)
        ends, lens = [int(p) + 1 for own in positions for p in own], [1] * sum(lens)
    T, S = sum(lens), len(lens)
    whole = np.concatenate([*positions, *slots, *([] if fresh or alone else contexts)])
    long = upload(whole, torch.int64, device)
    ints = [*_running(lens), *ends, *([] if fresh or alone else _running([end for _, _, end in spans]))]
    short = upload(np.concatenate((np.asarray(ints), table.ravel())), torch.int32, device)
    return Packing(
        cu_seqlens=short[: S + 1],
        positions=long[:T],
        max_len=max(lens, default=0),
        slots=long[T : 2 * T],
        block_table=short[len(ints) :].view(S, -1),
        context_lens=short[S + 1 : 2 * S + 1],
        page_size=page_size,
        fresh=fresh and not alone,
        context_rows=None if fresh or alone else long[2 * T :],
        cu_context=None if fresh or alone else short[2 * S + 1 : len(ints)],
        max_context=max(ends, default=0),
        alone=alone,
    )


def _running(sizes: Several[int]) -> list[int]:
    return [0, *np.cumsum(sizes, dtype=np.int64).tolist()]


class Prefill:
    """What goes before and after the main model's pass over chunks, for the sequences in `slots`."""

    def __init__(
        self, slots: Slots, module: Module, head: Head, modules: int, page_size: int, workspace: int,
        allowed: int | None, fixed: int = 0,
    ) -> None:  # fmt: skip
        """`workspace`: where the contexts of a pass hold more tokens than this, keys and values are not expanded.
        `fixed`: as in `packed`; no pass may have more tokens."""
        self.slots, self.module, self.head, self.modules = slots, module, head, modules
        self.page_size, self.workspace, self.allowed, self.fixed = page_size, workspace, allowed, fixed

    def prepare(self, chunks: Several[Chunk]) -> tuple[Tensor, Packing, str | None]:
        """What the main model is given for these: ids, where they lie, and the path of their attention."""
        packing = packed(
            [(c.pages, c.start, c.end) for c in chunks], self.page_size, self.slots.device, self.fixed
        )  # fmt: skip
        ids = self._ids([id for c in chunks for id in c.tokens[c.start : c.end]], packing)
        absorbs = self.fixed or sum(c.end for c in chunks) > self.workspace
        return ids, packing, "absorbed" if absorbs and not packing.fresh else None

    def finish(
        self, chunks: Several[Chunk], states: Tensor, picks: Tensor, path: str | None
    ) -> dict[int, PromptLogprobs]:  # fmt: skip
        """After the main model: the modules' rows, the experts' load, and what was asked for of the prompts' tokens, by
        slot. `states [T, D]`, `picks [layers, T, K]`, idle rows at the end; `path` is that of attention."""
        lens = [c.end - c.start for c in chunks]
        states, picks = states[: sum(lens)], picks[:, : sum(lens)]
        slots = upload(np.repeat([c.slot for c in chunks], lens), torch.int64, self.slots.device)
        count_experts(self.slots.load, slots, picks)
        if self.modules:
            self._further(chunks, states.split(lens), path)
        return {c.slot: self._logprobs(c, own) for c, own in zip(chunks, states.split(lens)) if c.logprobs is not None}

    def _further(self, chunks: Several[Chunk], rows: Several[Tensor], path: str | None) -> None:
        """The modules over the same chunks, each one row behind the one before."""
        device, kept = self.slots.device, self.slots.kept
        for depth in range(1, self.modules + 1):
            spans, states, sources = [], [], []
            ahead: list[int] = []
            for c, own in zip(chunks, rows):
                start, end = max(c.start - depth + 1, c.origin), max(c.end - depth + 1, c.origin)
                if depth > 1:
                    waiting = c.start - depth + 1 >= c.origin  # the row that lacked its token before
                    own = torch.cat((kept[depth - 2][c.slot][None], own)) if waiting else own
                    if own.shape[0]:
                        # The last row of the depth before lacks its token now.
                        kept[depth - 2][c.slot] = own[-1]
                own = own[: end - start]
                sources.append(own.shape[0])
                if end > start:
                    spans.append((c.pages, start, end))
                    states.append(own)
                    ahead += c.tokens[start + depth : end + depth]
            if not spans:
                return
            packing = packed(spans, self.page_size, device, self.fixed)
            joined = torch.cat(states)
            idle = joined.new_zeros(packing.positions.shape[0] - joined.shape[0], joined.shape[1])
            own_path = None if packing.fresh else path
            out = self.module(depth, torch.cat((joined, idle)), self._ids(ahead, packing), packing, own_path)
            rows = out[: sum(sources)].split(sources)

    def _ids(self, ids: list[int], packing: Packing) -> Tensor:
        return upload(ids + [0] * (packing.positions.shape[0] - len(ids)), torch.int64, self.slots.device)

    def _logprobs(self, chunk: Chunk, states: Tensor) -> PromptLogprobs:
        targets = upload(chunk.tokens[chunk.start + 1 : chunk.end + 1], torch.int64, self.slots.device)
        parts = []
        assert chunk.logprobs is not None
        for first in range(0, states.shape[0], LOGITS_AT_ONCE):
            some = slice(first, first + LOGITS_AT_ONCE)
            logits = self.head(states[some])[:, None]
            parts.append([t.squeeze(1) for t in likeliest(logits, targets[some, None], chunk.logprobs, self.allowed)])
        return PromptLogprobs(*(torch.cat(part).cpu() for part in zip(*parts)))
