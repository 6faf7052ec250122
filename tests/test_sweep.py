"""A sweep does what is missing, once, whatever ends it and whoever works beside it."""

import errno
import io
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
from records import made_on
from test_checkpoint import ENVIRONMENT, TESTS
from test_results import make_results

from common.results import load_all, make_directory, save
from reproduction import local_engine
from reproduction import sweep as sweep_module
from reproduction.experiments import EXPERIMENTS
from reproduction.local_engine import devices_of, run_locally
from reproduction.runs import Run
from reproduction.status import CRASHED, Status, on_found_data, statuses
from reproduction.sweep import Task, sweep
from reproduction.worker import work

BUSY = 75


def toy_run(**settings):
    return Run("toy", {"norm": "seminorm", **settings}, "abc")


def put(folder, run, status, *, ended, **changes):
    """Saves results of this run that ended at this time."""
    config = asdict(run.config)
    changes = {"provenance": made_on("abc"), **changes}
    results = make_results(config=config, status=status, start_time=ended - 1.0, timespan=1.0, **changes)
    return save(results, make_directory(folder, "toy", run.config.condition))


def state(folder, run, **options):
    [status] = statuses([run], str(folder), **options)
    return status.state, status.reason


def in_process(log):
    """An engine that does everything at once, in this process, and counts what it starts."""

    def engine(tasks, stopping):
        for task in tasks:
            log[str(task.run)] += 1
            yield Status(task.run, "running")
            try:
                work(json.loads(task.argument("cpu")))
                yield task.outcome(0)
            except SystemExit as error:
                task.log.write_text("what it printed")
                yield task.outcome(error.code)
            except RuntimeError as error:
                task.log.write_text(f"Traceback\nRuntimeError: {error}\n")
                yield task.outcome(1)

    return engine


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(sweep_module, "BUSY_SECONDS", 0.1)


def test_a_completed_run_is_done_whatever_else_it_left(tmp_path):
    run = toy_run()
    assert state(tmp_path, run) == ("missing", "")
    put(tmp_path, run, "completed", ended=10.0)
    put(tmp_path, run, "failed", ended=20.0, failure="later")
    assert state(tmp_path, run) == ("done", "")
    assert state(tmp_path, toy_run(seed=1)) == state(tmp_path, toy_run(shape="bent")) == ("missing", "")


def test_of_attempts_the_last_counts(tmp_path):
    run = toy_run()
    put(tmp_path, run, "failed", ended=30.0, failure="underflow")
    put(tmp_path, run, "interrupted", ended=20.0)
    assert state(tmp_path, run) == ("failed", "underflow")
    assert state(tmp_path, run, retry_before=31.0) == ("missing", "")
    put(tmp_path, run, "interrupted", ended=40.0)
    assert state(tmp_path, run) == ("missing", "")


def test_only_what_is_missing_is_done(tmp_path):
    runs = [toy_run(), toy_run(seed=1), toy_run(seed=2)]
    put(tmp_path, runs[0], "completed", ended=10.0)
    put(tmp_path, runs[1], "failed", ended=10.0, failure="underflow")
    started = Counter()
    arguments = dict(results_dir=str(tmp_path), device="cpu")
    assert [status.state for status in sweep(runs, in_process(started), **arguments)] == ["done", "failed", "done"]
    assert started == {str(runs[2]): 1}
    again = sweep(runs, in_process(started), retry_failed=True, **arguments)
    assert [status.state for status in again] == ["done", "done", "done"]
    assert started == {str(runs[2]): 1, str(runs[1]): 1}


def test_a_sweep_whose_output_nobody_can_read_goes_on(tmp_path, monkeypatch):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Closed())
    [status] = sweep([toy_run()], in_process(Counter()), results_dir=str(tmp_path), device="cpu")
    assert status.state == "done"


@pytest.mark.parametrize(
    ("end", "reason", "is_remembered"),
    [
        ("failed", "training failed in epoch 3 (training), batch 2 of 3", True),
        ("crashed", "RuntimeError: a bug; the whole output is in ", True),
        ("refused", "what it printed; the whole output is in ", False),
    ],
)
def test_what_fails_is_tried_again_on_demand(tmp_path, end, reason, is_remembered):
    run, started = toy_run(end=end), Counter()
    arguments = dict(results_dir=str(tmp_path), device="cpu")
    [status] = sweep([run], in_process(started), **arguments)
    assert status.state == "failed"
    assert status.reason.startswith(reason)
    assert state(tmp_path, run) == (("failed", status.reason) if is_remembered else ("missing", ""))
    assert [status.state for status in sweep([run], in_process(started), **arguments)] == ["failed"]
    assert started[str(run)] == (1 if is_remembered else 2)
    started.clear()
    assert [status.state for status in sweep([run], in_process(started), retry_failed=True, **arguments)] == ["failed"]
    assert started[str(run)] == 1


