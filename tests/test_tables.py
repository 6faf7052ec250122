"""The command that reruns the paper: what it lists, prints and exits with."""

import sys

import pytest
import tyro
from records import acrobot, result
from torch import nn

import tables
from common.command_line import call
from common.errors import Interrupted
from common.results import make_directory, save
from reproduction.status import CRASHED, Status


def command(monkeypatch, *arguments):
    """What the command exits with."""
    monkeypatch.setattr(sys, "argv", ["tables.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        call(lambda: sys.exit(tables.main(tyro.cli(tables.Options))))
    return caught.value.code


def quick(norm, seed=0):
    return acrobot(norm, seed, num_trajectories=16, max_epochs=2)


@pytest.fixture
def results_dir(tmp_path):
    """One of the three quick runs of acrobot is done, in 20 seconds, and one has crashed."""
    run = quick("default")
    saved = result(run, 200)
    saved.model, saved.timespan, saved.val_metrics = nn.Linear(2, 1), 25.0, saved.train_metrics
    save(saved, make_directory(str(tmp_path), "acrobot", run.config.condition))
    crashed = quick("seminorm").path(str(tmp_path), CRASHED)
    crashed.parent.mkdir(parents=True)
    crashed.write_text("killed by SIGKILL")
    return tmp_path


def test_a_dry_run_lists_what_there_is_to_do(monkeypatch, capsys, results_dir):
    arguments = ["acrobot", "--preset", "quick", "--dry-run", "--seeds", 2, "--results-dir", results_dir]
    assert not command(monkeypatch, *arguments)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:6]] == ["done", "failed", "missing", "missing", "missing", "missing"]
    assert "default" in lines[0]
    assert "(killed by SIGKILL)" in lines[1]
    assert [line[8:16].strip() for line in lines[:6]] == ["20 s", "unknown", "unknown", "20 s", "unknown", "unknown"]
    assert lines[6] == "4 of 6 runs are missing: about 20 s of training and 3 runs of unknown length"
    assert not command(monkeypatch, *arguments, "--retry-failed")
    assert "5 of 6 runs are missing" in capsys.readouterr().out


def test_rendering_trains_nothing(monkeypatch, capsys, results_dir):
    monkeypatch.setattr(tables, "sweep", None)
    assert not command(monkeypatch, "acrobot", "--preset", "quick", "--render", "--results-dir", results_dir)
    output = capsys.readouterr()
    assert "200" in output.out
    assert "killed by SIGKILL" in output.out
    assert "--retry-failed" in output.err


@pytest.mark.parametrize(("state", "code"), [("done", None), ("failed", 1), ("interrupted", 1)])
def test_the_exit_code_says_whether_all_is_done(monkeypatch, capsys, tmp_path, state, code):
    def sweep(runs, engine, *, results_dir, device, retry_failed):
        assert (results_dir, device, retry_failed) == (str(tmp_path), "cpu", True)
        assert engine.keywords == {"devices": ["cpu", "cpu", "cpu"]}
        return [Status(run, state if run is runs[1] else "done", "underflow") for run in runs]

    monkeypatch.setattr(tables, "sweep", sweep)
    arguments = ["acrobot", "--preset", "quick", "--jobs", 3, "--retry-failed", "--results-dir", tmp_path]
    assert command(monkeypatch, *arguments) == code
    assert "Symplectic" in capsys.readouterr().out


def test_an_interrupted_sweep_says_how_to_go_on(monkeypatch, capsys):
    def sweep(*arguments, **options):
        raise Interrupted("the same command goes on", 15)

    monkeypatch.setattr(tables, "sweep", sweep)
    assert command(monkeypatch, "acrobot") == 143
    assert "the same command goes on" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--seeds", 0], ["--jobs", -1], ["--device", "toaster"]])
def test_what_cannot_be_is_refused(monkeypatch, capsys, arguments):
    assert command(monkeypatch, "acrobot", *arguments) == 2
    assert f"{arguments[0][2:]}" in capsys.readouterr().err
