"""What a study found. Plain data: it can be saved, read back, sent between processes and put on a page."""

import dataclasses
import io
import json
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from abyssal.bench.machine import device_name


@dataclass(frozen=True)
class Grid:
    """A table. Its cells are text already; the first `labels` columns are words, the others numbers."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    labels: int = 1

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.head):
                raise ValueError(f"{self.title}: expected {len(self.head)} cells a row, got {row}")

    def render(self) -> Group:
        table = Table(title=Text(self.title), title_justify="left", title_style="bold", show_edge=False, pad_edge=False)
        for i, name in enumerate(self.head):
            table.add_column(Text(name), justify="left" if i < self.labels else "right")
        for row in self.rows:
            table.add_row(*(Text(cell) for cell in row))
        return Group(table, *([Text(self.note, style="dim")] if self.note else []))


@dataclass(frozen=True)
class Picture:
    """A PNG, and what is to be seen on it."""

    caption: str
    png: bytes = field(repr=False)

    @staticmethod
    def drawn(caption: str, draw: Callable[[Figure], None], size: tuple[float, float] = (10.0, 4.5)) -> "Picture":
        """What `draw` makes of an empty figure of `size` inches."""
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        out = io.BytesIO()
        figure.savefig(out, dpi=130, format="png", metadata={"Software": None})
        return Picture(caption, out.getvalue())


@dataclass(frozen=True)
class Result:
    """One study, run once."""

    name: str  # the verb's, and that of its files
    title: str
    claim: str  # what the paper says, with its section
    shown: tuple[str, ...]  # what this run shows of it, a sentence each
    not_shown: tuple[str, ...]  # and what it does not, or cannot at its size
    command: str  # that makes it again
    grids: tuple[Grid, ...]
    pictures: tuple[Picture, ...]
    numbers: dict[str, Any]  # every figure of the tables, unrounded: plain JSON
    seeds: tuple[int, ...]
    seconds: float  # of the clock: training, measuring and drawing, see `small.spent`
    machine: dict[str, Any] = field(default_factory=lambda: machine("cpu"))

    def __post_init__(self) -> None:
        """Tuples become lists and keys text, as JSON will have them."""
        object.__setattr__(self, "numbers", json.loads(json.dumps(self.numbers)))

    def to_json(self) -> str:
        """All but the pictures, whose captions stand for them. Raises ValueError for a number that is not finite."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("grids", "pictures")}
        plain["grids"] = [dataclasses.asdict(grid) for grid in self.grids]
        plain["pictures"] = [picture.caption for picture in self.pictures]
        return json.dumps(plain, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    @staticmethod
    def from_json(text: str, png: Callable[[int], bytes]) -> "Result":
        """Reads back what `to_json` wrote; `png(i)` is the i-th picture's."""
        plain = json.loads(text)
        grids = [{**g, "head": tuple(g["head"]), "rows": tuple(map(tuple, g["rows"]))} for g in plain["grids"]]
        plain["grids"] = tuple(Grid(**g) for g in grids)
        plain["pictures"] = tuple(Picture(caption, png(i)) for i, caption in enumerate(plain["pictures"]))
        lists = {name: tuple(plain[name]) for name in ("shown", "not_shown", "seeds")}
        return Result(**{**plain, **lists})

    def cost(self) -> str:
        """Seconds, machine and seeds, in a line."""
        seeds = f"seeds {', '.join(map(str, self.seeds))}" if len(self.seeds) != 1 else f"seed {self.seeds[0]}"
        where = f"{self.machine['device']}, {self.machine['threads']} threads, torch {self.machine['torch']}"
        return f"{self.seconds:.1f} s on {where}; {seeds if self.seeds else 'nothing is drawn at random'}"

    def render(self) -> Group:
        """The tables, what they show and do not show, and what it cost, for a terminal."""
        said: list[RenderableType] = [Text(f"The papers: {self.claim}", style="italic"), ""]
        for grid in self.grids:
            said += [grid.render(), ""]
        lines = [Text(f"Shown: {line}") for line in self.shown]
        lines += [Text(f"Not shown: {line}", style="yellow") for line in self.not_shown]
        return Group(Text(self.title, style="bold"), *said, *lines, Text(self.cost(), style="dim"))


def machine(device: str) -> dict[str, Any]:
    """What a study ran on."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }
