"""Keeps on disk what is slow to make, as tensors or as a folder; every data set uses it."""

import contextlib
import errno
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from common import files

logger = logging.getLogger(__name__)


def cache_directory() -> Path:
    """The folder for cached tensors, made if need be: the one that the environment variable SEMINORM_CACHE names, or
    else ~/.cache/seminorm. ValueError if that folder cannot be made."""
    # Unlike pathlib's, this leaves the ~ of a user who does not exist as it is.
    directory = Path(os.path.expanduser(os.environ.get("SEMINORM_CACHE") or "~/.cache/seminorm"))
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"The cache folder {directory} cannot be made ({error.strerror}): name another one by SEMINORM_CACHE."
        ) from error
    return directory


def load_or_build(
    path: Path, build: Callable[[], dict[str, Tensor]], fits: Callable[[dict[str, Tensor]], bool]
) -> dict[str, Tensor]:
    """The CPU tensors stored in `path`; where there are none that can be used, those of `build()`, then stored.

    What is stored can be used if it can be read and `fits` says that it has the names, types and shapes of what
    `build` makes; any exception of `fits` counts as no. Of several processes that ask for the same path one builds and
    the others wait for it. The folder must exist. OSError if the disk is full; it says so.
    """
    tensors = _read(path, fits)
    if tensors is None:
        with _sole_maker(path):
            tensors = _read(path, fits)  # another process may have built it while this one waited
            if tensors is None:
                if path.exists():
                    logger.warning("The cache file %s cannot be used: it is built anew.", path)
                tensors = build()
                _write(path, tensors)
    return tensors


def make_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Has `fill` make the contents of `folder`, unless they are there; an attempt cut short leaves no such folder.

    Of several processes that ask for the same folder one fills it and the others wait for it. NoRoom if the disk is
    full.
    """
    if folder.is_dir():
        return  # in a cache that may not be this user's to write to
    with _sole_maker(folder):
        if not folder.is_dir():
            partial = folder.with_name(f"{folder.name}.partial")
            if partial.is_symlink():
                partial.unlink()
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            try:
                fill(partial)
                # Or else, after a power cut, the name could be on the disk without all that is in it. Windows has none.
                getattr(os, "sync", lambda: None)()
                os.replace(partial, folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)


def is_lack_of_room(error: Exception) -> bool:
    """Whether an error says that a disk is full, or a quota used up."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class NoRoom(OSError):
    """The disk of a cache is full; it says which, and what to do."""


@contextlib.contextmanager
def _sole_maker(path: Path) -> Iterator[None]:
    """Holds the lock of `path`, for which it may have to wait, and explains a full disk."""
    lock = FileLock(f"{path}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning("Waiting for another process, which is making %s.", path)
        lock.acquire()
    try:
        yield
    except OSError as error:
        if not is_lack_of_room(error):
            raise
        raise NoRoom(
            f"There is no room for {path} ({error.strerror}): make some, or set SEMINORM_CACHE to a folder on another "
            "disk, and do the same again."
        ) from error
    finally:
        lock.release()


def _read(path: Path, fits: Callable[[dict[str, Tensor]], bool]) -> dict[str, Tensor] | None:
    # NumPy's archive rather than torch.save: its checksums are verified, and it holds no pickle.
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            tensors = {name: torch.from_numpy(archive[name]) for name in archive.files}
        return tensors if fits(tensors) else None
    except Exception:  # a damaged file may fail in any way, and every one has the same remedy
        return None


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    files.replace_by(path, lambda file: np.savez(file, **arrays))
