"""A study of prediction as tables."""

from collections.abc import Callable, Mapping, Sequence

from abyssal.config import ModelConfig
from abyssal.study.prediction_claims import ABLATIONS, ACCEPTED, MOST_ACCEPTED
from abyssal.study.prediction_found import Found
from abyssal.study.prediction_measure import GRAM, Drafted, Read, together
from abyssal.study.prediction_speed import Timed, cost
from abyssal.study.result import Grid
from abyssal.study.spread import Spread
from abyssal.study.trained import Trained

Runs = Mapping[str, Sequence[Trained]]
Labels = Mapping[str, str]
PRESET, CONTEXT = "deepseek-v3", 4096  # whose arithmetic stands beside


def percent(values: Sequence[float]) -> str:
    """Shares as a mean and its deviation, in percent."""
    return Spread.of([100 * value for value in values]).text(1)


def papers() -> Grid:
    head = ("", "15.7B, no MTP", "with it", "228.7B, no MTP", "with it")
    note = (
        "1.33T and 540B tokens, one module, dropped for the benchmarks. Section 5.4.3 has 85 to 90% of second tokens "
    )
    note += "accepted, and 1.8 times the tokens a second."
    return Grid("What DeepSeek-V3 reports (section 4.5.1)", head, ABLATIONS, note)


def table(runs: Runs, found: Sequence[Found], labels: Labels) -> Grid:
    """A row a variant: the main model, what it cost, and the modules on held-out text."""
    head = ("trained with", "parameters", "bits a byte", "less no MTP", "2nd token right", "3rd", "2nd accepted",
            "3rd", "seconds")  # fmt: skip
    rows = []
    for name, of_seeds in runs.items():
        bits = [run.bits_per_byte for run in of_seeds]
        apart = Spread.of([a - run.bits_per_byte for a, run in zip(bits, runs["none"])]).text(sign=True)
        reads = [of_module(f.held_out[name]) for f in found] if name in found[0].held_out else []
        right = _modules([[r.accuracy for r in own] for own in reads])
        accepted = _modules([[r.accepted for r in own] for own in reads])
        seconds = Spread.of([run.seconds for run in of_seeds]).mean
        parameters = f"{of_seeds[0].parameters:,}"
        less = apart if name != "none" else "–"
        rows.append(
            (labels[name], parameters, Spread.of(bits).text(), less, *right, *accepted, f"{seconds:.0f}")
        )  # fmt: skip
    note = "Mean ± standard deviation over the seeds. Bits a byte are the main model's. Right: the share of held-out "
    note += (
        "positions, in percent, at which a module's likeliest token is the text's. Accepted: the same of those where "
    )
    note += "the main model and the modules before are right, too. The main model has equally many steps everywhere."
    return Grid("What came of it", head, tuple(rows), note)


def of_module(kinds: Mapping[str, Sequence[Read]]) -> list[Read]:
    """The kinds together, a module each."""
    return [
        Read(*([sum(at) for at in zip(*part)] for part in zip(*reads))) for reads in zip(*kinds.values())
    ]  # fmt: skip


def _modules(of_seeds: Sequence[Sequence[float]]) -> tuple[str, str]:
    """The first and the second module's."""
    columns = [percent(column) for column in zip(*of_seeds)]
    first, second, *_ = [*columns, "–", "–"]
    return first, second


def drafts(found: Sequence[Found], labels: Labels) -> Grid:
    """A row a way of drafting."""
    head = ("drafts", "decoding", "1st accepted", "2nd", "tokens a step", "repeated")
    rows = []
    for name, k in found[0].greedy:
        for how, of in (("greedy", [f.greedy for f in found]), ("temperature 1", [f.sampled for f in found])):
            every = [together(list(one[name, k].values())) for one in of]
            second = percent([d.rate(1) for d in every]) if k > 1 else "–"
            steps = Spread.of([d.tokens_a_step for d in every]).text(2)
            told = f"{labels[name]}, {k} token{'s' * (k > 1)}"
            rows.append(
                (told, how, percent([d.rate(0) for d in every]), second, steps, percent([d.repeated for d in every]))
            )
    note = "By the engine, of texts that go on from held-out ones, in percent. A draft counts as accepted where all "
    note += "before it were, too. One module drafts a second token from its own state of the first. Repeated: tokens "
    note += f"that end {GRAM} which stood together before in the same text; these are easy. Ways of drafting stop at "
    note += "other places of a text, so that the first of two drafts is accepted otherwise than the only one."
    return Grid("Drafts accepted", head, tuple(rows), note, labels=2)


