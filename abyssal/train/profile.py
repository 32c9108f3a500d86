"""A profile of a few steps: a Chrome trace, and a table of what took the time."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

SKIPPED, WARMED, TAKEN = 3, 1, 2  # steps: compiled and settled in, seen and thrown away, kept
ROWS = 30


class Profile:
    """Of the fifth and the sixth step that are taken while it lasts; then its files are there."""

    def __init__(self, folder: Path, device: torch.device, rank: int = 0) -> None:
        self.trace, self.table = folder / f"trace-{rank}.json.gz", folder / f"table-{rank}.txt"
        self.order = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
        self.activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        self.written = False
        folder.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def steps(self) -> Iterator["profile"]:
        """While this lasts, `step()` on what it gives tells that a step has ended."""
        plan = schedule(wait=SKIPPED, warmup=WARMED, active=TAKEN, repeat=1)
        with profile(activities=self.activities, schedule=plan, on_trace_ready=self._write, record_shapes=True) as seen:
            yield seen

    @property
    def told(self) -> str:
        """What came of it."""
        if self.written:
            return f"{self.trace}, {self.table}"
        return f"none: it begins after {SKIPPED + WARMED} steps, and this start took no more"

    def _write(self, seen: "profile") -> None:
        if seen.step_num <= SKIPPED + WARMED:  # ended before a step was
            return
        seen.export_chrome_trace(str(self.trace))
        table = seen.key_averages().table(sort_by=self.order, row_limit=ROWS, max_name_column_width=80)
        self.table.write_text(table + "\n", "utf-8")
        self.written = True
