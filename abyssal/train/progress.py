"""What a run tells while it runs: a live line on a terminal, a line now and then elsewhere."""

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from abyssal.train.metrics import Record


class Display:
    """Shows records of metrics. Loss is in nats a token, load the experts' MaxVio (mean and largest of a layer),
    mtp how much of what an MTP module drafts would be kept."""

    def __init__(self, console: Console, steps: int, done: int) -> None:
        self.console = console
        self.steps = steps
        self._validation = ""
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=16),
            TextColumn("{task.description}"),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            refresh_per_second=4,
        )
        self._task = self._progress.add_task("", total=steps, completed=done)

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.console.is_terminal:
            self._progress.stop()

    def advance(self, step: int) -> None:
        """Step `step` has been taken."""
        self._progress.update(self._task, completed=step)

    def show(self, record: Record, seconds_left: float) -> None:
        """Tells a record: on the live line, and as a line of its own where there is none or it has a validation."""
        validation = record["validation"]
        if validation is not None:
            self._validation = f"  valid {validation['bits_per_byte']:.3f} bits/B"
            if validation["mtp_accepted"]:
                self._validation += "  mtp " + "/".join(f"{share:.0%}" for share in validation["mtp_accepted"])
        load = record["max_violation"]
        balance = f"  load +{sum(load) / len(load):.2f}/+{max(load):.2f}" if load else ""
        mfu, memory, dropped = record["mfu"], record["memory_gib"], record["tokens_dropped"]
        used = f"  {dropped} dropped" if dropped else ""
        used += "" if mfu is None else f"  mfu {mfu:.1%}"
        used += "" if memory is None else f"  {memory:.1f} GiB"
        text = (
            f"loss {record['main_loss']:.3f}{self._validation}  {record['tokens_per_second']:,.0f} tok/s{balance}"
            f"{used}  norm {record['grad_norm']:.2f}  lr {record['lr']:.1e}  epoch {record['epoch']:.2f}"
        )
        self._progress.update(self._task, description=text, completed=record["step"])
        if not self.console.is_terminal or validation is not None:
            minutes, seconds = divmod(round(seconds_left), 60)
            left = f"  left {minutes}:{seconds:02d}"
            self.console.print(f"step {record['step']}/{self.steps}  {text}{left}", highlight=False, soft_wrap=True)
