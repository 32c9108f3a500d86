"""Drafting with the MTP modules that were trained (DeepSeek-V3, section 2.2.3).

With n tokens known, module d's rows are true up to n - 1 - d: row p joins the state of depth d-1 with token p + d.
Module 1's last row says what follows the known tokens; module 2's needs that draft, and so on. What was made of a
draft is made anew once the true token is known, so that no module's cache ever keeps a wrong row. Drafts beyond the
number of modules chain the last one: its own state, one place further on.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from abyssal.engine.request import Request
from abyssal.engine.runner import Runner
from abyssal.engine.sampling import sample


@dataclass
class Speculated:
    """A request and what the main model has just added to it."""

    request: Request
    page: int
    kept: list[Tensor] = field(default_factory=list)  # depth d's state at its last true row, [1, D] each


class Drafter:
    """Drafts `count` tokens a request."""

    def __init__(self, runner: Runner, count: int) -> None:
        self.runner, self.count = runner, count
        self.modules = len(runner.model.mtp)

    def draft(self, group: Sequence[Speculated], states: Sequence[Tensor], before: Sequence[int]) -> None:
        """Sets every request's `drafts` and `draft_probs`. `states[s]` `[t, D]` are the main model's for rows
        `before[s]` and on; rows past the last known token but one are of rejected drafts, and mean nothing."""
        for s in group:
            s.request.drafts, s.request.draft_probs = [], []
        known = [len(s.request.tokens) for s in group]
        pages = [s.page for s in group]
        rows, starts = list(states), list(before)
        kept: list[list[Tensor]] = [[] for _ in group]
        for depth in range(1, self.count + 1):
            module = min(depth, self.modules)
            if depth > self.modules:  # the last module again, one place further
                starts = [n - 2 + depth - module for n in known]
            elif depth > 1:
                rows, starts = self._one_row_back(group, rows, starts, module - 1)
            ends = [n - 2 + max(depth - module, 0) for n in known]  # the row that drafts
            ahead = [self._ahead(s.request, start, len(r), module) for s, start, r in zip(group, starts, rows)]
            last = [end - start for end, start in zip(ends, starts)]
            out, logits = self.runner.predict(module, pages, rows, ahead, starts, last)
            if depth <= self.modules:
                for keep, o, start, n in zip(kept, out, starts, known):
                    true = max(n - 1 - module - start, 0)  # the last row that was made of known tokens alone
                    keep.append(o[true : true + 1])
            for s, row in zip(group, logits):
                self._choose(s.request, row)
            if depth < self.modules:
                rows = [o[: l + 1] for o, l in zip(out, last)]
            else:
                rows = [o[l : l + 1] for o, l in zip(out, last)]
        for s, keep in zip(group, kept):
            s.kept = keep

    def _ahead(self, request: Request, start: int, count: int, module: int) -> list[int]:
        """The token `module` places ahead of each row; 0 for rows past what is known and drafted."""
        tokens = request.tokens + request.drafts
        wanted = tokens[start + module : start + module + count]
        return wanted + [0] * (count - len(wanted))

    def _one_row_back(
        self, group: Sequence[Speculated], rows: list[Tensor], starts: list[int], depth: int
    ) -> tuple[list[Tensor], list[int]]:
        """A module's first row lies one before its predecessor's: the row whose token ahead was not known yet."""
        back = [torch.cat((s.kept[depth - 1], r)) if at else r for s, r, at in zip(group, rows, starts)]
        return back, [max(at - 1, 0) for at in starts]

    def _choose(self, request: Request, logits: Tensor) -> None:
        if request.sampling.greedy and not request.sampling.penalised:
            request.drafts.append(int(logits[: request.allowed].argmax()))
            return
        # A row of logits for every draft before this one, so that penalties count them.
        rows = logits.expand(len(request.drafts) + 1, -1)
        probs = request.probabilities(rows, request.drafts)[-1]
        request.drafts.append(sample(probs, request.generator))
        request.draft_probs.append(probs)
