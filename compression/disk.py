"""Writing through to the disk."""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Once this returns, what a file holds, or which names a folder has, survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
