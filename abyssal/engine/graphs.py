"""Decoding steps captured as CUDA graphs: a step of a thousand launches becomes one.

A graph is of a `Kind` and of a number of sequences from a ladder; a batch is filled up to the next rung with idle
sequences. All share one pool of memory, since one runs after the other.
"""

from collections import OrderedDict
from collections.abc import Sequence as Several

import torch
from torch import Tensor

from abyssal.engine.decode import Decoded, Decoder, Kind

FURTHER = 64  # graphs that are kept of kinds that were not asked for at the start; the least used goes


def ladder(most: int) -> list[int]:
    """1, 2, 4, then by 8 to 64, by 16 to 256, by 32 on; `most` is the last."""
    rungs = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max(most, 256) + 1, 32)]
    return [*(r for r in rungs if r < most), most]


class Graphs:
    """`Decoder.step`, replayed where it has been captured before; captured where it hasn't."""

    def __init__(self, decoder: Decoder, most: int, words: int) -> None:
        """`most` sequences; masks of `words` int32 a row."""
        self.decoder, self.rungs, self.words = decoder, ladder(most), words
        self._captured: OrderedDict[Kind, tuple[torch.cuda.CUDAGraph, Tensor, Tensor | None, Decoded]] = OrderedDict()
        self._warm: set[Kind] = set()
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, order: Tensor, kind: Kind, masks: Tensor | None = None) -> Decoded:
        """As `Decoder.step`. What it returns is written over by the next call."""
        if kind not in self._captured:
            others = [k for k in self._captured if k not in self._warm]
            if len(others) >= FURTHER:
                del self._captured[others[0]]
            self.capture(kind)
        self._captured.move_to_end(kind)
        graph, own_order, own_masks, result = self._captured[kind]
        own_order.copy_(order, non_blocking=True)
        if own_masks is not None and masks is not None:
            own_masks.copy_(masks, non_blocking=True)
        graph.replay()
        return result

    def capture(self, kind: Kind) -> None:
        """All sequences idle, so that what a warm-up writes is nobody's."""
        device = self.decoder.slots.device
        order = torch.full((kind.sequences,), self.decoder.slots.count, dtype=torch.int64, device=device)
        masks = None
        if kind.masked:
            masks = torch.full((kind.sequences, kind.width, self.words), -1, dtype=torch.int32, device=device)
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(2):  # the first compiles kernels and makes workspaces, which a capture may not
                self.decoder.step(order, kind, masks)
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            result = self.decoder.step(order, kind, masks)
        self._captured[kind] = (graph, order, masks, result)

    def rung(self, sequences: int) -> int:
        return next(r for r in self.rungs if r >= sequences)

    def warm(self, kinds: Several[Kind]) -> None:
        """Captures these, the largest first, so that the pool's memory is as large as it will be."""
        for kind in sorted(kinds, key=lambda k: -k.sequences):
            if kind not in self._captured:
                self.capture(kind)
            self._warm.add(kind)
