"""A study of balance as pictures: curves over training, and the experts' load by kind of text."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from abyssal.study.balance_measure import Found
from abyssal.study.result import Picture
from abyssal.study.trained import Trained

BASE = "none"  # what losses are drawn relative to
MOST_LOAD = 3.0  # mean loads; more is drawn like it


def curves(runs: Mapping[str, Sequence[Trained]], labels: Mapping[str, str]) -> Picture:
    """MaxVio, the loss, and how much lower or higher the loss is than where nothing balances."""

    def draw(figure: Figure) -> None:
        violation, loss, apart = figure.subplots(1, 3)
        base = np.array([run.loss for run in runs[BASE]])
        for i, (name, of_seeds) in enumerate(runs.items()):
            color, label = f"C{i}", labels[name]
            losses = np.array([run.loss for run in of_seeds])
            width = max(losses.shape[1] // 24, 1)
            over_layers = np.array([run.violation for run in of_seeds]).mean(-1)
            for axes, values in ((violation, over_layers), (loss, losses), (apart, losses - base)):
                if axes is apart and name == BASE:
                    continue
                at, smooth = smoothed(values, width)
                axes.plot(at, smooth.mean(0), color=color, label=label, linewidth=1.5)
                axes.fill_between(at, smooth.min(0), smooth.max(0), color=color, alpha=0.15, linewidth=0)
        apart.axhline(0, color="C0", linewidth=1)
        titles = (
            "MaxVio of the step's batch",
            "loss, nats a token",
            f"loss, less that of {labels[BASE]} at the same seed",
        )
        for axes, title in zip((violation, loss, apart), titles):
            axes.set_title(title, fontsize=10)
            axes.set_xlabel("step")
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
        violation.set_ylim(bottom=0)
        violation.legend(fontsize=8)

    caption = "Over training: lines are means over the seeds, bands reach from the lowest seed to the highest."
    return Picture.drawn(caption, draw, (14.0, 4.4))


def smoothed(values: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """`[seeds, steps]` -> the last step of each window of `width`, and the windows' means `[seeds, windows]`; what is
    left over at the beginning is left out."""
    windows = values.shape[1] // width
    kept = values[:, values.shape[1] - windows * width :]
    at = np.arange(1, windows + 1) * width + values.shape[1] - windows * width
    return at, kept.reshape(len(values), windows, width).mean(-1)


def heat(
    found: Mapping[str, Sequence[Found]], labels: Mapping[str, str], kinds: Sequence[str], first: int
) -> Picture:  # fmt: skip
    """Each expert's load by kind of text, a row a variant and a column a layer; of the first seed."""
    gates = len(next(iter(found.values()))[0].violation_by_layer)

    def draw(figure: Figure) -> None:
        grid = figure.subplots(len(found), gates, squeeze=False)
        for row, (name, of_seeds) in zip(grid, found.items()):
            loads = np.array(of_seeds[0].loads)  # [kinds, gates, E]
            for gate, axes in enumerate(row):
                image = axes.imshow(loads[:, gate], vmin=0, vmax=MOST_LOAD, cmap="viridis", aspect="auto")
                told = of_seeds[0].information_by_layer[gate]
                axes.set_title(f"{labels[name]}, layer {first + gate}: {told:.3f} bits", fontsize=8)
                axes.set_yticks(range(len(kinds)), kinds if gate == 0 else [""] * len(kinds), fontsize=8)
                axes.set_xticks([])
        for axes in grid[-1]:
            axes.set_xlabel("expert", fontsize=8)
        figure.colorbar(image, ax=grid, label="load, in mean loads", extend="max", shrink=0.6)

    caption = (
        "The experts' load by kind of held-out text (the first seed), as in DeepSeek-V3's figure 9: even rows are "
    )
    caption += "balance, rows that differ are specialisation; the bits are what a picked expert tells of the kind."
    return Picture.drawn(caption, draw, (13.0, 1.6 * len(found)))
