"""The record of a run, in memory and on disk: the trainer writes it, tables and interactive users read it.

Every record is a dataclass and a mapping at once: `results.test_metrics.loss` is `results["test_metrics"]["loss"]`.
On disk a run is one JSON file; results/README.md describes every name.
"""

import itertools
import json
import math
import os
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

SCHEMA = 2


class Record(Mapping):
    """A dataclass whose fields can also be looked up by name, as in a dictionary."""

    def __getitem__(self, name: str) -> Any:
        if name not in self.__dataclass_fields__:
            raise KeyError(name)
        return getattr(self, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.__dataclass_fields__)

    def __len__(self) -> int:
        return len(self.__dataclass_fields__)


@dataclass(kw_only=True)
class Tally(Record):
    """What was added up, exactly, over the batches of one pass over a data set."""

    loss: float
    forward_nfe: int
    backward_nfe: int
    forward_accepted: int
    forward_rejected: int
    backward_accepted: int
    backward_rejected: int


@dataclass(kw_only=True)
class Metrics(Tally):
    """One pass over a data set, with the solver's times in its first batch."""

    dataset_size: int
    timestamp: float
    timespan: float
    forward_ts: list[float] = field(repr=False)
    backward_ts: list[float] = field(repr=False)
    forward_accept_ts: list[float] = field(repr=False)
    forward_reject_ts: list[float] = field(repr=False)
    backward_accept_ts: list[float] = field(repr=False)
    backward_reject_ts: list[float] = field(repr=False)


@dataclass(kw_only=True)
class Epoch(Tally):
    """The training steps of one epoch, counted from 1."""

    epoch: int
    seconds: float
    cpu_seconds: float | None
    learning_rate: float


@dataclass(kw_only=True)
class ClassifierMetrics(Metrics):
    """One pass of a classifier."""

    accuracy: float


@dataclass(kw_only=True)
class ClassifierEpoch(Epoch):
    """The training steps of one epoch of a classifier."""

    accuracy: float


@dataclass(kw_only=True)
class HistoryEntry(Record):
    """What was measured after one epoch, counted from 1."""

    epoch: int
    train_metrics: Metrics
    val_metrics: Metrics


@dataclass(kw_only=True)
class Results(Record):
    """One run. `model` and the dataloaders live in memory only: they are None in results that were loaded."""

    memory_usage: int | None = None
    baseline_memory: int | None = None
    start_time: float
    timespan: float | None = None
    model: nn.Module | None = field(default=None, repr=False)
    parameters: int
    history: list[HistoryEntry] = field(default_factory=list, repr=False)
    train_dataloader: Iterable | None = field(default=None, repr=False)
    val_dataloader: Iterable | None = field(default=None, repr=False)
    test_dataloader: Iterable | None = field(default=None, repr=False)
    train_metrics: Metrics | None = None
    val_metrics: Metrics | None = None
    test_metrics: Metrics | None = None
    experiment: str
    config: dict[str, Any]
    provenance: dict[str, Any]
    epochs: list[Epoch] = field(default_factory=list, repr=False)
    status: str = "running"
    failure: str | None = None


IN_MEMORY_ONLY = ("model", "train_dataloader", "val_dataloader", "test_dataloader")


def metrics_of(values: Mapping[str, Any]) -> Metrics:
    """The metrics with these values, a classifier's if an accuracy is among them."""
    return (ClassifierMetrics if "accuracy" in values else Metrics)(**values)


def epoch_of(values: Mapping[str, Any]) -> Epoch:
    """The epoch with these values, a classifier's if an accuracy is among them."""
    return (ClassifierEpoch if "accuracy" in values else Epoch)(**values)


def history_entry_of(values: Mapping[str, Any]) -> HistoryEntry:
    """The history entry with these values, its metrics given as mappings."""
    return HistoryEntry(
        epoch=values["epoch"],
        train_metrics=metrics_of(values["train_metrics"]),
        val_metrics=metrics_of(values["val_metrics"]),
    )


def make_directory(results_dir: str, experiment: str, condition: str) -> Path:
    """Makes the folder for the runs of one condition of an experiment; what is unfit for a file name becomes '-'.

    Raises:
        ValueError: if the folder cannot be made.
    """
    # Neither '.' nor '/' passes, so it lies in `results_dir`; 200 characters are fewer than any file system's limit.
    names = [re.sub(r"[^A-Za-z0-9_+-]", "-", name)[:200] for name in (experiment, condition)]
    directory = Path(results_dir, *names)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"results_dir is {results_dir!r}, where no folder can be made: {error}") from error
    return directory


def save(results: Results, directory: Path) -> Path:
    """Writes `results` to `directory` as `<run>.json` with the lowest free number, and returns its path.

    The file appears complete or not at all, and never replaces another, however many processes save at once. The
    weights of a completed run follow as `<run>.pt`, for `torch.load`.
    """
    stored = {name: value for name, value in results.items() if name not in IN_MEMORY_ONLY}
    partial = directory / f"{uuid.uuid4().hex}.partial"
    with partial.open("x", encoding="utf-8") as file:
        json.dump(_plain({"schema": SCHEMA, **stored}), file, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())
    for run in itertools.count():
        path = directory / f"{run}.json"
        try:
            # Unlike a rename, a link fails if the name is taken.
            os.link(partial, path)
        except FileExistsError:
            continue
        break
    partial.unlink()
    if results.status == "completed":
        torch.save(results.model.state_dict(), partial)
        os.replace(partial, path.with_suffix(".pt"))
    return path


def load(path: str | os.PathLike) -> Results:
    """The results saved at `path`, with None for the model and the dataloaders.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a results file of this schema or an older one.
    """
    text = Path(path).read_text(encoding="utf-8")
    try:
        stored = json.loads(text)
        schema = stored.pop("schema")
        if schema == 1:
            for epoch in stored["epochs"]:
                epoch["cpu_seconds"] = None
        elif schema != SCHEMA:
            raise ValueError(f"its schema is {schema!r}, not {SCHEMA} or older")
        results = Results(**stored)
        results.epochs = [epoch_of(epoch) for epoch in results.epochs]
        results.history = [history_entry_of(entry) for entry in results.history]
        for name in ("train_metrics", "val_metrics", "test_metrics"):
            if results[name] is not None:
                setattr(results, name, metrics_of(results[name]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a results file of this version: {error}") from error
    return results


def _plain(value: Any) -> Any:
    """`value` in terms of strict JSON: records become objects, and numbers that are not finite become null."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
