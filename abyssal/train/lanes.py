"""The order in which a run reads its tokens: many places of the stream at once.

A stretch of the stream is often one long document, and a batch made of it alone would pull the model its way. So
the stream that the run will have read is laid out in equal lanes, and every step takes the next block of each lane:
the same tokens, each as often, in batches of unrelated documents.
"""

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor

import torch

from abyssal.data import Batch, Batches, Split
from abyssal.model.objective import Microbatch
from abyssal.train.config import TrainConfig


class Lanes:
    """The microbatches of every step, a pure function of the step."""

    def __init__(self, split: Split, config: TrainConfig, modules: int) -> None:
        """`modules`: the model's MTP modules. A block has `sequence` tokens where that divides `batch_tokens`."""
        most = max(config.batch_tokens // config.sequence, 1)
        self.lanes = next(n for n in range(most, 0, -1) if config.batch_tokens % n == 0)  # a microbatch
        self.steps, self.accumulate, self.modules = config.steps, config.accumulate, modules
        block = config.batch_tokens // self.lanes
        # One reader a lane: each keeps the order of the epoch that its lane has come to.
        self._readers = [
            Batches(split, block, config.sequence, config.seed) for _ in range(self.lanes * config.accumulate)
        ]

    def step(self, number: int) -> list[Microbatch]:
        """Those of step `number`, from 1, on the CPU."""
        blocks = [reader.batch(lane * self.steps + number - 1) for lane, reader in enumerate(self._readers)]
        parts = [blocks[i * self.lanes : (i + 1) * self.lanes] for i in range(self.accumulate)]
        return [Microbatch.of(_joined(part), self.modules) for part in parts]

    def following(self, done: int) -> Generator[list[Microbatch]]:
        """Those of step `done + 1` and of all that follow, each read while the one before is in use."""
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="lanes") as thread:
            ahead = thread.submit(self.step, done + 1)
            for number in range(done + 1, self.steps + 1):
                microbatches = ahead.result()
                if number < self.steps:
                    ahead = thread.submit(self.step, number + 1)
                yield microbatches


def _joined(batches: list[Batch]) -> Batch:
    return Batch(
        torch.cat([b.tokens for b in batches]),
        [n for b in batches for n in b.lengths],
        torch.cat([b.weights for b in batches]),
    )