def test_a_crash_is_forgotten_when_the_run_starts_again(tmp_path):
    task = Task(toy_run(), str(tmp_path), retry_before=time.time() + 1)
    task.log.parent.mkdir(parents=True)
    task.log.write_text("out of memory")
    assert "killed by SIGKILL" in task.outcome(-signal.SIGKILL).reason
    crashed = task.run.path(str(tmp_path), CRASHED)
    assert crashed.exists()
    crashed.write_bytes(b"out of \xff")
    assert state(tmp_path, task.run) == ("failed", "out of \N{REPLACEMENT CHARACTER}")
    work(json.loads(task.argument("cpu")))
    assert not crashed.exists()
    assert task.outcome(0) == Status(task.run, "done")


def test_a_crash_on_other_data_is_not_this_runs_and_one_on_a_full_disk_is_forgotten(tmp_path, monkeypatch):
    task = Task(toy_run(), str(tmp_path))
    task.log.parent.mkdir(parents=True)
    task.outcome(-signal.SIGKILL)
    assert state(tmp_path, task.run)[0] == "failed"
    assert state(tmp_path, replace(task.run, digest="other")) == ("missing", "")
    task.run.path(str(tmp_path), CRASHED).unlink()

    def full(path, *parts):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sweep_module.files, "replace", full)
    assert task.outcome(-signal.SIGKILL).state == "failed"
    assert state(tmp_path, task.run) == ("missing", "")


@pytest.mark.parametrize(("number", "name"), [(signal.SIGSEGV, "SIGSEGV"), (35, "signal 35"), (63, "signal 63")])
def test_any_signal_that_ends_a_worker_has_a_name(tmp_path, number, name):
    task = Task(toy_run(), str(tmp_path))
    task.log.parent.mkdir(parents=True)
    assert f"killed by {name};" in task.outcome(-number).reason


def test_what_failed_before_the_clock_was_set_back_is_tried_again(tmp_path):
    started, tomorrow = Counter(), time.time() + 86_400
    put(tmp_path, toy_run(), "failed", ended=tomorrow, failure="underflow")
    arguments = dict(results_dir=str(tmp_path), device="cpu")
    assert [status.state for status in sweep([toy_run()], in_process(started), **arguments)] == ["failed"]
    assert not started
    again = sweep([toy_run()], in_process(started), retry_failed=True, **arguments)
    assert [status.state for status in again] == ["done"]
    assert sum(started.values()) == 1


def test_a_reason_is_one_line_that_moves_no_cursor(tmp_path):
    put(tmp_path, toy_run(), "failed", ended=10.0, failure="first\nsecond\r\x1b[2J\u2028third\x07")
    assert state(tmp_path, toy_run()) == ("failed", "first second [2J third")


def test_runs_on_other_data_are_not_done(tmp_path):
    other = replace(toy_run(), digest="other")
    put(tmp_path, toy_run(), "completed", ended=10.0)
    assert state(tmp_path, toy_run()) == ("done", "")
    assert state(tmp_path, other) == ("missing", "")
    started = Counter()
    sweep([toy_run(seed=1)], in_process(started), results_dir=str(tmp_path), device="cpu")
    sweep([toy_run(), toy_run(seed=1)], in_process(started), results_dir=str(tmp_path), device="cpu")
    assert sum(started.values()) == 1


def test_without_data_at_hand_runs_are_on_those_that_most_results_have(tmp_path, monkeypatch):
    monkeypatch.setitem(EXPERIMENTS, "toy", replace(EXPERIMENTS["acrobot"], name="toy", data_settings=()))
    runs = [Run("toy", {"norm": "seminorm", "seed": seed}) for seed in range(3)]
    assert [run.digest for run in on_found_data(runs, [])] == [None] * 3
    put(tmp_path, runs[0], "completed", ended=10.0, provenance=made_on("few"))
    put(tmp_path, runs[1], "failed", ended=10.0, provenance=made_on("few"))
    for run in runs[1:]:
        put(tmp_path, run, "completed", ended=10.0, provenance=made_on("most"))
    put(tmp_path, toy_run(width=3), "completed", ended=10.0, provenance=made_on("no run of these"))
    results = load_all(tmp_path).values()
    assert [state(tmp_path, run)[0] for run in runs[1:]] == ["done", "done"], "that is where most are done"
    assert [run.digest for run in on_found_data(runs, results)] == ["most"] * 3
    others = [Run("toy", {"norm": "default", "seed": seed}) for seed in range(3)]
    assert [run.digest for run in on_found_data(others, results)] == [None] * 3, "no result is of such a run"
    assert [run.digest for run in on_found_data([toy_run()], results)] == ["abc"]
    found = statuses(on_found_data(runs, results), str(tmp_path))
    assert [status.state for status in found] == ["missing", "done", "done"]


