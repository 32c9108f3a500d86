"""A study of caches as pictures: bytes a token by kind of attention, and the cache against context."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from abyssal.study.cache_kinds import Kind
from abyssal.study.result import Picture

_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))


def picture(name: str, kinds: Sequence[Kind], memory: int, weights: int) -> Picture:
    """On the left a bar a kind; on the right one sequence's cache as it grows, and the memory that there is."""
    longest = max(1 << 17, kinds[0].config.max_position_embeddings)

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        colors = ["tab:orange"] + [f"C{i}" for i in (0, 2, 3, 4, 5, 6, 7, 8, 9)]
        shade = {kind.label: colors[i % len(colors)] for i, kind in enumerate(kinds)}
        sizes = [kind.bytes() for kind in kinds]
        bars = left.barh([kind.label for kind in kinds], sizes, color=[shade[kind.label] for kind in kinds])
        left.bar_label(bars, [f"{n:,}" for n in sizes], padding=3, fontsize=8)
        left.set_title(f"{name}: bytes that a token leaves behind", fontsize=10)
        left.margins(x=0.28)
        left.xaxis.set_major_formatter(lambda n, _: short(n))
        left.invert_yaxis()
        contexts = [1 << p for p in range(10, longest.bit_length())]
        for kind in kinds:
            if not kind.mtp:  # a line on top of another
                sizes = [kind.bytes(n) for n in contexts]
                right.plot(contexts, sizes, label=kind.label, color=shade[kind.label], marker=".", linewidth=1.5)
        for at, text, style in ((memory, "memory", "-"), (memory - weights, "memory beside the weights", "--")):
            if at > 0:
                right.axhline(at, color="gray", linestyle=style, linewidth=1)
                right.annotate(f"{short(at)} {text}", (contexts[0], at), fontsize=8, va="bottom", color="dimgray")
        right.set_xscale("log", base=2)
        right.set_yscale("log")
        right.set_xticks(contexts[::2], [f"{n // 1024}K" for n in contexts[::2]])
        low, high = right.get_ylim()
        right.set_yticks(*_ticks(low, high))
        right.minorticks_off()
        right.set_ylim(low, high)
        right.set_xlabel("tokens of context")
        right.set_title("the cache of one sequence", fontsize=10)
        right.grid(alpha=0.3)
        right.legend(fontsize=8)
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)

    caption = f"{name}: what a token leaves behind in all layers, and one sequence's cache against its context."
    return Picture.drawn(caption, draw, (13.0, 4.6))


def short(n: float) -> str:
    """Three digits or more and a decimal prefix: 80 GB, 70.3 kB."""
    scale, unit = next(((scale, unit) for scale, unit in _UNITS if n >= scale), _UNITS[-1])
    digits = f"{n / scale:.0f}" if n / scale >= 100 else f"{n / scale:.3g}"
    return f"{digits} {unit}"


def _ticks(low: float, high: float) -> tuple[list[float], list[str]]:
    at = [10.0**p for p in range(16) if low <= 10.0**p <= high]
    return at, [short(n) for n in at]
