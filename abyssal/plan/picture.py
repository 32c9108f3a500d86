"""Where the memory of a run's ranks goes, as bars."""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from abyssal.plan.report import GIB, Plan


def draw(plan: Plan, path: Path) -> None:
    """A bar a place in the pipeline, a colour a kind of memory; a line where the peak is. Gradients come as activations
    go, so a bar may be higher than that."""
    figure = Figure(figsize=(1.6 + 1.5 * len(plan.walks) + 2.6, 4.2), layout="constrained")
    axes = FigureCanvasAgg(figure).figure.subplots()
    names = [f"place {w.stage}" for w in plan.walks]
    bottom = [0.0] * len(names)
    kinds = list(plan.walks[0].memory)
    for kind in kinds:
        sizes = [w.memory[kind] / GIB for w in plan.walks]
        axes.bar(names, sizes, 0.6, bottom=bottom, label=kind)
        bottom = [b + s for b, s in zip(bottom, sizes)]
    for i, w in enumerate(plan.walks):
        axes.hlines(w.peak / GIB, i - 0.38, i + 0.38, colors="black", label="" if i else "peak")
        axes.annotate(f"{w.peak / GIB:.1f}", (i + 0.4, w.peak / GIB), ha="left", va="center")
    axes.set_ylabel("GiB of a rank")
    axes.set_title(f"{plan.model} on {plan.gpus:,} GPUs: {plan.mesh}", fontsize=10)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
