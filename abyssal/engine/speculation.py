"""Whether drafting pays: measured, not guessed.

A step that verifies drafts takes longer than one that doesn't, and gives more tokens. How much longer depends on how
many sequences share it: alone they wait for memory, and drafts are nearly free; many fill the arithmetic units. So for
every rung of the batch size (powers of two) both kinds are timed as they occur, and the one that gives more tokens a
second is taken.
"""

from collections import deque
from statistics import mean, median

LATELY = 9  # steps whose median counts: one that compiled or captured something says nothing
TRIAL = 4  # steps of the kind that isn't taken, to time it
EVERY = 512  # steps between two trials
SKIP = 2  # steps after a change that aren't timed


class Lately:
    """The median of seconds, and the mean of tokens, over the last steps of a kind."""

    def __init__(self) -> None:
        self.count = 0
        self._steps: deque[tuple[float, float]] = deque(maxlen=LATELY)

    def add(self, seconds: float, tokens: float) -> None:
        self.count += 1
        self._steps.append((seconds, tokens))

    @property
    def rate(self) -> float:
        """Tokens a second of a sequence."""
        return mean(tokens for _, tokens in self._steps) / median(seconds for seconds, _ in self._steps)


class Speculation:
    """Decides for each step; told afterwards what it took and gave."""

    def __init__(self, drafts: int, adapt: bool = True) -> None:
        self.drafts, self.adapt = drafts, adapt
        self._lately: dict[tuple[int, bool], Lately] = {}
        self._steps: dict[int, int] = {}
        self._last: tuple[int, bool] | None = None
        self._since = 0

    def wanted(self, sequences: int) -> bool:
        """Whether the next step of so many sequences should verify drafts and make new ones."""
        if not self.drafts or not self.adapt:
            return self.drafts > 0
        rung = self._rung(sequences)
        with_, without = (self._lately.setdefault((rung, kind), Lately()) for kind in (True, False))
        steps = self._steps.get(rung, 0)
        if with_.count < TRIAL:
            return True
        if without.count < TRIAL:
            return steps % (8 * TRIAL) >= TRIAL + SKIP  # in between, so that no text waits for a trial
        return (with_.rate > without.rate) != (steps % EVERY < TRIAL + SKIP)

    def tell(self, sequences: int, speculated: bool, seconds: float, tokens: int) -> None:
        """A step without prompts in it took so long and gave `tokens` to `sequences`."""
        rung = self._rung(sequences)
        self._steps[rung] = self._steps.get(rung, 0) + 1
        kind = (rung, speculated)
        self._since = self._since + 1 if kind == self._last else 0
        self._last = kind
        if self._since >= SKIP:
            self._lately.setdefault(kind, Lately()).add(seconds, tokens / sequences)

    @staticmethod
    def _rung(sequences: int) -> int:
        return sequences.bit_length()
