"""The record of a run, in memory and on disk: the trainer writes it, tables and interactive users read it.

Every record is a dataclass and a mapping at once: `results.test_metrics.loss` is `results["test_metrics"]["loss"]`.
On disk a run is one JSON file; results/README.md describes every name.
"""

import contextlib
import functools
import hashlib
import io
import itertools
import json
import logging
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock
from torch import nn

from torchadjoint.arguments import shown

from . import files
from .config import check_stored
from .provenance import Provenance
from .records import IN_MEMORY_ONLY, OPTIONAL, Record, is_optional, plain, read_as

SCHEMA = 3
Setting = str | int | float | bool | None

# What the numbers of a results file may be. Sums, means and squares of these stay finite, and dates have four digits.
COUNT = {"minimum": 0, "maximum": 10**15}
NUMBER = {"minimum": 1, "maximum": 10**15}
SECONDS = {"minimum": 0, "maximum": 1e9}
DATE = {"minimum": 0, "maximum": 253_402_300_799}
LOSS = {"minimum": -1e39, "maximum": 1e39}
SHARE = {"minimum": 0, "maximum": 1}

LONGEST_NAME = 200
"""How many characters the name of a folder has at most: fewer than any file system's limit."""

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Tally(Record):
    """What was added up, exactly, over the batches of one pass over a data set.

    The optional ones are measures of a model of some kind: means over the samples, as the loss is.
    """

    loss: float = field(metadata=LOSS)
    accuracy: float | None = field(default=None, metadata={**SHARE, **OPTIONAL})
    """Share of samples that a classifier has right."""
    bits_per_dim: float | None = field(default=None, metadata={**LOSS, **OPTIONAL})
    """Negative log-likelihood of a density of images, in bits for each of their numbers."""
    nll: float | None = field(default=None, metadata={**LOSS, **OPTIONAL})
    """Negative log-likelihood of any other density, in nats."""
    forward_nfe: int = field(metadata=COUNT)
    backward_nfe: int = field(metadata=COUNT)
    forward_accepted: int = field(metadata=COUNT)
    forward_rejected: int = field(metadata=COUNT)
    backward_accepted: int = field(metadata=COUNT)
    backward_rejected: int = field(metadata=COUNT)


MEASURES = tuple(item.name for item in fields(Tally) if is_optional(item))
"""The names of what is measured of models of some kind alone."""


@dataclass(kw_only=True)
class Metrics(Tally):
    """One pass over a data set, with the solver's times in its first batch."""

    dataset_size: int = field(metadata=NUMBER)
    timestamp: float = field(metadata=DATE)
    timespan: float = field(metadata=SECONDS)
    forward_ts: list[float] = field(repr=False)
    backward_ts: list[float] = field(repr=False)
    forward_accept_ts: list[float] = field(repr=False)
    forward_reject_ts: list[float] = field(repr=False)
    backward_accept_ts: list[float] = field(repr=False)
    backward_reject_ts: list[float] = field(repr=False)


@dataclass(kw_only=True)
class Epoch(Tally):
    """The training steps of one epoch, counted from 1."""

    epoch: int = field(metadata=NUMBER)
    seconds: float = field(metadata=SECONDS)
    cpu_seconds: float | None = field(metadata=SECONDS)
    learning_rate: float


@dataclass(kw_only=True)
class HistoryEntry(Record):
    """What was measured after one epoch, counted from 1."""

    epoch: int = field(metadata=NUMBER)
    train_metrics: Metrics
    val_metrics: Metrics


