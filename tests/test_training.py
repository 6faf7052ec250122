import copy
import io
import itertools
import json
import re
import subprocess
import sys
import time
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
import torch
from torch import nn

from common import progress, provenance, training
from common.config import TrainingConfig
from common.provenance import describe
from common.randomness import seeded, stream
from common.results import load
from common.training import train
from datasets.batches import Batches, DataSplit
from torchadjoint.statistics import SolveStatistics

NUM_SAMPLES = 20
NUM_BATCHES = 3


@dataclass(frozen=True)
class Config(TrainingConfig):
    """Fits a line."""

    rtol: float = 1e-3
    atol: float = 1e-6
    _: KW_ONLY
    max_epochs: int = 5
    batch_size: int = 8
    learning_rate: float = 0.1
    metric_interval: int = 2
    width: int = 1
    """Width of the model."""
    shape: Literal["straight", "bent"] = "straight"
    """Shape of the line."""


class Line(nn.Module):
    """A linear model that claims to have solved something: 2 evaluations and 1 step forward, 5, 3 and 1 backward."""

    def __init__(self, width: int = 1):
        super().__init__()
        self.linear = nn.Linear(2, width)
        self.num_training_batches = 0

    def forward(self, x):
        self.num_training_batches += self.training
        statistics = SolveStatistics()
        statistics.forward.evaluation_times += [0.0, 1.0]
        statistics.forward.accept_times += [0.0]
        prediction = self.linear(x)
        if prediction.requires_grad:
            prediction.register_hook(lambda gradient: self.solve_backward(statistics.backward))
        return prediction, statistics

    def solve_backward(self, statistics):
        statistics.evaluation_times += [1.0, 0.8, 0.6, 0.4, 0.2]
        statistics.accept_times += [1.0, 0.6, 0.2]
        statistics.reject_times += [0.6]


def make_config(tmp_path, **changes):
    return replace(Config("cpu", True, results_dir=tmp_path), **changes)


def make_data(config):
    generator = stream(0, "data")
    x = torch.randn(3, NUM_SAMPLES, 2, generator=generator)
    labels = (x[..., 0] > 0).long()
    orders = (stream(config.seed, "batch order"), None, None)
    parts = [Batches((x[part], labels[part]), config.batch_size, generator=order) for part, order in enumerate(orders)]
    return DataSplit(*parts, digest="abc")


def squared_error(prediction, labels):
    return nn.functional.mse_loss(prediction.squeeze(-1), labels.to(prediction))


def constant_loss(prediction, labels):
    return 1 + 0 * prediction.sum()


def num_correct(prediction, labels):
    return ((prediction.squeeze(-1) > 0.5) == labels).sum()


def run(config, model=None, **changes):
    if model is None:
        with seeded(config.seed, "weights"):
            model = Line(config.width)
    arguments = {
        "data": make_data(config),
        "loss_function": squared_error,
        "measures": {"accuracy": num_correct},
        **changes,
    }
    return train(config, experiment="toy", model=model, **arguments)


def without_clock(results):
    """What of the results does not depend on the time of day."""
    clocks = {"start_time", "timestamp", "timespan", "seconds", "cpu_seconds", "results_dir"}

    def stripped(value):
        if isinstance(value, dict):
            return {name: stripped(item) for name, item in value.items() if name not in clocks}
        return [stripped(item) for item in value] if isinstance(value, list) else value

    [path] = Path(results.config["results_dir"]).rglob("*.json")
    return stripped(json.loads(path.read_text()))


def counts(record):
    return {name: number for name, number in record.items() if re.search("nfe|accepted|rejected", name)}


def expected_counts(*, backward):
    forward = {"forward_nfe": 2, "forward_accepted": 1, "forward_rejected": 0}
    back = {"backward_nfe": 5, "backward_accepted": 3, "backward_rejected": 1}
    return {name: number * NUM_BATCHES for name, number in {**forward, **back}.items()} | (
        {} if backward else dict.fromkeys(back, 0)
    )


def test_the_same_seed_gives_identical_results(tmp_path):
    first, second, other = (
        without_clock(run(make_config(tmp_path / name, seed=seed)))
        for name, seed in (("first", 3), ("second", 3), ("other", 4))
    )
    assert first == second
    assert first["epochs"] != other["epochs"]


