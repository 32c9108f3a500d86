"""A study of balance as tables."""

from collections.abc import Mapping, Sequence

from abyssal.study.balance_claims import PAPERS
from abyssal.study.balance_measure import Found
from abyssal.study.result import Grid
from abyssal.study.spread import Spread
from abyssal.study.texts import Texts
from abyssal.study.trained import Trained

Runs = Mapping[str, Sequence[Trained]]
All = Mapping[str, Sequence[Found]]
Labels = Mapping[str, str]


def papers() -> Grid:
    """What they report, of models that are thousands of times as large."""
    head = ("paper", "model", "balanced by", "validation", "MaxVio")
    return Grid("What the papers report", head, PAPERS, labels=3)


def table(runs: Runs, found: All, labels: Labels) -> Grid:
    """A row a variant."""
    head = (
        "balanced by",
        "bits a byte",
        "MaxVio",
        "of a batch",
        "in a sequence",
        "tells of kind",
        "by chance",
        "seconds",
    )
    rows = []
    for name, of_seeds in found.items():
        columns = [
            [f.bits_per_byte for f in of_seeds],
            [f.violation for f in of_seeds],
            [f.violation_of_batch for f in of_seeds],
            [f.violation_of_sequence for f in of_seeds],
            [f.information for f in of_seeds],
            [f.information_by_chance for f in of_seeds],
        ]
        seconds = Spread.of([run.seconds for run in runs[name]]).mean
        rows.append((labels[name], *(Spread.of(column).text() for column in columns), f"{seconds:.0f}"))
    note = "Mean ± standard deviation over the seeds. MaxVio: of the held-out texts together, of a training batch (the "
    note += "last tenth of the steps), and within a held-out sequence; a mean over the layers. What a picked expert "
    note += "tells of the kind of text is in bits, beside what is left of it when the kinds are dealt out at random."
    return Grid("What came of it", head, tuple(rows), note)


def by_layer(found: All, labels: Labels, first: int) -> Grid:
    """MaxVio and information; `first` is the number of the first layer with experts, from 0."""
    gates = len(next(iter(found.values()))[0].violation_by_layer)
    head = ("balanced by", "", *(f"layer {first + gate}" for gate in range(gates)))
    rows = []
    for name, of_seeds in found.items():
        for what, lists in (
            ("MaxVio", [f.violation_by_layer for f in of_seeds]),
            ("tells of kind", [f.information_by_layer for f in of_seeds]),
        ):
            rows.append((labels[name], what, *(Spread.of(values).text() for values in zip(*lists))))
    return Grid("By layer, over the held-out texts", head, tuple(rows), labels=2)


def by_kind(runs: Runs, labels: Labels, kinds: Sequence[str]) -> Grid:
    """Bits a byte of each kind."""
    rows = []
    for name, of_seeds in runs.items():
        values = [[run.checks[-1].by_kind[kind] for run in of_seeds] for kind in kinds]
        rows.append((labels[name], *(Spread.of(column).text() for column in values)))
    return Grid("Bits a byte by kind of text", ("balanced by", *kinds), tuple(rows))


def texts_of(texts: Texts, note: str) -> Grid:
    """What was read of each kind."""
    head = ("kind", "documents", "bytes", "held-out tokens")
    rows = tuple(
        (
            kind,
            f"{about['documents']:,}",
            f"{about['bytes']:,}",
            f"{sum(len(b.tokens) for b in texts.held_out[kind]):,}",
        )
        for kind, about in texts.about.items()
    )
    return Grid("The texts", head, rows, note)
