"""What is claimed of attention, claim by claim, and whether trained runs, counts and clocks bear it out."""

from collections.abc import Mapping, Sequence

from abyssal.study.attention_algebra import EQUAL, Way
from abyssal.study.attention_clock import Time
from abyssal.study.attention_decode import Point
from abyssal.study.attention_heads import Alike
from abyssal.study.attention_ladder import Rung
from abyssal.study.claim import OPEN, REFUTED, REVERSED, SHOWN, Claim, paired
from abyssal.study.spread import Difference
from abyssal.study.trained import Trained

KINDS, LATENT, TABLE = "DeepSeek-V2, table 8", "DeepSeek-V2, table 9", "DeepSeek-V2, table 1 (section 2.1.4)"
HEAVY = "DeepSeek-V2, section 2.1"
ABSORB, DECOUPLE = "DeepSeek-V2, section 2.1.2", "DeepSeek-V2, section 2.1.3"
OWN = "no paper; why abyssal computes so"
ASKED = "asked here, claimed by no paper"

# Where, what was trained, attention, elements of cache a token, BBH, MMLU (accuracy, the same shots throughout).
PAPERS = (
    (KINDS, "7B, dense", "MQA", "–", "33.2", "37.9"),
    (KINDS, "7B, dense", "GQA, 8 groups", "–", "35.6", "41.2"),
    (KINDS, "7B, dense", "MHA", "–", "37.0", "45.2"),
    (LATENT, "16B, experts", "MHA", "110.6K", "37.9", "48.7"),
    (LATENT, "16B, experts", "MLA", "15.6K", "39.0", "50.0"),
    (LATENT, "250B, experts", "MHA", "860.2K", "46.6", "57.5"),
    (LATENT, "250B, experts", "MLA", "34.6K", "50.7", "59.0"),
)

NOTE = "Of times: medians; shown is what the quartiles tell apart."

Runs = Mapping[str, Sequence[Trained]]
Heads = Mapping[str, Sequence[Alike]]


def of_training(ladder: Sequence[Rung], runs: Runs, heads: Heads) -> list[Claim]:
    """Of bits a byte and of heads, judged by differences between runs of the same seed."""
    labels = {rung.name: rung.label for rung in ladder}
    bits = {name: [run.bits_per_byte for run in of_seeds] for name, of_seeds in runs.items()}
    alike = {name: [found.divergence for found in of_seeds] for name, of_seeds in heads.items()}

    def below(where: str, says: str, left: str, right: str) -> Claim:
        apart = Difference.of(bits[left], bits[right])
        return paired(where, says, f"bits a byte, {labels[left]} less {labels[right]}", -1, apart)

    def asked(what: str, values: Mapping[str, Sequence[float]], left: str, right: str, say: tuple[str, str]) -> Claim:
        apart = Difference.of(values[left], values[right])
        says = {-1: say[0], 0: f"{say[0]}, or the reverse", 1: say[1]}[apart.sign]
        compared = f"{what}, {labels[left]} less {labels[right]}"
        return paired(ASKED, says, compared, apart.sign or -1, apart)  # either way is an answer

    prediction, unlike = "bits a byte", "bits between heads"
    coupled = "Decoupled RoPE predicts better than coupled", "Coupled RoPE predicts better than decoupled"
    bare = "The rotary key helps prediction", "The rotary key harms prediction"
    return [
        below(KINDS, "MHA predicts better than GQA", "mha", "gqa"),
        below(KINDS, "MHA predicts better than MQA", "mha", "mqa"),
        below(KINDS, "GQA predicts better than MQA", "gqa", "mqa"),
        below(LATENT, "MLA predicts better than MHA", "mla", "mha"),
        asked(prediction, bits, "mla", "coupled", coupled),
        asked(prediction, bits, "mla", "bare", bare),
        *(
            asked(
                unlike, alike, name, "mha",
                (f"Heads are more alike under {labels[name]} than under MHA",
                 f"Heads differ more under {labels[name]} than under MHA"),
            )
            for name in ("gqa", "mqa", "mla")
        ),
    ]  # fmt: skip


def of_cache(ladder: Sequence[Rung]) -> list[Claim]:
    """Exact counts."""
    of = {rung.name: rung for rung in ladder}
    mha, mla, mqa = (of[name].elements for name in ("mha", "mla", "mqa"))
    layers = of["mqa"].model.num_hidden_layers
    return [
        _less(LATENT, "MLA keeps less than MHA", "elements a token, MLA and MHA", mla, mha),
        Claim(
            TABLE, "MLA keeps what GQA with 2.25 groups would, widths as the paper's",
            "elements a token and layer, MLA's by a group's", f"{mla // layers} / {mqa // layers} = {mla / mqa:g}",
            SHOWN if mla / mqa == 2.25 else REFUTED, {"ratio": mla / mqa},
        ),
    ]  # fmt: skip