def test_training_learns_and_is_measured_on_time(tmp_path):
    results = run(make_config(tmp_path))
    assert [epoch.epoch for epoch in results.epochs] == [1, 2, 3, 4, 5]
    assert [entry.epoch for entry in results.history] == [2, 4, 5]
    assert results.epochs[-1].loss < results.epochs[0].loss
    assert results.history[0].train_metrics.loss == results.epochs[1].loss
    assert results.parameters == 3
    assert results.status == "completed"


def test_counts_are_exact(tmp_path):
    results = run(make_config(tmp_path))
    with_backward, without_backward = expected_counts(backward=True), expected_counts(backward=False)
    assert all(counts(epoch) == with_backward for epoch in results.epochs)
    for entry in results.history:
        assert counts(entry.train_metrics) == with_backward
        assert counts(entry.val_metrics) == without_backward
    assert counts(results.train_metrics) == counts(results.val_metrics) == without_backward
    assert counts(results.test_metrics) == with_backward


def test_published_metrics_are_extra_passes_that_leave_training_alone(tmp_path):
    plain = run(make_config(tmp_path / "plain"))
    published = run(make_config(tmp_path / "published", published_metrics=True))
    for name in ("loss", "accuracy", "backward_nfe"):
        assert [epoch[name] for epoch in plain.epochs] == [epoch[name] for epoch in published.epochs]
    assert [entry.epoch for entry in plain.history] == [2, 4, 5]
    assert [entry.epoch for entry in published.history] == [1, 3, 5]
    entry = published.history[0]
    assert counts(entry.val_metrics) == expected_counts(backward=True)
    assert entry.train_metrics.loss != published.epochs[0].loss
    assert all(parameter.grad is None for parameter in published.model.parameters())


def test_means_weigh_every_sample_alike(tmp_path):
    results = run(make_config(tmp_path))
    x, labels = results.val_dataloader.tensors
    with torch.no_grad():
        prediction, _ = results.model(x)
    assert results.val_metrics.loss == pytest.approx(squared_error(prediction, labels).item(), rel=1e-5)
    assert results.val_metrics.accuracy == num_correct(prediction, labels).item() / NUM_SAMPLES
    assert results.val_metrics.dataset_size == NUM_SAMPLES


def test_without_measures_there_is_no_accuracy(tmp_path):
    results = run(make_config(tmp_path), measures=None)
    assert "accuracy" not in results.test_metrics
    assert "accuracy" not in results.epochs[0]


def test_a_lone_tensor_is_input_and_target(tmp_path):
    config = make_config(tmp_path, width=2)
    parts = [Batches((torch.ones(4, 2),), 4) for _ in range(3)]
    results = run(config, data=DataSplit(*parts, digest=""), loss_function=nn.functional.mse_loss, measures=None)
    assert results.epochs[-1].loss < results.epochs[0].loss


def test_the_best_measured_state_is_restored(tmp_path):
    calls = itertools.count()

    def growing_loss(prediction, labels):
        return squared_error(prediction, labels) + next(calls)

    results = run(make_config(tmp_path, metric_interval=1), loss_function=growing_loss)
    best = run(make_config(tmp_path, max_epochs=1))
    assert len(results.epochs) == 5
    assert torch.equal(results.model.linear.weight, best.model.linear.weight)


def test_the_best_state_is_that_of_the_least_train_loss(tmp_path):
    """The loss in training grows from batch to batch, that in measurements falls."""
    calls = itertools.count()
    with seeded(0, "weights"):
        model = Line()

    def parted_loss(prediction, labels):
        return squared_error(prediction, labels) + (next(calls) if model.training else -next(calls))

    run(make_config(tmp_path, metric_interval=1), model=model, loss_function=parted_loss)
    best = run(make_config(tmp_path, max_epochs=1))
    assert torch.equal(model.linear.weight, best.model.linear.weight)


