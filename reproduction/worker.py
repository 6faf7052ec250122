"""One run in a process of its own: `python -m reproduction.worker TASK`, which the sweep's engines start."""

import json
import sys
from typing import Any

from filelock import FileLock, Timeout

BUSY = 75
"""The exit code of a worker whose run another process is at: EX_TEMPFAIL, which not every system names."""


def work(task: dict[str, Any]) -> None:
    """Does what is left of a run, unless it is done, has failed, or is at work in another process.

    The lock is this process's own and not the sweep's: it lasts as long as the training, whatever ends the sweep.
    Returns when the run is done, and exits otherwise as `common.command_line.call` does.

    Args:
        task: what `sweep.Task.argument` makes.
    """
    lock = FileLock(task["lock"])
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        sys.exit(BUSY)
    with held:
        # Only now, because these take seconds, in which no other could see that the run is taken.
        from common import command_line

        from .runs import Run
        from .status import CRASHED, statuses

        run, results_dir = Run(task["experiment"], task["settings"], task["digest"]), task["results_dir"]
        [status] = statuses([run], results_dir, retry_before=task["retry_before"])
        if status.state == "failed":
            sys.exit(1)
        if status.state == "missing":
            run.path(results_dir, CRASHED).unlink(missing_ok=True)
            command_line.call(run.train, task["device"], results_dir)


if __name__ == "__main__":
    work(json.loads(sys.argv[1]))
