"""Answers on disk as they come, so that an evaluation that is cut short goes on where it was."""

import hashlib
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any


class Journal:
    """A JSON Lines file of answers by what was asked of whom. Without a path, nothing is kept.

    `identity` says who answers (weights, tokenizer, precision, limits, code): answers of another are in the same file
    without being mistaken for it. A line is on the disk before the next is begun; half a line at the end, which a kill
    leaves, is taken off.
    """

    def __init__(self, path: Path | None, identity: str) -> None:
        """Raises ValueError naming the line of a file that is no journal."""
        self.path, self.identity = path, identity
        self.known: dict[str, Any] = {}
        self._stream = None
        if path is None:
            return
        whole = _read(path, self.known)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = path.open("ab")
        if self._stream.tell() > whole:
            self._stream.truncate(whole)

    def key(self, kind: str, request: Any, repeat: int = 0) -> str:
        """Of the question `request`, which JSON can hold, asked for the `repeat`-th time."""
        return hashlib.sha256(json.dumps([self.identity, kind, request, repeat]).encode()).hexdigest()

    def get(self, key: str) -> Any:
        """The answer, or None."""
        return self.known.get(key)

    def put(self, answers: list[tuple[str, Any]]) -> None:
        """Keeps answers, which are on the disk when this returns."""
        self.known.update(answers)
        if self._stream is not None and answers:
            lines = (json.dumps({"key": key, "answer": answer}) + "\n" for key, answer in answers)
            self._stream.write("".join(lines).encode())
            self._stream.flush()
            os.fsync(self._stream.fileno())

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None


def _read(path: Path, known: dict[str, Any]) -> int:
    """Fills `known`; returns the bytes that are whole lines."""
    if not path.exists():
        return 0
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    for number, line in enumerate(data[:whole].splitlines(), 1):
        try:
            entry = json.loads(line)
            known[entry["key"]] = entry["answer"]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path}: line {number}: expected an answer with its key, as an evaluation writes"
            ) from error
    return whole
