"""The settings: normalised, checked, named, and read from the command line."""

import dataclasses
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from test_training import Config

import acrobot
import speech_commands
from common import command_line
from common.errors import Interrupted, TrainingFailed
from torchadjoint import ADJOINTS, Backsolve


def test_settings_are_normalised(tmp_path):
    config = Config(torch.device("cpu"), False, 1, numpy.float64(1e-3), results_dir=tmp_path, width=numpy.int64(2))
    assert (config.device, config.norm, config.rtol, config.results_dir) == ("cpu", "default", 1.0, str(tmp_path))
    assert [type(value) for value in (config.rtol, config.atol, config.width)] == [float, float, int]


def test_condition_names_what_departs_from_the_default():
    config = Config("cpu", True, seed=3, save=False, width=2, shape="bent", results_dir="elsewhere")
    assert config.condition == "seminorm-0.001-1e-06-width-2-shape-bent"


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"device": "banana"}, "device is 'banana', but this machine has cpu"),
        ({"device": None}, "device is None, but this machine has cpu"),
        ({"device": 10**25}, "device is 10000000000000000000000000, but this machine has cpu"),
        ({"save": "no"}, "save is 'no', but must be True or False"),
        ({"results_dir": None}, "results_dir is None, but must be the path of a folder"),
        ({"device": "cuda:99"}, "device is 'cuda:99', but this machine has cpu"),
        ({"norm": "banana"}, "unknown norm 'banana'"),
        ({"rtol": 0.0}, "rtol is 0.0, but must be a finite number above 0"),
        ({"atol": float("nan")}, "atol is nan, but must be a finite number above 0"),
        ({"rtol": float("inf")}, "rtol is inf, but must be a finite number above 0"),
        ({"rtol": "small"}, "rtol is 'small', but must be a finite number above 0"),
        ({"learning_rate": -1}, "learning_rate is -1, but must be a finite number above 0"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1, but must be a finite number of at least 0"),
        ({"max_epochs": 0}, "max_epochs is 0, but must be a whole number of at least 1"),
        ({"batch_size": 2.5}, "batch_size is 2.5, but must be a whole number of at least 1"),
        ({"batch_size": True}, "batch_size is True, but must be a whole number of at least 1"),
        ({"seed": -1}, "seed is -1, but must be a whole number of at least 0"),
        ({"width": 0}, "width is 0, but must be a whole number of at least 1"),
        ({"solver": "torchdiffeq", "warm_start": True}, "warm_start is True, but solver='torchdiffeq' has none"),
        ({"solver": "torchdiffeq", "method": "tsit5"}, "method is 'tsit5', but solver='torchdiffeq' has dopri5 and"),
        ({"shape": "round"}, "shape is 'round', but must be one of 'straight', 'bent'"),
    ],
)
def test_bad_settings_are_refused(settings, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        Config(**{"device": "cpu", "norm": True, **settings})


def test_the_solve_has_the_settings():
    config = Config("cpu", "default", 1e-2, 1e-5, method="bosh3", warm_start=True)
    adjoint = Backsolve("default", warm_start=True)
    assert config.solve.keywords == dict(rtol=1e-2, atol=1e-5, method="bosh3", adjoint=adjoint)
    assert Config("cpu", "discrete").solve.keywords["adjoint"] == ADJOINTS["discrete"]


def test_zero_is_allowed_where_it_means_something():
    assert Config("cpu", True, seed=0, weight_decay=0, scheduler_patience=0).weight_decay == 0.0


def from_command_line(monkeypatch, arguments, function=lambda config: None):
    configs = []
    monkeypatch.setattr("sys.argv", ["toy.py", *arguments.split()])
    command_line.run(Config, lambda config: configs.append(config) or function(config))
    return configs[0]


@pytest.mark.parametrize(("norm", "name"), [("True", "seminorm"), ("False", "default"), ("per-tensor", "per-tensor")])
def test_the_command_line_sets_the_settings(monkeypatch, norm, name):
    config = from_command_line(monkeypatch, f"--device cpu --norm {norm} --rtol 1e-2 --width 3 --no-save")
    assert config == Config("cpu", name, 1e-2, width=3, save=False)


def test_help_describes_every_setting(monkeypatch, capsys):
    with pytest.raises(SystemExit) as caught:
        from_command_line(monkeypatch, "--help")
    text = capsys.readouterr().out
    assert caught.value.code == 0
    for words in ("Fits a line.", "--device", "Where to train", "Width of the model.", "(default: 0.001)", "--no-save"):
        assert words in text


@pytest.mark.parametrize("experiment", [acrobot, speech_commands])
def test_help_explains_each_setting_and_each_norm_by_name(experiment, monkeypatch, capsys):
    help(experiment.main)
    text = " ".join(capsys.readouterr().out.split())
    monkeypatch.setattr("sys.argv", ["experiment.py", "--help"])
    with pytest.raises(SystemExit):
        command_line.run(experiment.Config, experiment.run)
    on_command_line = capsys.readouterr().out
    for field in dataclasses.fields(experiment.Config):
        assert f"{field.name}: " in text
        assert f"--{field.name.replace('_', '-')}" in on_command_line
    for norm in ADJOINTS:
        assert f"{norm}: " in text
        assert f"{norm}: " in on_command_line
    assert "Samples in a batch. " in text


PROGRAM = """
import os, runpy, signal, sys

class Interrupting:
    def find_spec(self, name, *_):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupting())
runpy.run_path(sys.argv[1], run_name="__main__")
"""


@pytest.mark.parametrize("program", ["acrobot.py", "speech_commands.py", "tables.py"])
def test_ctrl_c_during_the_imports_is_one_sentence(program):
    path = Path(acrobot.__file__).with_name(program)
    process = subprocess.run([sys.executable, "-c", PROGRAM, path], capture_output=True, text=True, cwd=path.parent)
    assert (process.returncode, process.stderr) == (130, "interrupted\n")


def test_ctrl_c_after_the_imports_is_pythons_own_again(monkeypatch):
    command_line.guard_imports()
    assert signal.getsignal(signal.SIGINT) != signal.default_int_handler
    command_line.call(lambda: None)
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_a_shell_that_ignores_ctrl_c_is_obeyed():
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    command_line.guard_imports()
    assert signal.signal(signal.SIGINT, previous) == signal.SIG_IGN


def raiser(error):
    def function(config):
        raise error

    return function


@pytest.mark.parametrize(
    ("arguments", "function", "code", "sentence"),
    [
        ("--device banana --norm True", raiser(AssertionError), 2, "device is 'banana'"),
        ("--device cpu --norm True", raiser(ValueError("bad data")), 2, "bad data"),
        ("--device cpu --norm True", raiser(FileNotFoundError("no data")), 2, "no data"),
        ("--device cpu --norm True", raiser(TrainingFailed("the loss is nan")), 1, "the loss is nan"),
        ("--device cpu --norm True", raiser(KeyboardInterrupt), 130, "interrupted"),
        ("--device cpu --norm True", raiser(Interrupted("go on so", signal.SIGINT)), 130, "go on so"),
        ("--device cpu --norm True", raiser(Interrupted("go on so", signal.SIGTERM)), 143, "go on so"),
        ("--device cpu --norm True", raiser(OSError("no space")), 2, "no space"),
    ],
)
def test_the_command_line_explains_errors(monkeypatch, capsys, arguments, function, code, sentence):
    with pytest.raises(SystemExit) as caught:
        from_command_line(monkeypatch, arguments, function)
    assert caught.value.code == code
    assert sentence in capsys.readouterr().err
