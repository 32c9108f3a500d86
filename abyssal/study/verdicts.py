"""What a study's result says of each claim, in a form that all studies share."""

from collections import Counter
from typing import NamedTuple

from abyssal.study.result import Result

KINDS = SHOWN, OPEN, REFUTED = "shown", "not resolved", "not so"


class Verdict(NamedTuple):
    """One claim of one study."""

    says: str
    where: str  # paper and section, or that it is asked here
    verdict: str  # as the study words it
    by_interval: bool  # judged by the interval of a difference over the seeds

    @property
    def kind(self) -> str:
        """SHOWN, OPEN or REFUTED."""
        told = self.verdict.lower()
        return SHOWN if told == SHOWN else REFUTED if told.startswith(REFUTED) else OPEN


def verdicts(result: Result) -> list[Verdict]:
    """The study's own claims, `numbers["claims"]`."""
    return [Verdict(c["says"], c["where"], c["verdict"], "margin" in c["numbers"]) for c in result.numbers["claims"]]


def counted(said: list[Verdict]) -> dict[str, int]:
    """How many of each kind."""
    found = Counter(verdict.kind for verdict in said)
    return {kind: found[kind] for kind in KINDS}
