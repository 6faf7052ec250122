"""The sweep's engine for one machine: worker processes, one device each, with the CPU's threads divided among them."""

import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from .status import Status
from .sweep import Task

POLL_SECONDS = 0.1


def devices_of(device: str, num_workers: int | None) -> list[str]:
    """The device of each worker: "cuda" stands for every GPU, and without `num_workers` each device has one worker."""
    devices = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if device == "cuda" else [device]
    return [devices[index % len(devices)] for index in range(num_workers or len(devices))]


def run_locally(
    tasks: Sequence[Task], stopping: Callable[[], bool], *, devices: Sequence[str]
) -> Iterator[Status | None]:
    """An engine as `sweep.Engine` describes it, with as many workers at a time as there are `devices`."""
    num_threads = max(1, torch.get_num_threads() // len(devices))
    waiting, free, workers, told = deque(tasks), deque(devices), {}, False
    try:
        while workers or (waiting and not stopping()):
            if waiting and free and not stopping():
                task, device = waiting.popleft(), free.popleft()
                workers[_start(task, device, num_threads)] = task, device
                yield Status(task.run, "running")
                continue
            if stopping() and not told:
                told = True
                for worker in workers:
                    worker.terminate()
            for worker in [worker for worker in workers if worker.poll() is not None]:
                task, device = workers.pop(worker)
                free.append(device)
                yield task.outcome(worker.returncode)
            yield None
            time.sleep(POLL_SECONDS)
    finally:
        # After an error or a second signal: whoever was told before now stops at once.
        for worker in workers:
            worker.terminate()


def _start(task: Task, device: str, num_threads: int) -> subprocess.Popen:
    paths = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    with task.log.open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "reproduction.worker", task.argument(device)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={
                **os.environ,
                "OMP_NUM_THREADS": str(num_threads),
                "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            },
            # Out of reach of the terminal's Ctrl-C: the sweep passes it on, and a second signal would act at once.
            start_new_session=True,
        )
