"""The table, the chart and the numbers of a run of `cpu.py`."""

import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib
from cells import ENGINES, LLAMA, MEMORY_TARGET, OURS, TRANSFORMERS, Cell, cells, told

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BEGIN, END = "<!-- cpu:begin -->", "<!-- cpu:end -->"
CHART, NUMBERS = "cpu-benchmark.png", "cpu-benchmark.json"
COLOURS = {OURS: "#0b5d7a", TRANSFORMERS: "#d9a441", LLAMA: "#8a8f98"}

Results = dict[str, Any]


def publish(results: Results, folder: Path | None, markdown: Path | None) -> None:
    """Prints the section. Writes it, the chart and the numbers into `markdown` and beside it, or into `folder`."""
    text = section(results)
    print(f"\n{text}")
    place = markdown.parent if markdown else folder
    if place is None:
        return
    place.mkdir(parents=True, exist_ok=True)
    chart(results, place / CHART)
    (place / NUMBERS).write_text(json.dumps(results, indent=1) + "\n")
    file = markdown or place / "cpu-benchmark.md"
    old = file.read_text() if markdown and file.exists() else "# Benchmarks\n"
    file.write_text(replaced(old, text))
    print(f"table: {file}\nchart: {place / CHART}\nnumbers: {place / NUMBERS}")


def replaced(old: str, text: str) -> str:
    """`old` with what stands between the markers replaced by `text`; at its end where there are none."""
    block = f"{BEGIN}\n{text}\n{END}"
    if BEGIN in old and END in old:
        return old[: old.index(BEGIN)] + block + old[old.index(END) + len(END) :]
    return f"{old.rstrip()}\n\n{block}\n"


def section(results: Results) -> str:
    parts = [
        _heading(results),
        _speeds(results),
        _flatness(results),
        _memory(results),
        _notes(results),
        _modes(results),
    ]
    return "\n\n".join(part for part in parts if part)


def measured(results: Results) -> list[tuple[Cell, dict[str, Any]]]:
    """The cells that were run, and each engine's part in them."""
    sizes = results["sizes"]
    known = {cell.name: cell for cell in cells(*sizes)}
    return [(known[entry["name"]], entry["engines"]) for entry in results["cells"]]


def _best(part: dict[str, Any] | None) -> float | None:
    return max(part["rates"]) if part and part["rates"] else None


