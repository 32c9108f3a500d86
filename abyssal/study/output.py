"""Where a study's result goes: checked before the study runs, and each file written whole or not at all."""

from dataclasses import dataclass
from pathlib import Path

from abyssal.files import write_file
from abyssal.study.page import page
from abyssal.study.result import Result


@dataclass(frozen=True)
class Places:
    """`folder` gets NAME.json, NAME.html and the pictures; the other two get one kind each. None: not wanted.

    Raises ValueError or FileNotFoundError, naming the option, where a file could not be written.
    """

    folder: Path | None = None
    json: Path | None = None
    picture: Path | None = None

    def __post_init__(self) -> None:
        if self.folder is not None and self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"--out: expected a folder, {self.folder} is a file")
        for option, path in (("--json", self.json), ("--picture", self.picture)):
            if path is None:
                continue
            if path.is_dir():
                raise ValueError(f"{option}: expected a file, {path} is a folder")
            if not path.parent.is_dir():
                raise FileNotFoundError(f"{option}: {path.parent} is no folder")
        if self.picture is not None and self.picture.suffix.lower() != ".png":
            raise ValueError(f"--picture: expected a name that ends in .png, got {self.picture}")

    def write(self, result: Result) -> list[Path]:
        """Writes what is wanted and returns the files."""
        written = [] if self.folder is None else save(result, self.folder)
        if self.json is not None:
            write_file(self.json, result.to_json().encode())
            written.append(self.json)
        if self.picture is not None:
            written += _write_pictures(result, self.picture)
        return written


def save(result: Result, folder: Path) -> list[Path]:
    """Writes a study's files into `folder`, which is made; the JSON last, so that where it is, the others are."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = _write_pictures(result, folder / f"{result.name}.png")
    html, numbers = folder / f"{result.name}.html", folder / f"{result.name}.json"
    write_file(html, page([result], result.title).encode())
    write_file(numbers, result.to_json().encode())
    return [numbers, html, *pictures]


def load(folder: Path, name: str) -> Result:
    """Reads back what `save` wrote. Raises FileNotFoundError."""
    first = folder / f"{name}.png"
    text = (folder / f"{name}.json").read_text("utf-8")
    return Result.from_json(text, lambda i: picture_path(first, i).read_bytes())


def picture_path(first: Path, index: int) -> Path:
    """`a.png`, `a-2.png`, ..."""
    return first if index == 0 else first.with_stem(f"{first.stem}-{index + 1}")


def _write_pictures(result: Result, first: Path) -> list[Path]:
    paths = [picture_path(first, i) for i in range(len(result.pictures))]
    for path, picture in zip(paths, result.pictures):
        write_file(path, picture.png)
    return paths


def ints(option: str, text: str) -> tuple[int, ...]:
    """Positive numbers with commas between them. Raises ValueError naming the option."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"{option}: expected positive numbers with commas between them, got {text!r}")
    return tuple(int(part) for part in parts)
