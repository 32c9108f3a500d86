"""`metrics.jsonl`: a line of JSON for every step that is told."""

import json
import os
from pathlib import Path
from typing import Any

from abyssal.files import write_file

Record = dict[str, Any]


class Metrics:
    """Appends to the file; what it holds of steps after `after` is dropped first, and a line half written."""

    def __init__(self, path: Path, after: int) -> None:
        self.path = path
        kept = [record for record in read_metrics(path) if record["step"] <= after]
        write_file(path, "".join(_line(record) for record in kept).encode())
        self._stream = path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        """Adds a line and hands it to the operating system."""
        self._stream.write(_line(record))
        self._stream.flush()

    def sync(self) -> None:
        """Returns when every line is on the disk."""
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        self._stream.close()


def read_metrics(path: str | Path) -> list[Record]:
    """The lines of the file, in order, up to one that is only half there; none if there is no file."""
    records: list[Record] = []
    if Path(path).is_file():
        for line in Path(path).read_text("utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                break
    return records


def _line(record: Record) -> str:
    return json.dumps(record, allow_nan=False) + "\n"
