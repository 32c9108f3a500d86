"""A study of experts as tables."""

import math
from collections.abc import Mapping, Sequence

from abyssal.costs import Parameters
from abyssal.study.experts_claims import PAPERS
from abyssal.study.experts_measure import Found
from abyssal.study.experts_shapes import Shape
from abyssal.study.experts_tokens import LEAST, Taken, Taker
from abyssal.study.result import Grid
from abyssal.study.spread import Difference, Spread
from abyssal.study.trained import Trained

SHOWN = 4  # experts of a layer whose tokens are told

Runs = Mapping[str, Sequence[Trained]]
All = Mapping[str, Sequence[Found]]


def papers() -> Grid:
    """What DeepSeekMoE reports, of models that are hundreds of times as large."""
    return Grid("What the paper reports: 2B parameters, 100B tokens", ("where", "what", "Pile loss"), PAPERS, labels=2)


def sizes(shapes: Sequence[Shape], counted: Sequence[Parameters]) -> Grid:
    """What the shapes have, and what a token meets of it."""
    head = (
        "shape", "routed", "chosen", "shared", "width", "in all", "activated", "routers", "in all, without",
        "activated, without",
    )  # fmt: skip
    rows = []
    for shape, size in zip(shapes, counted):
        numbers = (size.total, size.activated, size.routers, size.total - size.routers, size.activated - size.routers)
        of_experts = (shape.routed or 0, shape.chosen, shape.shared, shape.width)
        rows.append((shape.label, *map(str, of_experts), *(f"{n:,}" for n in numbers)))
    least, most = (pick(counted[:-1], key=lambda size: size.routers) for pick in (min, max))
    apart = most.routers - least.routers
    note = "Parameters, counted on the real models. The shapes with experts have equally many, in all and activated, "
    note += "but for their routers, a row of weights and a bias an expert (the last two columns are without them): "
    note += f"{apart:,} at most, {apart / least.total:.1%} of all and {apart / least.activated:.1%} of what a token "
    note += "meets. A shared expert is there in exchange for a routed one, and sees every token in exchange for one "
    note += "chosen. The dense MLP is as wide as what a token meets elsewhere."
    return Grid("The shapes", head, tuple(rows), note)


def table(shapes: Sequence[Shape], runs: Runs, found: All) -> Grid:
    """A row a shape."""
    head = ("shape", "bits a byte", f"less {shapes[0].label}", "MaxVio", "tells of kind", "by chance", "seconds")
    base = [run.bits_per_byte for run in runs["few"]]
    rows = []
    for shape in shapes:
        bits = [run.bits_per_byte for run in runs[shape.name]]
        apart = "" if shape.name == "few" else Difference.of(bits, base).text()
        cells = [Spread.of(bits).text(), apart]
        if shape.name in found:
            balances = [one.balance for one in found[shape.name]]
            cells += [Spread.of([b.violation for b in balances]).text()]
            cells += [Spread.of([b.information for b in balances]).text()]
            cells += [Spread.of([b.information_by_chance for b in balances]).text()]
        else:
            cells += ["–"] * 3
        rows.append((shape.label, *cells, f"{Spread.of([run.seconds for run in runs[shape.name]]).mean:.0f}"))
    note = "Of the held-out texts after the last step: mean ± standard deviation over the seeds; the difference is "
    note += "paired by seed, ± half the 95% interval (Student's). All gates are balanced alike, by their biases. What "
    note += "a picked expert tells of the kind of text is in bits, a mean over the layers, beside what is left of it "
    note += "when the kinds are dealt out at random: where experts are more and smaller it may be more for that alone."
    return Grid("What came of it", head, tuple(rows), note)


def by_kind(shapes: Sequence[Shape], runs: Runs, kinds: Sequence[str]) -> Grid:
    """Bits a byte of each kind."""
    rows = []
    for shape in shapes:
        values = [[run.checks[-1].by_kind[kind] for run in runs[shape.name]] for kind in kinds]
        rows.append((shape.label, *(Spread.of(column).text() for column in values)))
    return Grid("Bits a byte by kind of text", ("shape", *kinds), tuple(rows))


