"""A study of attention as tables."""

from collections.abc import Mapping, Sequence

from abyssal.study.attention_algebra import Shape, Way
from abyssal.study.attention_claims import PAPERS, Heads, Runs
from abyssal.study.attention_decode import Again, Point
from abyssal.study.attention_heads import Alike
from abyssal.study.attention_ladder import BASE, Rung
from abyssal.study.result import Grid
from abyssal.study.spread import Spread

Points = Mapping[str, Sequence[Point]]
Labels = Mapping[str, str]


def papers() -> Grid:
    """What they report, of models that are thousands of times as large."""
    head = ("paper", "model", "attention", "cache a token", "BBH", "MMLU")
    return Grid("What the papers report", head, PAPERS, labels=3)


def parameters(ladder: Sequence[Rung]) -> Grid:
    """That they are equal, and by what."""
    base = next(rung.parameters for rung in ladder if rung.name == BASE)
    rows = [
        (
            rung.label,
            f"{rung.attention:,}",
            f"{rung.model.intermediate_size:,}",
            f"{rung.parameters:,}",
            f"{rung.parameters / base - 1:+.2%}",
        )
        for rung in ladder
    ]
    c = ladder[0].model
    note = f"Width {c.hidden_size}, {c.num_hidden_layers} layers, {c.num_attention_heads} heads of d_h "
    note += f"{c.v_head_dim}; latent 4·d_h, rotary key d_h/2. The MLPs' width is solved for, so that what attention "
    note += "saves goes there and all have MHA's parameters."
    head = ("attention", "its parameters", "MLP width", "parameters", "of MHA's")
    return Grid("Equal parameters", head, tuple(rows), note)


def quality(ladder: Sequence[Rung], runs: Runs, heads: Heads, points: Points) -> Grid:
    """A row a rung: the ladder at a glance."""
    group = next(rung.elements for rung in ladder if rung.name == "mqa")
    last = next(iter(points.values()))[-1].context
    rows = [
        (
            rung.label,
            Spread.of([run.bits_per_byte for run in runs[rung.name]]).text(),
            f"{rung.elements:,}",
            f"{rung.bytes:,}",
            f"{rung.elements / group:g}",
            points[rung.name][-1].time.text(),
            Spread.of([found.divergence for found in heads[rung.name]]).text(),
            f"{Spread.of([run.seconds for run in runs[rung.name]]).mean:.0f}",
        )
        for rung in ladder
    ]
    note = "Mean ± standard deviation over the seeds. The cache is of a token in all layers, bytes are bf16's; groups "
    note += f"are those of the GQA that would keep as much. A token is decoded as the last of {last:,}. Between heads: "
    note += "the Jensen-Shannon divergence of a pair's attention, a mean over pairs and layers; 0 is alike."
    head = ("attention", "bits a byte", "elements", "bytes", "groups", "ms a token", "between heads", "seconds")
    return Grid("The ladder", head, tuple(rows), note)


def decoding(points: Points, labels: Labels) -> Grid:
    """Milliseconds a token and what they are of."""
    contexts = [point.context for point in next(iter(points.values()))]
    rows = [
        (
            labels[name],
            *(f"{p.time.ms:.3g} ({p.time.low:.3g} to {p.time.high:.3g})" for p in of_line),
            f"{of_line[-1].flops / 1e6:,.1f}",
            f"{of_line[-1].cache:,}",
        )
        for name, of_line in points.items()
    ]
    note = "Milliseconds, the median and quartiles: one token after a cache of the model's own, filled; on the CPU, "
    note += "eagerly, float32, all lines measured in turns. MFLOP by the formulas of abyssal inspect, bytes of the "
    note += "cache as allocated."
    head = ("attention", *(f"at {n:,}" for n in contexts), f"MFLOP at {contexts[-1]:,}", "cache bytes there")
    return Grid("Decoding a token", head, tuple(rows), note)


def recomputed(again: Sequence[Again], coupled: Sequence[Point], decoupled: Sequence[Point]) -> Grid:
    """The argument for decoupling."""
    rows = [
        (
            f"{a.context:,}",
            f"{c.time.ms:.3g}",
            f"{d.time.ms:.3g}",
            f"{a.time.ms:.3g}",
            f"{a.time.ms / c.time.ms:.0%}",
            f"{a.flops / 1e6:,.1f}",
            f"{a.made:,}",
            f"{c.cache:,}",
        )
        for a, c, d in zip(again, coupled, decoupled)
    ]
    note = "Coupled RoPE stands between W_UQ and W_UK: nothing can be absorbed, and each step makes the keys (and with "
    note += "them the values) of every earlier token from its latent, and turns them. Measured by itself, beside the "
    note += "whole step: all layers', milliseconds, MFLOP of the products, bytes of what is written on the way."
    head = ("context", "coupled: ms", "decoupled: ms", "keys anew: ms", "of the step", "MFLOP", "bytes made", "cache")
    return Grid("What coupled RoPE makes anew for each token", head, tuple(rows), note, labels=0)


def algebra(ways: Sequence[Way], shape: Shape, context: int, prompt: int, model_apart: float) -> Grid:
    """A row a way."""
    rows = [
        (
            w.task,
            w.name,
            f"{w.flops / 1e6:,.1f}",
            f"{w.weights:,}",
            f"{w.made:,}",
            f"{w.time.ms:.3g} ({w.time.low:.3g} to {w.time.high:.3g})",
            f"{w.apart_64:.0e}" if w.apart_64 else "–",
            f"{w.apart_32:.0e}" if w.apart_32 else "–",
        )
        for w in ways
    ]
    note = f"One layer of DeepSeek-V3's widths with {shape.heads} heads, float32 on the CPU: a token at {context:,}, "
    note += f"a prompt of {prompt:,}. MFLOP and bytes are of operations watched, milliseconds medians (quartiles). "
    note += "Apart: the largest difference from the way above, of the largest number. The trained model's logits, "
    note += f"absorbed and expanded: {model_apart:.0e} in float64. Of cached rows latent and rotary key lie side by "
    note += "side: concatenating costs there nothing but a copy of the query."
    head = ("task", "order", "MFLOP", "weights, bytes", "bytes made", "ms", "apart, float64", "float32")
    return Grid("The algebra at work", head, tuple(rows), note, labels=2)


def heads_by_layer(ladder: Sequence[Rung], heads: Heads, before: Mapping[str, Alike]) -> Grid:
    """How far heads differ in each layer, and before training."""
    layers = ladder[0].model.num_hidden_layers
    rows = [
        (
            rung.label,
            *(Spread.of(values).text() for values in zip(*(found.by_layer for found in heads[rung.name]))),
            f"{before[rung.name].divergence:.3f}",
        )
        for rung in ladder
    ]
    note = "Bits, mean ± standard deviation over the seeds: the Jensen-Shannon divergence of two heads' attention, a "
    note += "mean over pairs, held-out texts and every 8th row of them. 0: they attend alike; 1: to nothing in common."
    head = ("attention", *(f"layer {layer}" for layer in range(layers)), "untrained")
    return Grid("How far heads differ", head, tuple(rows), note)