def _number(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def _heading(results: Results) -> str:
    m, costs = results["machine"], results["costs"]
    parameters = costs["parameters"]
    versions = ", ".join(f"{name} {number}" for name, number in m["versions"].items())
    lines = [
        f"{m['cpu']} ({', '.join(m['features'])}), {m['threads']} of {m['cores']} cores, {m['date']}. {versions}. "
        f"{parameters['total'] / 1e6:.1f}M parameters, {parameters['activated'] / 1e6:.1f}M activated "
        f"a token. Read bandwidth {results['read_bytes_per_second'] / 1e9:.1f} GB/s.",
        f"`{m['command']}`",
    ]
    if results["quick"]:
        lines.insert(0, "**A trial of the benchmark on a model of two layers: these numbers mean nothing.**")
    return "\n\n".join(lines)


def _speeds(results: Results) -> str:
    lines = [
        "Tokens a second over all sequences, best (median).",
        "",
        "| | dtype | abyssal | transformers | llama.cpp | over transformers | over llama.cpp | bound |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for cell, engines in measured(results):
        row = [cell.title, cell.dtype]
        for engine in ENGINES:
            part, rate = engines.get(engine), _best(engines.get(engine))
            if rate is None or part is None:
                row.append("failed" if part else "–")
            else:
                row.append(f"{_number(rate)} ({_number(statistics.median(part['rates']))})")
        ours = _best(engines.get(OURS))
        for peer in (TRANSFORMERS, LLAMA):
            theirs, target = _best(engines.get(peer)), cell.targets.get(peer)
            asked = f" (asked: {target})" if target else ""
            if ours is None or theirs is None:
                row.append(f"–{asked}")
                continue
            missed = target is not None and not target.met(ours / theirs)
            row.append(f"{'**missed** ' if missed else ''}{ours / theirs:.2f}{asked}")
        row.append(_bound(results, cell))
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def _bound(results: Results, cell: Cell) -> str:
    """Tokens a second at which a decoding step has read what it must at the read bandwidth: the head, every weight of
    the blocks but the routed experts that no token chose, and the latents."""
    if cell.kind != "decode":
        return ""
    costs, itemsize = results["costs"], 4 if cell.dtype == "float32" else 2
    p = costs["parameters"]
    met = results["routing"]["used_by_8_tokens"] if cell.batch == 8 else results["routing"]["used_by_1_token"]
    weights = p["total"] - p["embedding"] - p["routed_experts"] * (1 - met)
    latents = costs["cache"]["bytes_per_token"] // 2 * cell.batch * cell.context  # elements: those bytes are of bf16
    return _number(cell.batch * results["read_bytes_per_second"] / ((weights + latents) * itemsize))


def _flatness(results: Results) -> str:
    rates = {(c.kind, c.dtype, c.batch, c.context): engines for c, engines in measured(results)}
    short, long, _ = results["sizes"]
    lines = [
        f"The time of a decoding step at context {long} over that at {short}.",
        "",
        "| | dtype | abyssal | transformers | llama.cpp |",
        "|---|---|---|---|---|",
    ]
    for dtype in ("float32", "bfloat16"):
        for batch in (1, 8):
            near, far = (rates.get(("decode", dtype, batch, context), {}) for context in (short, long))
            pairs = [(_best(near.get(engine)), _best(far.get(engine))) for engine in ENGINES]
            if any(a and b for a, b in pairs):
                row = [f"{a / b:.2f}" if a and b else "–" for a, b in pairs]
                lines.append(f"| batch {batch} | {dtype} | {' | '.join(row)} |")
    return "\n".join(lines) if len(lines) > 4 else ""


def _memory(results: Results) -> str:
    entries = [entry for entry in results["memory"] if entry["engines"]]
    if not entries:
        return ""
    lines = [
        "Peak anonymous resident memory above what the imports take, the compiler's own included (MB): while the "
        "weights are loaded, a prompt taken in, the step made ready and first run, and while decoding. The step is "
        "compiled in this process, or found on the disk, as it is from the second process on.",
        "",
        "| | dtype | step | weights + latents | abyssal: load / prompt / first step / decoding "
        "| peak over weights + latents | transformers, peak |",
        "|---|---|---|---|---|---|---|",
    ]
    for entry in entries:
        theirs = entry["engines"].get(TRANSFORMERS, {})
        peak = _mb(max(theirs["peaks"].values()) - theirs["imports"]) if "peaks" in theirs else "–"
        for step, ours in entry["engines"].get(OURS, {}).items():
            row = [f"batch {entry['batch']} × {entry['context']}", entry["dtype"], step]
            if "peaks" in ours:
                above = {name: found - ours["with_compiler"] for name, found in ours["peaks"].items()}
                needed = ours["weights"] + ours["latents"]
                ratio = max(above.values()) / needed
                missed = "" if ratio < MEMORY_TARGET else "**missed** "
                row += [_mb(needed), " / ".join(_mb(v) for v in above.values())]
                row.append(
                    f"{missed}{ratio:.2f} (asked: < {MEMORY_TARGET}); while decoding {above['decode'] / needed:.2f}"
                )
            else:
                row += ["–", "failed", "–"]
            lines.append(f"| {' | '.join([*row, peak])} |")
    return "\n".join(lines)


def _mb(count: float) -> str:
    return f"{count / 1e6:,.0f}"


def memory_told(found: dict[str, Any]) -> str:
    if "failed" in found:
        return str(found["failed"])
    base = found.get("with_compiler", found["imports"])
    return ", ".join(f"{name} {_mb(peak - base)} MB" for name, peak in found["peaks"].items())


def _notes(results: Results) -> str:
    routing, compiled = results["routing"], _compile_times(results)
    lines = ["How it was measured:", ""]
    for entry in results["agreement"]:
        differences = " and ".join(f"{peer} {d:.1e}" for peer, d in entry["difference"].items())
        lines.append(
            f"- The same weights, {entry['dtype']}, batch {entry['batch']}: the largest difference from our logits, "
            f"which reach {entry['largest']:.2f}, over a prompt and cached steps: {differences or 'no peer'}."
        )
    lines += [
        f"- Routing spreads: over 2048 tokens every layer uses {routing['used']:.0%} of its experts, the "
        f"busiest {routing['busiest']:.2f} times its even share; a batch of 8 tokens meets "
        f"{routing['used_by_8_tokens']:.0%} of a layer's.",
        "- Decoding: the model's step and the greedy choice of each sequence's next token, all sequences at the stated "
        "context; what is fed is drawn at random, the same for every engine, so that routing stays spread. Prefill: a "
        "prompt into an empty cache, and the choice after its last token. Training: forward, backward, clipping and "
        "fused AdamW. Processes alternate between the engines; a pass is warmed up before it is timed.",
        "- `bound`: what the read bandwidth alone would allow a decoding step.",
    ]
    if compiled:
        lines.append(f"- Compiling our decoding step is not in these numbers. {compiled}")
    for cell, engines in measured(results):
        for engine, part in engines.items():
            if part.get("failed"):
                lines.append(f"- {cell.title}, {cell.dtype}: {engine} failed: {part['failed']}.")
        if losses := _losses(engines):
            lines.append(f"- Losses of the first training steps: {losses}.")
    return "\n".join(lines)


def _modes(results: Results) -> str:
    lines = ["The peers' modes that were fastest, and so the ones above:", "", "| | dtype | transformers | llama.cpp |"]
    lines.append("|---|---|---|---|")
    for cell, engines in measured(results):
        won = [told(engines.get(peer, {}).get("variant", {})) or "–" for peer in (TRANSFORMERS, LLAMA)]
        lines.append(f"| {cell.title} | {cell.dtype} | {' | '.join(won)} |")
    return "\n".join(lines) if len(lines) > 4 else ""


def _losses(engines: dict[str, Any]) -> str:
    found = {
        e: part["details"][0]["losses"]
        for e, part in engines.items()
        if part["details"] and "losses" in part["details"][0]
    }
    return "; ".join(f"{engine} {', '.join(f'{loss:.4f}' for loss in own)}" for engine, own in found.items())


def _compile_times(results: Results) -> str:
    firsts, agains, stepped = [], [], False
    for _, engines in measured(results):
        details = [d for d in engines.get(OURS, {}).get("details", []) if "compiled" in d]
        seconds = [d["first_step_seconds"] for d in details if d["compiled"]]
        stepped |= bool(details)
        firsts += seconds[:1]
        agains += seconds[1:]
    if not firsts:
        return "It ran uncompiled, for lack of a C++ compiler." if stepped else ""
    again = f", {max(agains):.0f} s at most when it is on disk already" if agains else ""
    return f"It took {min(firsts):.0f} to {max(firsts):.0f} s the first time{again}."


def chart(results: Results, file: Path) -> None:
    """Bars of tokens a second, a panel a dtype."""
    rows = measured(results)
    dtypes = [d for d in ("float32", "bfloat16") if any(c.dtype == d for c, _ in rows)]
    if not dtypes:
        return
    figure, axes = plt.subplots(len(dtypes), 1, figsize=(11, 4.2 * len(dtypes)), squeeze=False, layout="constrained")
    for axis, dtype in zip(axes[:, 0], dtypes):
        own = [(cell, engines) for cell, engines in rows if cell.dtype == dtype]
        for i, engine in enumerate(ENGINES):
            rates = [_best(engines.get(engine)) or float("nan") for _, engines in own]
            bars = axis.bar(
                [x + (i - 1) * 0.27 for x in range(len(own))], rates, 0.26, label=engine, color=COLOURS[engine]
            )
            axis.bar_label(bars, [_number(r) if r == r else "" for r in rates], fontsize=8, padding=2)
        axis.set_yscale("log")
        axis.set_xticks(range(len(own)), [cell.title.replace(", ", "\n") for cell, _ in own], fontsize=9)
        axis.set_ylabel("tokens a second")
        axis.set_title(dtype, loc="left")
        axis.set_ylim(bottom=1)
        axis.margins(y=0.1)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, ncols=3, loc="lower right", bbox_to_anchor=(1, 1))
    figure.suptitle(f"{results['machine']['cpu']}, {results['machine']['threads']} threads")
    figure.savefig(file, dpi=130)
    plt.close(figure)
