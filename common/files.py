"""Files that are whole or absent: checkpoints and results are written so."""

import os
from pathlib import Path


def write(path: Path, *parts: bytes | memoryview) -> None:
    """Writes a file, all the way to the disk. If that fails, because the disk is full for example, none is left."""
    try:
        with path.open("wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise
