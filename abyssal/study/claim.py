"""A claim of a paper and what became of it here, in the form that all studies share."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from abyssal.study.result import Grid
from abyssal.study.spread import Difference

SHOWN, OPEN, REFUTED, REVERSED = "shown", "not resolved", "NOT SO", "NOT SO: the reverse"
PAIRED = (
    "Differences between runs of the same seed, mean ± half the 95% interval (Student's, over the seeds): one that is "
    "within it is not resolved, which is no proof that there is none. Where there is nothing to find, chance alone "
    "would still resolve about one in twenty of such claims."
)


@dataclass(frozen=True)
class Claim:
    """What is said, what was compared, what came of it, and the verdict."""

    where: str  # paper and section, or that it is asked here
    says: str
    compared: str  # which number, of what less what
    found: str
    verdict: str  # one of the four above
    numbers: Mapping[str, float]

    @property
    def holds(self) -> bool:
        return self.verdict == SHOWN

    def sentence(self) -> str:
        """With its numbers."""
        told = "" if self.holds else f", {self.verdict}"
        return f"{self.says} ({self.where}){told}. {self.compared[0].upper()}{self.compared[1:]}: {self.found}."

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def paired(
    where: str, says: str, compared: str, expected: int, apart: Difference, *,
    alike: float = 0.0, either_way: bool = False, level: bool = False, unit: str = "",
) -> Claim:  # fmt: skip
    """Of a difference over the seeds: that it is below (-1) or above (1) 0, or (0) no further above it than `alike`,
    `either_way` no further below it either. `level`: what is compared with is a figure of a paper and no variant that
    was trained, so that there is no reverse."""
    verdict = judged(apart, expected, alike, either_way)
    verdict = REFUTED if level and verdict == REVERSED else verdict
    within = "" if expected else f" (alike: within {alike:.3f})" if either_way else f" (no worse: {alike:.3f} at most)"
    numbers = {"expected": expected, "difference": apart.mean, "margin": apart.margin, "alike": alike}
    return Claim(where, says, compared, apart.text() + unit + within, verdict, numbers)


def judged(found: Difference, expected: int, alike: float = 0.0, either_way: bool = False) -> str:
    """The verdict on what `paired` says. Only where the whole interval is on one side is it not what chance may have
    made."""
    if expected:
        return SHOWN if found.sign == expected else REVERSED if found.sign else OPEN
    apart = abs(found.mean) if either_way else found.mean
    if apart + found.margin <= alike:
        return SHOWN
    return REFUTED if apart - found.margin > alike else OPEN


def claim_by_claim(said: Sequence[Claim], note: str = "") -> Grid:
    """A row a claim."""
    rows = tuple((c.says, c.where, c.compared, c.found, c.verdict) for c in said)
    return Grid("Claim by claim", ("claim", "by", "compared", "found", "here"), rows, f"{PAIRED} {note}".strip(), 3)