@pytest.mark.parametrize("sign", [1, -1])
def test_learning_rate_falls_and_training_stops_on_a_plateau(tmp_path, sign):
    """A negative log-likelihood may be below 0."""
    config = make_config(tmp_path, max_epochs=20, metric_interval=1, plateau_epochs=6)
    results = run(config, loss_function=lambda prediction, labels: sign * constant_loss(prediction, labels))
    # Measurements 2, 3 and 4 bring nothing, one more than are let pass.
    assert [epoch.learning_rate for epoch in results.epochs[3:5]] == pytest.approx([0.1, 0.01])
    assert len(results.epochs) == 8
    assert results.history[-1].epoch == 8


def test_each_part_is_measured_on_its_own_batches(tmp_path):
    results = run(make_config(tmp_path))
    for part in ("train", "val", "test"):
        x, labels = results[f"{part}_dataloader"].tensors
        with torch.no_grad():
            prediction, _ = results.model(x)
        assert results[f"{part}_metrics"].loss == pytest.approx(squared_error(prediction, labels).item(), rel=1e-5)
    assert len({results[f"{part}_metrics"].loss for part in ("train", "val", "test")}) == 3


@pytest.mark.parametrize("falling", ["train", "val"])
def test_the_train_loss_alone_steers_the_learning_rate_and_the_end(tmp_path, falling):
    """One of the two losses falls from epoch to epoch, the other stays."""
    epochs = {"train": itertools.count(), "val": itertools.count()}

    class Parted(Line):
        def forward(self, x):
            self.part = "train" if self.training else "val"
            return super().forward(x)

    model = Parted()

    def loss_function(prediction, labels):
        number = next(epochs[model.part]) // NUM_BATCHES
        return 0 * prediction.sum() + (1 / (1 + number) if model.part == falling else 1.0)

    config = make_config(tmp_path, max_epochs=12, metric_interval=1, plateau_epochs=6)
    results = run(config, model=model, loss_function=loss_function)
    num_epochs, learning_rate = (12, 0.1) if falling == "train" else (8, 0.001)
    assert len(results.epochs) == num_epochs
    assert results.epochs[-1].learning_rate == pytest.approx(learning_rate)


