"""What the workers of `cpu.py` share: the job they are given, their clocks, their memory.

Standard library only, since llama.cpp's worker may run under an interpreter that has nothing else of ours. A worker is
a process that measures one cell of one engine and prints one line of JSON.
"""

import json
import random
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

MARK = "RESULT "
WARM_STEPS = 4
LEAST_STEPS = 4  # of a timed pass, however slow
COMPARED_LOSSES = 3  # training steps whose losses are compared between the engines


@dataclass(frozen=True)
class Job:
    """One cell of one engine."""

    engine: str  # abyssal, transformers or llama.cpp
    kind: str  # logits, routing, prefill, decode, train, memory or bandwidth
    model: str  # a public-format folder, or a GGUF file
    dtype: str  # float32 or bfloat16
    vocab: int
    batch: int = 1
    context: int = 0  # tokens of a sequence: before the first step, of the prompt, or trained on
    steps: int = 64  # of a decoding pass, at most
    seconds: float = 15.0  # after which a decoding pass ends early
    passes: int = 2
    threads: int = 2
    variant: dict[str, Any] = field(default_factory=dict)  # the engine's own settings
    out: str = ""  # where arrays are written

    @staticmethod
    def received() -> "Job":
        return Job(**json.loads(sys.argv[1]))

    def text(self) -> str:
        return json.dumps(asdict(self))


def report(result: dict[str, Any]) -> None:
    """What the parent reads: the last line that begins with MARK."""
    print(MARK + json.dumps(result), flush=True)


def random_tokens(count: int, vocab: int, seed: int) -> list[int]:
    """Uniform ids from 3 on, the same for every engine: ids that repeat would route every token to the same experts."""
    draw = random.Random(seed)
    return [draw.randrange(3, vocab) for _ in range(count)]


def prompt(job: Job, length: int | None = None) -> list[int]:
    return random_tokens(job.context if length is None else length, job.vocab, seed=1)


def step_tokens(job: Job) -> list[list[int]]:
    """What is fed at each decoding step, an id a sequence. The engine's own greedy choice is made and timed, and not
    fed back: greedy text of random weights soon repeats itself, and would meet few experts."""
    flat = random_tokens(job.steps * job.batch, job.vocab, seed=2)
    return [flat[i : i + job.batch] for i in range(0, len(flat), job.batch)]


def decode_rates(step: Callable[[int, list[int]], object], rewind: Callable[[], None], job: Job) -> list[float]:
    """Tokens a second over all sequences, a number for each timed pass after a short one to warm up.

    `step(i, tokens)` takes one token a sequence at the place `context + i` and chooses the next greedily; `rewind()`
    puts the cache back to `context` tokens.
    """
    tokens = step_tokens(job)
    rewind()
    for i in range(min(WARM_STEPS, job.steps)):
        step(i, tokens[i])
    rates = []
    for _ in range(job.passes):
        rewind()
        done, start = 0, time.perf_counter()
        while done < job.steps and (done < LEAST_STEPS or time.perf_counter() - start < job.seconds):
            step(done, tokens[done])
            done += 1
        rates.append(done * job.batch / (time.perf_counter() - start))
    return rates


def call_rates(call: Callable[[], object], tokens: int, job: Job) -> list[float]:
    """Tokens a second of each timed call, after one to warm up; at least three calls of a short one a pass."""
    start = time.perf_counter()
    call()
    warm = time.perf_counter() - start
    rates = []
    for _ in range(job.passes * (3 if warm < 2 else 1)):
        start = time.perf_counter()
        call()
        rates.append(tokens / (time.perf_counter() - start))
    return rates


class MemoryWatch:
    """Samples this process's anonymous resident memory every 2 ms, in a thread; `phase(name)` begins a new peak.

    Files that are only mapped do not count; what is copied out of them does.
    """

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}
        self._name = "start"
        self._running = True
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def phase(self, name: str) -> None:
        self._sample()
        self._name = name
        self._sample()

    def stop(self) -> dict[str, int]:
        """The peak of each phase in bytes."""
        self._sample()
        self._running = False
        self._thread.join()
        return self.peaks

    def _sample(self) -> None:
        self.peaks[self._name] = max(self.peaks.get(self._name, 0), anonymous_bytes())

    def _watch(self) -> None:
        while self._running:
            self._sample()
            time.sleep(0.002)


def anonymous_bytes() -> int:
    """Resident memory of this process that no file backs. Linux alone tells."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon")
