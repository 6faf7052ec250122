"""Files that are whole or absent: checkpoints, results, tables, figures and the report are written so."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def replace(path: Path, *parts: bytes | memoryview) -> None:
    """Writes a file with these parts in place of what is at `path`, as `replace_by` does."""

    def write(file: BinaryIO) -> None:
        for part in parts:
            file.write(part)

    replace_by(path, write)


def replace_by(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Has `write` write a file in place of what is at `path`. Killed at any moment, this leaves the old or the new one.

    The new file is written beside the old one, as `<name>.partial`, all the way to the disk, and then renamed. No
    symbolic link of either name is followed. One process at a time may do this to a path.

    Raises:
        OSError: if there is no room, for example; the old file stays, and no part of the new one.
    """
    beside = path.with_name(f"{path.name}.partial")
    beside.unlink(missing_ok=True)
    try:
        # "x" follows no link that someone may have put there since.
        with beside.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
