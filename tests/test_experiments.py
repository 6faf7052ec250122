"""Speech Commands and acrobot through their own doors: `main` and the command line."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

import acrobot
import flow
import speech_commands
from common import command_line
from common.errors import TrainingFailed
from common.results import load
from datasets import synthetic
from datasets.batches import Batches
from torchadjoint import SolverError

PUBLISHED_NAMES = [
    "memory_usage", "baseline_memory", "start_time", "timespan", "model", "parameters", "history",
    "train_dataloader", "val_dataloader", "test_dataloader", "train_metrics", "val_metrics", "test_metrics",
]  # fmt: skip
ROOT = Path(__file__).parents[1]
RECORDINGS = Path(os.environ.get("SPEECH_COMMANDS_DATA", ROOT.parent / "shared" / "data"))


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    root = tmp_path_factory.mktemp("sounds")
    synthetic.write(root, clips_per_word=7)
    return root


@pytest.fixture
def small_speech(tmp_path, sounds):
    return dict(
        data_root=sounds,
        batch_size=25,
        max_epochs=1,
        hidden_channels=6,
        hidden_hidden_channels=5,
        num_hidden_layers=1,
        results_dir=tmp_path / "results",
    )


@pytest.fixture
def small_acrobot(tmp_path, small_networks):
    return dict(num_trajectories=7, batch_size=900, max_epochs=1, results_dir=tmp_path / "results")


def saved(settings):
    return sorted(Path(settings["results_dir"]).glob("*/*/*.json"))


def test_acrobot_needs_nothing_of_speech_commands():
    program = "import sys, acrobot; print([n for n in ('torchaudio', 'soundfile', 'torchcde') if n in sys.modules])"
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert process.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("experiment", "defaults"),
    [
        (
            speech_commands,
            dict(rtol=1e-3, atol=1e-6, seed=0, max_epochs=200, batch_size=1024, hidden_channels=90,
                 hidden_hidden_channels=40, num_hidden_layers=4, data_root=None, split="published", save=True,
                 results_dir="results"),
        ),
        (
            acrobot,
            dict(rtol=1e-4, atol=1e-4, seed=0, max_epochs=50, batch_size=256, num_trajectories=128, save=True,
                 results_dir="results"),
        ),
    ],
)  # fmt: skip
def test_signatures(experiment, defaults):
    parameters = inspect.signature(experiment.main).parameters
    positional = [name for name, parameter in parameters.items() if parameter.kind is not parameter.KEYWORD_ONLY]
    assert positional == ["device", "norm", "rtol", "atol"]
    assert {name: parameters[name].default for name in defaults} == defaults
    with pytest.raises(TypeError, match="hidden_chanels"):
        experiment.main("cpu", True, hidden_chanels=3)


def test_speech_commands_end_to_end(small_speech):
    results = speech_commands.main("cpu", True, 1e-2, 1e-3, **small_speech)
    assert list(results.keys())[: len(PUBLISHED_NAMES)] == PUBLISHED_NAMES
    assert 0 <= results.test_metrics.accuracy <= 1
    assert results.config["norm"] == "seminorm"
    assert len(results.train_dataloader) == 2, "49 clips in batches of 25"
    assert [tuple(layer.weight.shape) for layer in results.model.modules() if isinstance(layer, nn.Linear)] == [
        (6, 21), (5, 6), (6 * 21, 5), (10, 6),
    ]  # fmt: skip
    assert results.epochs[0].backward_nfe > 2 * 160
    (path,) = saved(small_speech)
    assert load(path).test_metrics == results.test_metrics
    batches = Batches(results.train_dataloader.tensors, 25)
    num_right = sum((results.model(x)[0].argmax(dim=-1) == labels).sum().item() for x, labels in batches)
    assert num_right > 0
    assert results.train_metrics.accuracy == num_right / batches.dataset_size
    [(x, labels)] = results.test_dataloader
    loss = functional.cross_entropy(results.model(x)[0], labels).item()
    assert results.test_metrics.loss == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("experiment", [acrobot, speech_commands])
def test_a_seed_draws_the_weights_and_the_order(experiment, small_acrobot, small_speech, monkeypatch):
    settings = small_acrobot if experiment is acrobot else small_speech
    monkeypatch.setattr(
        experiment,
        "train",
        lambda config, *, model, data, **_: (next(model.parameters()), data.train.generator.initial_seed()),
    )
    (first, order), (second, another) = (experiment.main("cpu", True, seed=seed, **settings) for seed in (0, 1))
    assert not torch.equal(first, second)
    assert order != another


@pytest.mark.parametrize(
    ("experiment", "settings"),
    [
        (acrobot, dict(torque="consistent", num_trajectories=5, batch_size=7)),
        (speech_commands, dict(split="official", data_root="there", batch_size=7)),
        (flow, dict(data="mnist", data_root="there", batch_size=7)),
    ],
    ids=["acrobot", "speech_commands", "flow"],
)
def test_the_data_are_those_that_the_settings_name(experiment, settings, monkeypatch):
    class Loaded(Exception):
        pass

    def load(**options):
        assert {name: options[name] for name in settings} == settings
        raise Loaded

    monkeypatch.setattr(experiment.dataset, "load", load)
    with pytest.raises(Loaded):
        experiment.main("cpu", True, **settings)


def test_acrobot_end_to_end(small_acrobot):
    results = acrobot.main(torch.device("cpu"), False, **small_acrobot)
    assert list(results.keys())[: len(PUBLISHED_NAMES)] == PUBLISHED_NAMES
    assert results["test_metrics"]["loss"] == results.test_metrics.loss
    assert "accuracy" not in results.test_metrics
    assert results.config["norm"] == "default"
    # Seven times between eight points, and for each a start of two evaluations and a step of six at least.
    assert results.epochs[0].backward_nfe >= 7 * 8
    [(windows,)] = results.test_dataloader
    loss = functional.mse_loss(results.model(windows)[0], windows).item()
    assert results.test_metrics.loss == pytest.approx(loss, rel=1e-5)
    (path,) = saved(small_acrobot)
    assert load(path).history == results.history


@pytest.mark.parametrize("experiment", [acrobot, speech_commands])
def test_the_same_seed_trains_to_the_same_bits_and_another_does_not(experiment, small_acrobot, small_speech):
    settings = (small_acrobot if experiment is acrobot else small_speech) | dict(save=False, metric_interval=1)

    def losses(seed):
        results = experiment.main("cpu", True, 1e-2, 1e-3, seed=seed, **settings | dict(max_epochs=2))
        measured = [(entry.train_metrics.loss, entry.val_metrics.loss) for entry in results.history]
        assert len(measured) == 2
        return [*measured, results.test_metrics.loss]

    assert losses(0) == losses(0) != losses(1)


@pytest.mark.parametrize("solver", ["torchadjoint", "torchdiffeq"])
def test_full_makes_the_papers_repeats(monkeypatch, solver):
    configs = []
    for experiment in (acrobot, speech_commands):
        monkeypatch.setattr(experiment, "run", configs.append)
        experiment.full("cpu", True, solver=solver)
    assert [(config.rtol, config.atol, config.seed) for config in configs] == [
        *((1e-4, 1e-4, seed) for seed in range(5)),
        *((rtol, atol, seed) for rtol, atol in ((1e-3, 1e-6), (1e-4, 1e-7), (1e-5, 1e-8)) for seed in range(5)),
    ]
    assert {(config.norm, config.solver) for config in configs} == {("seminorm", solver)}


@pytest.mark.parametrize(
    "settings",
    [
        dict(device="toaster"), dict(norm="seminrom"), dict(rtol=0.0), dict(atol=float("nan")), dict(rtol=-1.0),
        dict(batch_size=0), dict(max_epochs=0), dict(seed=-1), dict(solver="euler"),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("experiment", [acrobot, speech_commands])
def test_bad_settings_are_refused_by_name(experiment, settings):
    ((name, value),) = settings.items()
    with pytest.raises(ValueError, match="norm" if name == "norm" else name) as caught:
        experiment.main(**dict(device="cpu", norm=True) | settings)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--norm", "seminrom"], "seminrom"),
        (["--norm", "as-published"], "norm is 'as-published'"),
        (["--norm", "True", "--data-root", "/nowhere/at/all"], "data_root /nowhere/at/all is not a folder"),
        (["--norm", "True", "--data-root", "."], "data_root . holds none of the words"),
        (["--norm", "True", "--data-root", "~nobody-at-all"], "data_root ~nobody-at-all is not a folder"),
        (["--norm", "True", "--data-root", "x" * 3000], "is not a folder"),
        (["--norm", "True", "--hidden-channels", "1000000000"], "hidden_channels is 1000000000"),
        (["--norm", "True", "--num-hidden-layers", "0"], "num_hidden_layers is 0"),
    ],
)
def test_on_the_command_line_bad_input_is_one_sentence(monkeypatch, capsys, tmp_path, arguments, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["speech_commands.py", "--device", "cpu", *arguments])
    with pytest.raises(SystemExit) as caught:
        command_line.run(speech_commands.Config, speech_commands.run)
    assert caught.value.code == 2
    output = "".join(capsys.readouterr())
    assert "Traceback" not in output
    assert words in output


@pytest.mark.parametrize("program", [["acrobot.py", "--norm", "True"], ["tables.py", "run", "quick"]])
def test_programs_exit_with_2_for_bad_input(program, tmp_path):
    script = Path(acrobot.__file__).with_name(program[0])
    process = subprocess.run(
        [sys.executable, script, *program[1:], "--device", "toaster"], capture_output=True, text=True, cwd=tmp_path
    )
    assert process.returncode == 2
    assert "device is 'toaster'" in process.stderr
    assert "Traceback" not in process.stderr


@pytest.mark.parametrize(("experiment", "learning_rate"), [(acrobot, 1e30), (speech_commands, 1e10)])
def test_a_training_that_blows_up_is_explained_and_saved(experiment, learning_rate, small_acrobot, small_speech):
    settings = small_acrobot if experiment is acrobot else small_speech
    reason = "the norm of the weights is inf"
    with pytest.raises(
        TrainingFailed, match=rf"epoch 1 \(training\), batch \d+ of \d+, at rtol .* and atol .*: {reason}"
    ):
        experiment.main("cpu", True, learning_rate=learning_rate, **settings)
    (path,) = saved(settings)
    assert load(path).status == "failed"


def test_a_failed_solve_is_explained_and_what_was_learnt_is_saved(small_acrobot, monkeypatch):
    def fail(*arguments, **options):
        raise SolverError("the step became too small at t = 0.1")

    monkeypatch.setattr("torchadjoint.solve", fail)
    with pytest.raises(TrainingFailed, match=r"epoch 1.*, batch 1 of 1, at rtol 0.0001 and atol 0.0001: the step"):
        acrobot.main("cpu", True, **small_acrobot)
    (path,) = saved(small_acrobot)
    assert load(path).status == "failed"


@pytest.mark.skipif(not (RECORDINGS / "speech_commands_v0.02").is_dir(), reason="no recordings here")
def test_real_recordings(small_speech, caplog):
    settings = small_speech | dict(data_root=RECORDINGS, batch_size=700, save=False)
    results = speech_commands.main("cpu", "seminorm", 1e-2, 1e-3, **settings)
    assert results.train_metrics.dataset_size > 1000
    assert "of the 34,975 clips" in caplog.text
