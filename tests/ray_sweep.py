"""Sweeps on a Ray of two nodes, one of which is lost in mid-run: `python ray_sweep.py FOLDER`, run by tests.

It is a program, because Ray leaves its mark on a process: handlers of signals, threads, hooks at its end.
"""

import json
import os
import signal
import sys
from pathlib import Path

from ray.cluster_utils import Cluster

from common.errors import Interrupted
from reproduction import ray_engine
from reproduction.runs import Run
from reproduction.sweep import sweep

WELL = [Run("toy", {"norm": norm, "max_epochs": 40}, "abc") for norm in ("default", "seminorm")]
NOT_WELL = [
    Run("toy", {"norm": "seminorm", "end": end, "seed": seed}, "abc")
    for seed, end in enumerate(("failed", "crashed", "killed"), start=1)
]


def start_cluster(folder):
    """Two nodes of one core each, on which runs work in the folders `kept` and `lost`.

    On a machine with too much to do Ray's own time limits can be too short: it gets three attempts.
    """
    for attempts_left in (2, 1, 0):
        cluster = Cluster()
        try:
            for name in ("kept", "lost"):
                (folder / name).mkdir(exist_ok=True)
                # The workers find the toy there; the project is brought to them.
                environment = {"TMPDIR": str(folder / name), "PYTHONPATH": str(Path(__file__).parent)}
                cluster.add_node(num_cpus=1, include_dashboard=False, env_vars=environment)
            return cluster
        except Exception:
            cluster.shutdown()
            if not attempts_left:
                raise


def losing(engine, cluster, folder):
    """The engine, whose second node is lost as soon as a run has written a checkpoint there."""

    def losing_engine(tasks, stopping):
        for status in engine(tasks, stopping):
            if cluster.worker_nodes and list((folder / "lost").rglob("*.checkpoint")):
                [node] = cluster.worker_nodes
                cluster.remove_node(node, allow_graceful=False)
            yield status

    return losing_engine


def interrupting(engine, folder):
    """The engine, to which Ctrl-C comes when a run has written a checkpoint."""

    def interrupting_engine(tasks, stopping):
        # Those whose processes were killed left theirs.
        known = set((folder / "kept").rglob("*.checkpoint"))
        for status in engine(tasks, stopping):
            if not stopping() and set((folder / "kept").rglob("*.checkpoint")) - known:
                os.kill(os.getpid(), signal.SIGINT)
            yield status

    return interrupting_engine


def main(folder):
    for run in WELL:
        run.train("cpu", str(folder / "whole"))
    swept, stopped = (dict(results_dir=str(folder / name), device="cpu") for name in ("swept", "stopped"))
    ray_engine.NUM_RETRIES = 1
    cluster = start_cluster(folder)
    try:
        os.environ["RAY_ADDRESS"] = cluster.address
        engine = ray_engine.connect("cpu")
        statuses = sweep(WELL + NOT_WELL, losing(engine, cluster, folder), **swept)
        try:
            sweep(WELL[:1], interrupting(engine, folder), **stopped)
        except Interrupted:
            checkpoints = list((folder / "stopped").rglob("*.checkpoint"))
            sweep(WELL[:1], engine, **stopped)
    finally:
        ray_engine.ray.shutdown()
        cluster.shutdown()
    report = {
        "statuses": [[status.state, status.reason] for status in statuses],
        "checkpoints_when_stopped": [path.name for path in checkpoints],
    }
    (folder / "report.txt").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
