"""What the papers claim of balance, claim by claim, and whether a run's numbers bear it out."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Literal

from abyssal.study.balance_measure import Found
from abyssal.study.claim import Claim, paired
from abyssal.study.spread import Difference

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
NOTE = f"Bits a byte are no worse where they are {ALIKE:.1%} higher at most, less than 2.258 is to the paper's 2.253."

Number = Literal["bits_per_byte", "violation", "violation_of_sequence", "information"]
NAMES: dict[Number, str] = {
    "bits_per_byte": "bits a byte",
    "violation": "MaxVio",
    "violation_of_sequence": "MaxVio within a sequence",
    "information": "bits that an expert tells of the kind",
}


def claims(found: Mapping[str, Sequence[Found]], labels: Mapping[str, str]) -> list[Claim]:
    """Each, judged by runs of the variants none, auxiliary, sequence, free and both, in the same order of seeds."""

    def says(where: str, what: str, number: Number, left: str, expected: int, right: str) -> Claim:
        values = [[float(getattr(run, number)) for run in found[name]] for name in (left, right)]
        alike = 0.0 if expected else ALIKE * fmean(values[1])
        compared = f"{NAMES[number]}: {labels[left]} less {labels[right]}"
        return paired(where, what, compared, expected, Difference.of(*values), alike=alike)

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
