"""Does the runs that a results folder lacks, by an engine that it is given; tables.py calls it, engines use `Task`."""

import contextlib
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from filelock import FileLock, Timeout
from tqdm import tqdm

from common import files
from common.checkpoint import DelayedSignals
from common.progress import say
from common.records import one_line
from common.results import load_all, make_directory

from .runs import Run
from .status import CRASHED, Status, estimated_seconds, on_found_data, statuses, time_after_failures
from .worker import BUSY

BUSY_SECONDS = 10.0
"""How long to wait before trying again what other processes are at."""
INTERRUPTED = (128 + signal.SIGINT, 128 + signal.SIGTERM, -signal.SIGINT, -signal.SIGTERM)


@dataclass(frozen=True)
class Task:
    """One run for a worker to do. What failed before `retry_before` (seconds since 1970) is tried again."""

    run: Run
    results_dir: str
    retry_before: float = 0.0

    @property
    def log(self) -> Path:
        """Where an engine puts what the worker prints."""
        return self.run.path(self.results_dir, ".log")

    @property
    def lock(self) -> Path:
        """What the process that is at the run holds."""
        return self.run.path(self.results_dir, ".lock")

    def is_taken(self) -> bool:
        """Whether a process is at the run."""
        try:
            with FileLock(self.lock, timeout=0):
                return False
        except Timeout:
            return True

    def argument(self, device: str) -> str:
        """The argument of `python -m reproduction.worker`."""
        return json.dumps(
            {
                "lock": str(self.lock),
                "experiment": self.run.experiment,
                "settings": self.run.settings,
                "digest": self.run.digest,
                "results_dir": self.results_dir,
                "retry_before": self.retry_before,
                "device": device,
            }
        )

    def outcome(self, returncode: int) -> Status:
        """How it stands with the run after a worker ended with this code (negative: by that signal)."""
        if returncode == 0:
            return Status(self.run, "done")
        if returncode == BUSY:
            return Status(self.run, "busy")
        if returncode in INTERRUPTED:
            return Status(self.run, "interrupted")
        [status] = statuses([self.run], self.results_dir, retry_before=self.retry_before)
        if status.state == "failed":
            return status
        if returncode < 0:
            # Real-time signals have a number, but no name.
            name = signal.Signals(-returncode).name if -returncode in list(signal.Signals) else f"signal {-returncode}"
            reason = f"the process was killed by {name}; its output is in {self.log}"
        else:
            printed = self.log.read_text(encoding="utf-8", errors="replace").strip()
            reason = f"{printed.rpartition(chr(10))[2]}; the whole output is in {self.log}"
        if returncode != 2:
            # What cannot be used (settings, data, files) is looked at again next time, but this is remembered.
            content = f"{one_line(reason)}\n{self.run.digest or ''}"
            with contextlib.suppress(OSError):  # such as a full disk: then it is tried again next time
                files.replace(self.run.path(self.results_dir, CRASHED), content.encode())
        return Status(self.run, "failed", reason)


Engine = Callable[[Sequence[Task], Callable[[], bool]], Iterator[Status | None]]
"""Does tasks: yields `running` when it starts one and `Task.outcome` when that ends, and None now and then (each second
at least) while nothing happens. Once the function that it is given returns True it starts none, sends the workers one
SIGTERM each (upon which they finish their batch and save), and yields their outcomes."""


