"""From an engine's pieces to what a chat's client is told: answer, thinking, calls, and where each letter came from."""

import secrets
from collections import deque
from dataclasses import dataclass, field

from abyssal.engine.request import Piece
from abyssal.serve.answers import CallDelta, FunctionDelta
from abyssal.serve.reasoning import ReasoningSplitter, Segment
from abyssal.serve.tools import ToolParser


@dataclass
class Delta:
    """What a piece adds. `spans` cut `reasoning` and then `content`."""

    content: str = ""
    reasoning: str = ""
    calls: list[CallDelta] = field(default_factory=list)
    spans: list[tuple[str, bool]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.content or self.reasoning or self.calls)


class Reader:
    """Of one sample. Its pieces go in, in order; the last flushes what was held back."""

    def __init__(self, splitter: ReasoningSplitter | None = None, parser: ToolParser | None = None) -> None:
        self._splitter, self._parser = splitter, parser
        self._spans: deque[tuple[str, bool]] = deque()
        self.calls = 0

    def push(self, piece: Piece) -> Delta:
        self._spans.extend(piece.spans)
        covered = sum(len(text) for text, _ in piece.spans)
        if covered < len(piece.text):
            self._spans.append((piece.text[covered:], False))
        segments = self._segments(piece.text)
        if piece.output is not None:
            segments += self._flushed()
        delta = Delta()
        for segment in segments:
            self._add(segment, delta)
        return delta

    def _segments(self, text: str) -> list[Segment]:
        first = self._splitter.push(text) if self._splitter else [Segment("content", text)]
        return self._parsed(first)

    def _flushed(self) -> list[Segment]:
        found = self._parsed(self._splitter.flush()) if self._splitter else []
        return found + (self._parser.flush() if self._parser else [])

    def _parsed(self, segments: list[Segment]) -> list[Segment]:
        if self._parser is None:
            return segments
        found: list[Segment] = []
        for segment in segments:
            found += self._parser.push(segment.text) if segment.kind == "content" else [segment]
        return found

    def _add(self, segment: Segment, delta: Delta) -> None:
        spans = self._cut(len(segment.text))
        match segment.kind:
            case "content":
                delta.content += segment.text
                delta.spans += spans
            case "reasoning":
                delta.reasoning += segment.text
                delta.spans += spans
            case "name":
                self.calls += 1
                called = FunctionDelta(name=segment.text.strip(), arguments="")
                id = f"call_{secrets.token_hex(12)}"
                delta.calls.append(CallDelta(index=self.calls - 1, id=id, type="function", function=called))
            case "arguments":
                said = FunctionDelta(arguments=segment.text)
                delta.calls.append(CallDelta(index=self.calls - 1, function=said))

    def _cut(self, size: int) -> list[tuple[str, bool]]:
        """The spans of the next `size` letters."""
        found: list[tuple[str, bool]] = []
        while size and self._spans:
            text, drafted = self._spans.popleft()
            if len(text) > size:
                self._spans.appendleft((text[size:], drafted))
            if text:
                found.append((text[:size], drafted))
            size -= len(found[-1][0]) if text else 0
        return found
