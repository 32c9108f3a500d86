"""Packed batches out of a token set, each a pure function of its number."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from abyssal.data.shards import Split


@dataclass(frozen=True, eq=False)
class Batch:
    """T tokens in one flat row. A document that goes on past the batch goes on in the next one as a new sequence."""

    tokens: torch.Tensor  # [T] int64
    lengths: list[int]  # of the packed sequences, each 1 or more; their sum is T
    weights: torch.Tensor  # [T] float32: 1 where the loss counts (where a next token exists is the model's to say)


@dataclass(frozen=True)
class _Epoch:
    order: np.ndarray  # [documents] int64: which document comes when
    ends: np.ndarray  # [documents] int64: the tokens of the epoch up to and with each of them


class Batches:
    """The endless stream of a split's documents, in another order each epoch, cut into batches of T tokens.

    Batch i is the tokens [i·T, (i+1)·T) of the stream, so resuming needs only the step, and data rank r of R
    takes the batches step·R + r. Sequences are documents, cut at `max_len` and at the edges of the batch.
    """

    def __init__(self, split: Split, tokens: int, max_len: int, seed: int, shuffle: bool = True, kept: int = 2) -> None:
        """`kept`: the orders of so many epochs, the last that were asked for, stay in memory, 16 bytes a document each.

        Raises ValueError if `tokens` or `max_len` is below 1, or `seed` is not an unsigned 64-bit number.
        """
        _check(tokens, max_len)
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed {seed}: expected 0 to 2**64 - 1")
        self.split = split
        self.tokens = tokens
        self.max_len = max_len
        self.seed = seed
        self.shuffle = shuffle
        self._epoch = lru_cache(maxsize=kept)(self._make_epoch)  # other threads may ask, too

    def batch(self, step: int) -> Batch:
        """Batch number `step`, from 0. Raises ValueError if it is negative."""
        if step < 0:
            raise ValueError(f"step {step}: expected 0 or more")
        pieces: list[np.ndarray] = []
        at, end = step * self.tokens, (step + 1) * self.tokens
        while at < end:
            number, begin = divmod(at, self.split.tokens)
            epoch = self._epoch(number)
            stop = min(self.split.tokens, begin + end - at)
            pieces += _pieces(self.split, epoch, begin, stop)
            at += stop - begin
        return _pack(pieces, self.max_len)

    def from_step(self, step: int) -> Iterator[Batch]:
        """The batches from `step` on, without end; the next one is read while the last one is in use."""
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches") as thread:
            ahead = thread.submit(self.batch, step)
            while True:
                batch = ahead.result()
                step += 1
                ahead = thread.submit(self.batch, step)
                yield batch

    def _make_epoch(self, number: int) -> _Epoch:
        count = self.split.documents
        if self.shuffle:
            # Sorting Philox's raw numbers, not numpy's `permutation`: NumPy promises these bits for ever and may
            # change that function, and a run resumed under a newer NumPy must go on with the same order.
            key = np.array([self.seed, number], dtype=np.uint64)
            order = np.argsort(np.random.Philox(key=key).random_raw(count), kind="stable")
        else:
            order = np.arange(count)
        return _Epoch(order, np.cumsum(self.split.lengths[order]))


def validation_batches(split: Split, tokens: int, max_len: int) -> Iterator[Batch]:
    """Every token of the split exactly once, in order, `tokens` a batch; the last batch may be shorter.

    Raises ValueError if `tokens` or `max_len` is below 1.
    """
    _check(tokens, max_len)
    epoch = _Epoch(np.arange(split.documents), np.cumsum(split.lengths))
    for begin in range(0, split.tokens, tokens):
        yield _pack(_pieces(split, epoch, begin, min(begin + tokens, split.tokens)), max_len)


def _check(tokens: int, max_len: int) -> None:
    if tokens < 1 or max_len < 1:
        raise ValueError(f"tokens {tokens}, max_len {max_len}: expected at least 1 of each")


def _pieces(split: Split, epoch: _Epoch, begin: int, stop: int) -> list[np.ndarray]:
    """The tokens [begin, stop) of an epoch, a piece a document."""
    first, last = np.searchsorted(epoch.ends, (begin, stop - 1), side="right").tolist()
    pieces = [split.document(i) for i in epoch.order[first : last + 1].tolist()]
    after = int(epoch.ends[last]) - stop  # tokens of the last document; cut first, in case it is the first one, too
    pieces[-1] = pieces[-1][: len(pieces[-1]) - after]
    pieces[0] = pieces[0][begin - (int(epoch.ends[first]) - int(split.lengths[epoch.order[first]])) :]
    return pieces


def _pack(pieces: list[np.ndarray], max_len: int) -> Batch:
    lengths = [min(max_len, len(piece) - at) for piece in pieces for at in range(0, len(piece), max_len)]
    tokens = torch.from_numpy(np.concatenate(pieces).astype(np.int64))
    return Batch(tokens, lengths, torch.ones(len(tokens), dtype=torch.float32))
