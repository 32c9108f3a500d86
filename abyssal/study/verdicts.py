"""What a study's result says of each claim, in a form that all studies share."""

from collections import Counter
from typing import NamedTuple

from abyssal.study.result import Result

KINDS = SHOWN, OPEN, REFUTED = "shown", "not resolved", "not so"


class Verdict(NamedTuple):
    """One claim of one study."""

    says: str
    where: str  # paper and section, or that it is asked here; empty where the sentence says it
    verdict: str  # as the study words it

    @property
    def kind(self) -> str:
        """SHOWN, OPEN or REFUTED."""
        told = self.verdict.lower()
        return SHOWN if told == SHOWN else REFUTED if told.startswith(REFUTED) else OPEN


def verdicts(result: Result) -> list[Verdict]:
    """The study's own claims, `numbers["claims"]`; where it has none each sentence of what is shown is one."""
    if "claims" in result.numbers:
        return [Verdict(c["says"], c["where"], c["verdict"]) for c in result.numbers["claims"]]
    return [Verdict(line, "", "NOT SO" if line.startswith("NOT SO") else SHOWN) for line in result.shown]


def counted(said: list[Verdict]) -> dict[str, int]:
    """How many of each kind."""
    found = Counter(verdict.kind for verdict in said)
    return {kind: found[kind] for kind in KINDS}
