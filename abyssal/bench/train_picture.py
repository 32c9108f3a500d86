"""The training benchmark as a picture: tokens a second and peak memory, a bar a row."""

from pathlib import Path

from abyssal.bench.train_report import REFERENCE, TrainReport

COLOURS = {"abyssal": "#1f4e79", "transformers": "#b9b9b9", "torchtitan": "#8c8c8c"}
ASKED = {"tokens a second": 170_000, "peak memory, GiB": 45}  # of the reference shape on an H100


def draw(report: TrainReport, path: Path) -> None:
    """Writes a PNG. Rows that failed are named, without a bar."""
    from matplotlib.figure import Figure

    rows = [row for row in report.rows if row.name != "loader alone"][::-1]
    figure = Figure(figsize=(11, 0.34 * len(rows) + 1.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    places = range(len(rows))
    colours = [COLOURS[row.who] for row in rows]
    rates = [row.tokens_per_second or 0.0 for row in rows]
    memory = [row.memory_gib or 0.0 for row in rows]
    for axes, values, what, form in (
        (left, rates, "tokens a second", ",.0f"),
        (right, memory, "peak memory, GiB", ".1f"),
    ):
        bars = axes.barh(places, values, 0.72, color=colours)
        axes.bar_label(bars, [format(v, form) if v else "failed" for v in values], padding=3, fontsize=8)
        axes.set_xlabel(what)
        axes.margins(x=0.18)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.spines[["top", "right"]].set_visible(False)
        if report.shape.model == REFERENCE and report.gpu:
            axes.axvline(ASKED[what], color="#c0392b", lw=1.2, ls="--")
    left.set_yticks(list(places), [f"{row.who} {row.name}" for row in rows], fontsize=8)
    s = report.shape
    figure.suptitle(
        f"Training {s.model}, {s.batch} × {s.sequence} tokens a microbatch, {report.device}, {report.date}; "
        "dashed: asked" if report.gpu else f"Training {s.model}, {report.device}, {report.date}",
        fontsize=10, x=0.01, ha="left",
    )  # fmt: skip
    figure.savefig(path, dpi=130)
