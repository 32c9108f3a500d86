"""Where the memory of a run's ranks goes, as bars."""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from abyssal.plan.report import GIB, Plan


def draw(plan: Plan, path: Path) -> None:
    """A bar a pipeline stage, a colour a kind of memory, and what is held for a moment on top."""
    figure = Figure(figsize=(1.6 + 1.5 * len(plan.walks) + 2.6, 4.2), layout="constrained")
    axes = FigureCanvasAgg(figure).figure.subplots()
    names = [f"stage {w.stage}" for w in plan.walks]
    bottom = [0.0] * len(names)
    kinds = list(plan.walks[0].memory)
    for kind in [*kinds, "for a moment"]:
        sizes = [
            w.memory[kind] / GIB if kind in w.memory else max(0.0, (w.peak - sum(w.memory.values())) / GIB)
            for w in plan.walks
        ]
        axes.bar(names, sizes, 0.6, bottom=bottom, label=kind)
        bottom = [b + s for b, s in zip(bottom, sizes)]
    for i, w in enumerate(plan.walks):
        axes.annotate(f"{w.peak / GIB:.1f}", (i, bottom[i]), ha="center", va="bottom")
    axes.set_ylabel("GiB of a rank")
    axes.set_title(f"{plan.model} on {plan.gpus:,} GPUs: {plan.mesh}", fontsize=10)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
