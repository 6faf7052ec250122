"""What a results folder says of runs: done, failed or missing, and how long they take; worker, sweep and tables ask."""

import contextlib
import json
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from common.records import one_line
from common.results import Results, load_all

from .runs import Run, identity_of

CRASHED = ".crashed"
"""Suffix of the file that says, in one line, why a worker that left no results ended, and below the data's digest."""


@dataclass(frozen=True)
class Status:
    """How it stands with a run, and, if it failed, why.

    The results folder knows the first three states; in a sweep a run can also be running, interrupted (its process
    alone, by a signal), or busy: another process is at it.
    """

    run: Run
    state: Literal["done", "failed", "missing", "running", "interrupted", "busy"]
    reason: str = ""
    """On one line."""

    def __post_init__(self):
        object.__setattr__(self, "reason", one_line(self.reason))


def statuses(runs: Sequence[Run], results_dir: str, *, retry_before: float = 0.0) -> list[Status]:
    """The status of each run.

    Only the last attempt counts, unless one was completed. One that was interrupted, or failed before the time
    `retry_before` (seconds since 1970), leaves the run missing.
    """
    standing = []
    for run, attempts in zip(runs, _attempts(runs, results_dir), strict=True):
        ended, reason = _last_end(run, attempts, results_dir)
        if any(results.status == "completed" for results in attempts):
            standing.append(Status(run, "done"))
        elif reason is None or ended < retry_before:
            standing.append(Status(run, "missing"))
        else:
            standing.append(Status(run, "failed", reason))
    return standing


def begun(standing: Sequence[Status]) -> list[Status]:
    """Those of the experiments and groups of which some run is done; all where none is."""
    groups = {(status.run.experiment, status.run.group) for status in standing if status.state == "done"}
    return [status for status in standing if (status.run.experiment, status.run.group) in groups] or list(standing)


def time_after_failures(runs: Sequence[Run], results_dir: str) -> float:
    """Now, or a later time if a clock that was set back since has put an end of these runs into the future."""
    ends = [_last_end(run, attempts, results_dir)[0] for run, attempts in zip(runs, _attempts(runs, results_dir))]  # noqa: B905
    return max([time.time(), *(ended + 1.0 for ended in ends)])


def _attempts(runs: Sequence[Run], results_dir: str) -> list[list[Results]]:
    """The results of each run, completed or not; of a run whose data are not known, on what most were trained on."""
    found = defaultdict(list)
    experiments = {run.experiment for run in runs}
    stored = load_all(results_dir).values()
    for results in stored:
        if results.experiment in experiments:
            found[identity_of(results)].append(results)
    return [found[run.identity] for run in on_found_data(runs, stored)]


def _last_end(run: Run, attempts: list[Results], results_dir: str) -> tuple[float, str | None]:
    """When the last attempt at a run ended, and why if it failed."""
    ends = [(results.start_time + (results.timespan or 0.0), results.failure) for results in attempts]
    crashed = run.path(results_dir, CRASHED)
    # A worker that begins takes it away, at any time.
    with contextlib.suppress(FileNotFoundError):
        reason, _, digest = crashed.read_text(encoding="utf-8", errors="replace").partition("\n")
        if not digest or run.digest in (None, digest):
            ends.append((crashed.stat().st_mtime, reason))
    return max(ends, default=(0.0, None), key=lambda end: end[0])


def on_found_data(runs: Sequence[Run], results: Iterable[Results]) -> list[Run]:
    """The runs, those without a digest of their data with that which most completed results of such runs have.

    Runs that share their data get the same digest; None is left where there are no results.
    """
    experiments = {run.experiment for run in runs}
    found = defaultdict(set)
    for result in results:
        if result.experiment in experiments:
            found[result.provenance["split"]].add((result.status == "completed", identity_of(result)))

    def num_found(digest: str | None, alike: list[Run]) -> tuple[int, int]:
        identities = [replace(run, digest=digest).identity for run in alike]
        return tuple(sum((done, each) in found[digest] for each in identities) for done in (True, False))

    alike = defaultdict(list)
    for run in runs:
        if run.digest is None:
            alike[run.data_key].append(run)
    digests = {}
    for key, group in alike.items():
        best = max(found, key=lambda digest: num_found(digest, group), default=None)
        digests[key] = best if found and any(num_found(best, group)) else None
    return [run if run.digest is not None else replace(run, digest=digests[run.data_key]) for run in runs]


def estimated_seconds(runs: Sequence[Run], results: Iterable[Results], device: str) -> list[float | None]:
    """How long each run trains on such a device; None where that is unknown.

    It is what completed runs that differ in nothing but seed and epochs took for an epoch, times the epochs and one
    more, which is about what the measurements take.
    """
    experiments = {run.experiment for run in runs}
    rates = defaultdict(list)
    for result in results:
        if result.status == "completed" and result.experiment in experiments:
            kind = _kind(identity_of(result), result.config["device"])
            rates[kind].append(sum(epoch.seconds for epoch in result.epochs) / len(result.epochs))
    found = [rates.get(_kind(run.identity, device)) for run in runs]
    return [
        None if rate is None else (run.config.max_epochs + 1) * sum(rate) / len(rate)
        for run, rate in zip(runs, found, strict=True)
    ]


def _kind(identity: str, device: str) -> str:
    experiment, settings, digest = json.loads(identity)
    return json.dumps([experiment, {**settings, "seed": None, "max_epochs": None}, digest, device.partition(":")[0]])
