"""A study of attention as pictures: cache against prediction, time against context, algebra, heads."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from abyssal.study.attention_algebra import Way
from abyssal.study.attention_claims import Heads, Runs
from abyssal.study.attention_decode import Again, Point
from abyssal.study.attention_ladder import Rung
from abyssal.study.result import Picture
from abyssal.study.spread import Spread

COLORS = {"mha": "C0", "gqa": "C2", "mqa": "C4", "bare": "C7", "mla": "tab:orange", "coupled": "C3"}
BESIDE = 0.04  # of a doubling: how far points of one size are drawn from each other


def ladder_picture(
    ladder: Sequence[Rung], runs: Runs, points: Mapping[str, Sequence[Point]], labels: Mapping[str, str]
) -> Picture:
    """What a rung keeps against how it predicts; what a token costs against its context."""

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        sizes = [rung.bytes for rung in ladder]
        for i, rung in enumerate(ladder):
            beside = sizes[:i].count(rung.bytes) - (sizes.count(rung.bytes) - 1) / 2
            bits = Spread.of([run.bits_per_byte for run in runs[rung.name]])
            label, color = f"{rung.label}: {rung.bytes:,}", COLORS[rung.name]
            left.errorbar(
                rung.bytes * 2 ** (beside * BESIDE),
                bits.mean,
                bits.deviation,
                fmt="o",
                label=label,
                color=color,
                markersize=8,
                capsize=4,
            )
        left.set_xscale("log", base=2)
        left.margins(x=0.15)
        left.set_xticks(*_apart(sorted(sizes)))
        left.minorticks_off()
        left.set_xlabel("bytes that a token leaves behind, bf16")
        left.set_title("bits a byte of held-out text (lower is better)", fontsize=10)
        left.legend(fontsize=8)
        for name, of_line in points.items():
            at, ms = [p.context for p in of_line], [p.time.ms for p in of_line]
            color, dash = (COLORS[name], "-") if name in COLORS else (COLORS["mla"], ":")
            right.plot(at, ms, color=color, linestyle=dash, marker=".", label=labels[name])
            right.fill_between(at, *zip(*((p.time.low, p.time.high) for p in of_line)), color=color, alpha=0.15)
        right.set_xscale("log", base=2)
        right.set_yscale("log")
        right.set_xticks(*_contexts(at))
        right.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        right.yaxis.set_major_formatter(lambda ms, _: f"{ms:g}")
        right.minorticks_off()
        right.set_xlabel("tokens of context")
        right.set_title("milliseconds to decode a token", fontsize=10)
        right.legend(fontsize=8)
        for axes in (left, right):
            _plain(axes)

    caption = "Left: what a token leaves behind against prediction, means over the seeds with their standard "
    caption += "deviation, at equal parameters; points of one size stand side by side. Right: one token decoded after "
    caption += "a filled cache, median and quartiles."
    return Picture.drawn(caption, draw, (13.0, 4.8))


def algebra_picture(again: Sequence[Again], coupled: Sequence[Point], ways: Sequence[Way]) -> Picture:
    """How much of a step with coupled RoPE is making keys anew; what each order of multiplication takes."""

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.2))
        anew = np.array([min(a.time.ms, c.time.ms) for a, c in zip(again, coupled)])
        whole = np.array([c.time.ms for c in coupled])
        at = np.arange(len(whole))
        left.bar(at, anew / whole, color="C3", label="keys made anew")
        left.bar(at, 1 - anew / whole, bottom=anew / whole, color="lightgray", label="all else")
        for i, ms in enumerate(whole):
            left.annotate(f"{ms:.3g} ms", (i, 1.01), ha="center", va="bottom", fontsize=8)
        left.set_xticks(at, [f"{a.context:,}" for a in again])
        left.set_ylim(0, 1.28)
        left.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25%", "50%", "75%", "100%"])
        left.set_xlabel("tokens of context")
        left.set_title("coupled RoPE: where a decoded token's time goes", fontsize=10)
        left.legend(fontsize=8, loc="upper left", ncols=2)
        ms = [way.time.ms for way in ways]
        colors = ["tab:orange" if i % 2 == 0 else "C0" for i in range(len(ways))]
        places = [i + 0.6 * (i // 2) for i in range(len(ways))]
        bars = right.barh(places, ms, color=colors)
        right.bar_label(bars, [f"{x:.3g} ms" for x in ms], padding=3, fontsize=8)
        right.set_yticks(places, [f"{way.task}, {way.name}" for way in ways], fontsize=8)
        right.invert_yaxis()
        right.set_xscale("log")
        right.set_xlim(min(ms) / 3, max(ms) * 4)
        right.xaxis.set_major_formatter(lambda ms, _: f"{ms:g}")
        right.set_title("milliseconds of two orders of multiplication, one result", fontsize=10)
        for axes in (left, right):
            _plain(axes)

    caption = "Left: with coupled RoPE the keys of every earlier token are made anew at each step. Right: pairs of "
    caption += "orders of multiplication with one result, at one layer of DeepSeek-V3's widths with fewer heads."
    return Picture.drawn(caption, draw, (13.0, 4.8))


def heads_picture(ladder: Sequence[Rung], heads: Heads) -> Picture:
    """Each pair of heads in each layer; of the first seed."""
    layers = ladder[0].model.num_hidden_layers
    most = max(x for rung in ladder for layer in heads[rung.name][0].pairs for row in layer for x in row)

    def draw(figure: Figure) -> None:
        grid = figure.subplots(layers, len(ladder), squeeze=False)
        for column, rung in enumerate(ladder):
            found = heads[rung.name][0]
            for layer in range(layers):
                axes = grid[layer][column]
                image = axes.imshow(found.pairs[layer], vmin=0, vmax=most or 1, cmap="viridis")
                mean = f"{found.by_layer[layer]:.3f} bits"
                axes.set_title(f"{rung.label}\n{mean}" if layer == 0 else mean, fontsize=8)
                axes.set_xticks([])
                axes.set_yticks([])
                if column == 0:
                    axes.set_ylabel(f"layer {layer}", fontsize=8)
        figure.colorbar(image, ax=grid, label="bits between two heads' attention", shrink=0.6)

    caption = "How far heads differ (the first seed): each square is a pair of heads, the brighter, the less they "
    caption += "attend to the same tokens; the number is the mean over pairs."
    return Picture.drawn(caption, draw, (13.0, 2.0 * layers + 0.4))


def _plain(axes: Axes) -> None:
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _apart(sizes: Sequence[int]) -> tuple[list[int], list[str]]:
    """Ticks that do not run into each other: of two that are near, the first."""
    kept: list[int] = []
    for size in sizes:
        if not kept or size > 1.3 * kept[-1]:
            kept.append(size)
    return kept, [f"{size:,}" for size in kept]


def _contexts(at: Sequence[int]) -> tuple[list[int], list[str]]:
    return list(at), [f"{n // 1024}K" if n % 1024 == 0 else f"{n:,}" for n in at]
