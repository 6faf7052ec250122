"""The sweep's engine for a cluster: runs are Ray tasks, and what they leave comes back to the sweep, which files it.

So nodes and sweep need no file system in common. tables.py imports this only for `--engine ray`.
"""

import contextlib
import io
import json
import math
import os
import sys
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from common import command_line, files, provenance
from common.progress import say
from common.results import directory_of, place
from datasets.cache import is_lack_of_room

from .runs import Run
from .status import CRASHED, Status, statuses
from .sweep import Engine, Task

# Ray reads it when it is imported: a Ray that is started here reports nothing to its makers, unless asked to.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
try:
    import ray
    from ray.exceptions import LocalRayletDiedError, RayError, TaskCancelledError
except ModuleNotFoundError as error:
    raise ValueError(
        "engine is 'ray', but Ray is not installed: run `pip install -r requirements-cluster.txt`, or leave it at local"
    ) from error

ROOT = Path(__file__).resolve().parents[1]
NUM_RETRIES = 5
"""How often a run is started again after its node or its process was lost, before it counts as failed."""
POLL_SECONDS = 0.5


def connect(device: str, num_jobs: int | None = None) -> Engine:
    """An engine, as `sweep.Engine` describes it, on the cluster in RAY_ADDRESS; without one, on a Ray of this machine.

    The nodes get a copy of this project's code; what it imports must be installed there. They keep downloads in their
    own caches, and a path to recordings is one of theirs. To be called before `sweep`, as Ray sets a signal handler.

    Args:
        device: "cpu", for as many runs at a time as the cluster has cores, or "cuda", for one on each GPU.
        num_jobs: so many runs at a time in place of that; they divide the cores, or share GPUs.

    Raises:
        ValueError: if there is no such cluster, or no such device in it.
    """
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device is {device!r}, but on Ray it must be cpu or cuda: Ray chooses the GPU")
    if not ray.is_initialized():
        code = {"working_dir": str(ROOT), "excludes": ["/.git", "/.venv", "/results", "/reference"]}
        try:
            ray.init(runtime_env=code, log_to_driver=False, logging_level="warning")
        except Exception as error:  # of many kinds, down to this one
            address = os.environ.get("RAY_ADDRESS")
            tried = (
                f"no Ray cluster can be used at {address!r}, the RAY_ADDRESS" if address else "Ray does not start here"
            )
            raise ValueError(f"{tried}: {error}") from error
    if device == "cuda" and not ray.cluster_resources().get("GPU"):
        raise ValueError("device is 'cuda', but Ray's cluster has no GPU")
    # The nodes have the code as it is now.
    commit = provenance.commit()
    return partial(_run_on_ray, device=device, num_jobs=num_jobs, share=share_of(device, num_jobs), commit=commit)


