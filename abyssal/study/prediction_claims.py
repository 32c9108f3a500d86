"""What DeepSeek-V3 claims of multi-token prediction, and whether a run's numbers bear it out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from abyssal.study.claim import Claim, paired
from abyssal.study.spread import Difference

TRAINING, ABLATION, INFERENCE = (f"DeepSeek-V3, section {n}" for n in ("2.2", "4.5.1", "5.4.3"))
HERE = "asked here"

# The ablation's models, and what came of them without and with MTP, a module in training, dropped afterwards.
ABLATIONS = (
    ("Pile-test, bits a byte", "0.729", "0.729", "0.658", "0.657"),
    ("MMLU", "50.0", "53.3", "67.5", "66.6"),
    ("HumanEval", "20.7", "26.8", "44.5", "53.7"),
    ("GSM8K", "25.4", "31.4", "72.3", "74.0"),
)
ACCEPTED, MOST_ACCEPTED, FASTER = 0.85, 0.90, 1.8  # section 5.4.3
ALIKE = 0.002  # of bits a byte: 0.658 and 0.657 are apart by 0.15%
NOTE = (
    f"Bits a byte are alike within {ALIKE:.1%}; the paper's 0.658 and 0.657 are apart by 0.15%. Second drafts are "
    "compared where the first was accepted: how good first ones are does not count. Each model drafts greedy text of "
    "its own, since the one with one module is read on held-out text one token ahead only."
)


@dataclass(frozen=True)
class Numbers:
    """What the claims are judged by: a number a seed, in the order of the seeds."""

    bits: Mapping[str, Sequence[float]]  # of the main model, a variant
    accepted: Sequence[float]  # one module, one draft, greedy
    sampled: Sequence[float]  # the same at temperature 1
    of_kind: Sequence[Mapping[str, float]]  # the same, greedy, a kind of text
    second_chained: Sequence[float]  # second drafts of those whose first was accepted: one module drafts again
    second_own: Sequence[float]  # and with a second module
    faster: Sequence[float]  # tokens a second with one draft over those without, one sequence at once


def claims(n: Numbers) -> list[Claim]:
    """Each, paired by seed."""
    apart = Difference.of(n.bits["one"], n.bits["none"])
    level = [0.0] * len(n.accepted)
    unlike = [max(kinds.values()) - min(kinds.values()) for kinds in n.of_kind]
    spread = MOST_ACCEPTED - ACCEPTED
    return [
        paired(
            TRAINING, "The main model predicts better for having been trained with MTP",
            "Bits a byte: one module less none", -1, apart,
        ),
        paired(
            ABLATION, "Its bits a byte are as without", "Bits a byte: one module less none", 0, apart,
            alike=ALIKE * fmean(n.bits["none"]), either_way=True,
        ),
        paired(
            HERE, "A second module costs the main model nothing more", "Bits a byte: two modules less one", 0,
            Difference.of(n.bits["two"], n.bits["one"]), alike=ALIKE * fmean(n.bits["one"]),
        ),
        paired(
            INFERENCE, "85% or more of the drafts are accepted, in greedy decoding", "Share accepted, less 0.85", 1,
            Difference.of(n.accepted, [ACCEPTED] * len(n.accepted)), level=True,
        ),
        paired(
            INFERENCE, "85% or more of the drafts are accepted, at temperature 1", "Share accepted, less 0.85", 1,
            Difference.of(n.sampled, [ACCEPTED] * len(n.sampled)), level=True,
        ),
        paired(
            INFERENCE, "Acceptance is as good whatever the text is of: kinds are apart by less than 5 points",
            "Share accepted, best less worst kind, less 0.05", -1,
            Difference.of(unlike, [spread] * len(unlike)), level=True,
        ),
        paired(
            HERE, "Greedy text is drafted better than text drawn at temperature 1",
            "Share accepted: greedy less drawn", 1, Difference.of(n.accepted, n.sampled),
        ),
        paired(
            TRAINING, "Once a first draft is accepted, a second module drafts the next token better than the first one "
            "does again",
            "Share of second drafts accepted among those whose first was: two modules less one", 1,
            Difference.of(n.second_own, n.second_chained),
        ),
        paired(
            INFERENCE, "One draft makes decoding faster", "Ratio of tokens/s, less 1", 1,
            Difference.of([ratio - 1 for ratio in n.faster], level),
        ),
        paired(
            INFERENCE, "It is 1.8 times as fast, or faster", "Ratio of tokens/s, less 1.8", 1,
            Difference.of(n.faster, [FASTER] * len(n.faster)), level=True,
        ),
    ]  # fmt: skip