@dataclass(kw_only=True)
class Results(Record):
    """One run. `model` and the dataloaders live in memory only: they are None in results that were loaded."""

    memory_usage: int | None = field(default=None, metadata=COUNT)
    baseline_memory: int | None = field(default=None, metadata=COUNT)
    start_time: float = field(metadata=DATE)
    timespan: float | None = field(default=None, metadata={"minimum": -1e9, "maximum": 1e9})  # clocks are set back
    model: nn.Module | None = field(default=None, repr=False, metadata=IN_MEMORY_ONLY)
    parameters: int = field(metadata=COUNT)
    history: list[HistoryEntry] = field(default_factory=list, repr=False)
    train_dataloader: Iterable | None = field(default=None, repr=False, metadata=IN_MEMORY_ONLY)
    val_dataloader: Iterable | None = field(default=None, repr=False, metadata=IN_MEMORY_ONLY)
    test_dataloader: Iterable | None = field(default=None, repr=False, metadata=IN_MEMORY_ONLY)
    train_metrics: Metrics | None = None
    val_metrics: Metrics | None = None
    test_metrics: Metrics | None = None
    experiment: str
    config: dict[str, Setting]
    provenance: Provenance
    epochs: list[Epoch] = field(default_factory=list, repr=False)
    status: Literal["running", "completed", "failed", "interrupted"] = "running"
    failure: str | None = None


def directory_of(results_dir: str, experiment: str, condition: str) -> Path:
    """The folder for the runs of one condition of an experiment.

    What is unfit for a file name becomes '-', and the end of a long name a digest of the whole.
    """
    return Path(results_dir, _name_of(experiment), _name_of(condition))


def _name_of(text: str) -> str:
    # Neither '.' nor '/' passes, so it lies in `results_dir`.
    name = re.sub(r"[^A-Za-z0-9_+-]", "-", text)
    if len(name) > LONGEST_NAME:
        return f"{name[: LONGEST_NAME - 17]}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    return name


def check_folder(results_dir: str | os.PathLike) -> None:
    """Refuses, by a ValueError, a folder of results that is not there: it may be mistyped."""
    if not os.path.isdir(results_dir):
        raise ValueError(
            f"results_dir is {os.fspath(results_dir)!r}, but there is no such folder: train something first, or give "
            "that of the results files"
        )


def make_directory(results_dir: str, experiment: str, condition: str) -> Path:
    """Makes the folder for the runs of one condition of an experiment.

    Raises:
        ValueError: if the folder cannot be made.
    """
    directory = directory_of(results_dir, experiment, condition)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"results_dir is {results_dir!r}, where no folder can be made: {error}") from error
    return directory


def save(results: Results, directory: Path) -> Path:
    """Writes `results` to `directory` as `<run>.json` with the lowest free number, and returns its path.

    The weights of a completed run lie beside it as `<run>.pt`, for `torch.load`. A completed run that is there already
    is not written again: this process was then killed before it could remove its checkpoint, and has resumed from it.

    Raises:
        OSError: if there is no room, for example; then nothing is left of it.
    """
    if results.status == "completed" and (path := _find_completed(results, directory)):
        return path
    content = json.dumps({"schema": SCHEMA, **plain(results)}, allow_nan=False).encode()
    if results.status != "completed":
        return place(content, None, directory)
    weights = io.BytesIO()
    # From the CPU, so that a machine without this GPU can load them.
    torch.save({name: tensor.cpu() for name, tensor in results.model.state_dict().items()}, weights)
    return place(content, weights.getbuffer(), directory)


def _find_completed(results: Results, directory: Path) -> Path | None:
    """The file of this very run, which no other has started at the same time with the same seed."""
    for path in filter(Path.is_file, directory.glob("*.json")):
        with contextlib.suppress(ValueError, OSError):
            other = load(path)
            if other.status == "completed" and _start(other) == _start(results):
                return path
    return None


def _start(results: Results) -> tuple[float, Setting]:
    return results.start_time, results.config["seed"]


def place(content: bytes, weights: bytes | memoryview | None, directory: Path) -> Path:
    """Writes what a results file is to hold, and the weights if there are any, and returns the path, as `save` does.

    The file appears complete or not at all, and never replaces another, however many processes do this at once.

    Raises:
        OSError: as `save`.
    """
    with FileLock(directory / "save.lock"):
        # A link may be a dead one, for which `exists` is False.
        run = next(run for run in itertools.count() if not os.path.lexists(directory / f"{run}.json"))
        path, path_of_weights = directory / f"{run}.json", directory / f"{run}.pt"
        # What a process that was killed in here has left, which would pass for the weights of this run.
        path_of_weights.unlink(missing_ok=True)
        try:
            # The weights come first: no completed run is ever without them.
            if weights is not None:
                files.replace(path_of_weights, weights)
            files.replace(path, content)
        except OSError:
            path_of_weights.unlink(missing_ok=True)
            raise
    return path


