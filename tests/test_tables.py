"""The command that reruns the paper: what it lists, prints and exits with."""

import math
import sys

import pytest
import torch
import tyro
from records import acrobot, result
from torch import nn

import figures
import report
import tables
from common.command_line import call
from common.errors import Interrupted
from common.results import make_directory, save
from datasets.batches import Batches, DataSplit
from reproduction import diagnostics, equal_error
from reproduction.status import CRASHED, Status


def command(monkeypatch, *arguments):
    """What the command exits with."""
    monkeypatch.setattr(sys, "argv", ["tables.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        call(lambda: sys.exit(tables.main(tyro.cli(tables.COMMANDS))))
    return caught.value.code


def quick(norm, seed=0):
    return acrobot(norm, seed, num_trajectories=8, max_epochs=2)


@pytest.fixture(autouse=True)
def small_data(monkeypatch):
    """No data set is loaded, the flow's apart, but each has four samples and a digest."""

    def load_data(experiment, config):
        if getattr(config, "data_root", None) == "/nowhere":
            raise ValueError("data_root /nowhere is not a folder: give another")
        loaded.append((experiment, getattr(config, "data_root", None)))
        if experiment == "flow":
            return real_load_data(experiment, config)
        shape = (4, 8, 8) if experiment == "acrobot" else (4, 5, 21)
        batches = Batches((torch.linspace(-1, 1, math.prod(shape)).view(shape),), 256)
        return DataSplit(batches, batches, batches, digest=f"{experiment} all")

    loaded, real_load_data = [], tables.load_data
    monkeypatch.setattr(tables, "load_data", load_data)
    return loaded


@pytest.fixture
def no_training(monkeypatch):
    monkeypatch.setattr(tables, "sweep", None)


@pytest.fixture
def results_dir(tmp_path):
    """One of the three quick runs of acrobot is done, in 20 seconds, and one has crashed."""
    run = quick("default")
    saved = result(run, 200, split="acrobot all")
    saved.model, saved.timespan, saved.val_metrics = nn.Linear(2, 1), 25.0, saved.train_metrics
    save(saved, make_directory(str(tmp_path), "acrobot", run.config.condition))
    crashed = quick("seminorm").path(str(tmp_path), CRASHED)
    crashed.parent.mkdir(parents=True)
    crashed.write_text("killed by SIGKILL")
    return tmp_path


QUICK = ["quick", "--experiments", "acrobot"]


@pytest.mark.usefixtures("no_training")
def test_a_plan_lists_what_there_is_to_do(monkeypatch, capsys, results_dir):
    monkeypatch.setattr(tables, "rough_seconds", lambda runs, *_: [600.0 for _ in runs])
    arguments = ["plan", *QUICK, "--seeds", 2, "--results-dir", results_dir]
    assert not command(monkeypatch, *arguments)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:6]] == ["done", "failed", "missing", "missing", "missing", "missing"]
    assert "default" in lines[0]
    assert "(killed by SIGKILL)" in lines[1]
    # Two epochs of 10 seconds, and as much as one for the measurements.
    assert [line[8:16].strip() for line in lines[:6]] == ["30 s", "0:10 h", "0:10 h", "30 s", "0:10 h", "0:10 h"]
    assert lines[6] == (
        f"1 of 6 runs are done in {results_dir}; 1 failed before and stay so without --retry-failed; "
        "4 to train: roughly 0:30 h of training, one after the other."
    )
    assert not command(monkeypatch, *arguments, "--retry-failed")
    assert "5 to train: roughly 0:40 h" in capsys.readouterr().out


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize("preset", ["quick", "paper"])
def test_every_run_has_a_length_and_nothing_is_downloaded(monkeypatch, capsys, small_data, tmp_path, preset):
    assert not command(monkeypatch, "plan", preset, "--results-dir", tmp_path)
    output = capsys.readouterr().out
    # Of images that a download would bring there is nothing to time.
    assert all(("unknown" in line) == ("data-mnist" in line or "cifar10" in line) for line in output.splitlines()[:-2])
    others = [loaded for loaded in small_data if loaded[0] != "flow"]
    assert sorted(others) == [("acrobot", None), ("speech_commands", "synthetic")]
    assert ("would download" in output) == (preset == "paper")


