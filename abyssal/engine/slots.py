"""What the device knows of every running sequence: a row a slot, so that a step needs no word of the host.

A slot is a sequence's place among those that run. The row after the last slot is nobody's: a batch is filled up with
it, one token whose page is the scratch page.
"""

from collections.abc import Sequence as Several
from typing import Any

import numpy as np
import torch
from torch import Tensor

from abyssal.engine.sampling import Sampling
from abyssal.ops.device import sent
from abyssal.ops.sample import Adjust, Settings


def upload(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A list or array to the device, without waiting for it."""
    return sent(torch.as_tensor(np.asarray(values)).to(dtype), device)


class Slots:
    """`count` slots of up to `columns` pages each; steps of up to `drafts` drafted tokens."""

    def __init__(
        self, count: int, columns: int, drafts: int, modules: int, width: int, vocab: int, load: tuple[int, int],
        dtype: torch.dtype, device: torch.device,
    ) -> None:  # fmt: skip
        def rows(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(count + 1, *shape, dtype=dtype, device=device)

        self.count, self.columns, self.drafts, self.vocab, self.device = count, columns, drafts, vocab, device
        self.tables = rows(columns, dtype=torch.int32)  # each slot's pages
        self.known = rows(dtype=torch.int64) + 1  # tokens of the sequence; all but the last stand in the cache
        self.last = rows(1 + drafts, dtype=torch.int64)  # its last token, and what was drafted to follow it
        # The state of depth d's last row that was made of known tokens alone, for d = 1 to modules - 1.
        self.kept = [rows(width, dtype=dtype) for _ in range(modules - 1)]
        self.load = rows(*load, dtype=torch.int32)  # tokens that each layer sent to each expert
        self.past_load = torch.zeros(load, dtype=torch.int64, device=device)  # of sequences that are gone
        self.temperature, self.top_p, self.min_p = (rows(dtype=torch.float32) for _ in range(3))
        self.top_k, self.seed = rows(dtype=torch.int32), rows(dtype=torch.int64)
        # What drafts were drawn from. There from the start, since steps are captured before anybody samples.
        self.draft_probs = rows(drafts, vocab, dtype=torch.float32) if drafts else None
        # Made when first asked for: a row is as wide as the vocabulary.
        self.bias: Tensor | None = None  # [count + 1, vocab]
        self.counts: Tensor | None = None  # [count + 1, vocab] int32: of each id in the output
        self.seen: Tensor | None = None  # [count + 1, vocab] bool: in the prompt
        self.penalties: Tensor | None = None  # [count + 1, 3]: repetition, presence, frequency

    def write_tables(self, updates: Several[tuple[int, int, int]]) -> None:
        """Each (slot, column, page)."""
        if updates:
            at = upload(updates, torch.int64, self.device)
            self.tables[at[:, 0], at[:, 1]] = at[:, 2].to(torch.int32)

    def enter(self, slot: int, known: int, last: int, sampling: Sampling, seed: int) -> None:
        """A sequence that is ready to be decoded. It has no drafts yet: its last token stands for them."""
        place = upload([slot, known, seed, last], torch.int64, self.device)
        at = place[:1]
        self.known[at], self.seed[at] = place[1:2], place[2:3]
        self.last[at] = place[3:4]
        numbers = upload([sampling.temperature, sampling.top_p, sampling.min_p], torch.float32, self.device)
        temperature = numbers[:1]
        self.temperature[at] = temperature * 0 if sampling.greedy else temperature
        self.top_p[at], self.min_p[at] = numbers[1:2], numbers[2:3]
        self.top_k[at] = upload([min(sampling.top_k, self.vocab)], torch.int32, self.device)
        if self.draft_probs is not None and not sampling.greedy:
            self.draft_probs[at] = 0
            self.draft_probs[at, :, place[3:4]] = 1
        if self.bias is not None:
            self.bias[at] = 0
        if self.penalties is not None:
            self.penalties[at] = upload([[1.0, 0.0, 0.0]], torch.float32, self.device)

    def adjust(self, slot: int, sampling: Sampling, prompt: Several[int], output: Several[int]) -> None:
        """Biases and penalties of a sequence that has some; after `enter`."""
        if sampling.logit_bias:
            if self.bias is None:
                self.bias = torch.zeros(self.count + 1, self.vocab, device=self.device)
            ids, values = zip(*sampling.logit_bias)
            self.bias[slot, upload(ids, torch.int64, self.device)] = upload(values, torch.float32, self.device)
        if sampling.penalised:
            if self.penalties is None or self.counts is None or self.seen is None:
                self.penalties = torch.zeros(self.count + 1, 3, device=self.device)
                self.penalties[:, 0] = 1
                self.counts = torch.zeros(self.count + 1, self.vocab, dtype=torch.int32, device=self.device)
                self.seen = torch.zeros(self.count + 1, self.vocab, dtype=torch.bool, device=self.device)
            self.penalties[slot] = upload(
                [sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty],
                torch.float32, self.device,
            )  # fmt: skip
            counts = np.bincount(np.asarray(output, dtype=np.int64), minlength=self.vocab)
            self.counts[slot] = upload(counts, torch.int32, self.device)
            self.seen[slot] = False
            self.seen[slot, upload(prompt, torch.int64, self.device)] = True

    def vacate(self, slots: Several[int]) -> None:
        """New sequences come to these slots: what those before left there is counted, and gone."""
        if not slots:
            return
        at = upload(slots, torch.int64, self.device)
        for kept in self.kept:  # may be no number, and a text shorter than the modules' depth reads it
            kept[at] = 0
        if self.load.numel():
            self.past_load += self.load[at].sum(0)
            self.load[at] = 0

    def total_load(self) -> list[list[int]]:
        """Of all sequences so far. Waits for the device."""
        return (self.past_load + self.load.sum(0)).tolist()

    def copy(self, source: int, target: int) -> None:
        """What a forked sequence shares with the one it comes from, beside pages."""
        for kept in self.kept:
            kept[target] = kept[source]

    def settings(self, order: Tensor, greedy: bool) -> Settings:
        """Of the slots in `order`; where all are greedy nobody looks at them, and they are of any."""
        if greedy:
            rows = order.shape[0]
            return Settings(
                self.temperature[:rows], self.top_k[:rows], self.top_p[:rows], self.min_p[:rows], self.seed[:rows]
            )
        return Settings(
            self.temperature[order], self.top_k[order], self.top_p[order], self.min_p[order], self.seed[order]
        )

    def adjustments(self, order: Tensor, masks: Tensor | None, biased: bool, penalised: bool) -> Adjust:
        """What changes the logits of the slots in `order`; `masks` as `Adjust.mask`."""
        bias = self.bias[order] if biased and self.bias is not None else None
        if not penalised or self.penalties is None or self.counts is None or self.seen is None:
            return Adjust(bias, masks, None, None, None, None, None)
        return Adjust(bias, masks, self.counts[order], self.seen[order], *self.penalties[order].unbind(1))