def of_decoding(points: Mapping[str, Sequence[Point]]) -> list[Claim]:
    """Of the clock, judged by the quartiles of what was measured in turns."""
    coupled, decoupled = points["coupled"], points["mla"]
    first, last = ((c.time, d.time) for c, d in ((coupled[0], decoupled[0]), (coupled[-1], decoupled[-1])))
    contexts = coupled[0].context, coupled[-1].context
    slower = slower_than(
        DECOUPLE, "Coupled RoPE makes every key anew, so that decoding is slower than with decoupled",
        f"a token at {contexts[1]:,}, coupled and decoupled RoPE", *last,
    )  # fmt: skip
    ratios = [(c.low / d.high, c.ms / d.ms, c.high / d.low) for c, d in (first, last)]
    grows = SHOWN if ratios[1][0] > ratios[0][2] else REFUTED if ratios[1][2] < ratios[0][0] else OPEN
    cases = zip(("first", "last"), ratios)
    return [
        slower,
        Claim(
            DECOUPLE, "And the more so, the longer the context", "a token with coupled RoPE takes, times decoupled",
            f"{ratios[0][1]:.1f} at {contexts[0]:,}, {ratios[1][1]:.1f} at {contexts[1]:,}", grows,
            {f"{end}_{what}": x for end, r in cases for what, x in zip(("low", "ratio", "high"), r)},
        ),
        slower_than(
            HEAVY, "A smaller cache is read faster: GQA decodes faster than MHA",
            f"a token at {contexts[1]:,}, MHA and GQA", points["mha"][-1].time, points["gqa"][-1].time,
        ),
        slower_than(
            HEAVY, "A smaller cache is read faster: MLA decodes faster than MHA",
            f"a token at {contexts[1]:,}, MHA and MLA", points["mha"][-1].time, points["mla"][-1].time,
        ),
    ]  # fmt: skip


def of_algebra(ways: Sequence[Way], model_apart: float) -> list[Claim]:
    """That orders of multiplication are equal to rounding, and which is the faster."""
    by_task: dict[str, dict[str, Way]] = {}
    for way in ways:
        by_task.setdefault(way.task, {})[way.name] = way
    most = max(model_apart, *(way.apart_64 for way in ways))
    whole = Claim(
        ABSORB, "The orders of multiplication have one result, to rounding",
        f"largest difference in float64, of {len(ways) // 2} pairs and of the trained model's logits",
        f"{most:.0e} of the largest number", SHOWN if most <= EQUAL else REFUTED, {"apart": most},
    )  # fmt: skip
    token, prompt = by_task["attend: a token"], by_task["attend: a prompt"]
    scores, query = by_task["scores: a token"], by_task["query: a token"]

    def pair(where: str, says: str, slow: Way, fast: Way) -> Claim:
        return slower_than(where, says, f"{fast.task}, {slow.name} and {fast.name}", slow.time, fast.time)

    return [
        whole,
        pair(ABSORB, "Absorbed, a token is decoded faster", token["expanded"], token["absorbed"]),
        pair(OWN, "Expanded, a prompt is read faster", prompt["absorbed"], prompt["expanded"]),
        pair(OWN, "The sum of two scores is faster than one of what is concatenated", scores["concatenation"],
             scores["sum"]),
        _less(OWN, "The sum writes less than concatenation", "bytes made for a token's scores",
              scores["sum"].made, scores["concatenation"].made),
        pair(OWN, "Two factors are faster than W_UQ·W_UK multiplied out", query["W_UQ·W_UK"], query["two factors"]),
        _less(OWN, "Two factors are smaller than W_UQ·W_UK", "bytes of weights",
              query["two factors"].weights, query["W_UQ·W_UK"].weights),
    ]  # fmt: skip


def slower_than(where: str, says: str, compared: str, slow: Time, fast: Time) -> Claim:
    """Shown where three quarters of the one took longer than three quarters of the other."""
    verdict = SHOWN if slow.low > fast.high else REVERSED if slow.high < fast.low else OPEN
    found = f"{slow.ms:.3g} and {fast.ms:.3g} ms, {slow.ms / fast.ms:.2g} times"
    numbers = {f"{which}_{name}": x for which, t in (("slow", slow), ("fast", fast)) for name, x in t._asdict().items()}
    return Claim(where, says, compared, found, verdict, numbers)


def _less(where: str, says: str, compared: str, less: int, more: int) -> Claim:
    """Of counts."""
    verdict = SHOWN if less < more else REFUTED
    return Claim(where, says, compared, f"{less:,} and {more:,}", verdict, {"less": less, "more": more})
