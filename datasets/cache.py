"""Keeps what is slow to make on disk, as tensors; every data set uses it."""

import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

logger = logging.getLogger(__name__)


def cache_directory(cache_dir: str | Path | None = None) -> Path:
    """The folder for cached tensors, made if need be: `cache_dir`, or else the one that the environment variable
    SEMINORM_CACHE names, or else ~/.cache/seminorm. ValueError if that folder cannot be made."""
    directory = Path(cache_dir or os.environ.get("SEMINORM_CACHE") or "~/.cache/seminorm").expanduser()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"The cache folder {directory} cannot be made ({error.strerror}): give another one or set SEMINORM_CACHE."
        ) from error
    return directory


def load_or_build(path: Path, build: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The CPU tensors stored in `path`; where there are none, or they cannot be read, those of `build()`, then stored.

    Of several processes that ask for the same path one builds and the others wait for it. The folder must exist.
    """
    tensors = _read(path)
    if tensors is None:
        with FileLock(f"{path}.lock"):
            tensors = _read(path)  # another process may have built it while this one waited
            if tensors is None:
                if path.exists():
                    logger.warning("The cache file %s cannot be read: it is built anew.", path)
                tensors = build()
                _write(path, tensors)
    return tensors


def _read(path: Path) -> dict[str, Tensor] | None:
    # NumPy's archive rather than torch.save: its checksums are verified, and it holds no pickle.
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {name: torch.from_numpy(archive[name]) for name in archive.files}
    except Exception:  # a damaged file may fail in any way, and every one has the same remedy
        return None


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    # The lock is held, so that the name can be fixed: what a killed process left there is overwritten.
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            np.savez(file, **{name: tensor.numpy() for name, tensor in tensors.items()})
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
