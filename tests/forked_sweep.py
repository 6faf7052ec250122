"""Sweeps that are shared, killed, interrupted: `python forked_sweep.py EXPERIMENT SCENARIO FOLDER`, run by tests.

The sweeps are forks, and so are the workers of toy runs: only one process has to import everything. Acrobot's workers
are programs, as they are for a user.
"""

import json
import os
import random
import signal
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch._dynamo  # as optimisers do when the first is made
import toy
from tqdm import tqdm

from common import command_line
from reproduction import local_engine, sweep
from reproduction.runs import Run, load_data
from reproduction.worker import work

RUNS = {
    "toy": [
        Run("toy", {"norm": norm, "seed": seed, "max_epochs": 8}, "abc")
        for seed in range(3)
        for norm in ("default", "seminorm")
    ],
    "acrobot": [
        Run("acrobot", {"norm": norm, "num_trajectories": 7, "max_epochs": 2, "metric_interval": 1})
        for norm in ("default", "seminorm", "as-published")
    ],
}


class Fork:
    """A function in a process of its own, with what the engine needs of `subprocess.Popen`."""

    def __init__(self, function, log):
        self.returncode = None
        self.pid = os.fork()
        if self.pid == 0:
            code = 70
            try:
                os.setsid()
                tqdm.set_lock(threading.RLock())  # its own is shared between forks, and a kill may leave it taken
                signal.signal(signal.SIGINT, signal.default_int_handler)
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                with open(log, "ab", buffering=0) as file:
                    os.dup2(file.fileno(), 1)
                    os.dup2(file.fileno(), 2)
                function()
                code = 0
            except SystemExit as error:
                code = error.code or 0
            finally:
                os._exit(code)

    def poll(self):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self):
        while self.poll() is None:
            time.sleep(0.01)
        return self.returncode

    def send(self, number):
        os.kill(self.pid, number)

    def terminate(self):
        self.send(signal.SIGTERM)

    def workers(self):
        """The processes that a sweep has started, by number."""
        return [int(pid) for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()]


def start_worker(task, device, num_threads):
    return Fork(lambda: work(json.loads(task.argument(device))), task.log)


def start_sweep(runs, folder, log="sweep.log"):
    """A sweep with two workers at a time; exits with 1 if not all was done."""

    def run():
        engine = partial(local_engine.run_locally, devices=["cpu", "cpu"])
        statuses = sweep.sweep(runs, engine, results_dir=str(folder), device="cpu")
        sys.exit(any(status.state != "done" for status in statuses))

    folder.mkdir(parents=True, exist_ok=True)
    return Fork(lambda: command_line.call(run), folder / log)


def whole(runs, folder):
    """How long an undisturbed sweep takes: seconds."""
    started = time.monotonic()
    assert start_sweep(runs, folder / "whole").wait() == 0
    return time.monotonic() - started


def shared(runs, folder):
    sweeps = [start_sweep(runs, folder, f"{number}.log") for number in range(2)]
    assert [process.wait() for process in sweeps] == [0, 0]


def killed(runs, folder):
    """At random, three times, the second time without the workers."""
    duration = whole(runs, folder)
    delays = random.Random(3)
    for takes_workers in (True, False, True):
        process = start_sweep(runs, folder / "killed")
        time.sleep(delays.uniform(0.05, 0.25) * duration)
        process.send(signal.SIGSTOP)
        victims = process.workers() if takes_workers else []
        for victim in [*victims, process.pid]:
            os.kill(victim, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
    assert start_sweep(runs, folder / "killed").wait() == 0


def interrupted(runs, folder):
    whole(runs, folder)
    for number in (signal.SIGINT, signal.SIGTERM):
        process = start_sweep(runs, folder / "interrupted")
        while len(process.workers()) < 2 or not list(folder.rglob("*.checkpoint")):
            time.sleep(0.01)
        workers = process.workers()
        # As a terminal does it: to the sweep's whole process group.
        os.killpg(process.pid, number)
        assert process.wait() == 128 + number
        assert not [worker for worker in workers if Path(f"/proc/{worker}").exists()]
    assert start_sweep(runs, folder / "interrupted").wait() == 0
    logs = "".join(log.read_text() for log in folder.rglob("seed-*.log"))
    assert "interrupted in epoch" in logs
    assert "Starts anew" not in logs


if __name__ == "__main__":
    torch.set_num_threads(1)
    experiment, scenario, folder = sys.argv[1:]
    # Loads what is loaded at the first use only.
    toy.main(device="cpu", norm="seminorm", save=False)
    sweep.BUSY_SECONDS = 0.2
    if experiment == "toy":
        local_engine._start = start_worker
    runs = RUNS[experiment]
    if experiment == "acrobot":
        digest = load_data(experiment, runs[0].config).digest
        runs = [replace(run, digest=digest) for run in runs]
    globals()[scenario](runs, Path(folder))
