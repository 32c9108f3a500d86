"""Files that are on the disk whole, or not at all; where a model's files are, and what is cached."""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Forces a file, or the renames in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, data: bytes | memoryview) -> None:
    """Writes a file so that under its name there is either all of it, on the disk, or what was there before."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def cache_folder() -> Path:
    """Where what can be made again is kept between commands: `$XDG_CACHE_HOME/abyssal`, or else in `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "abyssal"


def model_folder(model: str) -> str:
    """The folder that a model is read from: a run's folder stands for the model in it."""
    inner = Path(model) / "model"
    return str(inner) if (inner / "config.json").is_file() else model
