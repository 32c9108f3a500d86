"""One decoding step of a batch, the same operations whatever the sequences hold: it can be captured in a CUDA graph.

With n tokens of a sequence known, the main model is given token n - 1 and what was drafted to follow it. Of the drafts
it accepts the first a, and adds one token of its own. Then the MTP modules draft anew (DeepSeek-V3, section 2.2.3).
Module d's row p joins the state of depth d - 1 with token p + d, so with n' = n + a + 1 tokens known its rows are true
up to n' - 1 - d, and row n' - 2 joins the first of what lies beyond: the last true token, or the draft before. What was
made of a draft is made anew once the true token is known, so no module's cache ever keeps a wrong row. Drafts beyond
the number of modules chain the last one: its own state, one place further on.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from abyssal.engine.slots import Slots
from abyssal.model.packing import Packing
from abyssal.ops.sample import Adjust, Settings, draw, likeliest, verify
from abyssal.ops.step import count_experts, finish, follow, place_rows, step_rows

Main = Callable[[Tensor, Packing], tuple[Tensor, Tensor, Tensor]]
"""tokens `[T]` -> states `[T, D]`, logits `[T, vocab]`, and the experts picked `[layers, T, K]`."""
Module = Callable[[int, Tensor, Tensor, Packing, str | None], Tensor]
"""depth from 1, states of the depth before `[T, D]`, ids ahead `[T]`, attention's path -> its states `[T, D]`."""
Head = Callable[[Tensor], Tensor]


class Kind(NamedTuple):
    """What a step has to be able to do: one graph a kind."""

    sequences: int
    width: int  # tokens of each that go through the main model: 1 and its drafts
    drafts: int  # to make for the next step; 0: the modules only keep their caches up
    greedy: bool = True  # all of them
    masked: bool = False
    biased: bool = False
    penalised: bool = False
    logprobs: int | None = None  # of the token and so many likeliest


class Decoded(NamedTuple):
    """What the host is told of a step, a row a sequence."""

    accepted: Tensor  # [S, 1 + 1 + (width - 1) + drafts] int64: how many drafts, the token after them (-1: the logits
    # were not finite), the drafts that were verified, the new ones
    logprob: Tensor | None  # [S, width] of each accepted token and the one after
    top_ids: Tensor | None  # [S, width, logprobs]
    top_logprobs: Tensor | None