@pytest.mark.parametrize(("factor", "num_epochs"), [(1.000005, 8), (1.00005, 12)])
def test_a_loss_that_hardly_falls_is_a_plateau(tmp_path, factor, num_epochs):
    """What counts is a fall to less than 1 / 1.0001 of what the loss was when the plateau began."""
    batches = itertools.count()

    def loss_function(prediction, labels):
        # In double precision, as so small a fall is near the rounding of single. The measurements alternate with the
        # training, NUM_BATCHES at a time.
        loss = factor ** -(next(batches) // (2 * NUM_BATCHES))
        return (0 * prediction.sum()).double() + loss

    config = make_config(tmp_path, max_epochs=12, metric_interval=1, plateau_epochs=6)
    assert len(run(config, loss_function=loss_function).epochs) == num_epochs


def test_off_a_terminal_there_is_a_line_for_each_epoch(tmp_path, capsys):
    results = run(make_config(tmp_path))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 6
    for line, epoch in zip(lines[:-1], results.epochs, strict=True):
        told = f"epoch {epoch.epoch} of 5: loss {epoch.loss:.5g}, accuracy {epoch.accuracy:.3f}, NFE per step"
        assert line.startswith(f"{told} 2 forward, 5 backward, {epoch.seconds:.1f} s; about ")
        assert line.endswith(" left")
    assert lines[-1].startswith("measuring on all parts of the data: 9 batches; about ")


@pytest.fixture
def slow(monkeypatch):
    """Models for which a batch takes a second, in training and in measurements alike."""
    clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr(progress, "time", clock)

    class Slow(Line):
        def forward(self, x):
            clock.now += 1
            return super().forward(x)

    return Slow


def seconds_left(capsys):
    return [int(line[-len("00 left") : -len(" left")]) for line in capsys.readouterr().err.splitlines()]


@pytest.mark.parametrize("published", [False, True])
def test_the_time_left_counts_all_passes(tmp_path, slow, capsys, published):
    run(make_config(tmp_path, published_metrics=published), model=slow())
    of_a_measurement = NUM_BATCHES * (2 if published else 1)
    total = 5 * NUM_BATCHES + 3 * of_a_measurement + 9
    measured_before = [0, 1, 1, 2, 2] if published else [0, 0, 1, 1, 2]
    expected = [
        total - NUM_BATCHES * epoch - of_a_measurement * done for epoch, done in enumerate(measured_before, start=1)
    ]
    assert seconds_left(capsys) == [*expected, 9]


def test_the_time_left_after_an_early_end_is_that_of_measuring(tmp_path, slow, capsys):
    config = make_config(tmp_path, max_epochs=10, metric_interval=1, plateau_epochs=3)
    assert len(run(config, model=slow(), loss_function=constant_loss).epochs) == 5
    assert seconds_left(capsys)[-1] == 9


def test_on_a_terminal_there_is_a_bar(tmp_path, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    run(make_config(tmp_path))
    shown = terminal.getvalue().split("\r")
    assert "100%" in shown[-1]
    assert "the last measurement (measuring test)" in shown[-1]
    assert "epoch 1 of 5" not in terminal.getvalue()


def test_statistics_print_as_numbers():
    _, statistics = Line()(torch.ones(1, 2))
    assert str(statistics) == (
        "SolveStatistics(forward=Statistics(nfe=2, num_accepted=1, num_rejected=0), "
        "backward=Statistics(nfe=0, num_accepted=0, num_rejected=0))"
    )


def test_times_are_those_of_the_first_batch_thinned_and_rounded(tmp_path):
    class Long(Line):
        def forward(self, x):
            self.is_full = len(x) == 8
            return super().forward(x)

        def solve_backward(self, statistics):
            super().solve_backward(statistics)
            statistics.evaluation_times[:] = [number / 3 for number in range(1000 if self.is_full else 10)]

    times = run(make_config(tmp_path), model=Long()).test_metrics
    assert times.backward_nfe == 2010
    assert times.backward_ts == [float(f"{number / 3:.6g}") for number in range(0, 1000, 4)]
    assert times.forward_ts == [0.0, 1.0]
    assert (times.forward_accept_ts, times.forward_reject_ts) == ([0.0], [])
    assert (times.backward_accept_ts, times.backward_reject_ts) == ([1.0, 0.6, 0.2], [0.6])


def test_evaluation_forward_only_keeps_no_graph(tmp_path):
    with_graph = []

    def loss_function(prediction, labels):
        with_graph.append(prediction.requires_grad)
        return squared_error(prediction, labels)

    run(make_config(tmp_path, max_epochs=1), loss_function=loss_function)
    training, val, train_and_val, test = [True] * 3, [False] * 3, [False] * 6, [True] * 3
    assert with_graph == training + val + train_and_val + test


def test_the_weights_decay_as_the_settings_say(tmp_path):
    with seeded(0, "weights"):
        before = Line().linear.weight.detach()
    config = make_config(tmp_path, max_epochs=1, weight_decay=0.5)
    after = run(config, loss_function=constant_loss).model.linear.weight.detach()
    torch.testing.assert_close(after, before * (1 - 0.1 * 0.5) ** NUM_BATCHES)


def test_a_plateau_ends_with_a_measurement(tmp_path):
    config = make_config(tmp_path, max_epochs=20, metric_interval=3, plateau_epochs=4)
    results = run(config, loss_function=constant_loss)
    assert len(results.epochs) == results.history[-1].epoch == 9
    [path] = tmp_path.rglob("*.json")
    assert load(path).status == "completed"


def test_seconds_of_training_leave_out_evaluation(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now, process_time=lambda: 2 * clock.now, time=time.time)
    monkeypatch.setattr(training, "time", clock)

    class Slow(Line):
        def forward(self, x):
            clock.now += 1 if self.training else 1000
            return super().forward(x)

    results = run(make_config(tmp_path), model=Slow())
    assert [epoch.seconds for epoch in results.epochs] == [NUM_BATCHES] * 5
    assert [epoch.cpu_seconds for epoch in results.epochs] == [2 * NUM_BATCHES] * 5
    assert results.test_metrics.timespan == 1000 * NUM_BATCHES


def test_results_are_saved_under_their_condition(tmp_path):
    results = run(make_config(tmp_path, norm=False, seed=7))
    [path] = tmp_path.rglob("*.json")
    assert path.relative_to(tmp_path) == Path("toy", "default-0-001-1e-06", "0.json")
    saved = load(path)
    assert saved.config == results.config
    assert saved.config["seed"] == 7
    assert saved.provenance["split"] == "abc"
    assert saved.test_metrics == results.test_metrics


def test_nothing_is_saved_unasked(tmp_path):
    run(make_config(tmp_path, save=False))
    assert not list(tmp_path.iterdir())


def test_no_place_to_save_is_noticed_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    model = Line()
    with pytest.raises(ValueError, match="results_dir"):
        run(make_config(tmp_path, results_dir=tmp_path / "file"), model=model)
    assert model.num_training_batches == 0


def test_results_in_memory_copy(tmp_path):
    results = run(make_config(tmp_path))
    assert copy.deepcopy(results).test_metrics == results.test_metrics


def test_provenance_tells_versions():
    described = json.loads(json.dumps(describe(torch.device("cpu"))))
    assert described["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert described["device_name"]


def test_the_commit_is_that_of_the_project_and_says_whether_files_differ(tmp_path, monkeypatch):
    def git(*arguments):
        own = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *own, *arguments], cwd=tmp_path / "project", check=True, capture_output=True)

    monkeypatch.delenv(provenance.COMMIT, raising=False)
    module = tmp_path / "project" / "common" / "provenance.py"
    module.parent.mkdir(parents=True)
    module.write_text("")
    monkeypatch.setattr(provenance, "__file__", str(module))
    assert provenance.commit() is None
    git("init")
    git("add", ".")
    git("commit", "--message", "first")
    assert re.fullmatch("[0-9a-f]{40}", provenance.commit())
    module.write_text("changed")
    assert re.fullmatch("[0-9a-f]{40}-dirty", provenance.commit())
    copy_of_it = tmp_path / "project" / "copy" / "common" / "provenance.py"
    copy_of_it.parent.mkdir(parents=True)
    copy_of_it.write_text("")
    monkeypatch.setattr(provenance, "__file__", str(copy_of_it))
    assert provenance.commit() is None, "a copy within another repository is not of that one's commit"


def test_a_cpu_has_its_generation_in_its_name(monkeypatch):
    text = "processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: A CPU\n\nprocessor\t: 1\nmodel\t\t: 17\n"
    monkeypatch.setattr(provenance.platform, "system", lambda: "Linux")
    monkeypatch.setattr(provenance.Path, "read_text", lambda self: text)
    assert provenance._device_name(torch.device("cpu")) == "A CPU, family 25, model 17"


def test_patience_is_that_of_the_settings(tmp_path):
    rates = [
        [
            epoch.learning_rate
            for epoch in run(
                make_config(tmp_path, scheduler_patience=patience, max_epochs=6, metric_interval=1, save=False),
                loss_function=constant_loss,
            ).epochs
        ]
        for patience in (0, 2)
    ]
    assert [len(set(of_run)) > 1 for of_run in rates] == [True, True]
    falls = [next(number for number, rate in enumerate(of_run) if rate < of_run[0]) for of_run in rates]
    assert falls[1] == falls[0] + 2


def test_to_write_a_checkpoint_takes_no_time_of_the_training(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(training.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(training.time, "process_time", lambda: clock.now)
    monkeypatch.setattr(training.Checkpoint, "write", lambda *_: setattr(clock, "now", clock.now + 100))

    class Ticking(Line):
        def forward(self, x):
            clock.now += 1
            return super().forward(x)

    results = run(make_config(tmp_path, save=True), model=Ticking())
    assert [(epoch.seconds, epoch.cpu_seconds) for epoch in results.epochs] == [(NUM_BATCHES, NUM_BATCHES)] * 5


@pytest.mark.gpu
def test_memory_is_measured_on_a_gpu(tmp_path):
    config = make_config(tmp_path, device=0)
    parts = [Batches((torch.ones(8, 2, device="cuda"),), 8) for _ in range(3)]
    results = run(config, data=DataSplit(*parts, digest=""), loss_function=lambda y, x: (y**2).mean(), measures=None)
    assert results.memory_usage > 0
    assert results.baseline_memory >= 3 * 64
    assert results.config["device"] == "cuda:0"
