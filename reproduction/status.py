"""What a results folder says of runs: done, failed or missing, and how long they take; worker, sweep and tables ask."""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from common.results import Results, load_all

from .runs import Run, identity

CRASHED = ".crashed"
"""Suffix of the file that says, in one sentence, why a worker that left no results ended."""


@dataclass(frozen=True)
class Status:
    """How it stands with a run, and, if it failed, why.

    The results folder knows the first three states; in a sweep a run can also be running, interrupted (its process
    alone, by a signal), or busy: another process is at it.
    """

    run: Run
    state: Literal["done", "failed", "missing", "running", "interrupted", "busy"]
    reason: str = ""


def statuses(runs: Sequence[Run], results_dir: str, *, retry_before: float = 0.0) -> list[Status]:
    """The status of each run.

    Only the last attempt counts, unless one was completed. One that was interrupted, or failed before the time
    `retry_before` (seconds since 1970), leaves the run missing.
    """
    attempts = defaultdict(list)
    experiments = {run.experiment for run in runs}
    for results in load_all(results_dir).values():
        if results.experiment in experiments:
            attempts[identity(results.experiment, results.config)].append(results)
    return [_status(run, attempts[run.identity], results_dir, retry_before) for run in runs]


def _status(run: Run, attempts: list[Results], results_dir: str, retry_before: float) -> Status:
    if any(results.status == "completed" for results in attempts):
        return Status(run, "done")
    ends = [(results.start_time + results.timespan, results.failure) for results in attempts]
    crashed = run.path(results_dir, CRASHED)
    if crashed.exists():
        ends.append((crashed.stat().st_mtime, crashed.read_text(encoding="utf-8")))
    ended, reason = max(ends, default=(0.0, None), key=lambda end: end[0])
    return Status(run, "missing") if reason is None or ended < retry_before else Status(run, "failed", reason)


def estimated_seconds(runs: Sequence[Run], results: Iterable[Results], device: str) -> list[float | None]:
    """How long each run trains on such a device; None where that is unknown.

    It is what completed runs that differ in nothing but seed and epochs took for an epoch, times the epochs.
    """
    experiments = {run.experiment for run in runs}
    rates = defaultdict(list)
    for result in results:
        if result.status == "completed" and result.experiment in experiments:
            kind = _kind(identity(result.experiment, result.config), result.config["device"])
            rates[kind].append(sum(epoch.seconds for epoch in result.epochs) / len(result.epochs))
    found = [rates.get(_kind(run.identity, device)) for run in runs]
    return [
        None if rate is None else run.config.max_epochs * sum(rate) / len(rate)
        for run, rate in zip(runs, found, strict=True)
    ]


def _kind(identity: str, device: str) -> str:
    experiment, settings = json.loads(identity)
    return json.dumps([experiment, {**settings, "seed": None, "max_epochs": None}, device.partition(":")[0]])
