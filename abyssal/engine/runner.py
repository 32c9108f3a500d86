"""The model over its latent cache: prompts in, then a few tokens at a time for every sequence at once.

The decoding step can be compiled (`compiled.py`), then for every page at once; everything else runs eagerly.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from abyssal.engine.compiled import Compiled
from abyssal.model.cache import Cache
from abyssal.model.packing import Packing
from abyssal.model.positions import rotary
from abyssal.model.transformer import Transformer

PREFILL_CHUNK = 2048  # tokens of a prompt taken at once: bounds what a long prompt needs beside its latents


class Runner:
    """`pages` sequences of up to `page_size` tokens, known by their page; at most `width` tokens of each a step."""

    def __init__(
        self,
        model: Transformer,
        pages: int,
        page_size: int,
        width: int = 1,
        compiled: bool = False,
        say: Callable[[str], None] = print,
    ) -> None:
        self.model = model
        weight = model.embed.weight
        self.device = weight.device
        self.cache = Cache.allocate(model.leaves(), pages, page_size, weight.dtype, weight.device)
        self.pages, self.width, self.compiled = pages, width, compiled
        self._step = Compiled(self._main, say) if compiled else self._main
        self._draft_step = Compiled(self._first, say) if compiled else self._first

    def _main(self, tokens: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
        states = self.model.hidden(tokens, packing, self.cache).states
        return states, self.model.logits(states)

    def _first(self, states: Tensor, ahead: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
        states = self._module(1, states, ahead, packing)
        return states, self.model.logits(states)

    def _module(self, depth: int, states: Tensor, ahead: Tensor, packing: Packing) -> Tensor:
        config = self.model.config
        layer = self.cache.layers[config.num_hidden_layers + depth - 1]
        embedded, angles = self.model.enter(ahead, packing), rotary(config, packing.positions)
        return self.model.mtp[depth - 1](states, embedded, angles, packing, layer)[0]

    def _packing(self, lengths: Sequence[int], before: Sequence[int], pages: Sequence[int]) -> Packing:
        return self.cache.contiguous_packing(lengths, before, pages, self.device)

    def clear(self, page: int) -> None:
        """Zeroes a page whose sequence failed: what is not a number there would reach the next sequence, since
        attention multiplies rows past a sequence's end by 0."""
        rows = slice(page * self.cache.page_size, (page + 1) * self.cache.page_size)
        for layer in self.cache.layers:
            for left in layer.values():
                left[rows] = 0

    def warm(self) -> None:
        """A prompt and a step of one and of `width` tokens, thrown away: on a GPU a kernel is compiled when it is
        first met, and that should not be within a request."""
        for width in {1, self.width}:
            self.prefill(0, [0, 0])
            self.decode([0], [[0] * width], [2])
        self.clear(0)

    @torch.inference_mode()
    def prefill(self, page: int, tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
        """A prompt into an empty page: (states `[T, D]`, logits `[vocab]` after its last token)."""
        states = []
        for start in range(0, len(tokens), PREFILL_CHUNK):
            chunk = torch.tensor(tokens[start : start + PREFILL_CHUNK], device=self.device)
            packing = self._packing([len(chunk)], [start], [page])
            hidden = self.model.hidden(chunk, packing, self.cache).states
            states.append(hidden if self.model.mtp else hidden[-1:])
        return torch.cat(states), self.model.logits(states[-1][-1:])[0]

    @torch.inference_mode()
    def decode(
        self, pages: Sequence[int], tokens: Sequence[Sequence[int]], before: Sequence[int]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The next few tokens of each page's sequence, after the `before` that stand in it.

        Returns for each sequence its states `[t, D]` and logits `[t, vocab]`, a row a token.
        """
        lengths = [len(t) for t in tokens]
        if self.compiled:
            flat, packing, places = self._every_page(pages, tokens, before)
            states, logits = self._step(flat, packing)
            return [states[at] for at in places], [logits[at] for at in places]
        states, logits = self._step(self._ids(tokens), self._packing(lengths, before, pages))
        return list(states.split(lengths)), list(logits.split(lengths))

    @torch.inference_mode()
    def predict(
        self,
        depth: int,
        pages: Sequence[int],
        states: Sequence[Tensor],
        ahead: Sequence[Sequence[int]],
        before: Sequence[int],
        last: Sequence[int],
    ) -> tuple[list[Tensor], Tensor]:
        """MTP module `depth`, from 1, over rows of each sequence: the states of the depth before, the token ahead
        of each row, the rows that stand in its cache already. Returns its states, and the logits `[S, vocab]` of
        row `last` of each sequence."""
        lengths = [len(t) for t in ahead]
        if self.compiled and depth == 1 and min(before) > 0:  # a decoding step, not a prompt
            flat, packing, places = self._every_page(pages, ahead, before)
            joined = states[0].new_zeros(flat.shape[0], states[0].shape[1])
            for at, rows in zip(places, states):
                joined[at] = rows
            out, logits = self._draft_step(joined, flat, packing)
            return [out[at] for at in places], torch.stack([logits[at][l] for at, l in zip(places, last)])
        packing = self._packing(lengths, before, pages)
        out = self._module(depth, torch.cat(list(states)), self._ids(ahead), packing)
        parts = out.split(lengths)
        return list(parts), self.model.logits(torch.stack([part[l] for part, l in zip(parts, last)]))

    def _ids(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor([id for row in tokens for id in row], device=self.device)

    def _every_page(
        self, pages: Sequence[int], tokens: Sequence[Sequence[int]], before: Sequence[int]
    ) -> tuple[Tensor, Packing, list[slice]]:
        """Equally many rows for every page, used or not, and where each sequence's are: a compiled step has one
        shape. What an idle page computes is written over when a sequence comes to it."""
        width = 1 if max(len(t) for t in tokens) == 1 else self.width
        rows, at = [[0] * width for _ in range(self.pages)], [0] * self.pages
        for page, own, old in zip(pages, tokens, before):
            rows[page], at[page] = [*own, *[0] * (width - len(own))], old
        places = [slice(page * width, page * width + len(own)) for page, own in zip(pages, tokens)]
        return self._ids(rows), self._packing([width] * self.pages, at, range(self.pages)), places
