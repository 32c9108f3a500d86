"""The live line of an offline call: samples done, tokens a second, drafts accepted."""

from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from abyssal.engine.request import Piece, Totals


def shown(pieces: Iterator[Piece], samples: int, totals: Callable[[], Totals]) -> Iterator[Piece]:
    """Passes pieces on, and draws what has come of `samples` on the standard error."""
    columns = (
        TextColumn("generating"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[said]}"),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=samples, said="")
        for piece in pieces:
            rate = totals().acceptance
            said = f"{totals().tokens_per_second:,.1f} tokens/s" + (f", {rate:.0%} of drafts accepted" if rate else "")
            bar.update(task, advance=int(piece.output is not None), said=said)
            yield piece
