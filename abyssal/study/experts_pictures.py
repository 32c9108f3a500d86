"""A study of experts as pictures: what came of the shapes, and which texts the experts take."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from abyssal.study.balance_pictures import MOST_LOAD, smoothed
from abyssal.study.experts_measure import Found
from abyssal.study.experts_shapes import Shape
from abyssal.study.result import Picture
from abyssal.study.trained import Trained

COLORS = {"few": "C0", "few_shared": "C9", "fine": "C1", "fine_shared": "C3", "dense": "gray"}
MARKS = "os^Dv<>P*X"  # a seed


def outcome(
    shapes: Sequence[Shape], runs: Mapping[str, Sequence[Trained]], found: Mapping[str, Sequence[Found]],
    levels: Sequence[int], experts: int,
) -> Picture:  # fmt: skip
    """The loss over training, the bits a byte at its end, and what disabling costs."""

    def draw(figure: Figure) -> None:
        apart, bits, rise = figure.subplots(1, 3)
        base = np.array([run.loss for run in runs["few"]])
        for row, shape in enumerate(shapes):
            color, of_seeds = COLORS[shape.name], runs[shape.name]
            if shape.name != "few":
                losses = np.array([run.loss for run in of_seeds]) - base
                at, smooth = smoothed(losses, max(losses.shape[1] // 20, 1))
                apart.plot(at, smooth.mean(0), color=color, linewidth=1.5)
                apart.fill_between(at, smooth.min(0), smooth.max(0), color=color, alpha=0.15, linewidth=0)
            ends = [run.bits_per_byte for run in of_seeds]
            for seed, end in enumerate(ends):
                bits.plot(end, row, MARKS[seed % len(MARKS)], color=color, markersize=6, alpha=0.8)
            bits.plot([np.mean(ends)] * 2, [row - 0.3, row + 0.3], color=color, linewidth=2)
            if shape.name in found:
                costs = np.array([one.disabled for one in found[shape.name]])
                costs = costs - costs[:, :1]
                rise.plot(levels, costs.mean(0), color=color, marker=".", linewidth=1.5, label=shape.label)
                rise.fill_between(levels, costs.min(0), costs.max(0), color=color, alpha=0.15, linewidth=0)
                lost = [one.replaced - one.disabled[0] for one in found[shape.name] if one.replaced is not None]
                if lost:
                    rise.plot(0, np.mean(lost), "X", color=color, markersize=9, clip_on=False, zorder=3)
        apart.axhline(0, color=COLORS["few"], linewidth=1)
        apart.set_title(f"loss in nats, less that of {shapes[0].label} at the same seed", fontsize=10)
        apart.set_xlabel("step")
        bits.set_yticks(range(len(shapes)), [shape.label for shape in shapes], fontsize=8)
        bits.set_ylim(len(shapes) - 0.5, -0.5)
        bits.set_title("held-out bits a byte: a mark a seed", fontsize=10)
        rise.set_title("bits a byte that disabling costs", fontsize=10)
        rise.set_xlabel("share of the routed experts masked, each token's first")
        rise.set_xticks(levels, [f"{n}/{experts}" if n else "0" for n in levels])
        rise.plot([], [], "X", color="dimgray", markersize=8, linestyle="none", label="shared replaced by a routed one")
        rise.legend(fontsize=8)
        for axes in (apart, bits, rise):
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)

    caption = (
        "Equal parameters and equal activated ones. Left: over training, lines are means over the seeds and bands "
    )
    caption += (
        "reach from the lowest to the highest. Right: experts masked in the trained models; a cross is the shared "
    )
    caption += "expert replaced by one routed expert more."
    return Picture.drawn(caption, draw, (15.0, 4.4))


def heat(shapes: Sequence[Shape], found: Mapping[str, Sequence[Found]], kinds: Sequence[str], first: int) -> Picture:
    """Each expert's load by kind of text, a row a shape and a column a layer; of the first seed."""
    drawn = [shape for shape in shapes if shape.name in found]
    gates = len(found[drawn[0].name][0].balance.information_by_layer)

    def draw(figure: Figure) -> None:
        grid = figure.subplots(len(drawn), gates, squeeze=False)
        for row, shape in zip(grid, drawn):
            balance = found[shape.name][0].balance
            for gate, axes in enumerate(row):
                loads = by_favourite(np.array(balance.loads)[:, gate])
                image = axes.imshow(loads, vmin=0, vmax=MOST_LOAD, cmap="viridis", aspect="auto", interpolation="none")
                told = balance.information_by_layer[gate]
                axes.set_title(f"{shape.label}, layer {first + gate}: {told:.2f} bits", fontsize=9)
                axes.set_yticks(range(len(kinds)), kinds if gate == 0 else [""] * len(kinds), fontsize=9)
                axes.set_xticks([])
        for axes in grid[-1]:
            axes.set_xlabel("experts, by the kind that they take most of", fontsize=9)
        figure.colorbar(image, ax=grid, label="load, in mean loads", extend="max", shrink=0.6)

    caption = "The experts' load by kind of held-out text (the first seed), sorted within each layer: columns of one "
    caption += (
        "colour are experts for all kinds, bright blocks experts for one. The bits are what a picked expert tells "
    )
    caption += "of the kind."
    return Picture.drawn(caption, draw, (14.0, 1.7 * len(drawn)))


def by_favourite(loads: np.ndarray) -> np.ndarray:
    """`[kinds, E]` -> the same with the experts of the first kind first, of these the most one-sided first."""
    share = loads / np.maximum(loads.sum(0, keepdims=True), 1e-9)
    return loads[:, np.lexsort((-share.max(0), share.argmax(0)))]
