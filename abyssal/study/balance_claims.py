"""What the papers claim of balance, claim by claim, and whether a run's numbers bear it out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from abyssal.study.balance_measure import Found
from abyssal.study.spread import SHOWN, Difference, judged

WANG, V3_FREE, V3_BATCH = "Wang et al. 2024, table 2", "DeepSeek-V3, section 4.5.2", "DeepSeek-V3, section 4.5.3"
V3_METHOD = "DeepSeek-V3, section 2.1.2"
BETTER = f"{WANG}; {V3_FREE}"

# Where, what was trained, how it was balanced, validation, MaxVio over the validation set.
PAPERS = (
    (WANG, "1B on 100B tokens", "auxiliary loss", "perplexity 9.56", "0.72"),
    (WANG, "1B on 100B tokens", "auxiliary-loss-free", "perplexity 9.50", "0.04"),
    (WANG, "3B on 200B tokens", "auxiliary loss", "perplexity 7.97", "0.52"),
    (WANG, "3B on 200B tokens", "auxiliary-loss-free", "perplexity 7.92", "0.04"),
    (V3_BATCH, "1B", "sequence-wise loss", "loss 2.258", "–"),
    (V3_BATCH, "1B", "auxiliary-loss-free", "loss 2.253", "–"),
    (V3_BATCH, "1B", "batch-wise auxiliary loss", "loss 2.253", "–"),
    (V3_BATCH, "3B", "sequence-wise loss", "loss 2.085", "–"),
    (V3_BATCH, "3B", "auxiliary-loss-free", "loss 2.080", "–"),
    (V3_BATCH, "3B", "batch-wise auxiliary loss", "loss 2.080", "–"),
)

ALIKE = 0.002  # of a loss: 2.258 is 0.2% more than 2.253, and the paper calls these different

Number = Literal["bits_per_byte", "violation", "violation_of_sequence", "information"]
NAMES: dict[Number, str] = {
    "bits_per_byte": "bits a byte",
    "violation": "MaxVio",
    "violation_of_sequence": "MaxVio within a sequence",
    "information": "bits that an expert tells of the kind",
}


@dataclass(frozen=True)
class Claim:
    """That a number of variant `left` is below (-1) or above (1) that of `right`, or above it by no more than `alike`
    (0): to be below is no cost; and what the runs say of it, paired by seed."""

    where: str
    says: str
    number: Number
    left: str
    expected: int
    right: str
    found: Difference
    alike: float = 0.0

    @property
    def holds(self) -> bool:
        return self.verdict == SHOWN

    @property
    def verdict(self) -> str:
        return judged(self.found, self.expected, self.alike)

    def compared(self, labels: Mapping[str, str]) -> str:
        """Which number, of what less what."""
        return f"{NAMES[self.number]}: {labels[self.left]} less {labels[self.right]}"

    def sentence(self, labels: Mapping[str, str]) -> str:
        """With its numbers."""
        within = f" (alike: within {self.alike:.3f})" if self.expected == 0 else ""
        told = "" if self.holds else f", {self.verdict}"
        return f"{self.says} ({self.where}){told}. {self.compared(labels)}: {self.found.text()}{within}."

    def numbers(self) -> dict[str, Any]:
        plain = {"where": self.where, "says": self.says, "number": self.number, "left": self.left, "right": self.right}
        difference = {
            "expected": self.expected,
            "difference": self.found.mean,
            "margin": self.found.margin,
            "alike": self.alike,
        }
        return {**plain, **difference, "verdict": self.verdict}


def claims(found: Mapping[str, Sequence[Found]]) -> list[Claim]:
    """Each, judged by runs of the variants none, auxiliary, sequence, free and both, in the same order of seeds."""

    def says(where: str, what: str, number: Number, left: str, expected: int, right: str) -> Claim:
        values = [[float(getattr(run, number)) for run in found[name]] for name in (left, right)]
        alike = 0.0 if expected else ALIKE * fmean(values[1])
        return Claim(where, what, number, left, expected, right, Difference.of(*values), alike)

    return [
        says(V3_METHOD, "Where nothing balances, load is uneven", "violation", "none", 1, "free"),
        says(V3_METHOD, "The loss balances", "violation", "auxiliary", -1, "none"),
        says(WANG, "The bias balances better than the loss", "violation", "free", -1, "auxiliary"),
        says(
            BETTER,
            "With the bias the model predicts better than with the loss",
            "bits_per_byte",
            "free",
            -1,
            "auxiliary",
        ),
        says(V3_BATCH, "Balancing every sequence costs prediction", "bits_per_byte", "sequence", 1, "free"),
        says(V3_BATCH, "A loss over the batch costs no more than the bias", "bits_per_byte", "auxiliary", 0, "free"),
        says(
            V3_BATCH, "Experts specialise more if not every sequence is balanced", "information", "free", 1, "sequence"
        ),
        says(
            V3_METHOD, "A small sequence-wise loss evens a sequence's load", "violation_of_sequence", "both", -1, "free"
        ),
        says(V3_METHOD, "A small sequence-wise loss costs next to nothing", "bits_per_byte", "both", 0, "free"),
    ]
