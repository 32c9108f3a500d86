"""Means over seeds with their spread, and differences with their interval."""

import statistics
from collections.abc import Sequence
from typing import NamedTuple

# Student's t at 97.5% for 1, 2, ... degrees of freedom; for more than these the last, which is too large.
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


class Spread(NamedTuple):
    """Of one number over the seeds: its mean and the standard deviation of a sample."""

    mean: float
    deviation: float

    @staticmethod
    def of(values: Sequence[float]) -> "Spread":
        return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0)

    def text(self, digits: int = 3, sign: bool = False) -> str:
        return f"{self.mean:{'+' if sign else ''}.{digits}f} ± {self.deviation:.{digits}f}"


class Difference(NamedTuple):
    """Of two variants that were trained with the same seeds, pair by pair: the mean, and half the width of its 95%
    interval (Student's)."""

    mean: float
    margin: float

    @staticmethod
    def of(left: Sequence[float], right: Sequence[float]) -> "Difference":
        """left - right. Raises ValueError for fewer than two pairs."""
        apart = [a - b for a, b in zip(left, right, strict=True)]
        if len(apart) < 2:
            raise ValueError(f"seeds: expected two or more, got {len(apart)}")
        freedom = min(len(apart) - 1, len(T))
        return Difference(statistics.fmean(apart), T[freedom - 1] * statistics.stdev(apart) / len(apart) ** 0.5)

    @property
    def sign(self) -> int:
        """-1 or 1 where chance is an unlikely cause, 0 where it is not."""
        return 0 if abs(self.mean) <= self.margin else (1 if self.mean > 0 else -1)

    def text(self, digits: int = 3) -> str:
        return f"{self.mean:+.{digits}f} ± {self.margin:.{digits}f}"
