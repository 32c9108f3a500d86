"""Files that are on the disk whole, or not at all."""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Forces a file, or the renames in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
