"""What the engine counts: plain numbers, read by the progress bar, the server's `/metrics` and the page."""

import time
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


@dataclass
class Histogram:
    """Counts of values in seconds: `counts[i]` are those of at most `SECONDS[i]` and above the one before; the last
    are those above all."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(SECONDS) + 1))
    total: float = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(SECONDS, seconds)] += 1
        self.total += seconds

    def snapshot(self) -> dict[str, Any]:
        return {"bounds": list(SECONDS), "counts": list(self.counts), "sum": self.total, "count": sum(self.counts)}


@dataclass
class Metrics:
    """Counters only grow; gauges are as of the last step."""

    started: float = field(default_factory=time.monotonic)
    # gauges
    running: int = 0
    waiting: int = 0
    pages_total: int = 0
    pages_free: int = 0  # those that hold a prefix nobody uses now are free, too
    pages_cached: int = 0  # free, and hold a prefix
    page_bytes: int = 0
    cached_rows: int = 0  # tokens of running sequences that stand in the cache
    mha_bytes_a_token: int = 0
    latent_bytes_a_token: int = 0
    tokens_per_second: float = 0.0  # generated, over the last second or so
    speculating: bool = False  # whether the last step drafted
    # counters
    requests: int = 0
    steps: int = 0
    prompt_tokens: int = 0  # of prompts taken in
    cached_tokens: int = 0  # of these, found in the prefix cache
    generated_tokens: int = 0
    preemptions: int = 0
    evicted_pages: int = 0
    copied_pages: int = 0
    step_seconds: float = 0.0
    decode_seconds: float = 0.0  # of steps without prompts
    decoded_tokens: int = 0  # generated in those
    idle_seconds: float = 0.0  # of a GPU, between the steps of a call
    device_seconds: float = 0.0  # of a GPU, in steps
    by_batch: dict[int, list[float]] = field(default_factory=dict)  # decoding: sequences -> steps, seconds, tokens
    drafted: list[int] = field(default_factory=list)  # by position in the draft
    accepted: list[int] = field(default_factory=list)
    finished: Counter[str] = field(default_factory=Counter)  # by Finish
    expert_load: list[list[int]] = field(default_factory=list)  # by layer with experts, tokens to each expert
    queue_time: Histogram = field(default_factory=Histogram)
    first_token: Histogram = field(default_factory=Histogram)
    between_tokens: Histogram = field(default_factory=Histogram)

    def snapshot(self) -> dict[str, Any]:
        """Everything as plain JSON; names as above, histograms as `Histogram.snapshot`."""
        plain = {name: value for name, value in vars(self).items() if name != "started"}
        for name, value in plain.items():
            if isinstance(value, Histogram):
                plain[name] = value.snapshot()
            elif isinstance(value, Counter):
                plain[name] = dict(value)
            elif isinstance(value, dict):
                plain[name] = {str(key): list(row) for key, row in value.items()}
            elif isinstance(value, list):
                plain[name] = [list(v) if isinstance(v, list) else v for v in value]
        plain["uptime"] = time.monotonic() - self.started
        return plain