def sweep(
    runs: Sequence[Run],
    engine: Engine,
    *,
    results_dir: str,
    device: str,
    retry_failed: bool = False,
    guesses: Mapping[str, float | None] = MappingProxyType({}),
) -> list[Status]:
    """Does the runs that are missing, and says how it stands with each of `runs`.

    Any number of sweeps can share a results folder: what another is at is waited for,
    and done here if it is left undone. `guesses` are the seconds of runs, by their identity, that the time left is made
    of where no completed run tells.

    Raises:
        ValueError: if settings are not allowed, or the results folder cannot be used.
        Interrupted: a KeyboardInterrupt, after SIGINT or SIGTERM: when every run at work has saved where it is.
    """
    retry_before = time_after_failures(runs, results_dir) if retry_failed else 0.0
    known = {run.identity: Status(run, "missing") for run in runs}
    with DelayedSignals() as signals, _Display(known, results_dir, device, guesses) as display:
        while pending := [status.run for status in known.values() if status.state in ("missing", "busy")]:
            tasks = []
            for status in statuses(pending, results_dir, retry_before=retry_before):
                if status.state == "missing":
                    make_directory(results_dir, status.run.experiment, status.run.config.condition)
                    task = Task(status.run, results_dir, retry_before)
                    if task.is_taken():
                        status = Status(status.run, "busy")
                    else:
                        tasks.append(task)
                known[status.run.identity] = status
            for status in engine(tasks, lambda: signals.received is not None):
                display.show(status)
            if any(status.state == "busy" for status in known.values()):
                retry_at = time.monotonic() + BUSY_SECONDS
                while signals.received is None and time.monotonic() < retry_at:
                    display.show(None)
                    time.sleep(0.1)
            num_done = sum(status.state == "done" for status in known.values())
            signals.check(
                f"Interrupted: {num_done} of {len(known)} runs are done, and where the others stopped is saved. "
                "The same command goes on from there."
            )
    return [known[run.identity] for run in runs]


class _Display:
    """Keeps `known` up to date, with a bar on a terminal and a line for each event; stdout is left for the table."""

    def __init__(self, known: dict[str, Status], results_dir: str, device: str, guesses: Mapping[str, float | None]):
        self.known = known
        self.results_dir = results_dir
        self.device = device
        self.guesses = guesses
        self.started = {}
        self._estimate()
        self.bar = tqdm(total=len(known), disable=None, bar_format="{bar:20} {desc}, {elapsed} so far")

    def __enter__(self) -> "_Display":
        self.show(None)
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()

    def show(self, status: Status | None) -> None:
        """Shows what just happened; None is time that passed."""
        if status is not None:
            self.known[status.run.identity] = status
            if status.state == "running":
                self.started[status.run.identity] = time.monotonic()
            if status.state == "done":
                self._estimate()
            reason = f" ({status.reason})" if status.reason else ""
            line = f"{status.state}: {status.run}{reason}; {self._summary()}"
            if self.bar.disable:
                say(line, sys.stderr)
            else:
                tqdm.write(line, file=sys.stderr)
        self.bar.n = len(self._in("done", "failed"))
        self.bar.set_description_str(self._summary())

    def _in(self, *states: str) -> list[str]:
        return [identity for identity, status in self.known.items() if status.state in states]

    def _estimate(self) -> None:
        results = load_all(self.results_dir).values()
        # On a cluster the data are not known here, but completed runs tell which they are.
        runs = on_found_data([status.run for status in self.known.values()], results)
        seconds = estimated_seconds(runs, results, self.device)
        self.estimates = {
            identity: self.guesses.get(identity) if second is None else second
            for identity, second in zip(self.known, seconds, strict=True)
        }

    def _summary(self) -> str:
        counts = {state: len(self._in(state)) for state in ("running", "done", "failed")}
        counts["waiting"] = len(self.known) - sum(counts.values())
        return f"{', '.join(f'{number} {state}' for state, number in counts.items())}, {self._time_left()} left"

    def _time_left(self) -> str:
        seconds = 0.0
        for identity in self._in("running", "missing", "busy"):
            if self.estimates[identity] is None:
                return "unknown time"
            now = time.monotonic()
            elapsed = now - self.started[identity] if self.known[identity].state == "running" else 0.0
            seconds += max(0.0, self.estimates[identity] - elapsed)
        return "about " + tqdm.format_interval(seconds / max(1, len(self._in("running"))))
