"""A sweep on Ray ends as one on this machine does, whichever nodes are lost, and says what it cannot do."""

import errno
import importlib.util
import json
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from filelock import FileLock
from test_checkpoint import ENVIRONMENT, TESTS
from test_sweep import put, toy_run, trained

import reproduction
import tables
from common import provenance
from common.results import load_all
from reproduction.status import Status
from reproduction.sweep import Task

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="there is no Ray for this Python")


@dataclass(frozen=True)
class Swept:
    """What `ray_sweep.py` left."""

    folder: Path
    statuses: list
    checkpoints_when_stopped: list[str]
    processes_left: list[str]


def processes_with(variable):
    """The ids of the processes that were started with this in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if variable.encode() in path.read_bytes().split(b"\0"):
                found.append(path.parent.name)
        except OSError:
            continue
    return found


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ray")
    # Not in `folder`: the paths of its sockets must be short.
    ray_folder = tempfile.mkdtemp(prefix="ray-")
    environment = {
        **ENVIRONMENT,
        "RAY_TMPDIR": ray_folder,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_worker_niceness": "0",
    }
    try:
        command = [sys.executable, "-W", "error", str(TESTS / "ray_sweep.py"), str(folder)]
        process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        logs = [path.read_text() for path in folder.rglob("*.log")]
        assert process.returncode == 0, "\n".join([process.stderr, *logs])
        waited_until = time.monotonic() + 30
        while (left := processes_with(f"RAY_TMPDIR={ray_folder}")) and time.monotonic() < waited_until:
            time.sleep(0.1)
    finally:
        shutil.rmtree(ray_folder, ignore_errors=True)
    return Swept(folder=folder, processes_left=left, **json.loads((folder / "report.txt").read_text()))


@needs_ray
def test_a_lost_node_costs_what_its_run_had_done_there(swept):
    assert list((swept.folder / "lost").rglob("*.checkpoint")), "no run was at work there"
    assert [state for state, _ in swept.statuses[:2]] == ["done", "done"]
    assert trained(swept.folder / "swept") == trained(swept.folder / "whole")
    assert len(trained(swept.folder / "swept")) == 2
    assert not list((swept.folder / "swept").rglob("seed-0.checkpoint"))


@needs_ray
def test_results_are_as_if_the_run_had_been_here(swept):
    for path, results in load_all(swept.folder / "swept").items():
        assert results.config["results_dir"] == str(swept.folder / "swept")
        assert results.provenance["commit"] == provenance.commit()
        assert path.with_suffix(".pt").exists() == (results.status == "completed")
        assert "Saved" in (path.parent / f"seed-{results.config['seed']}.log").read_text()


@needs_ray
def test_a_run_that_fails_is_not_tried_again_and_says_why(swept):
    (failed, failure), (crashed, crash), (killed, death) = swept.statuses[2:]
    assert failed == crashed == killed == "failed"
    assert "underflow in dt" in failure
    assert [results.status for results in load_all(swept.folder / "swept").values()].count("failed") == 1
    assert crash.startswith("RuntimeError: a bug; the whole output is in ")
    log = Path(crash.rpartition(" ")[2]).read_text()
    assert log.count("Traceback") == 1, "it was tried again"
    assert "/working_dir_files/" in log, "the code was not brought to the node"
    assert "died" in death


@needs_ray
def test_an_interrupted_sweep_brings_the_checkpoints_home_and_goes_on_from_there(swept):
    assert "seed-0.checkpoint" in swept.checkpoints_when_stopped
    [learnt] = trained(swept.folder / "stopped")
    assert learnt in trained(swept.folder / "whole")
    results = list(load_all(swept.folder / "stopped").values())
    started = [
        {item.start_time for item in results if item.status == status} for status in ("interrupted", "completed")
    ]
    assert started[0]
    assert started[0] <= started[1]
    assert not list((swept.folder / "stopped").rglob("*.checkpoint"))


@needs_ray
def test_no_process_is_left(swept):
    assert swept.processes_left == []


@pytest.fixture
def ray_engine(monkeypatch):
    """The engine, in a cluster of two nodes that is made up."""
    pytest.importorskip("ray")
    from reproduction import ray_engine

    nodes = [{"Alive": True, "Resources": {"CPU": 8.0, "GPU": 4.0}}, {"Alive": True, "Resources": {"CPU": 4.0}}]
    monkeypatch.setattr(ray_engine.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray_engine.ray, "nodes", lambda: nodes)
    monkeypatch.setattr(ray_engine.ray, "cluster_resources", lambda: {"CPU": 12.0, "GPU": 4.0})
    return ray_engine


def test_runs_divide_the_cores_and_share_the_gpus(ray_engine):
    cores = {num_jobs: ray_engine.share_of("cpu", num_jobs)["num_cpus"] for num_jobs in (None, 1, 2, 5, 100)}
    assert cores == {None: 1, 1: 8, 2: 6, 5: 2, 100: 1}
    gpus = {num_jobs: ray_engine.share_of("cuda", num_jobs)["num_gpus"] for num_jobs in (None, 2, 4, 6, 16)}
    assert gpus == {None: 1, 2: 1, 4: 1, 6: 1 / 2, 16: 1 / 4}


def test_a_device_that_the_cluster_lacks_is_refused(ray_engine, monkeypatch):
    with pytest.raises(ValueError, match="'cuda:1', but on Ray it must be cpu or cuda"):
        ray_engine.connect("cuda:1")
    monkeypatch.setattr(ray_engine.ray, "cluster_resources", lambda: {"CPU": 12.0})
    with pytest.raises(ValueError, match="Ray's cluster has no GPU"):
        ray_engine.connect("cuda")


def test_a_cluster_that_does_not_answer_is_named(ray_engine, monkeypatch):
    def init(**options):
        raise RuntimeError("Timed out while waiting")

    monkeypatch.setattr(ray_engine.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray_engine.ray, "init", init)
    for address, sentence in (
        ("10.0.0.1:6379", "no Ray cluster can be used at '10.0.0.1:6379'"),
        ("", "does not start"),
    ):
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(ValueError, match=f"{sentence}.*: Timed out while waiting"):
            ray_engine.connect("cpu")


def test_what_another_is_at_or_has_done_is_left_alone(ray_engine, tmp_path):
    taken, done = (Task(toy_run(seed=seed), str(tmp_path)) for seed in range(2))
    put(tmp_path, done.run, "completed", ended=10.0)
    with FileLock(taken.lock):
        statuses = list(ray_engine.connect("cpu")([taken, done], lambda: False))
    assert statuses == [Status(taken.run, "busy"), Status(done.run, "done")]
    assert not done.is_taken()


def test_a_sweep_that_loses_ray_itself_ends_and_no_run_has_failed(ray_engine, tmp_path, monkeypatch):
    def get(reference):
        raise ray_engine.LocalRayletDiedError

    monkeypatch.setattr(ray_engine.ray, "get", get)
    task = Task(toy_run(), str(tmp_path))
    with pytest.raises(ConnectionError, match="lost Ray on its own machine"):
        ray_engine._file(task, None, lambda: False)
    assert not list(tmp_path.iterdir())


def test_while_the_disk_is_full_what_a_run_left_waits_and_is_put_there_once(ray_engine, tmp_path, monkeypatch, capsys):
    task = Task(toy_run(), str(tmp_path))
    put(tmp_path, toy_run(seed=1), "completed", ended=10.0)
    [results] = tmp_path.rglob("*.json")
    left = ray_engine._Left(0, "printed\n", b"checkpoint", results.read_bytes(), None)
    results.unlink()
    monkeypatch.setattr(ray_engine.ray, "get", lambda reference: left)
    monkeypatch.setattr(ray_engine, "POLL_SECONDS", 0.0)
    places, attempts = [], iter(range(5))

    def replace(path, content):
        if next(attempts) < 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        path.write_bytes(content)

    monkeypatch.setattr(ray_engine, "place", lambda *arguments: places.append(arguments))
    monkeypatch.setattr(ray_engine.files, "replace", replace)
    assert ray_engine._file(task, None, lambda: False) == Status(task.run, "done")
    assert len(places) == 1
    assert (task.log.read_text(), next(attempts)) == ("printed\n", 4)
    assert capsys.readouterr().err.count("there is no room for the results of") == 1
    attempts = iter(range(5))
    with pytest.raises(OSError, match="No space left"):
        ray_engine._file(task, None, lambda: True)


def test_without_ray_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "reproduction.ray_engine", raising=False)
    monkeypatch.delattr(reproduction, "ray_engine", raising=False)
    with pytest.raises(ValueError, match=r"pip install -r requirements-cluster\.txt"):
        tables.engine_of(tables.Train("quick", engine="ray"))
