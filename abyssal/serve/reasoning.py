"""Thinking apart from the answer: `<think>` ... `</think>` at the start of an answer, as it streams.

R1's template ends the prompt with `<think>`, so that the answer has the end of the thinking alone (`opened`).
"""

from typing import Literal, NamedTuple

OPEN, CLOSE = "<think>", "</think>"


class Segment(NamedTuple):
    """Some of the text, in order: all segments together are what was pushed, to the letter."""

    kind: Literal["content", "reasoning", "drop", "name", "arguments"]
    text: str


def held(text: str, mark: str) -> int:
    """How long an end of `text` may be the beginning of `mark`: it is not certain yet."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if mark.startswith(text[-n:])), 0)


class Cutter:
    """Cuts a text that comes in pieces into segments, holding back what may yet turn out to begin a mark."""

    def __init__(self) -> None:
        self._held = ""

    def push(self, text: str) -> list[Segment]:
        self._held += text
        out: list[Segment] = []
        while self._held and self._step(out):
            pass
        return out

    def _step(self, out: list[Segment]) -> bool:
        """Moves what is certain from `_held` to `out`; False where more must come first."""
        raise NotImplementedError


class ReasoningSplitter(Cutter):
    """Cuts a text into "reasoning", "content", and "drop": the marks, and line ends next to them."""

    def __init__(self, opened: bool) -> None:
        super().__init__()
        self._state: Literal["start", "open", "thinking", "closed", "content"] = "open" if opened else "start"

    def flush(self) -> list[Segment]:
        """What was held back, when no more comes."""
        rest, self._held = self._held, ""
        if not rest:
            return []
        kind: Literal["reasoning", "content"] = "reasoning" if self._state in ("open", "thinking") else "content"
        return [Segment(kind, rest)]

    def _step(self, out: list[Segment]) -> bool:
        """Settles what it can of what is held; False where it needs more."""
        text = self._held
        if self._state == "content":
            return self._take("content", len(text), out)
        if self._state == "start":
            inner = text.lstrip()
            if inner.startswith(OPEN):
                self._state = "open"
                return self._take("drop", len(text) - len(inner) + len(OPEN), out)
            if not OPEN.startswith(inner):
                self._state = "content"
            return self._state == "content"
        if self._state in ("open", "closed"):  # line ends after a mark
            skipped = len(text) - len(text.lstrip("\n"))
            if skipped < len(text):
                self._state = "thinking" if self._state == "open" else "content"
            return self._take("drop", skipped, out) or skipped < len(text)
        at = text.find(CLOSE)
        if at < 0:
            certain = text[: len(text) - held(text, CLOSE)].rstrip("\n")
            self._take("reasoning", len(certain), out)
            return False
        said = text[:at].rstrip("\n")
        self._take("reasoning", len(said), out)
        self._state = "closed"
        return self._take("drop", at - len(said) + len(CLOSE), out)

    def _take(self, kind: Literal["content", "reasoning", "drop"], size: int, out: list[Segment]) -> bool:
        if size:
            out.append(Segment(kind, self._held[:size]))
            self._held = self._held[size:]
        return size > 0
