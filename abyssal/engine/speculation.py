"""Whether drafting pays: measured, not guessed.

A step that verifies drafts takes longer than one that doesn't, and gives more tokens. How much longer depends on how
many sequences share it: alone they wait for memory, and drafts are nearly free; many fill the arithmetic units. So for
every rung of the batch size (powers of two) both kinds are timed as they occur, and the one that gives more tokens a
second is taken.
"""

from dataclasses import dataclass

KEEP = 0.9  # of the running means, at each step
TRIAL = 4  # steps of the kind that isn't taken, to time it
EVERY = 512  # steps between two trials
SKIP = 2  # steps after a change that aren't timed


@dataclass
class Mean:
    value: float = 0.0
    count: int = 0

    def add(self, x: float) -> None:
        self.value = x if not self.count else KEEP * self.value + (1 - KEEP) * x
        self.count += 1


class Speculation:
    """Decides for each step; told afterwards what it took and gave."""

    def __init__(self, drafts: int, adapt: bool = True) -> None:
        self.drafts, self.adapt = drafts, adapt
        self._seconds: dict[tuple[int, bool], Mean] = {}
        self._tokens = Mean()  # a step and sequence, where drafts are verified
        self._steps: dict[int, int] = {}
        self._last: tuple[int, bool] | None = None
        self._since = 0

    def wanted(self, sequences: int) -> bool:
        """Whether the next step of so many sequences should verify drafts and make new ones."""
        if not self.drafts or not self.adapt:
            return self.drafts > 0
        rung = self._rung(sequences)
        with_, without = (self._seconds.get((rung, kind), Mean()) for kind in (True, False))
        steps = self._steps.get(rung, 0)
        if with_.count < TRIAL:
            return True
        if without.count < TRIAL:
            return steps % (8 * TRIAL) >= TRIAL + SKIP  # in between, so that no text waits for a trial
        better = self._tokens.value / with_.value > 1 / without.value
        return better != (steps % EVERY < TRIAL + SKIP)

    def tell(self, sequences: int, speculated: bool, seconds: float, tokens: int) -> None:
        """A step without prompts in it took so long and gave `tokens` to `sequences`."""
        rung = self._rung(sequences)
        self._steps[rung] = self._steps.get(rung, 0) + 1
        kind = (rung, speculated)
        self._since = self._since + 1 if kind == self._last else 0
        self._last = kind
        if self._since >= SKIP:
            self._seconds.setdefault(kind, Mean()).add(seconds)
            if speculated:
                self._tokens.add(tokens / sequences)

    @staticmethod
    def _rung(sequences: int) -> int:
        return sequences.bit_length()
