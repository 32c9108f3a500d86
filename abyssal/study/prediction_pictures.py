"""A study of prediction as pictures: the loss, what is accepted and where, and when drafting pays."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from abyssal.config import ModelConfig
from abyssal.study.balance_pictures import smoothed
from abyssal.study.prediction_claims import ACCEPTED, FASTER, MOST_ACCEPTED
from abyssal.study.prediction_found import Found
from abyssal.study.prediction_measure import Drafted, together
from abyssal.study.prediction_speed import Timed, cost
from abyssal.study.prediction_tables import CONTEXT, PRESET, measured, of_module
from abyssal.study.result import Picture
from abyssal.study.trained import Trained

STRETCHES = 8  # that a text is cut into
BAND = "#3a7"


def acceptance(
    runs: Mapping[str, Sequence[Trained]], found: Sequence[Found], labels: Mapping[str, str], prompt: int
) -> Picture:
    """The main model's loss against that without MTP; drafts accepted by kind of text and by position."""

    def draw(figure: Figure) -> None:
        apart, kinds, positions = figure.subplots(1, 3)
        _apart(apart, runs, labels)
        _kinds(kinds, found)
        _positions(positions, found, prompt)
        for axes in (apart, kinds, positions):
            axes.grid(alpha=0.3)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)

    caption = (
        "Left: the main model's loss with MTP, less that without it at the same seed and step; below 0 MTP helps. "
    )
    caption += "Middle and right, in the same colours: how many drafts of one module are accepted. Lines and bars are "
    caption += "means over the seeds, bands and whiskers reach from the lowest to the highest; green is DeepSeek-V3's."
    return Picture.drawn(caption, draw, (14.0, 4.6))


