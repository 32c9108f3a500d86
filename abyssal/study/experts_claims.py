"""What DeepSeekMoE claims of its experts, claim by claim, and whether a study's runs bear it out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from abyssal.study.experts_measure import Found
from abyssal.study.spread import SHOWN, Difference, judged

TABLE, ABLATION, ANALYSIS = (f"DeepSeekMoE, section {n}" for n in ("4.2", "4.4", "4.5"))
CONTROL = "a control; not the paper's"

# Where, what was compared, Pile loss.
PAPERS = (
    (f"{TABLE}, table 1", "dense, 0.2B activated", "2.060"),
    (f"{TABLE}, table 1", "Switch: 1 of 16, 0.2B activated", "1.881"),
    (f"{TABLE}, table 1", "GShard: 2 of 16, 0.3B activated", "1.867"),
    (f"{TABLE}, table 1", "DeepSeekMoE: 1 shared + 7 of 63, 0.3B activated", "1.808"),
    ("DeepSeekMoE, section 4.3", "GShard with experts 1.5 times as large", "1.808"),
    (ABLATION, "of 64 experts 1, 2 or 4 are shared", "1.808, 1.806, 1.811"),
    (ANALYSIS, "the shared expert disabled, a routed one more", "1.808 → 2.414"),
)

BITS, RISE = "bits a byte", "bits a byte that disabling costs"


@dataclass(frozen=True)
class Claim:
    """That a number is below (-1) or above (1) another, and what the runs say of it, paired by seed."""

    where: str
    says: str
    compared: str  # which number, of what less what
    expected: int
    found: Difference

    @property
    def holds(self) -> bool:
        return self.verdict == SHOWN

    @property
    def verdict(self) -> str:
        return judged(self.found, self.expected)

    def sentence(self) -> str:
        """With its numbers."""
        told = "" if self.holds else f", {self.verdict}"
        return f"{self.says} ({self.where}){told}. {self.compared}: {self.found.text()}."

    def numbers(self) -> dict[str, Any]:
        plain = {"where": self.where, "says": self.says, "compared": self.compared, "expected": self.expected}
        return {**plain, "difference": self.found.mean, "margin": self.found.margin, "verdict": self.verdict}


def claims(
    bits: Mapping[str, Sequence[float]], found: Mapping[str, Sequence[Found]], labels: Mapping[str, str]
) -> list[Claim]:
    """Each, judged by all shapes' bits a byte and by what was found of those with experts, in the same order of
    seeds."""

    def better(where: str, says: str, left: str, right: str) -> Claim:
        compared = f"{BITS}: {labels[left]} less {labels[right]}"
        return Claim(where, says, compared, -1, Difference.of(bits[left], bits[right]))

    def sensitive(where: str, says: str, left: str, right: str) -> Claim:
        compared = f"{RISE}: {labels[left]} less {labels[right]}"
        rises = [[run.rise for run in found[name]] for name in (left, right)]
        return Claim(where, says, compared, 1, Difference.of(*rises))

    shared = found["fine_shared"]
    replaced = [run.replaced for run in shared if run.replaced is not None]
    own = labels["fine_shared"]
    return [
        better(TABLE, "Experts predict better than a dense MLP that activates as much", "few", "dense"),
        better(TABLE, "Many small experts and a shared one predict better than few large", "fine_shared", "few"),
        better(ABLATION, "Of few large experts, sharing one helps", "few_shared", "few"),
        better(ABLATION, "Beside a shared expert, cutting finer helps", "fine_shared", "few_shared"),
        better("DeepSeekMoE, section 3.1", "Without a shared expert, cutting finer helps", "fine", "few"),
        better("DeepSeekMoE, section 3.2", "Of many small experts, sharing one helps", "fine_shared", "fine"),
        sensitive(ANALYSIS, "Disabling the first experts costs small ones more", "fine_shared", "few"),
        sensitive(CONTROL, "And so it does without a shared expert", "fine", "few"),
        Claim(
            ANALYSIS, "A routed expert more does not replace the shared one",
            f"{BITS} of {own}: the shared one replaced, less as trained", 1,
            Difference.of(replaced, [run.disabled[0] for run in shared]),
        ),
        Claim(
            CONTROL, "Losing the shared expert costs more than losing the routed one picked first",
            f"{BITS} of {own}: the shared one replaced, less the first routed one replaced", 1,
            Difference.of(replaced, [run.without_first for run in shared]),
        ),
    ]  # fmt: skip