class Decoder:
    """The step over `slots`, which it reads and moves on."""

    def __init__(
        self, slots: Slots, main: Main, module: Module, head: Head, modules: int, page_size: int, allowed: int | None,
        alone: bool = False,
    ) -> None:  # fmt: skip
        """`allowed`: ids from it on are never taken. `alone`: every token's attention is computed by itself."""
        self.slots, self.main, self.module, self.head = slots, main, module, head
        self.modules, self.page_size, self.allowed, self.alone = modules, page_size, allowed, alone
        self._sums: dict[tuple[int, int], Tensor] = {}

    def step(
        self, order: Tensor, kind: Kind, masks: Tensor | None = None, main: Main | None = None
    ) -> Decoded:  # fmt: skip
        """`order [S]` int64: the slots, filled up with the idle one. `masks [S, width, words]`: see `ops.sample`.
        `main` runs in place of our own, where it does more in the same pass."""
        s, W = self.slots, kind.width
        rows = step_rows(order, s.known, s.last, s.tables, W, self.page_size)
        known, drafts = rows.known, rows.tokens[:, 1:]
        packing = self.packing(rows.table, rows.positions, rows.slots, rows.context_lens)
        states, logits, picks = (main or self.main)(rows.tokens.flatten(), packing)
        logits, states = logits.unflatten(0, (-1, W)), states.unflatten(0, (-1, W))
        settings = s.settings(order, kind.greedy)
        adjust = s.adjustments(order, masks, kind.biased, kind.penalised)
        probs = s.draft_probs[order, : W - 1] if s.draft_probs is not None and not kind.greedy and W > 1 else None
        accepted, token = verify(logits, drafts, probs, known, settings, self.allowed, adjust, greedy=kind.greedy)
        # What follows the n known tokens: accepted drafts, the new token, then what is drafted now.
        text = follow(drafts, accepted, token, kind.drafts)
        logprob = top_ids = top = None
        if kind.logprobs is not None:
            logprob, top_ids, top = likeliest(logits, text[:, :W], kind.logprobs, self.allowed)
        count_experts(s.load, order, picks, accepted)
        if kind.penalised and s.counts is not None:
            live = torch.arange(W, device=order.device) <= accepted[:, None]
            at = order[:, None] * s.vocab + text[:, :W]
            s.counts.view(-1).scatter_add_(0, at.flatten(), live.flatten().to(torch.int32))
        if self.modules and s.drafts:
            adjust = s.adjustments(order, None, kind.biased, False)
            text = self.draft(order, kind, rows.table, known, packing, accepted, text, states, settings, adjust)
        told = finish(order, s.count, s.known, s.last, accepted, token, drafts, text, kind.drafts)
        if s.draft_probs is not None and not kind.greedy and not kind.drafts:
            s.draft_probs[order] = torch.nn.functional.one_hot(s.last[order, 1:], s.vocab).to(torch.float32)
        return Decoded(told, logprob, top_ids, top)

    def draft(
        self, order: Tensor, kind: Kind, table: Tensor, known: Tensor, packing: Packing, accepted: Tensor,
        text: Tensor, rows: Tensor, settings: Settings, adjust: Adjust,
    ) -> Tensor:  # fmt: skip
        """`rows [S, width, D]`: the main model's states from token n - 1 on, and `packing` where these lie. Returns
        `text`, what follows the known tokens, with the drafts in it; without drafts to make, the modules only write
        their rows."""
        s, M = self.slots, self.modules
        start, at, kept = known - 1, accepted, []
        drawn: list[Tensor] = []
        for depth in range(1, (kind.drafts or M) + 1):
            if depth <= M:
                if depth > 1:  # one row back: its token ahead was not known before
                    rows = torch.cat((s.kept[depth - 2][order][:, None], rows), 1)
                    start, at = start - 1, at + 1
                rows = rows[:, : text.shape[1]]  # without drafts, the last rows will lack their token
                if depth > 1:
                    packing = self.placed(table, start, rows.shape[1])
                out = self.rows(depth, rows, text[:, : rows.shape[1]], packing)
                if depth < M:
                    kept.append(take(out, accepted))
            else:
                rows, start = take(out, at)[:, None], known + accepted - 1 + (depth - M)
                out = self.rows(M, rows, text.gather(1, accepted[:, None] + depth - 1), self.placed(table, start, 1))
                at = torch.zeros_like(accepted)
            if kind.drafts:
                logits = self.head(take(out, at))
                # The new token's position is known + accepted; the draft's lies `depth` after it.
                token, probs = draw(
                    logits, known + accepted + depth, settings, self.allowed, adjust, not kind.greedy,
                    greedy=kind.greedy,
                )  # fmt: skip
                text = text.scatter(1, accepted[:, None] + depth, token.clamp(min=0)[:, None])
                drawn += [probs] if probs is not None else []
            rows = out
        for own, row in zip(s.kept, kept):
            own.index_copy_(0, order, row)
        if drawn and s.draft_probs is not None and not kind.greedy:
            s.draft_probs[order, : kind.drafts] = torch.stack(drawn, 1).to(torch.float32)
        return text

    def rows(self, depth: int, states: Tensor, ahead: Tensor, packing: Packing) -> Tensor:
        """A module over equally many rows of each sequence, `[S, w, D]` and `[S, w]`."""
        out = self.module(depth, states.flatten(0, 1), ahead.flatten(), packing, None)
        return out.unflatten(0, (-1, states.shape[1]))

    def placed(self, table: Tensor, start: Tensor, width: int) -> Packing:
        """`width` rows of each sequence from row `start [S]` on; `table [S, P]` its pages."""
        return self.packing(table, *place_rows(table, start, width, self.page_size))

    def packing(self, table: Tensor, positions: Tensor, slots: Tensor, lens: Tensor) -> Packing:
        """Rows at `positions [S, w]`, written to `slots`; `lens [S]` is where the contexts end with them."""
        S, width = positions.shape
        if self.alone:
            table, lens, S, width = table.repeat_interleave(width, 0), (positions + 1).flatten().int(), S * width, 1
        cu = self._running(S, width, table.device)
        return Packing(
            cu, positions.flatten(), width, slots.flatten(), table, lens, self.page_size, fresh=False, alone=self.alone
        )  # fmt: skip

    def prepare(self, kind: Kind) -> None:
        """What a step keeps for the next one is made here, where a compiler should find it made."""
        for width in range(1, kind.width + self.modules):
            self._running(kind.sequences, width, self.slots.device)

    def _running(self, S: int, width: int, device: torch.device) -> Tensor:
        """`[S + 1]` int32: 0, width, 2 width ...; made once, before anything is captured."""
        if (S, width) not in self._sums:
            self._sums[S, width] = torch.arange(0, S * width + 1, width, dtype=torch.int32, device=device)
        return self._sums[S, width]


def take(rows: Tensor, at: Tensor) -> Tensor:
    """`[S, w, D]`, `at [S]` -> `[S, D]`."""
    return rows.gather(1, at[:, None, None].expand(-1, 1, rows.shape[-1])).squeeze(1)
