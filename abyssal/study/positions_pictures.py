"""A study of positions as pictures: losses by position, the encodings, norms, and products against distance."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from abyssal.study.positions_encodings import Products
from abyssal.study.positions_measure import ROTARY, Found
from abyssal.study.result import Picture

Runs = Mapping[str, list[Found]]
Labels = Mapping[str, str]
COLORS = {"none": "gray", "integer": "C3", "binary": "C1", "sinusoidal": "C2", "rope": "C0", "decoupled": "C4"}


def losses(found: Runs, labels: Labels, length: int) -> Picture:
    """By position within the trained length, as it is and compared; past it; and past it with YaRN."""
    most = max(found["rope"][0].yarn)

    def draw(figure: Figure) -> None:
        (within, less), (beyond, yarn) = figure.subplots(2, 2)
        none = np.array([x.whole for x in found["none"]])
        narrow, wide = max(length // 16, 1), max(length // 4, 1)
        for name, runs in found.items():
            whole, sliding = (np.array([getattr(x, what) for x in runs]) for what in ("whole", "sliding"))
            past, color, label = (whole - sliding)[:, length - 1 :], COLORS[name], labels[name]
            _band(within, *binned(whole[:, : length - 1], narrow), color, label)
            _band(less, *binned((whole - none)[:, : length - 1], narrow), color, label)
            _band(beyond, *binned(past, wide, length), color, label)
            if name in ROTARY:
                stretched = np.array([x.yarn[most] for x in runs]) - sliding
                _band(yarn, *binned(past, wide, length), color, label)
                _band(yarn, *binned(stretched, wide), color, f"{label}, YaRN ×{most}", dashed=True)
        _titled(within, "loss within the trained length, nats a token", "position predicted")
        _titled(less, f"less that of {labels['none']} at the same seed, nats", "position predicted")
        _titled(beyond, "past it: from all before, less from a window, nats", "position predicted")
        _titled(yarn, "the same of the rotary ones, and with YaRN, not trained further", "position predicted")
        for axes in (less, beyond):
            axes.set_yscale("symlog", linthresh=0.1)
            low, high = axes.get_ylim()
            axes.set_yticks(*_ticks(low, high))
            axes.set_ylim(low, high)
        for axes in (beyond, yarn):
            axes.axhline(0, color="black", linewidth=0.8)
            axes.axvline(length, color="black", linewidth=0.8, linestyle=":")
        for axes in (within, yarn):
            axes.legend(fontsize=8)

    caption = "Loss by position. Right of the dotted line lie positions that no training sequence had; 0 is what the "
    caption += "same model makes of the same tokens in windows of the trained length. Lines are means over the seeds, "
    caption += "bands reach from the lowest seed to the highest."
    return Picture.drawn(caption, draw, (13.0, 8.4))


def encodings(rows: Mapping[str, Tensor], length: int) -> Picture:
    """What each dimension does along the sequence: a panel an encoding."""

    def draw(figure: Figure) -> None:
        grid = figure.subplots(2, -(-len(rows) // 2), squeeze=False)
        flat = grid.flatten()
        for axes, (name, values) in zip(flat, rows.items()):
            signed = float(values.min()) < 0
            span = {"vmin": -1.0, "vmax": 1.0, "cmap": "RdBu"} if signed else {"vmin": 0.0, "cmap": "viridis"}
            image = axes.imshow(values.T.numpy(), aspect="auto", interpolation="nearest", **span)
            axes.axvline(length - 0.5, color="black" if signed else "white", linewidth=1, linestyle=":")
            axes.set_title(name, fontsize=10)
            axes.set_ylabel("dimension", fontsize=8)
            axes.set_xlabel("position", fontsize=8)
            axes.tick_params(labelsize=8)
            figure.colorbar(image, ax=axes, shrink=0.9).ax.tick_params(labelsize=8)
        for axes in flat[len(rows) :]:
            axes.set_visible(False)

    caption = "What each dimension does along the sequence. The first three are added to the embeddings; of the rotary "
    caption += (
        "ones it is what becomes of a key whose pairs are all (1, 0), which queries and keys are both subject to. "
    )
    caption += "The dotted line is the trained length."
    return Picture.drawn(caption, draw, (14.0, 7.0))


def norms(found: Runs, labels: Labels, length: int) -> Picture:
    """Before and after adding, and what is left of the token."""

    def draw(figure: Figure) -> None:
        size, left = figure.subplots(1, 2)
        for name, runs in found.items():
            if name in ROTARY:
                continue  # as none: nothing is added
            label = "none, RoPE, decoupled RoPE" if name == "none" else labels[name]
            for axes, what in ((size, "after"), (left, "cosine")):
                values = np.array([getattr(x.embedded, what) for x in runs])
                _band(axes, np.arange(values.shape[1]), values, color=COLORS[name], label=label)
            if name != "none":
                before = np.array([x.embedded.before for x in runs])
                size.plot(before.mean(0), color=COLORS[name], linewidth=1, linestyle="--")
        size.set_yscale("log")
        left.set_ylim(top=1.05)
        _titled(size, "norm: solid after the position is added, dashed before", "position")
        _titled(left, "cosine of an embedding before and after", "position")
        for axes in (size, left):
            axes.axvline(length, color="black", linewidth=0.8, linestyle=":")
            axes.legend(fontsize=8)

    caption = (
        "What the first block reads, in the trained models, means over held-out texts; bands over the seeds. A cosine "
    )
    caption += "near 0 means that the sum says the place and hardly the token."
    return Picture.drawn(caption, draw, (13.0, 4.4))


def dots(added: Mapping[str, Products], rotated: Mapping[str, Products], scores: Mapping[str, Tensor], length: int,
         labels: Labels) -> Picture:  # fmt: skip
    """Products against distance: of encodings, of rotated keys, and what the trained heads made of it (`scores`
    `[layers, H, distances]` a kind)."""

    def draw(figure: Figure) -> None:
        top, *below = figure.subplots(1 + len(scores), max(2, *(len(x) for x in scores.values())), squeeze=False)
        for axes, of, title in zip(top, (added, rotated), ("encodings that are added", "rotated keys of equal pairs")):
            for i, (name, p) in enumerate(of.items()):
                at, style = np.arange(len(p.mean)), "--" if "YaRN" in name else "-"
                axes.plot(at, p.mean, color=f"C{i}", label=name, linewidth=1.5, linestyle=style)
                axes.fill_between(at, p.low, p.high, color=f"C{i}", alpha=0.15, linewidth=0)
            _titled(axes, f"{title}: cosine against distance", "distance")
            axes.legend(fontsize=8)
        for row, (name, layers) in zip(below, scores.items()):
            for number, (axes, heads) in enumerate(zip(row, layers)):
                for head, values in enumerate(heads):
                    axes.plot(values.numpy(), linewidth=1.2, label=f"head {head}")
                _titled(axes, f"{labels[name]}, layer {number}: what distance adds to a score", "distance")
                if number == 0:
                    axes.legend(fontsize=7)
        for row in (top, *below):
            for axes in row:
                axes.set_visible(axes.has_data())
                axes.axvline(length, color="black", linewidth=0.8, linestyle=":")

    caption = (
        "Products against distance. Above, of the encodings by themselves: bands reach over all pairs of places, and "
    )
    caption += "have no width where the distance alone decides. Below, of the trained models' mean queries and keys, "
    caption += (
        "rotated: the part of a score (before the softmax) that is the distance's, a line a head; of the first seed."
    )
    return Picture.drawn(caption, draw, (14.0, 3.6 * (1 + len(scores))))


def binned(values: np.ndarray, width: int, first: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """`[seeds, n]` of positions from `first` on -> the middles of the bins of `width`, and the bins' means; the last
    may be narrower."""
    starts = np.arange(0, values.shape[1], width)
    sizes = np.diff([*starts, values.shape[1]])
    return first + starts + (sizes - 1) / 2, np.add.reduceat(values, starts, axis=1) / sizes


def _band(axes: Axes, at: np.ndarray, values: np.ndarray, color: str, label: str, dashed: bool = False) -> None:
    """`values [seeds, n]`: the mean as a line, and from the lowest to the highest."""
    axes.plot(at, values.mean(0), color=color, label=label, linewidth=1.5, linestyle="--" if dashed else "-")
    axes.fill_between(at, values.min(0), values.max(0), color=color, alpha=0.15, linewidth=0)


def _titled(axes: Axes, title: str, label: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(label, fontsize=9)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _ticks(low: float, high: float) -> tuple[Sequence[float], Sequence[str]]:
    ticks = [x for x in (-10, -3, -1, -0.3, -0.1, 0, 0.1, 0.3, 1, 3, 10) if low <= x <= high]
    return ticks, [f"{x:g}" for x in ticks]