def disabled(shapes: Sequence[Shape], found: All, masked: Mapping[str, Sequence[int]], experts: int) -> Grid:
    """What it costs to take experts out."""
    levels = next(iter(masked.values()))
    head = ("shape", "as trained", *(f"{n}/{experts} masked" for n in levels[1:]), "first one", "shared replaced")
    rows = []
    for shape in shapes:
        if shape.name not in found:
            continue
        of_seeds = found[shape.name]
        cells = [Spread.of([run.disabled[0] for run in of_seeds]).text()]
        for level in range(1, len(levels)):
            rise = Spread.of([run.disabled[level] - run.disabled[0] for run in of_seeds])
            cells.append(rise.text(sign=True))
        cells.append(Spread.of([run.without_first - run.disabled[0] for run in of_seeds]).text(sign=True))
        without = [run.replaced - run.disabled[0] for run in of_seeds if run.replaced is not None]
        rows.append((shape.label, *cells, Spread.of(without).text(sign=True) if without else "–"))
    told = "; ".join(f"{s.label}: {', '.join(map(str, masked[s.name][1:]))}" for s in shapes if s.name in found)
    note = "Bits a byte as trained, and how many more it is with experts taken out of the trained model. Masked: in "
    note += (
        f"every layer and for each token, the experts that its gate would pick first ({told}), and as many as before "
    )
    note += (
        "are picked of the rest. First one: only the very first. Shared replaced: the shared expert is out, and one "
    )
    note += "routed expert more is picked. Gate values are always those of the unbiased scores."
    return Grid("Redundancy: what it costs to disable experts", head, tuple(rows), note)


def alikeness(shapes: Sequence[Shape], found: All, first: int, tokens: int) -> Grid:
    """How alike experts are and how they are combined, a row a shape and layer."""
    head = (
        "shape", "layer", "cosine", "of picked together", "sets possible", "sets met", "effective", "tells of token",
        "by chance",
    )  # fmt: skip
    rows = []
    for shape in shapes:
        if shape.routed is None:
            continue
        of_seeds = found[shape.name]
        for i in range(len(of_seeds[0].cosine)):
            together = [run.cosine_together[i] for run in of_seeds if run.cosine_together is not None]
            rows.append((
                shape.label, str(first + i), Spread.of([run.cosine[i] for run in of_seeds]).text(),
                Spread.of(together).text() if together else "–", f"{math.comb(shape.routed, shape.chosen):,}",
                Spread.of([float(run.combinations[i]) for run in of_seeds]).text(0),
                Spread.of([run.effective[i] for run in of_seeds]).text(0),
                Spread.of([run.tells_of_token[i] for run in of_seeds]).text(),
                Spread.of([run.tells_by_chance[i] for run in of_seeds]).text(),
            ))  # fmt: skip
    note = "Cosine: of the outputs of two experts for the same held-out token, a mean over pairs and tokens; 0: they "
    note += f"have nothing in common, 1: they do the same. Sets: of experts picked for one of {tokens:,} held-out "
    note += (
        "tokens, how many are possible (section 3.1 of DeepSeekMoE), how many were met, and as many as would be met "
    )
    note += (
        "if all were equally frequent. What a picked expert tells of the token's id is in bits, beside what is left "
    )
    note += "of it when the ids are dealt out at random; those of shapes with other numbers of experts do not compare."
    return Grid("Redundancy: how alike experts are, and how they are combined", head, tuple(rows), note, labels=2)


def tokens(shape: Shape, of_layers: Sequence[Sequence[Taker]]) -> Grid:
    """Of every layer the experts whose tokens differ most from the text, and which tokens these are."""
    head = ("expert", "takes", "for instance", "load", "bits")
    rows = []
    for of_layer in of_layers:
        for taker in sorted(of_layer, key=lambda taker: -taker.bits)[:SHOWN]:
            takes = "  ".join(f"{t.text} ×{t.lift:.1f} ({t.picked}/{t.occurs})" for t in taker.tokens)
            context = taker.tokens[0].context if taker.tokens else ""
            name = f"layer {taker.layer}, {taker.expert}"
            rows.append((name, takes, context, f"{taker.load:.2f}", f"{taker.bits:.2f}"))
    note = (
        f"The first seed. Of each layer the {SHOWN} experts whose tokens differ most from the held-out text, in bits "
    )
    note += "(Kullback-Leibler), and the tokens that add most to that: how many times as often they are among the "
    note += (
        f"expert's tokens as in the text (picked/occurs; {LEAST} times at least), and the place of the first of them "
    )
    note += "where its gate value was highest. ␣ is a space, ⏎ the end of a line. All experts are in the JSON."
    return Grid(f"Which tokens experts take, {shape.label}", head, tuple(rows), note, labels=3)


def of_taken(taken: Taken) -> list[object]:
    """For JSON: token, lift, picked, occurs, context."""
    return [taken.text, taken.lift, taken.picked, taken.occurs, taken.context]
