"""The engine's rates as a picture: bars, and where the project's targets lie."""

from pathlib import Path

from abyssal.bench.serving import EngineReport


def draw(report: EngineReport, path: Path) -> None:
    """Writes a PNG."""
    from matplotlib.figure import Figure

    rows = report.rows[::-1]
    figure = Figure(figsize=(9, 0.55 * len(rows) + 1.2), layout="constrained")
    axes = figure.add_subplot()
    places = range(len(rows))
    axes.barh([p + 0.2 for p in places], [r.tokens_per_second for r in rows], 0.38, label="abyssal", color="#1f4e79")
    peer = [(p - 0.2, report.peer[r.name]) for p, r in zip(places, rows) if r.name in report.peer]
    axes.barh([p for p, _ in peer], [rate for _, rate in peer], 0.38, label="transformers", color="#c9c9c9")
    asked = [(p + 0.2, r.asked) for p, r in zip(places, rows) if r.asked]
    axes.plot([rate for _, rate in asked], [p for p, _ in asked], "|", ms=14, mew=2, color="#c0392b", label="asked")
    axes.set_xscale("log")
    axes.set_yticks(list(places), [r.name for r in rows])
    axes.set_xlabel("tokens a second")
    axes.set_title(f"{report.model}, {report.device}", loc="left", fontsize=10)
    axes.legend(frameon=False, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
