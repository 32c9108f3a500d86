"""`curves.png`: losses, balance, speed, and how the experts are loaded."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from abyssal.train.metrics import Record


def draw_curves(records: Sequence[Record], path: Path, title: str) -> None:
    """Draws the records of a run's metrics."""
    figure = Figure(figsize=(12, 7), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    losses, load, speed, heat = figure.subplots(2, 2).flatten()
    if records:
        _losses(losses, records)
        _violation(load, records)
        _series(speed, records, [r["tokens_per_second"] for r in records], "tokens/s")
        speed.set_ylim(bottom=0)
        speed.set_title("speed (tokens a second)")
        _heat(figure, heat, records)
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, dpi=110, format="png")
    temporary.replace(path)


def _series(axes: Any, records: Sequence[Record], values: Sequence[float], label: str, **style: Any) -> None:
    axes.plot([r["step"] for r in records], values, label=label, linewidth=1.2, **style)
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)


def _losses(axes: Any, records: Sequence[Record]) -> None:
    _series(axes, records, [r["main_loss"] for r in records], "main")
    for d in range(len(records[0]["mtp_losses"])):
        _series(axes, records, [r["mtp_losses"][d] for r in records], f"MTP module {d + 1}", alpha=0.7)
    told = [r for r in records if r["validation"]]
    if told:
        last = told[-1]["validation"]["bits_per_byte"]
        label = f"validation, at last {last:.3f} bits a byte"
        _series(axes, told, [r["validation"]["loss"] for r in told], label, marker="o", markersize=3, color="black")
    axes.set_title("loss (nats a token)")
    axes.legend()


def _violation(axes: Any, records: Sequence[Record]) -> None:
    axes.set_title("expert load: how far the busiest is above the mean (MaxVio)")
    if not records[0]["max_violation"]:
        axes.text(0.5, 0.5, "no experts", ha="center", transform=axes.transAxes)
        return
    _series(axes, records, [max(r["max_violation"]) for r in records], "worst layer", alpha=0.6)
    means = [sum(r["max_violation"]) / len(r["max_violation"]) for r in records]
    _series(axes, records, means, "mean of the layers")
    axes.set_ylim(bottom=0)
    axes.legend()


def _heat(figure: Figure, axes: Any, records: Sequence[Record]) -> None:
    loads = [r["validation"]["expert_load"] for r in records if r["validation"] and r["validation"]["expert_load"]]
    if not loads:
        axes.axis("off")
        return
    axes.set_title("load of each expert on held-out text (1 is the mean)")
    image = axes.imshow(loads[-1], aspect="auto", vmin=0, vmax=2, cmap="RdBu_r", interpolation="nearest")
    axes.set_xlabel("expert")
    axes.set_ylabel("layer with experts")
    axes.set_yticks(range(len(loads[-1])))
    figure.colorbar(image, ax=axes)
