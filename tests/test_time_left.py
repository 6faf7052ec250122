"""How long runs and a sweep are said to take still."""

from dataclasses import replace
from types import SimpleNamespace

from test_results import EPOCH
from test_sweep import put, toy_run

from common.results import Epoch, load_all, read_as
from reproduction import sweep
from reproduction.experiments import EXPERIMENTS
from reproduction.status import Status, estimated_seconds


def epochs(*seconds):
    return [read_as(Epoch, {**EPOCH, "epoch": epoch, "seconds": s}) for epoch, s in enumerate(seconds, start=1)]


def test_time_is_estimated_from_runs_of_the_same_kind(tmp_path):
    run = toy_run(seed=4, max_epochs=10)

    put(tmp_path, toy_run(), "completed", ended=10.0, epochs=epochs(1.0, 3.0))
    put(tmp_path, toy_run(seed=1), "interrupted", ended=10.0, epochs=epochs(3.0, 3.0))
    put(tmp_path, toy_run(shape="bent"), "completed", ended=10.0, epochs=epochs(3.0, 3.0))
    others = [toy_run(norm="default"), toy_run(batch_size=4), replace(run, digest="more data")]
    results = list(load_all(tmp_path).values())
    assert estimated_seconds([run, *others], results, "cpu") == [22.0, None, None, None]
    assert estimated_seconds([run], results, "cuda:1") == [None]


def test_time_is_the_mean_of_the_runs_that_are_done(tmp_path):
    for seed, seconds in enumerate((2.0, 4.0)):
        put(tmp_path, toy_run(seed=seed), "completed", ended=10.0, epochs=epochs(seconds, seconds))
    results = list(load_all(tmp_path).values())
    assert estimated_seconds([toy_run(seed=4, max_epochs=10)], results, "cpu") == [33.0]


def test_the_time_left_is_shared_by_the_workers_and_falls_as_they_work(tmp_path, monkeypatch, capsys):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(sweep.time, "monotonic", lambda: clock.now)
    runs = [toy_run(seed=seed) for seed in range(2)]
    known = {run.identity: Status(run, "missing") for run in runs}
    display = sweep._Display(known, str(tmp_path), "cpu", dict.fromkeys(known, 100.0))
    for run in runs:
        display.show(Status(run, "running"))
    clock.now = 40.0
    display.show(Status(runs[0], "running"))
    display.started[runs[0].identity] = 0.0
    assert display._time_left() == "about 01:00"


def test_runs_whose_data_are_not_known_here_are_estimated_by_those_that_are_done(tmp_path, monkeypatch):
    monkeypatch.setitem(EXPERIMENTS, "toy", replace(EXPERIMENTS["acrobot"], name="toy", data_settings=()))
    put(tmp_path, toy_run(), "completed", ended=10.0, epochs=epochs(2.0, 2.0))
    runs = [replace(run, digest=None) for run in (toy_run(), toy_run(seed=1))]
    display = sweep._Display({run.identity: Status(run, "missing") for run in runs}, str(tmp_path), "cpu", {})
    assert [*display.estimates.values()] == [2.0 * 6] * 2
