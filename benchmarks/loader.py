"""How fast a run's microbatches come from disk: packed, shifted, ready to be copied to a device.

    python benchmarks/loader.py [--tokens FOLDER] [--rate 500000] [--json FILE]

Random token sets are made in a temporary folder (--folder names another disk's), of short and of long documents; with
--tokens a real one is measured, too. For each:

- cold: tokens a second where nothing of the files is in memory; warm: read again;
- core: how much of one core the reading takes while a step eats --rate tokens a second;
- waited: the part of the time for which such a step, which leaves the cores alone, waits for its tokens.

The first step, which finds out in what order the documents come, counts in cold alone.
"""

import argparse
import gc
import json
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from abyssal.bench.machine import device_name, versions
from abyssal.data import Split, TokenSet
from abyssal.train import TrainConfig
from abyssal.train.lanes import Lanes

MEANS = (50, 1000, 30_000)  # tokens of a document
SET_TOKENS = 40_000_000
BATCHES = (32768, 65536, 131072)
SEQUENCE = 2048
STEPS = 40  # of a measurement
RUN_STEPS = 2000  # of the run that they are the first of: over how many epochs its lanes are spread
VOCAB = 16384


@dataclass(frozen=True)
class Row:
    documents: str
    batch: int  # tokens a step
    cold: float  # tokens/s
    warm: float  # tokens/s
    core: float  # of one core, at the rate
    waited: float  # of a step's time, at the rate


def made(folder: Path, mean: int) -> tuple[Path, Path]:
    """A set of random tokens in documents of log-normal lengths: the files of its tokens and offsets."""
    draw = np.random.default_rng(mean)
    lengths = draw.lognormal(np.log(mean) - 0.5, 1.0, SET_TOKENS // mean).astype(np.int64).clip(1)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    files = folder / f"{mean}.tokens", folder / f"{mean}.offsets"
    draw.integers(0, VOCAB, offsets[-1], dtype=np.uint16).tofile(files[0])
    offsets.tofile(files[1])
    return files


def opened(tokens: Path, offsets: Path) -> Split:
    """Mapped, as `TokenSet` maps its shards."""
    mapped = [np.asarray(np.memmap(file, kind, "r")) for file, kind in ((tokens, np.uint16), (offsets, np.int64))]
    return Split("train", mapped[:1], mapped[1:], 0)


def training_split(folder: Path) -> Split:
    return TokenSet.open(folder, verify=False).split("train")


def forget(files: list[Path]) -> None:
    """Nothing of the files is in memory, now that they are mapped nowhere."""
    gc.collect()
    for file in files:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(name: str, batch: int, files: list[Path], open_split: Callable[[], Split], rate: float) -> Row:
    config = TrainConfig.of(
        {"model": "tiny", "out": "nowhere", "steps": RUN_STEPS, "batch_tokens": batch, "sequence": SEQUENCE}
    )
    forget(files)
    lanes = Lanes(open_split(), config, modules=1)
    cold = taken(lanes, 0, first=True)
    warm = min((taken(lanes, 0) for _ in range(3)), key=lambda t: t.wall)
    fed = taken(lanes, batch / rate)
    read = STEPS * batch
    return Row(name, batch, read / cold.wall, read / warm.wall, fed.processor / fed.wall, fed.waited / fed.wall)


class Taken(NamedTuple):
    """Seconds."""

    wall: float
    waited: float  # for the reader
    processor: float


def taken(lanes: Lanes, step: float, first: bool = False) -> Taken:
    """What some steps cost, where each is followed by `step` seconds of waiting for a device. Without `first` another
    one comes before them, whose cost doesn't count."""
    with closing(lanes.following(0)) as stream:
        if not first:
            next(stream)
            time.sleep(step)
        waited, busy, begin = 0.0, time.process_time(), time.perf_counter()
        for _ in range(STEPS):
            asked = time.perf_counter()
            next(stream)
            waited += time.perf_counter() - asked
            time.sleep(step)
        return Taken(time.perf_counter() - begin, waited, time.process_time() - busy)


def table(rows: list[Row], rate: float) -> str:
    lines = [
        f"| documents | tokens a step | cold, tokens/s | warm, tokens/s | core at {rate:,.0f}/s | waited |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for r in rows:
        speeds = f"{r.cold:,.0f} | {r.warm:,.0f} | {r.core:.1%} | {r.waited:.1%}"
        lines.append(f"| {r.documents} | {r.batch:,} | {speeds} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=Path, help="a token set to measure, too")
    parser.add_argument("--folder", type=Path, help="where the random sets are written, for a while")
    parser.add_argument("--rate", type=float, default=500_000, help="tokens a second that a step eats")
    parser.add_argument("--json", type=Path, help="write every number into this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # as beside a step, whose host thread wants the other cores
    rows = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        for mean in MEANS:
            tokens, offsets = made(Path(temporary), mean)
            for batch in BATCHES:
                name, read = f"random, {mean:,} tokens", partial(opened, tokens, offsets)
                rows.append(measure(name, batch, [tokens, offsets], read, arguments.rate))
    if arguments.tokens is not None:
        files = sorted(arguments.tokens.glob("train-*.*"))
        for batch in BATCHES:
            read = partial(training_split, arguments.tokens)
            rows.append(measure(arguments.tokens.name, batch, files, read, arguments.rate))
    print(table(rows, arguments.rate))
    if arguments.json is not None:
        found = {
            "device": device_name("cpu"),
            "versions": versions(False),
            "rate": arguments.rate,
            "rows": [asdict(row) for row in rows],
        }
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
