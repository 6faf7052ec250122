"""Which stored runs lend their weights, and the models and data of these."""

import shlex

import pytest
import torch
import tyro
from records import rewrite, saved_run

import acrobot
import speech_commands
from reproduction import diagnostics, equal_error, law
from reproduction.runs import load_data
from reproduction.trained import batches_of, trained_run, trained_seeds


def test_weights_come_from_a_completed_run_with_the_least_train_loss(tmp_path, small_networks):
    for experiment in (acrobot, speech_commands):
        with pytest.raises(FileNotFoundError) as caught:
            trained_run(str(tmp_path), experiment.__name__)
        command = shlex.split(str(caught.value).split("`")[1])
        assert command[:2] == ["python", f"{experiment.__name__}.py"]
        config = tyro.cli(experiment.Config, args=command[2:])
        assert (config.results_dir, config.max_epochs <= 24) == (str(tmp_path), True)
    saved_run(tmp_path, loss=0.5)
    best = saved_run(tmp_path, loss=0.2, seed=1)
    saved_run(tmp_path, loss=0.1, status="interrupted")
    saved_run(tmp_path, loss=0.1, seed=2).with_suffix(".pt").unlink()
    run = trained_run(str(tmp_path), "acrobot")
    assert (run.path, run.config.seed) == (best, 1)
    longer = saved_run(tmp_path, loss=0.9, seed=3)

    def train_on(record):
        record["epochs"].append(record["epochs"][-1] | {"epoch": 3})
        record["history"][-1]["epoch"] = 3

    rewrite(longer, train_on)
    assert trained_run(str(tmp_path), "acrobot").path == longer


def test_runs_that_differ_in_their_seed_are_measured_together_wherever_they_were_written(tmp_path, small_networks):
    first = saved_run(tmp_path, loss=0.1, max_epochs=2, start_time=9.0)
    other = saved_run(tmp_path, seed=1, max_epochs=2, results_dir="elsewhere", resume=True)
    saved_run(tmp_path, seed=2, max_epochs=3)
    assert [run.path for run in trained_seeds(str(tmp_path), "acrobot")] == [first, other]
    saved_run(tmp_path, loss=0.1, max_epochs=2, start_time=1.0)
    runs = trained_seeds(str(tmp_path), "acrobot")
    assert [run.path for run in runs] == [first, other], "of a seed the latest run counts"
    rewrite(other, lambda record: record["provenance"].update(split="of other data"))
    assert [run.path for run in trained_seeds(str(tmp_path), "acrobot")] == [first]


def test_the_flows_that_are_measured_at_equal_error_are_of_one_group(tmp_path):
    first, other = (saved_run(tmp_path, "flow", data="checkerboard", seed=seed) for seed in (0, 1))
    saved_run(tmp_path, "flow", data="2spirals", loss=0.1)
    assert [run.path for run in trained_seeds(str(tmp_path), "flow")] == [first, other]


def test_batches_come_from_all_over_and_share_no_sample():
    batches = batches_of((torch.arange(100),), 10, 3)
    assert [x.tolist() for (x,) in batches] == [list(range(number, 100, 10)) for number in range(3)]


def test_too_few_samples_for_batches_that_share_none_are_refused():
    data = (torch.arange(60),)
    assert len(batches_of(data, 20, 3)) == 3
    with pytest.raises(ValueError, match="the test set has 60 samples, too few for batch number 4 of 16"):
        batches_of(data, 16, 4)
    with pytest.raises(ValueError, match="too few for batch number 1 of 128"):
        batches_of(data, 128, 1)


def test_measurements_are_of_the_test_set_and_other_data_are_told(tmp_path, caplog):
    saved_run(tmp_path, "flow", data="moons")
    run = trained_run(str(tmp_path), "flow")
    data = load_data("flow", run.config)
    assert torch.equal(run.test_set()[0], data.test.tensors[0])
    assert "their split is another" in caplog.text
    caplog.clear()
    run.results.provenance.split = data.digest
    run.test_set()
    assert not caplog.records


def test_a_folder_of_recordings_is_given_to_the_experiment_that_has_some(tmp_path, small_networks):
    for experiment, data_root in (("speech_commands", "elsewhere"), ("acrobot", None), ("flow", None)):
        saved_run(tmp_path, experiment)
        assert getattr(trained_run(str(tmp_path), experiment).config, "data_root", None) is None
        run = trained_run(str(tmp_path), experiment, data_root="elsewhere")
        assert getattr(run.config, "data_root", None) == data_root


def test_a_model_has_the_weights_of_its_run_and_measures(tmp_path):
    saved_run(tmp_path, "flow", data="checkerboard", loss=0.1)
    weights = torch.load(saved_run(tmp_path, "flow", data="checkerboard", seed=1).with_suffix(".pt"), weights_only=True)
    model = trained_seeds(str(tmp_path), "flow")[1].model()
    assert not model.training
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


class Asked(Exception):
    """What a program looks for."""


@pytest.mark.parametrize(
    ("module", "finds", "chosen"),
    [
        (diagnostics, "trained_run", dict(experiments=("speech_commands",))),
        (equal_error, "trained_seeds", dict(experiments=("speech_commands",))),
        (law, "subject_of", dict(step="grid", models=("speech_commands",))),
    ],
    ids=["diagnostics", "equal_error", "law"],
)
@pytest.mark.parametrize("weights_dir", [None, "weights"])
def test_programs_take_weights_and_recordings_from_where_they_are_told(module, finds, chosen, weights_dir, monkeypatch):
    def look(*arguments, **options):
        raise Asked(*arguments, *options.values())

    monkeypatch.setattr(module, finds, look)
    with pytest.raises(Asked) as caught:
        module.main(module.Options(results_dir="out", weights_dir=weights_dir, data_root="recordings", **chosen))
    assert {"speech_commands", "recordings", weights_dir or "out"} <= {*caught.value.args}


@pytest.mark.parametrize("step", ["grid", "predict", "check"])
def test_the_law_takes_the_step_that_it_is_told(step, monkeypatch):
    taken = []
    monkeypatch.setattr(law, "subject_of", lambda *_: "subject")
    for name, function in (("grid", "measure_grid"), ("predict", "predict"), ("check", "check")):
        monkeypatch.setattr(law, function, lambda *_, name=name: taken.append(name))
    law.main(law.Options(step=step, models=("neural_ode",)))
    assert taken == [step]
