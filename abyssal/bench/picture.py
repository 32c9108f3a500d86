"""A roofline: what was achieved over how much arithmetic a byte allows, under the two measured ceilings."""

from pathlib import Path

from abyssal.bench.case import Row
from abyssal.bench.measure import Ceilings


def draw(rows: list[Row], ceilings: Ceilings, device: str, path: Path) -> None:
    """One marker a shape, a colour an operation; the best peer's hollow. Cases that do no arithmetic are left out."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(12, 6.5), layout="constrained")
    shown = [row for row in rows if row.ours.seconds and row.case.flops]
    ops = list(dict.fromkeys(row.case.op for row in shown))
    colours = plt.get_cmap("tab20")
    for i, op in enumerate(ops):
        part = [row for row in shown if row.case.op == op]
        intensity = [row.case.flops / row.bytes for row in part]
        done = [row.case.flops / row.ours.seconds / 1e12 for row in part if row.ours.seconds]
        axes.scatter(intensity, done, s=26, color=colours(i % 20), label=op, zorder=3)
        for row, x in zip(part, intensity):
            theirs = row.peers[row.best].seconds if row.best is not None else None
            if theirs:
                y = row.case.flops / theirs / 1e12
                axes.scatter([x], [y], s=34, facecolors="none", edgecolors=[colours(i % 20)], linewidths=0.9, zorder=2)
    reach = [row.case.flops / row.bytes for row in shown] or [1.0]
    left, right = min(reach) / 3, max(*reach, ceilings.wide / ceilings.bandwidth) * 3
    lines = [("16 bits" if ceilings.fp8 else "products", ceilings.wide, "-")]
    lines += [("FP8", ceilings.fp8, "--")] if ceilings.fp8 else []
    for name, rate, style in lines:
        knee = rate / ceilings.bandwidth
        heights = [min(ceilings.bandwidth * x, rate) / 1e12 for x in (left, knee, max(right, knee))]
        axes.plot([left, knee, max(right, knee)], heights, style, color="0.35", linewidth=1.2, zorder=1)
        axes.annotate(
            f"{name}: {rate / 1e12:.3g} TFLOP/s", (max(right, knee), rate / 1e12), xytext=(-4, 4),
            textcoords="offset points", ha="right", fontsize=8, color="0.35",
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="FLOP a byte", ylabel="TFLOP/s achieved")
    axes.set_title(f"{device}: {ceilings.bandwidth / 1e9:.0f} GB/s; filled: ours, hollow: the best peer", fontsize=10)
    axes.grid(True, which="major", alpha=0.25)
    if ops:
        figure.legend(fontsize=7, loc="outside right upper")
    figure.savefig(path, dpi=130)
    plt.close(figure)