def load(path: str | os.PathLike) -> Results:
    """The results saved at `path`, with None for the model and the dataloaders.

    Raises:
        OSError: if the file cannot be read, FileNotFoundError if there is none.
        ValueError: if it is not a results file of this schema or an older one.
    """
    content = Path(path).read_bytes()
    try:
        stored = json.loads(content.decode(), parse_float=_finite, parse_constant=_finite)
        results = read_as(Results, _upgraded(read_as(dict[str, Any], stored)))
        _check(results)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a results file of this version: {error}") from error
    return results


def load_all(results_dir: str | os.PathLike) -> dict[Path, Results]:
    """Every run saved below `results_dir`, by its path, in the order of the paths.

    What is no results file, or cannot be read, or is a link, is named in the log with the reason and left out.
    """
    root = Path(results_dir)
    runs = {}
    for path in sorted(root.glob("*/*/*.json")):
        try:
            if os.path.realpath(path) != os.path.join(os.path.realpath(root), path.relative_to(root)):
                raise ValueError(f"{path} is a link, or in a folder that is one")
            if not path.is_file():
                raise ValueError(f"{path} is not a file")
            runs[path] = load(path)
        except (ValueError, OSError) as error:
            _warn(f"Left out of the results: {error}")
    return runs


@functools.cache
def _warn(sentence: str) -> None:
    """Once, as programs read a folder several times."""
    logger.warning(sentence)


def _check(results: Results) -> None:
    """Refuses, with ValueError, what no field shows on its own."""
    check_stored(results.config)
    if results.status == "running" or results.timespan is None:
        raise ValueError(f"its status is {results.status} and its timespan {results.timespan}: it has not ended")
    trained, measured = [epoch.epoch for epoch in results.epochs], [entry.epoch for entry in results.history]
    if trained != list(range(1, len(trained) + 1)):
        raise ValueError(f"its epochs are {shown(trained)}, but must be 1, 2, 3 and so on")
    if measured != sorted(set(measured) & set(trained)):
        raise ValueError(f"its history is of the epochs {shown(measured)}, but must be of some of {shown(trained)}")
    of_parts = [results.train_metrics, results.val_metrics, results.test_metrics]
    if results.status == "completed" and (None in of_parts or not measured or measured[-1] != trained[-1]):
        raise ValueError("it is completed, but lacks metrics of a part of the data or of its last epoch")
    of_epochs = [metrics for entry in results.history for metrics in (entry.train_metrics, entry.val_metrics)]
    tallies = [tally for tally in [*of_parts, *of_epochs, *results.epochs] if tally is not None]
    for name in MEASURES:
        if len({name in tally for tally in tallies}) > 1:
            raise ValueError(f"it has {name} in some epochs or metrics and none in others")


def _upgraded(stored: dict[str, Any]) -> dict[str, Any]:
    """The values of a results file of any version as this version names them."""
    schema, values = stored.get("schema"), {name: value for name, value in stored.items() if name != "schema"}
    if schema not in range(1, SCHEMA + 1):
        raise ValueError(f"its schema is {shown(schema)}, not {SCHEMA} or older")
    if schema == 1:
        epochs = read_as(list[dict[str, Any]], stored.get("epochs"), "it.epochs")
        values["epochs"] = [epoch | {"cpu_seconds": None} for epoch in epochs]
    if schema < SCHEMA:
        config = read_as(dict[str, Any], stored.get("config"), "it.config")
        if config.get("solver") == "dopri5":
            values["config"] = config | {"solver": "torchadjoint"}
    return values


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not a finite number")
    return number