def by_kind(found: Sequence[Found], kinds: Sequence[str]) -> Grid:
    """One module, one draft: a row a kind, and by position."""
    head = ("text", "greedy", "temperature 1", "held out", "agrees", "repeated", "early", "late")
    rows = []
    for kind in kinds:
        greedy = [f.greedy["one", 1][kind] for f in found]
        sampled = [f.sampled["one", 1][kind] for f in found]
        reads = [f.held_out["one"][kind][0] for f in found]
        rows.append((kind, *_row(greedy, sampled, reads)))
    every = [together(list(f.greedy["one", 1].values())) for f in found]
    drawn = [together(list(f.sampled["one", 1].values())) for f in found]
    rows.append(("all", *_row(every, drawn, [of_module(f.held_out["one"])[0] for f in found])))
    note = f"In percent; DeepSeek-V3 has {ACCEPTED:.0%} to {MOST_ACCEPTED:.0%}. Held out: of the text's own second "
    note += (
        "tokens, where the model is right about the first. Agrees: the module's likeliest token is the model's own, "
    )
    note += "on held-out text. Early and late: the first and the second half of the greedy texts."
    return Grid("One module, one draft: accepted by kind of text and by position", head, tuple(rows), note)


def _row(greedy: Sequence[Drafted], sampled: Sequence[Drafted], reads: Sequence[Read]) -> tuple[str, ...]:
    half = len(greedy[0].steps) // 2
    return (
        percent([d.rate(0) for d in greedy]),
        percent([d.rate(0) for d in sampled]),
        percent([r.accepted for r in reads]),
        percent([r.agreement for r in reads]),
        percent([d.repeated for d in greedy]),
        percent([_between(d, 0, half) for d in greedy]),
        percent([_between(d, half, None) for d in greedy]),
    )


def _between(d: Drafted, start: int, end: int | None) -> float:
    return sum(d.accepted[0][start:end]) / max(sum(d.steps[start:end]), 1)


def speed(timed: Sequence[Sequence[Timed]]) -> Grid:
    """Measured by the engine, of the variant with one module."""
    head = ("texts at once", "drafts", "tokens/s", "× none", "tokens a step", "a step takes", "breaks even at")
    rows = []
    for batch, k, ratios, steps, rates in measured(timed):
        takes = [a / ratio for a, ratio in zip(steps, ratios)]
        even = percent([t - 1 for t in takes]) if k == 1 else "–"
        cells = (Spread.of(ratios).text(2), Spread.of(steps).text(2), Spread.of(takes).text(2), even)
        rows.append((str(batch), str(k), f"{Spread.of(rates).mean:,.0f}", *(cells if k else ("1", "1", "1", "–"))))
    note = "Greedy, decoding alone, medians of alternating passes, the same model each; mean ± standard deviation over "
    note += "the seeds. What a step takes is in plain steps; with one draft, more than that share of them (in percent) "
    note += "has to be accepted for drafting to gain anything. The step is not compiled."
    return Grid("Speed measured on this machine", head, tuple(rows), note, labels=2)


def measured(
    timed: Sequence[Sequence[Timed]],
) -> list[tuple[int, int, list[float], list[float], list[float]]]:
    """Batch, drafts, and a number a seed: times as fast as without drafts, tokens a step, tokens a second."""
    found = []
    for batch, k in [(t.batch, t.drafts) for t in timed[0]]:
        of_seeds = [{t.drafts: t for t in seed if t.batch == batch} for seed in timed]
        rates = [of[k].tokens_per_second for of in of_seeds]
        ratios = [rate / of[0].tokens_per_second for rate, of in zip(rates, of_seeds)]
        found.append((batch, k, ratios, [of[k].tokens_a_step for of in of_seeds], rates))
    return found


def arithmetic(timed: Sequence[Sequence[Timed]], model: ModelConfig, context: int) -> Grid:
    """The bounds beside what was measured, and V3's own."""
    head = ("model", "tokens a step", "waiting for weights", "working on every token", "measured")
    ratio: Callable[[Sequence[float]], str] = lambda values: Spread.of(values).text(2)  # noqa: E731
    rows = []
    for batch, k, ratios, steps, _ in measured(timed):
        if k:
            c = cost(model, k, context)
            told = f"this one, {k} draft{'s' * (k > 1)}, {batch} at once"
            bounds = ratio([a / c.waiting for a in steps]), ratio([a / c.working for a in steps])
            rows.append((told, ratio(steps), *bounds, ratio(ratios)))
    large = cost(ModelConfig.load(PRESET), 1, CONTEXT)
    for accepted in (ACCEPTED, MOST_ACCEPTED):
        a = 1 + accepted
        cells = (f"{a:.2f}", f"{a / large.waiting:.2f}", f"{a / large.working:.2f}")
        said = "1.8, says section 5.4.3"
        rows.append((f"{PRESET}, 1 draft, {accepted:.0%} accepted", *cells, said))
    note = "Times as fast as without drafts. Waiting: a pass takes what its weights take to be read, and the second "
    note += "token is free (experts that only the second token needs are not counted). Working: every token costs its "
    note += "products, and one draft can only lose. A module's head is counted. A model as small as this one waits for "
    note += "neither, but for the calls that make up a step: what is measured may lie outside of both."
    return Grid("What arithmetic says", head, tuple(rows), note)
