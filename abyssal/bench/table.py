"""The table: an operation's shapes together, our time, its share of the roof, and the best peer's."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from abyssal.bench.case import Row
from abyssal.bench.measure import Ceilings


def render(rows: list[Row], ceilings: Ceilings, versions: dict[str, str | None], device: str) -> RenderableType:
    """One table, then what failed and what was noted."""
    rate = f"{ceilings.bandwidth / 1e9:.0f} GB/s, {ceilings.wide / 1e12:.3g} TFLOP/s"
    rate += f", FP8 {ceilings.fp8 / 1e12:.3g} TFLOP/s" if ceilings.fp8 else ""
    table = Table(title=f"{device}: {rate}", title_justify="left", title_style="bold")
    table.add_column("operation and shape", overflow="fold")
    for head in ("ours", "of the roof", "best peer's", "ours/peer", "error"):
        table.add_column(head, justify="right", no_wrap=head != "best peer's")
    before = ""
    for row in rows:
        if row.case.op != before:
            table.add_section()
            table.add_row(Text(row.case.op, "bold"))
            before = row.case.op
        table.add_row(*_cells(row, ceilings))
    said = [Text(line, "dim") for line in notes(rows, versions)]
    return Group(table, *[Text(line, "red") for line in failures(rows)], *said)


def failures(rows: list[Row]) -> list[str]:
    """Ours that failed."""
    return [f"failed: {row.case.op}, {row.case.shape}: {row.ours.failure}" for row in rows if row.ours.failure]


def notes(rows: list[Row], versions: dict[str, str | None]) -> list[str]:
    """Peers that failed or were not there, and remarks on rows, each once."""
    lines = {f"{name} is not installed": None for name, version in versions.items() if version is None}
    for row in rows:
        for name, timing in row.peers.items():
            if timing.failure and not timing.failure.startswith("not installed"):
                lines[f"{name}: {row.case.op}, {row.case.shape}: {timing.failure}"] = None
        if row.case.note:
            of = f", {row.case.shape}" if any(c.isdigit() for c in row.case.note) else ""
            lines[f"{row.case.op}{of}: {row.case.note}"] = None
    return list(lines)


def line(row: Row) -> str:
    """One case in a line, for a log."""
    said = f"{row.case.op}, {row.case.shape}: "
    if not row.ours.seconds:
        return said + row.ours.failure
    return said + duration(row.ours.seconds) + (f", {row.ratio:.2f} of {row.best}" if row.ratio else "")


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def _cells(row: Row, ceilings: Ceilings) -> list[RenderableType]:
    ours, best, ratio = row.ours, row.best, row.ratio
    theirs = row.peers[best].seconds if best is not None else None
    style = "" if ratio is None else "green" if ratio <= 1 else "yellow"
    return [
        Text("  " + row.case.shape),
        duration(ours.seconds) if ours.seconds else Text("failed", "red"),
        f"{row.roof(ceilings) / ours.seconds:.0%}" if ours.seconds else "",
        f"{duration(theirs)} {best}" if theirs else "-",
        Text(f"{ratio:.2f}" if ratio else "", style),
        f"{ours.error:.1e}" if ours.error is not None else "",
    ]
