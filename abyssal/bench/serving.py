"""What the engine is timed at: batches of fixed shape, an even crowd, and a crowd as uneven as people are."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from abyssal.engine import LLM, Sampling


@dataclass(frozen=True)
class Load:
    """Requests that come all at once."""

    name: str
    prompts: list[int]  # their lengths
    outputs: list[int]
    figure: str  # "decode": of steps in which all decode; "prefill", "output": tokens over all the time
    asked: float | None = None  # tokens a second that the project asks of one H100


@dataclass
class Timed:
    """A load, and what came of it."""

    name: str
    tokens_per_second: float
    seconds: float
    steps: int
    device_idle: float | None  # share of its time that a GPU waited between two steps
    first_token: float  # mean seconds from arrival
    asked: float | None
    cached: int


@dataclass
class EngineReport:
    """A run: what it ran on, what was timed, and the peer's rates by the same names."""

    device: str
    date: str
    versions: dict[str, str | None]
    model: str
    settings: dict[str, Any]
    rows: list[Timed] = field(default_factory=list)
    peer: dict[str, float] = field(default_factory=dict)
    startup: dict[str, float] = field(default_factory=dict)  # seconds

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def even(name: str, count: int, prompt: int, output: int, figure: str, asked: float | None = None) -> Load:
    return Load(name, [prompt] * count, [output] * count, figure, asked)


def crowd(count: int, seed: int = 0) -> Load:
    """Lengths as of conversations that people share: log-normal, prompts of about 220 tokens in the mean and answers of
    about 200, from 4 to 2048."""
    draw = np.random.default_rng(seed)
    prompts = np.clip(draw.lognormal(4.7, 1.2, count), 4, 2048).astype(int)
    outputs = np.clip(draw.lognormal(4.9, 0.9, count), 4, 1024).astype(int)
    return Load(f"{count} at once, lengths as of ShareGPT", prompts.tolist(), outputs.tolist(), "output")


def gpu_loads() -> list[Load]:
    """On one H100, for DeepSeek-V2-Lite's shape."""
    return [
        even("decode, batch 1, context 1k", 1, 1024, 128, "decode", 400),
        even("decode, batch 8, context 1k", 8, 1024, 128, "decode"),
        even("decode, batch 32, context 1k", 32, 1024, 128, "decode", 2700),
        even("decode, batch 128, context 1k", 128, 1024, 128, "decode", 9000),
        even("decode, batch 32, context 8192", 32, 8192, 96, "decode", 2200),
        even("decode, batch 1, context 16384", 1, 16384, 96, "decode"),
        even("prefill 8 × 4096", 8, 4096, 1, "prefill", 95000),
        even("256 requests, 1024 in, 128 out", 256, 1024, 128, "output", 6500),
        crowd(1000),
    ]


def small_loads() -> list[Load]:
    """What a CPU does in a minute."""
    return [
        even("decode, batch 1, context 64", 1, 64, 32, "decode"),
        even("decode, batch 4, context 64", 4, 64, 32, "decode"),
        even("prefill 2 × 128", 2, 128, 1, "prefill"),
        even("16 requests, 32 in, 16 out", 16, 32, 16, "output"),
    ]


def timed(llm: LLM, load: Load, seed: int, say: Callable[[str], None] = lambda _: None) -> Timed:
    """Runs a load once, of prompts drawn at random: whoever draws the same tokens again would find them cached."""
    draw = np.random.default_rng(seed)
    vocab = llm.model.config.vocab_size
    prompts = [draw.integers(0, vocab, n).tolist() for n in load.prompts]
    settings = [Sampling(max_tokens=n, temperature=0, ignore_eos=True) for n in load.outputs]
    say(load.name)
    engine = llm.engine
    before = (0.0, 0.0) if engine is None else (engine.metrics.idle_seconds, engine.metrics.device_seconds)
    counted = 0 if engine is None else engine.metrics.first_token.total
    full = {} if engine is None else {size: list(row) for size, row in engine.metrics.by_batch.items()}
    began = time.perf_counter()
    outputs = llm.generate(prompts, settings)
    seconds = time.perf_counter() - began
    assert all(len(o.tokens) == n for o, n in zip(outputs, load.outputs))
    assert llm.engine is not None
    metrics, totals = llm.engine.metrics, llm.totals
    idle, busy = metrics.idle_seconds - before[0], metrics.device_seconds - before[1]
    if load.figure == "decode":  # of steps with all of them: prompts come one after the other, and so do the ends
        rate = _full(metrics.by_batch, full, len(load.prompts))
    else:
        rate = sum(load.prompts if load.figure == "prefill" else load.outputs) / seconds
    return Timed(
        load.name, rate, seconds, totals.steps, idle / (idle + busy) if busy else None,
        (metrics.first_token.total - counted) / len(load.prompts), load.asked, totals.cached_tokens,
    )  # fmt: skip


def _full(now: dict[int, list[float]], before: dict[int, list[float]], size: int) -> float:
    """Tokens a second of the steps in which `size` sequences decoded."""
    _, seconds, tokens = (n - b for n, b in zip(now[size], before.get(size, [0, 0.0, 0])))
    return tokens / seconds
