"""Streaming text past stop strings: what may be shown now, and what may yet turn out to begin one."""


class StopWatcher:
    """Passes text on up to the first of `stops` to appear in it, which is never shown, whole or in part.

    However the text is cut into pieces, what `push` and at the end `flush` return joins to the same: the text
    before the earliest place at which a stop string begins.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        """Raises ValueError if a stop string is empty."""
        if "" in stops:
            raise ValueError("stops: expected strings that are not empty")
        self.stops = stops
        self.reached = False
        self.found: str | None = None  # the stop string that was reached
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """The text that can be shown now, and whether a stop string has been reached, after which all is silence."""
        if self.reached:
            return "", True
        self._held += text
        found, open_ = self._found(), self._open()
        # A longer stop string may have begun before the one found ("<end>" before "end"): then it is not settled.
        self.reached = found <= open_ and found < len(self._held)
        if self.reached:
            self.found = self._name(found)
        shown = self._held[: min(found, open_)]
        self._held = "" if self.reached else self._held[len(shown) :]
        return shown, self.reached

    def flush(self) -> str:
        """What is still held back when no more text comes. Sets `reached` if a stop string stands in it."""
        found = self._found()
        if not self.reached and found < len(self._held):
            self.reached, self.found = True, self._name(found)
        shown, self._held = self._held[:found], ""
        return shown

    def _name(self, at: int) -> str:
        """The stop string that begins there: the first given of several."""
        return next(stop for stop in self.stops if self._held.startswith(stop, at))

    def _found(self) -> int:
        """Where the first stop string in the held text begins; its length if there is none."""
        places = [self._held.find(stop) for stop in self.stops]
        return min((place for place in places if place >= 0), default=len(self._held))

    def _open(self) -> int:
        """Where the first stop string begins that the held text breaks off in or ends with; its length if none."""
        longest = max(map(len, self.stops), default=0)
        end = len(self._held)
        for start in range(max(0, end - longest + 1), end):
            tail = self._held[start:]
            if any(stop.startswith(tail) for stop in self.stops):
                return start
        return end