def share_of(device: str, num_jobs: int | None) -> dict[str, float]:
    """What each run gets of the cluster as it is now: at least one core, and for "cuda" a GPU or a part of one."""
    total = ray.cluster_resources()
    if device == "cuda":
        return {"num_gpus": 1 / math.ceil((num_jobs or 1) / total["GPU"])}
    largest = max(node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"])
    return {"num_cpus": max(1, min(largest, total["CPU"] // num_jobs)) if num_jobs else 1}


def _run_on_ray(
    tasks: Sequence[Task],
    stopping: Callable[[], bool],
    *,
    device: str,
    num_jobs: int | None,
    share: Mapping[str, float],
    commit: str | None,
) -> Iterator[Status | None]:
    # A process for each run, as locally. Ray starts a run again if its node or its process is lost, and only then.
    remote = ray.remote(max_calls=1, max_retries=NUM_RETRIES, scheduling_strategy="SPREAD", **share)(_train)
    waiting, at_work, told = deque(tasks), {}, False
    try:
        while at_work or (waiting and not stopping()):
            if waiting and not stopping() and len(at_work) < (num_jobs or _num_places(device)):
                task = waiting.popleft()
                lock, status = _claim(task)
                if status.state == "running":
                    checkpoint = _read(task.run.path(task.results_dir, ".checkpoint"))
                    reference = remote.remote(task.run.experiment, dict(task.run.settings), checkpoint, device, commit)
                    at_work[reference] = task, lock
                yield status
                continue
            if stopping() and not told:
                told = True
                for reference in at_work:
                    # Reaches the trainer as Ctrl-C would.
                    ray.cancel(reference)
            for reference in ray.wait(list(at_work), timeout=POLL_SECONDS)[0]:
                task, lock = at_work.pop(reference)
                status = _file(task, reference, stopping)
                lock.release()
                yield status
            yield None
    finally:
        # After an error or a second signal.
        for reference in at_work:
            ray.cancel(reference)


def _num_places(device: str) -> int:
    """One more than there is room for at the moment: a cluster that grows on demand must see that there is demand."""
    return int(ray.cluster_resources().get("GPU" if device == "cuda" else "CPU", 0)) + 1


def _claim(task: Task) -> tuple[FileLock, Status]:
    """The lock of a run, held by this process, and "running"; or a free one, and why the run is not to be done."""
    lock = FileLock(task.lock)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return lock, Status(task.run, "busy")
    [status] = statuses([task.run], task.results_dir, retry_before=task.retry_before)
    if status.state == "missing":
        task.run.path(task.results_dir, CRASHED).unlink(missing_ok=True)
        return lock, Status(task.run, "running")
    lock.release()
    return lock, status


@dataclass(frozen=True)
class _Left:
    """What a run left on its node: the worker's exit code, what it printed, and the contents of files."""

    returncode: int
    printed: str
    checkpoint: bytes | None
    results: bytes | None
    weights: bytes | None


def _train(
    experiment: str, settings: dict[str, Any], checkpoint: bytes | None, device: str, commit: str | None
) -> _Left:
    """Does a run on a node, from this checkpoint on; the code there is a copy of this commit, without its history."""
    if commit is not None:
        os.environ[provenance.COMMIT] = commit
    run = Run(experiment, settings)
    with tempfile.TemporaryDirectory(prefix="seminorm-") as folder:
        checkpoint_path = run.path(folder, ".checkpoint")
        directory = checkpoint_path.parent
        directory.mkdir(parents=True)
        if checkpoint is not None:
            checkpoint_path.write_bytes(checkpoint)
        with io.StringIO() as output:
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                try:
                    command_line.call(run.train, device, folder)
                    returncode = 0
                except SystemExit as error:
                    returncode = error.code
                except Exception:
                    traceback.print_exc()
                    returncode = 1
            printed = output.getvalue()
        return _Left(returncode, printed, *map(_read, (checkpoint_path, directory / "0.json", directory / "0.pt")))


def _read(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def _file(task: Task, reference: ray.ObjectRef, stopping: Callable[[], bool]) -> Status:
    """Puts what a run left where it had been if it had run here, and says how it ended.

    While there is no room it waits for some: what a run left is nowhere else.
    """
    try:
        left = ray.get(reference)
    except TaskCancelledError:
        return Status(task.run, "interrupted")
    except LocalRayletDiedError as error:
        raise ConnectionError(
            "the sweep has lost Ray on its own machine, and with it what was at work: when Ray is up again, do the same"
        ) from error
    except RayError as error:
        left = _Left(1, f"{error}\n", None, None, None)
    is_told = False
    for put in (_put_results, _put_checkpoint, _put_log):
        while True:
            try:
                put(task, left)
                break
            except OSError as error:
                if not is_lack_of_room(error) or stopping():
                    raise
                if not is_told:
                    is_told = True
                    say(f"there is no room for the results of {task.run} in {task.results_dir}: make some", sys.stderr)
                time.sleep(POLL_SECONDS)
    return task.outcome(left.returncode)


def _put_log(task: Task, left: _Left) -> None:
    with task.log.open("a", encoding="utf-8") as log:
        log.write(left.printed)


def _put_results(task: Task, left: _Left) -> None:
    if left.results is not None:
        stored = json.loads(left.results)
        stored["config"]["results_dir"] = task.results_dir  # it was a temporary one
        directory = directory_of(task.results_dir, task.run.experiment, task.run.config.condition)
        place(json.dumps(stored).encode(), left.weights, directory)


def _put_checkpoint(task: Task, left: _Left) -> None:
    checkpoint = task.run.path(task.results_dir, ".checkpoint")
    if left.checkpoint is not None:
        files.replace(checkpoint, left.checkpoint)
    elif left.returncode == 0:
        checkpoint.unlink(missing_ok=True)