@pytest.mark.usefixtures("no_training")
def test_runs_on_other_recordings_do_not_count(monkeypatch, capsys, results_dir, small_data):
    monkeypatch.setattr(tables, "rough_seconds", lambda runs, *_: [600.0 for _ in runs])
    [path] = results_dir.rglob("0.json")
    path.write_text(path.read_text().replace("acrobot all", "acrobot of old"))
    assert not command(monkeypatch, "plan", *QUICK, "--results-dir", results_dir)
    assert "0 of 3 runs are done" in capsys.readouterr().out
    assert small_data == [("acrobot", None)]
    # Without a look at the data, what is there is shown.
    assert not command(monkeypatch, "show", *QUICK, "--results-dir", results_dir)
    assert "200" in capsys.readouterr().out
    assert len(small_data) == 1


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize("name", ["run", "plan"])
def test_the_recordings_are_looked_at_before_anything_is_counted(monkeypatch, capsys, tmp_path, name):
    arguments = [name, "cpu", "--data-root", "/nowhere", "--results-dir", tmp_path]
    assert command(monkeypatch, *arguments) == 2
    output = capsys.readouterr()
    assert output.err.splitlines()[-1] == "data_root /nowhere is not a folder: give another"
    assert "runs are done" not in output.out + output.err


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize("arguments", [[], ["run"], ["plan"], ["show"], ["quick"], ["show", "quick", "--retry-failed"]])
def test_nothing_is_trained_by_accident(monkeypatch, capsys, arguments):
    assert command(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert any(word in error for word in ("quick,cpu,paper", "run, plan, show, page", "Unrecognized"))


@pytest.mark.usefixtures("no_training")
def test_showing_trains_nothing(monkeypatch, capsys, results_dir, small_data):
    assert not command(monkeypatch, "show", *QUICK, "--results-dir", results_dir)
    output = capsys.readouterr()
    assert "200" in output.out
    assert "killed by SIGKILL" in output.out
    assert "--retry-failed" in output.err
    assert not small_data


@pytest.mark.parametrize(("state", "code"), [("done", None), ("failed", 1), ("interrupted", 1)])
def test_the_exit_code_says_whether_all_is_done(monkeypatch, capsys, tmp_path, state, code):
    def sweep(runs, engine, *, results_dir, device, retry_failed, guesses):
        assert (results_dir, device, retry_failed) == (str(tmp_path), "cpu", True)
        assert engine.keywords == {"devices": ["cpu", "cpu", "cpu"]}
        assert {run.identity for run in runs} == guesses.keys()
        assert all(seconds > 0 for seconds in guesses.values())
        assert {run.digest for run in runs} == {"acrobot all"}
        return [Status(run, state if run is runs[1] else "done", "underflow") for run in runs]

    monkeypatch.setattr(tables, "sweep", sweep)
    arguments = ["run", *QUICK, "--jobs", 3, "--retry-failed", "--results-dir", tmp_path]
    assert command(monkeypatch, *arguments) == code
    output = capsys.readouterr()
    assert "Symplectic" in output.out
    assert f"0 of 3 runs are done in {tmp_path}; 3 to train: roughly " in output.err


def test_an_interrupted_sweep_says_how_to_go_on(monkeypatch, capsys, tmp_path):
    def sweep(*arguments, **options):
        raise Interrupted("the same command goes on", 15)

    monkeypatch.setattr(tables, "sweep", sweep)
    assert command(monkeypatch, "run", *QUICK, "--results-dir", tmp_path) == 143
    assert "the same command goes on" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--seeds", 0], ["--jobs", -1], ["--device", "toaster"], ["--experiments"]])
def test_what_cannot_be_is_refused(monkeypatch, capsys, arguments):
    assert command(monkeypatch, "run", *QUICK, *arguments) == 2
    assert f"{arguments[0][2:]}" in capsys.readouterr().err


def test_a_plan_refuses_a_device_too(monkeypatch, capsys, small_data):
    assert command(monkeypatch, "plan", *QUICK, "--device", "toaster") == 2
    assert "device is 'toaster'" in capsys.readouterr().err
    assert not small_data


def test_a_training_looks_at_the_recordings_that_it_downloads(monkeypatch, small_data, tmp_path):
    monkeypatch.setattr(tables, "sweep", lambda runs, engine, **options: [Status(run, "done") for run in runs])
    arguments = ["run", "paper", "--experiments", "speech_commands", "--seeds", 1, "--results-dir", tmp_path]
    assert not command(monkeypatch, *arguments)
    assert small_data == [("speech_commands", None)]


def test_the_tables_of_runs_on_other_machines_have_their_results(monkeypatch, capsys, small_data, tmp_path):
    """With Ray the data are on the nodes, so that only the results tell which they were."""

    def sweep(runs, engine, **options):
        assert {run.digest for run in runs} == {None}
        saved = result(runs[0], 31_415)
        saved.model, saved.val_metrics = nn.Linear(2, 1), saved.train_metrics
        save(saved, make_directory(str(tmp_path), "acrobot", runs[0].config.condition))
        return [Status(run, "done") for run in runs]

    monkeypatch.setattr(tables, "sweep", sweep)
    monkeypatch.setattr(tables, "engine_of", lambda options: None)
    assert not command(monkeypatch, "run", *QUICK, "--engine", "ray", "--results-dir", tmp_path)
    assert "31,415" in capsys.readouterr().out
    assert not small_data


def test_a_home_folder_is_one_for_the_sweep_too(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tables.Plan(preset="quick", results_dir="~/results").results_dir == str(tmp_path / "results")
    for options in (figures.Options, report.Options, diagnostics.Options, equal_error.Options):
        assert options(results_dir="~/results").results_dir == str(tmp_path / "results")


def test_what_is_shown_is_of_the_format_and_detail_asked_for(monkeypatch, capsys, results_dir):
    options = ("--format", "csv", "--all-seeds", "--results-dir", results_dir)
    assert not command(monkeypatch, "show", "quick", *options)
    heading = capsys.readouterr().out.splitlines()[0].split(",")
    assert heading[:2] == ["experiment", "group"]
    assert "seed" in heading


@pytest.mark.parametrize("step", ["claims", "page"])
def test_a_folder_that_is_not_there_replaces_no_page(monkeypatch, step, tmp_path, capsys):
    before = [path.read_bytes() for path in (tables.CLAIMS, tables.PAGE)]
    assert command(monkeypatch, step, "--results-dir", tmp_path / "mistyped") == 2
    assert "there is no such folder" in capsys.readouterr().err
    assert [path.read_bytes() for path in (tables.CLAIMS, tables.PAGE)] == before


def test_the_engine_gets_its_options(monkeypatch):
    pytest.importorskip("ray", reason="Ray is not installed")
    from reproduction import ray_engine

    monkeypatch.setattr(ray_engine, "connect", lambda device, jobs: (device, jobs))
    options = dict(preset="quick", device="cuda:1", jobs=3)
    assert tables.engine_of(tables.Train(**options, engine="ray")) == ("cuda:1", 3)
    assert tables.engine_of(tables.Train(**options)).keywords == {"devices": ["cuda:1"] * 3}


def test_claims_of_ones_own_results_have_a_page_of_their_own(monkeypatch, results_dir):
    committed, own = tables.CLAIMS.read_bytes(), results_dir / "mine.md"
    arguments = ["claims", "--results-dir", results_dir, "--output", own]
    assert "write it by the same command without --check" in command(monkeypatch, *arguments, "--check")
    assert not command(monkeypatch, *arguments)
    assert not command(monkeypatch, *arguments, "--check")
    assert "from the results in `.`" in own.read_text()
    assert tables.CLAIMS.read_bytes() == committed
