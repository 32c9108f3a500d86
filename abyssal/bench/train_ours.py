"""Our rows: the Trainer that `abyssal train` runs, given microbatches.

    python -m abyssal.bench.train_ours VARIANT SHAPE

VARIANT is `base`, `accumulated`, `mtp`, `fp8`, or `recompute MODE`; SHAPE a `Shape` in JSON.
"""

import math
import random
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from statistics import median

import torch

from abyssal.bench.train_rows import Later, Measured, Row, Shape, alike, attempt, timed
from abyssal.data import Batch
from abyssal.data.shards import TokenSet
from abyssal.model.objective import Microbatch
from abyssal.train.config import TrainConfig
from abyssal.train.trainer import Trainer

SHORTEST = 16  # of the packed documents
RECOMPUTE = ("cheap", "up", "experts", "block")  # see abyssal.train.recompute
AHEAD = 8  # different batches that a row goes round; more would only take the host's memory


def variants() -> list[str]:
    """All there are, with what TrainConfig offers."""
    fp8 = ["fp8"] if "fp8" in TrainConfig.model_fields else []
    return ["base", "mtp", "accumulated", *(f"recompute {mode}" for mode in RECOMPUTE), *fp8]


def even(shape: Shape, draw: random.Random) -> list[int]:
    """The lengths of a batch that is not packed."""
    return [shape.sequence] * shape.batch


def uneven(shape: Shape, draw: random.Random) -> list[int]:
    """Lengths of documents, log-uniform from SHORTEST to the sequence, with as many tokens; the last is cut."""
    low, high, lengths, left = math.log(min(SHORTEST, shape.sequence)), math.log(shape.sequence), [], shape.tokens
    while left:
        lengths.append(min(round(math.exp(draw.uniform(low, high))), left))
        left -= lengths[-1]
    return lengths


def microbatches(shape: Shape, lengths: Callable[[Shape, random.Random], list[int]], modules: int) -> list[Microbatch]:
    """AHEAD of them, of random tokens, on the CPU, as the loader gives them."""
    draw, vocabulary = random.Random(0), shape.config().vocab_size
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(AHEAD):
        tokens = torch.randint(0, vocabulary, (shape.tokens,), generator=generator)
        made.append(Microbatch.of(Batch(tokens, lengths(shape, draw), torch.ones(shape.tokens)), modules))
    return made


def stepping(trainer: Trainer, made: Sequence[Microbatch], count: int = 1) -> Callable[[int], Later]:
    """Steps of `count` microbatches each."""
    return lambda i: _step(trainer, [made[(i * count + j) % len(made)] for j in range(count)])


def _step(trainer: Trainer, batches: Sequence[Microbatch]) -> Later:
    taken = trainer.step(batches)
    return lambda: taken.main_loss  # to read it is to wait for it


def build(shape: Shape, variant: str) -> Trainer:
    modules, settings = int(variant == "mtp"), [*shape.settings]
    if variant.startswith("recompute "):
        settings.append(f"recompute={variant.removeprefix('recompute ')}")
    elif variant == "fp8":
        settings.append("fp8=true")
    elif variant == "accumulated":
        settings.append(f"accumulate={shape.accumulate}")
    config = TrainConfig.read(shape.run, [*settings, f"model.num_nextn_predict_layers={modules}"])
    assert config.data is not None
    return Trainer(config, config.model_settings(), TokenSet.open(config.data))


def run(shape: Shape, variant: str) -> None:
    """Says the rows of a variant."""
    made: list[Trainer] = []
    count = shape.accumulate if variant == "accumulated" else 1

    def first(row: Row) -> Measured:
        trainer = build(shape, variant)
        made.append(trainer)
        row.note = str(trainer.dtype).removeprefix("torch.")
        if count > 1:
            row.note += f", {count} microbatches a step"
        batches = microbatches(shape, even, int(variant == "mtp"))
        found = timed(stepping(trainer, batches, count), 1 if count > 1 else shape.warm, row.steps, shape.device)
        trainer.check()
        return found

    steps = shape.steps if count == 1 else max(2, shape.steps // count)
    attempt(Row("abyssal", variant, shape.tokens * count, steps), first)
    if variant == "base" and made:
        for name, measure in (
            ("packed", _packed),
            ("documents in memory", _from_memory),
            ("documents from disk", _from_disk),
            ("loader alone", _loader),
        ):
            attempt(Row("abyssal", name, shape.tokens, shape.steps), partial(measure, made[0], shape))


def _packed(trainer: Trainer, shape: Shape, row: Row) -> Measured:
    batches = microbatches(shape, uneven, 0)
    _describe(row, batches)
    return timed(stepping(trainer, batches), shape.warm, shape.steps, shape.device)


def _from_memory(trainer: Trainer, shape: Shape, row: Row) -> Measured:
    """What `_from_disk` takes, read before."""
    batches = [micro for number in range(shape.warm + shape.steps) for micro in trainer.lanes.step(number + 1)]
    _describe(row, batches)
    return timed(stepping(trainer, batches), shape.warm, shape.steps, shape.device)


def _from_disk(trainer: Trainer, shape: Shape, row: Row) -> Measured:
    """Steps on what the loader reads meanwhile."""
    row.context = alike(_lengths(trainer.lanes.step(1)))
    row.note = "the same, read meanwhile"
    with closing(trainer.lanes.following(0)) as stream:
        return timed(lambda i: _step(trainer, next(stream)), shape.warm, shape.steps, shape.device)


def _loader(trainer: Trainer, shape: Shape, row: Row) -> Measured:
    """What one thread of the loader delivers."""
    row.note = "read and packed, by one thread"
    times = []
    for number in range(1, shape.warm + shape.steps + 1):
        began = time.perf_counter()
        trainer.lanes.step(number)
        times.append(time.perf_counter() - began)
    return Measured(median(times[shape.warm :]) * 1e3, None, None)


def _describe(row: Row, batches: Sequence[Microbatch]) -> None:
    lengths = _lengths(batches)
    row.context = alike(lengths)
    row.note = f"documents and pieces of {sum(lengths) / len(lengths):.0f} tokens in the mean"


def _lengths(batches: Sequence[Microbatch]) -> list[int]:
    """Of the packed sequences."""
    return [n for micro in batches for n in micro.packing.cu_seqlens.diff().tolist()]


if __name__ == "__main__":
    run(Shape.parse(sys.argv[2]), sys.argv[1])