def _apart(axes: Axes, runs: Mapping[str, Sequence[Trained]], labels: Mapping[str, str]) -> None:
    base = np.array([run.loss for run in runs["none"]])
    for i, (name, of_seeds) in enumerate(runs.items()):
        if name == "none":
            continue
        values = np.array([run.loss for run in of_seeds]) - base
        at, smooth = smoothed(values, max(values.shape[1] // 24, 1))
        axes.plot(at, smooth.mean(0), color=f"C{i}", label=labels[name], linewidth=1.5)
        axes.fill_between(at, smooth.min(0), smooth.max(0), color=f"C{i}", alpha=0.15, linewidth=0)
    axes.axhline(0, color="C0", linewidth=1, label=labels["none"])
    axes.set_title("main model's loss, less that without MTP (nats)", fontsize=10)
    axes.set_xlabel("step")
    axes.legend(fontsize=8)


def _kinds(axes: Axes, found: Sequence[Found]) -> None:
    kinds = list(found[0].greedy["one", 1])
    bars = {
        "engine, greedy": [[f.greedy["one", 1][kind].rate(0) for f in found] for kind in kinds],
        "engine, temperature 1": [[f.sampled["one", 1][kind].rate(0) for f in found] for kind in kinds],
        "held-out text": [[f.held_out["one"][kind][0].accepted for f in found] for kind in kinds],
    }
    for i, (label, values) in enumerate(bars.items()):
        shares = 100 * np.array(values)  # [kinds, seeds]
        mean = shares.mean(1)
        around = np.stack([mean - shares.min(1), shares.max(1) - mean])
        axes.bar(np.arange(len(kinds)) + 0.27 * (i - 1), mean, 0.25, yerr=around, label=label, color=f"C{i}", capsize=2)
    _band(axes)
    axes.set_xticks(range(len(kinds)), kinds)
    axes.set_title("drafts accepted, by kind of text (%)", fontsize=10)


def _positions(axes: Axes, found: Sequence[Found], prompt: int) -> None:
    for i, (label, of) in enumerate(
        (("engine, greedy", [f.greedy for f in found]), ("engine, temperature 1", [f.sampled for f in found]))
    ):
        drafted = [together(list(one["one", 1].values())) for one in of]
        _stretches(axes, [_of_steps(d) for d in drafted], prompt, f"C{i}", label)
    reads = [of_module(f.held_out["one"])[0] for f in found]
    _stretches(axes, [(np.array(r.kept), np.array(r.before)) for r in reads], 0, "C2", "held-out text")
    _band(axes)
    axes.axvline(prompt, color="0.6", linewidth=0.8, linestyle=":")
    axes.set_title("drafts accepted, by position in the text (%)", fontsize=10)
    axes.set_xlabel("position in the text; from the dotted line on the model writes")
    axes.legend(fontsize=8, loc="lower right")


def _of_steps(d: Drafted) -> tuple[np.ndarray, np.ndarray]:
    return np.array(d.accepted[0]), np.array(d.steps)


def _stretches(axes: Axes, counts: Sequence[tuple[np.ndarray, np.ndarray]], start: int, color: str, label: str) -> None:
    """Shares of counts `(of these, of so many)` by position, from `start` on, in stretches."""
    size = len(counts[0][0])
    cuts = np.linspace(0, size, min(STRETCHES, size) + 1).astype(int)[:-1]
    made = np.array([np.add.reduceat(b, cuts) for _, b in counts])
    there = made.min(0) > 0  # a stretch without any steps has no share
    shares = 100 * np.array([np.add.reduceat(a, cuts) for a, _ in counts])[:, there] / made[:, there]
    at = start + ((cuts + np.append(cuts[1:], size)) / 2)[there]
    axes.plot(at, shares.mean(0), color=color, label=label, linewidth=1.5, marker="o", markersize=3)
    axes.fill_between(at, shares.min(0), shares.max(0), color=color, alpha=0.15, linewidth=0)


def _band(axes: Axes) -> None:
    axes.axhspan(100 * ACCEPTED, 100 * MOST_ACCEPTED, color=BAND, alpha=0.3, linewidth=0)
    axes.set_ylim(0, 102)


def gains(timed: Sequence[Sequence[Timed]], model: ModelConfig, context: int) -> Picture:
    """Tokens a second over those without drafts, against the share that is accepted: arithmetic's lines, and points
    that were measured."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        share = np.linspace(0, 1, 50)
        own, large = cost(model, 1, context), cost(ModelConfig.load(PRESET), 1, CONTEXT)
        axes.plot(100 * share, (1 + share) / large.waiting, color=BAND, label=f"{PRESET}, waiting for its weights")
        axes.plot(100 * share, (1 + share) / own.waiting, "C0--", label="this model, waiting for its weights")
        axes.plot(100 * share, (1 + share) / own.working, "C3--", label="this model, working on every token")
        points = [p for p in measured(timed) if p[1] == 1]
        for i, (batch, _, ratios, steps, _) in enumerate(points):
            color, takes = f"C{4 + i}", float(np.mean([a / r for a, r in zip(steps, ratios)]))
            told = f"this machine, {batch} text{'s' * (batch > 1)} at once: a step takes {takes:.2f} plain ones"
            axes.plot(100 * share, (1 + share) / takes, color=color, linewidth=1)
            axes.plot([100 * (a - 1) for a in steps], ratios, "o", color=color, markersize=7, label=told)
        axes.axhline(1, color="black", linewidth=1)
        axes.text(101.5, 1.015, "faster", fontsize=9, ha="right")
        axes.text(101.5, 0.985, "slower", fontsize=9, ha="right", va="top")
        ends = [100 * ACCEPTED, 100 * MOST_ACCEPTED]
        axes.fill_between(ends, 1, FASTER, color=BAND, alpha=0.25, linewidth=0)
        axes.plot(ends, [FASTER] * 2, color=BAND, linewidth=4, label=f"DeepSeek-V3 reports {FASTER} times")
        axes.set_xlim(0, 102)
        axes.set_ylim(0.4, 2)
        axes.set_xlabel("drafts accepted (%)")
        axes.set_ylabel("tokens a second, over those without drafts")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, loc="upper left")

    caption = (
        "When one draft a step pays: what arithmetic says, and what was measured (a point a seed). The thin lines "
    )
    caption += "are what this machine would give at other acceptances, if a step took as long."
    return Picture.drawn(caption, draw, (10.0, 5.4))
