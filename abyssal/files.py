"""Files that are on the disk whole, or not at all; where a model's files are."""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Forces a file, or the renames in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def model_folder(model: str) -> str:
    """The folder that a model is read from: a run's folder stands for the model in it."""
    inner = Path(model) / "model"
    return str(inner) if (inner / "config.json").is_file() else model
