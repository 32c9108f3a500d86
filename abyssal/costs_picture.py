"""The costs of a model as a picture: where its parameters are, and what a token leaves behind."""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from abyssal.costs import Costs

_PARTS = ("embedding", "head", "attention", "dense_mlps", "routed_experts", "shared_experts", "routers", "norms")
_RUNGS = {
    "mha": "MHA",
    "gqa8": "GQA, 8 heads",
    "mqa": "MQA",
    "latent": "latent without rotary key",
}


def draw(costs: Costs, name: str, path: str | Path) -> None:
    """Writes a PNG: parameters by part on the left, cache bytes a token under each kind of attention on the right."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)

    parts = {part.replace("_", " "): getattr(costs.parameters, part) for part in _PARTS}
    parts = {part: n for part, n in parts.items() if n}
    bars = left.barh(list(parts), list(parts.values()), color="tab:blue")
    left.bar_label(bars, [f"{n:,}" for n in parts.values()], padding=3, fontsize=8)
    left.set_title(
        f"{name}: {costs.parameters.total:,} parameters, {costs.parameters.activated:,} activated", fontsize=9
    )

    cache = {"this model": costs.cache.bytes_per_token}
    cache |= {label: costs.cache.compared[rung].bytes_per_token for rung, label in _RUNGS.items()}
    colors = ["tab:orange", *["tab:gray"] * len(_RUNGS)]
    bars = right.barh(list(cache), list(cache.values()), color=colors)
    right.bar_label(bars, [f"{n:,}" for n in cache.values()], padding=3, fontsize=8)
    right.set_title("bytes a token leaves in the cache, bf16", fontsize=9)

    left.set_xscale("log")  # routed experts are most of it
    for axes in (left, right):
        axes.margins(x=0.3)
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