def test_a_guess_is_the_time_left_until_a_run_tells(tmp_path, capsys):
    run = toy_run()

    def engine(tasks, stopping):
        yield Status(run, "running")
        yield Status(run, "interrupted")

    options = dict(results_dir=str(tmp_path), device="cpu")
    sweep([run], engine, guesses={run.identity: 3_725.0}, **options)
    assert "about 1:02:0" in capsys.readouterr().err.splitlines()[0]
    sweep([run], engine, **options)
    assert "unknown time left" in capsys.readouterr().err.splitlines()[0]


@pytest.mark.parametrize("code", [130, 143, -signal.SIGTERM, -signal.SIGINT])
def test_an_interrupted_worker_leaves_its_run_missing(tmp_path, code):
    task = Task(toy_run(), str(tmp_path))
    assert task.outcome(code) == Status(task.run, "interrupted")
    assert state(tmp_path, task.run) == ("missing", "")


def test_a_worker_that_comes_late_does_nothing(tmp_path):
    """Its sweep looked at the folder before another sweep did the run."""
    run = toy_run()
    task = Task(run, str(tmp_path))
    put(tmp_path, run, "completed", ended=10.0)
    work(json.loads(task.argument("cpu")))
    failing = Task(toy_run(end="failed"), str(tmp_path), retry_before=10.0)
    put(tmp_path, failing.run, "failed", ended=11.0, failure="underflow")
    with pytest.raises(SystemExit) as caught:
        work(json.loads(failing.argument("cpu")))
    assert caught.value.code == 1
    assert failing.outcome(1).reason == "underflow"
    assert len(load_all(tmp_path)) == 2


def test_what_another_is_at_is_waited_for(tmp_path):
    """The first time round another process has the run, and the second time it has done it."""
    run, rounds = toy_run(), []

    def engine(tasks, stopping):
        rounds.append(tasks)
        if tasks:
            put(tmp_path, run, "completed", ended=10.0)
            yield tasks[0].outcome(BUSY)

    assert [status.state for status in sweep([run], engine, results_dir=str(tmp_path), device="cpu")] == ["done"]
    assert [len(tasks) for tasks in rounds] == [1, 0]


def test_a_worker_leaves_a_run_to_the_one_that_has_it(tmp_path):
    task = Task(toy_run(), str(tmp_path))
    task.log.parent.mkdir(parents=True)
    assert not task.is_taken()
    with sweep_module.FileLock(task.lock):
        assert task.is_taken()
        with pytest.raises(SystemExit) as caught:
            work(json.loads(task.argument("cpu")))
    assert caught.value.code == BUSY
    assert not load_all(tmp_path)


