"""The order in which a run reads its tokens: many places of the stream at once.

A stretch of the stream is often one long document, and a batch made of it alone would pull the model its way. So
the stream that the run will have read is laid out in equal lanes, and every step takes the next block of each lane:
the same tokens, each as often, in batches of unrelated documents.
"""

from collections import deque
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor

import torch

from abyssal.data import Batch, Batches, Split
from abyssal.model.objective import Microbatch
from abyssal.train.config import TrainConfig

AHEAD = 4  # steps read before they are wanted: making the order of a new epoch may take longer than a step


class Lanes:
    """The microbatches of every step, a pure function of the step; of `parts` readers, those of number `part`."""

    def __init__(self, split: Split, config: TrainConfig, modules: int, part: int = 0, parts: int = 1) -> None:
        """`modules`: the model's MTP modules. A block has `sequence` tokens where that divides `batch_tokens`."""
        most = max(config.batch_tokens // config.sequence, 1)
        self.lanes = next(n for n in range(most, 0, -1) if config.batch_tokens % n == 0)  # a microbatch
        self.steps, self.modules = config.steps, modules
        self.mine = range(part, config.accumulate, parts)  # of a step's microbatches
        block = config.batch_tokens // self.lanes
        # Lanes that are in the same epoch share its order; a block may lie across the border of two.
        kept = 2 * self.lanes * max(len(self.mine), 1)
        self._stream = Batches(split, block, config.sequence, config.seed, kept=kept)

    def step(self, number: int) -> list[Microbatch]:
        """Those of step `number`, from 1, on the CPU."""
        return [Microbatch.of(self._batch(i, number), self.modules) for i in self.mine]

    def _batch(self, i: int, number: int) -> Batch:
        """Microbatch i of step `number`: the next block of each of its lanes."""
        lanes = range(i * self.lanes, (i + 1) * self.lanes)
        return _joined([self._stream.batch(lane * self.steps + number - 1) for lane in lanes])

    def following(self, done: int) -> Generator[list[Microbatch]]:
        """Those of step `done + 1` and of all that follow, read while the ones before are in use."""
        thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="lanes")
        try:
            ahead = deque(thread.submit(self.step, n) for n in range(done + 1, min(done + AHEAD, self.steps) + 1))
            for number in range(done + 1, self.steps + 1):
                microbatches = ahead.popleft().result()
                if number + AHEAD <= self.steps:
                    ahead.append(thread.submit(self.step, number + AHEAD))
                yield microbatches
        finally:
            thread.shutdown(cancel_futures=True)


def _joined(batches: list[Batch]) -> Batch:
    return Batch(
        torch.cat([b.tokens for b in batches]),
        [n for b in batches for n in b.lengths],
        torch.cat([b.weights for b in batches]),
    )