def test_devices_are_dealt_out(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    assert devices_of("cuda", None) == ["cuda:0", "cuda:1", "cuda:2"]
    assert devices_of("cuda", 2) == ["cuda:0", "cuda:1"]
    assert devices_of("cuda", 4) == ["cuda:0", "cuda:1", "cuda:2", "cuda:0"]
    assert devices_of("cuda:1", None) == ["cuda:1"]
    assert devices_of("cpu", 2) == ["cpu", "cpu"]


class FakeWorker:
    """Ends a while after a signal, the sooner the earlier it started; without one it is done after long."""

    def __init__(self, started):
        self.signals = self.polls = self.polls_since = 0
        self.returncode = None
        started.append(self)
        self.lifetime = 3 * len(started)

    def terminate(self):
        self.signals += 1

    def poll(self):
        self.polls += 1
        self.polls_since += self.signals > 0
        if self.polls > 500:
            self.returncode = 0
        if self.polls_since > self.lifetime:
            self.returncode = 143
        return self.returncode


@pytest.fixture
def workers(monkeypatch):
    started = []
    monkeypatch.setattr(local_engine, "_start", lambda task, device, num_threads: FakeWorker(started))
    monkeypatch.setattr(local_engine, "POLL_SECONDS", 0.001)
    return started


def test_who_is_at_work_when_the_sweep_stops_is_told_once_and_no_one_follows(tmp_path, workers):
    tasks = [Task(toy_run(seed=seed), str(tmp_path)) for seed in range(4)]
    outcomes = run_locally(tasks, lambda: len(workers) >= 2, devices=["cpu", "cpu"])
    assert [status.state for status in outcomes if status] == ["running"] * 2 + ["interrupted"] * 2
    assert [worker.signals for worker in workers] == [1, 1]


def test_an_error_in_the_sweep_leaves_no_one_at_work(tmp_path, workers):
    outcomes = run_locally([Task(toy_run(), str(tmp_path))], lambda: False, devices=["cpu"])
    next(outcomes)
    outcomes.close()
    assert [worker.signals for worker in workers] == [1]


def test_workers_are_processes_that_share_the_threads(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.get_num_threads", lambda: 3)
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    runs = [toy_run(), toy_run(seed=1)]
    engine = partial(run_locally, devices=["cpu", "cpu"])
    done = sweep(runs, engine, results_dir=str(tmp_path), device="cpu")
    assert [status.state for status in done] == ["done", "done"]
    assert [results.provenance["num_threads"] for results in load_all(tmp_path).values()] == [1, 1]
    assert "Saved" in Task(runs[0], str(tmp_path)).log.read_text()


def trained(folder):
    """What each completed run under a folder learnt; the commit may change while a slow test goes on."""
    clocks = {"start_time", "timestamp", "timespan", "seconds", "cpu_seconds", "results_dir", "commit"}

    def stripped(value):
        if isinstance(value, dict):
            return {name: stripped(item) for name, item in value.items() if name not in clocks}
        return [stripped(item) for item in value] if isinstance(value, list) else value

    files = [json.loads(path.read_text()) for path in Path(folder).rglob("*.json")]
    return sorted(json.dumps(stripped(file)) for file in files if file["status"] == "completed")


def forked(experiment, scenario, folder, limit):
    command = [sys.executable, "-W", "error", str(TESTS / "forked_sweep.py"), experiment, scenario, str(folder)]
    process = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=limit)
    logs = [path.read_text() for path in Path(folder).rglob("*.log")]
    assert process.returncode == 0, "\n".join([process.stderr, *logs])


def test_two_sweeps_on_one_folder_do_each_run_once(tmp_path):
    forked("toy", "shared", tmp_path, limit=600)
    assert [results.status for results in load_all(tmp_path).values()] == ["completed"] * 6
    both = [(tmp_path / f"{number}.log").read_text().count("\ndone: ") for number in range(2)]
    assert min(both) > 0


@pytest.mark.parametrize("scenario", ["killed", "interrupted"])
def test_a_stopped_sweep_ends_as_one_left_alone(tmp_path, scenario):
    forked("toy", scenario, tmp_path, limit=600)
    assert trained(tmp_path / scenario) == trained(tmp_path / "whole")
    assert len(trained(tmp_path / scenario)) == 6
    assert not list(tmp_path.rglob("*.checkpoint"))


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["killed", "interrupted"])
def test_a_stopped_sweep_of_an_experiment_ends_as_one_left_alone(tmp_path, scenario):
    forked("acrobot", scenario, tmp_path, limit=3000)
    assert trained(tmp_path / scenario) == trained(tmp_path / "whole")
    assert len(trained(tmp_path / scenario)) == 3


def test_a_crash_that_another_sweep_forgets_meanwhile_is_none(tmp_path, monkeypatch):
    run = toy_run()
    path = run.path(str(tmp_path), CRASHED)
    path.parent.mkdir(parents=True)
    path.write_text("out of memory\nabc")
    assert state(tmp_path, run)[0] == "failed"
    read_text = Path.read_text

    def unlink_and_read(self, **options):
        self.unlink()
        return read_text(self, **options)

    monkeypatch.setattr(Path, "read_text", unlink_and_read)
    assert state(tmp_path, run) == ("missing", "")


def test_threads_are_divided_among_the_workers(tmp_path, monkeypatch):
    numbers = []

    def start(task, device, num_threads):
        numbers.append(num_threads)
        return FakeWorker([])

    monkeypatch.setattr(local_engine, "_start", start)
    monkeypatch.setattr(local_engine, "POLL_SECONDS", 0.001)
    monkeypatch.setattr("torch.get_num_threads", lambda: 8)
    tasks = [Task(toy_run(seed=seed), str(tmp_path)) for seed in range(2)]
    list(run_locally(tasks, lambda: len(numbers) >= 2, devices=["cpu", "cpu"]))
    assert numbers == [4, 4]
