"""What the figures rest on beside the runs: errors of gradients, errors of steps, and the acrobot's control."""

import dataclasses
import itertools
import json
import shlex
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import tyro
from problems import F64, Growth, Network, random
from records import made_on
from torch import nn

import acrobot
import flow
import speech_commands
from common.results import Epoch, HistoryEntry, Metrics, Results, save
from datasets.acrobot import FullyActuatedAcrobot
from reproduction import control, diagnostics, equal_error, gradients
from reproduction.captions import caption
from reproduction.diagnostics import path_of, trained_run
from reproduction.equal_error import MEASURED, Measured, Way, trained_seeds
from reproduction.experiments import EXPERIMENTS
from reproduction.gradients import (
    BLOCK_NAMES,
    drivers,
    exact_gradient,
    gradient_errors,
    gradient_of,
    losses,
    step_errors,
)
from reproduction.runs import load_data
from torchadjoint import METHODS


class Model(nn.Module):
    """A field, solved from its input to t = 2: what an experiment's model looks like."""

    def __init__(self, field):
        super().__init__()
        self.field = field

    def forward(self, y0):
        solution = self.solve(self.field, y0, torch.tensor([0.0, 2.0], dtype=y0.dtype))
        return solution.y[-1], solution.statistics


def squares(prediction, target):
    return prediction.square().sum()


def test_an_error_is_the_distance_from_the_exact_gradient_and_falls_with_the_tolerance(monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(gradients, "time", SimpleNamespace(process_time=lambda: next(ticks)))
    field, y0 = Growth(), random(4, 3)
    squares(field.exact(y0, torch.tensor([0.0, 2.0], dtype=F64))[-1], y0).backward()
    exact = torch.stack([parameter.grad for parameter in field.parameters()])
    tolerances = [(10.0**-digits, 10.0**-digits) for digits in (3, 5, 7)]
    adjoints = ("default", "per-tensor", "seminorm", "discrete")
    model = Model(field)
    rows = gradient_errors(model, [(y0,)], squares, tolerances=tolerances, adjoints=adjoints, reference=(1e-12, 1e-12))
    assert all(0 < row["reference_error"] < 1e-9 and row["cpu_seconds"] == 1 for row in rows)
    for adjoint in adjoints:
        mine = [row for row in rows if row["adjoint"] == adjoint]
        assert mine[0]["error"] > 5 * mine[1]["error"] > 25 * mine[2]["error"] > 0
        assert mine[0]["backward_nfe"] < mine[2]["backward_nfe"]
        for row in mine:
            options = {name: row[name] for name in ("adjoint", "rtol", "atol")}
            gradient, counted = gradient_of(model, (y0,), squares, **options)
            assert row["error"] == pytest.approx(((gradient - exact).norm() / exact.norm()).item(), rel=1e-3)
            assert (row["forward_nfe"], row["backward_nfe"]) == (counted.forward.nfe, counted.backward.nfe)


def test_the_references_own_error_is_the_distance_of_two_ways_in_float64():
    model, batch = Model(Network(width=64, dtype=torch.float32)), (random(4, 3, dtype=torch.float32),)
    loose = dict(rtol=1e-3, atol=1e-3)
    arguments = dict(tolerances=[(1e-2, 1e-2)], adjoints=("default",), reference=(1e-3, 1e-3))
    [row] = gradient_errors(model, [batch], squares, **arguments)
    model.double()
    exact, other = (
        gradient_of(model, (batch[0].double(),), squares, adjoint=adjoint, **loose)[0]
        for adjoint in ("seminorm", "discrete")
    )
    assert row["reference_error"] == pytest.approx(((other - exact).norm() / exact.norm()).item(), rel=1e-6)
    judge, _ = gradient_of(model, (batch[0].double(),), squares, adjoint="discrete", rtol=1e-6, atol=1e-6)
    judged = exact_gradient(model, batch, squares, (1e-3, 1e-3), (1e-6, 1e-6))
    assert judged[0].equal(exact)
    assert judged[1] == pytest.approx(((judge - exact).norm() / exact.norm()).item(), rel=1e-6)


def test_losses_are_those_of_the_method_and_right_answers_are_counted():
    field, y0 = Growth(), random(6, 3)
    last = field.exact(y0, torch.tensor([0.0, 2.0], dtype=F64))[-1]
    labels = last.argmax(dim=-1)
    labels[:2] = last[:2].argmin(dim=-1)  # two of six are not the largest

    def found(targets, loss_function, rtol):
        methods = ["dopri5", "adaptive_heun"]
        return losses(Model(field), (y0, targets), loss_function, tolerances=[(rtol, rtol)], methods=methods)

    rows = found(labels, nn.functional.cross_entropy, 1e-8)
    assert [row["accuracy"] for row in rows] == pytest.approx([4 / 6] * 2)
    assert [row["loss"] for row in rows] == pytest.approx([nn.functional.cross_entropy(last, labels).item()] * 2)
    assert rows[0]["forward_nfe"] < rows[1]["forward_nfe"]
    # Of a loose solve the loss is off, by another amount for each method.
    loose = [abs(row["loss"]) for row in found(last, nn.functional.mse_loss, 1e-2)]
    assert min(loose) > 1e-8
    assert loose[0] != pytest.approx(loose[1], rel=0.1)


def test_references_are_two_decades_tighter_than_what_they_judge():
    for setting in (card.gradients for card in EXPERIMENTS.values()):
        for tolerance, tightest in zip(setting.reference, map(min, zip(*setting.tolerances)), strict=True):  # noqa: B905
            assert tolerance < 1.01e-2 * tightest


def observed(adjoint, **options):
    model = Model(Network(width=64))
    options = dict(adjoint=adjoint, rtol=1e-6, atol=1e-8) | options
    _, counted = gradient_of(model, (random(4, 3),), squares, **options)
    return step_errors(model, (random(4, 3),), squares, **options), counted.backward


@pytest.mark.parametrize("adjoint", ["default", "seminorm"])
def test_every_attempted_step_is_seen_with_the_error_that_it_was_judged_by(adjoint):
    steps, counted = observed(adjoint)
    assert counted.num_rejected > 0
    for times, is_of in ((counted.accept_times, lambda r: r <= 1), (counted.reject_times, lambda r: r > 1)):
        assert [step["t0"] for step in steps if is_of(step["error_ratio"])] == times
    for step in steps:
        assert step["t1"] < step["t0"]
        assert max(step.get(name, 0) for name in BLOCK_NAMES) == pytest.approx(step["error_ratio"])
        assert ("a_theta" in step) == (adjoint == "default")


def test_shares_are_of_all_steps_and_go_to_the_largest():
    steps = [dict(z=1.0, a_z=2.0, a_theta=3.0), dict(z=5.0, a_z=2.0, a_theta=3.0), dict(z=0.1, a_z=0.2, a_theta=0.3)]
    assert drivers(steps) == pytest.approx({"z": 1 / 3, "a_z": 0, "a_theta": 2 / 3, "a_t": 0})
    assert sum(drivers(observed("default")[0]).values()) == pytest.approx(1)
    assert drivers(observed("seminorm")[0])["a_theta"] == 0


@pytest.fixture(scope="module")
def vector_field():
    return acrobot.build(acrobot.Config("cpu", "seminorm")).vector_field


def test_the_control_is_what_the_formula_says(vector_field):
    angles, velocities = random(5, 2, dtype=torch.float32), random(5, 2, seed=1, dtype=torch.float32)
    leaf = angles.clone().requires_grad_()
    inputs = torch.cat([leaf.cos(), leaf.sin()], dim=-1)
    vector_field.potential(inputs.unsqueeze(0)).sum().backward()
    matrices = vector_field.control(inputs.unsqueeze(0)).view(5, 2, 2)
    expected = (matrices.inverse() @ (2 * leaf.grad - velocities).unsqueeze(-1)).squeeze(-1)
    torques = control.energy_shaping(vector_field, angles, velocities)
    torch.testing.assert_close(torques, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("torque", ["published", "consistent"])
def test_the_control_acts_on_the_true_dynamics_from_rest(vector_field, torque):
    rows = control.swing_up(vector_field, torque=torque, num_steps=40)
    assert rows.shape == (41, 6)
    assert np.isfinite(rows).all()
    assert np.abs(rows[:, 4:]).max() <= 15
    assert np.abs(rows[:, 4:]).max() > 0
    assert (rows[0, :4] == 0).all()
    environment = FullyActuatedAcrobot(torque=torque)
    for before, after in itertools.pairwise(rows):
        environment.state = before[:4]
        environment.step(before[4:])
        assert environment.state == pytest.approx(after[:4], abs=1e-6)
    states = torch.tensor(rows[:, :4], dtype=torch.float32)
    torques = control.energy_shaping(vector_field, states[:, :2], states[:, 2:]).clamp(-15, 15)
    assert rows[:, 4:] == pytest.approx(torques.detach().numpy(), rel=1e-3, abs=1e-3)


def test_the_caption_says_what_the_reference_was(tmp_path):
    rows = [dict(batch=number, rtol=rtol, atol=rtol) for number in range(5) for rtol in (1e-2, 1e-5)]
    record = {"batch_size": 16, "reference": [1e-6, 1e-9], "rows": rows}
    path = diagnostics.path_of(str(tmp_path), "gradient_errors", "speech_commands")
    path.parent.mkdir()

    def reading():
        path.write_text(json.dumps(record))
        return caption("gradient-errors", str(tmp_path)).reading

    assert "5 batches of 16 samples" in reading()
    assert "1e-6, 1e-9, 1 decade tighter than the tightest point; discrete at the same tolerances was not" in reading()
    record["reference"] = [1e-7, 1e-10]
    rows[3]["reference_error"] = 0.00234
    assert "1e-7, 1e-10, 2 decades tighter" in reading()
    assert "is 0.002 or less away" in reading()


def saved_run(folder, *, experiment=acrobot, loss=1.0, status="completed", start_time=0.0, **settings):
    """A run of a few weights, on disk."""
    config = experiment.Config("cpu", "seminorm", batch_size=8, **settings)
    counts = dict.fromkeys(Metrics.__dataclass_fields__, 0) | {
        name: [] for name in Metrics.__dataclass_fields__ if name.endswith("_ts")
    }
    metrics = Metrics(**counts | dict(loss=loss, dataset_size=1, timestamp=0.0, timespan=0.0))
    clocks = dict(epoch=1, loss=loss, seconds=1.0, cpu_seconds=1.0, learning_rate=0.1)
    epoch = Epoch(**dict.fromkeys(Epoch.__dataclass_fields__, 0) | clocks)
    results = Results(
        start_time=start_time,
        timespan=1.0,
        parameters=1,
        model=experiment.build(config),
        train_metrics=metrics,
        val_metrics=metrics,
        test_metrics=metrics,
        experiment=experiment.__name__,
        config=dataclasses.asdict(config),
        provenance=made_on("a"),
        epochs=[epoch],
        history=[HistoryEntry(epoch=1, train_metrics=metrics, val_metrics=metrics)],
        status=status,
    )
    directory = folder / experiment.__name__ / "seminorm"
    directory.mkdir(parents=True, exist_ok=True)
    return save(results, directory)


@pytest.fixture
def small_networks(monkeypatch):
    network = acrobot.SoftplusNetwork
    monkeypatch.setattr(
        acrobot, "SoftplusNetwork", lambda *widths: network(widths[0], *[9] * (len(widths) - 2), widths[-1])
    )


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
    path, results = trained_run(str(tmp_path), "acrobot")
    assert (path, results.config["seed"]) == (best, 1)


def test_runs_that_differ_in_their_seed_are_measured_together_wherever_they_were_written(tmp_path, small_networks):
    first = saved_run(tmp_path, loss=0.1, max_epochs=2, start_time=9.0)
    other = saved_run(tmp_path, seed=1, max_epochs=2, results_dir="elsewhere", resume=True)
    saved_run(tmp_path, seed=2, max_epochs=3)
    assert sorted(trained_seeds(str(tmp_path), "acrobot")) == [first, other]
    saved_run(tmp_path, loss=0.1, max_epochs=2, start_time=1.0)
    assert sorted(trained_seeds(str(tmp_path), "acrobot")) == [first, other], "of a seed the latest run counts"


def test_the_flows_that_are_measured_at_equal_error_are_of_one_group(tmp_path):
    first, other = (saved_run(tmp_path, experiment=flow, data="checkerboard", seed=seed) for seed in (0, 1))
    saved_run(tmp_path, experiment=flow, data="2spirals", loss=0.1)
    assert sorted(trained_seeds(str(tmp_path), "flow")) == [first, other]


def test_a_flow_is_measured_by_the_norms_that_the_measurement_is_named_after(tmp_path, monkeypatch):
    saved_run(tmp_path, experiment=flow, data="checkerboard", integrals="unweighed")
    seen = []
    monkeypatch.setitem(
        diagnostics.MEASUREMENTS,
        "step_errors",
        lambda experiment, config, model, data: seen.append(model.flow.integrals) or {},
    )
    diagnostics.main(diagnostics.Options(str(tmp_path), experiments=("flow",), measurements=("step_errors",)))
    assert seen == ["none"]


def test_equal_error_goes_on_where_it_stopped_and_starts_anew_for_another_reference(
    tmp_path, small_networks, monkeypatch
):
    def measure(**changes):
        equal_error.main(dataclasses.replace(options, **changes))
        return json.loads(path_of(str(tmp_path), "equal_error", "acrobot").read_bytes())["rows"]

    for seed in (0, 1):
        saved_run(tmp_path, seed=seed)
    monkeypatch.setattr(equal_error, "test_set", lambda *arguments: (random(40, 8, 8, dtype=torch.float32),))
    ways = (Way("default", "dopri5", (1e-2,)),)
    few = Measured(ways, batch_size=4, num_batches=2, atol_over_rtol=1.0, reference=(1e-5, 1e-5), judge=(1e-5, 1e-5))
    monkeypatch.setitem(MEASURED, "acrobot", few)
    options = equal_error.Options(str(tmp_path), str(tmp_path), experiments=("acrobot",))
    first = measure(limit=3)
    assert [(row["seed"], row["batch"]) for row in first] == [(0, 0), (1, 0), (0, 1)]
    whole = measure()
    assert whole[:3] == first
    assert len(whole) == 4
    monkeypatch.setitem(MEASURED, "acrobot", dataclasses.replace(few, judge=(1e-6, 1e-6)))
    assert len(measure(limit=1)) == 1
    assert len(measure()) == 4
    saved_run(tmp_path, loss=0.005, start_time=4.0, resume=True)
    measure()  # the same settings
    saved_run(tmp_path, loss=0.001, max_epochs=7, start_time=5.0)
    with pytest.raises(
        ValueError, match="was measured with the weights of acrobot/seminorm, which was trained by other"
    ):
        measure()


def test_the_command_saves_strict_json_with_its_source(tmp_path, small_networks, monkeypatch):
    saved_run(tmp_path)
    monkeypatch.setattr(diagnostics, "test_set", lambda *arguments: (random(40, 8, 8, dtype=torch.float32),))
    card, few = EXPERIMENTS["acrobot"], dict(adjoints=("default", "discrete"), batch_size=4, tolerances=((1e-3, 1e-3),))
    few = dataclasses.replace(card.gradients, **few)
    monkeypatch.setitem(EXPERIMENTS, "acrobot", dataclasses.replace(card, gradients=few))
    monkeypatch.setattr(diagnostics, "METHODS", {name: METHODS[name] for name in ("bosh3", "dopri5", "rk4")})
    with pytest.raises(SystemExit) as caught:
        diagnostics.main(diagnostics.Options(str(tmp_path / "results"), weights_dir=str(tmp_path)))
    assert "python speech_commands.py" in caught.value.code
    records = {path.name: json.loads(path.read_text()) for path in (tmp_path / "results" / "diagnostics").iterdir()}
    assert sorted(records) == [f"{name}-acrobot.json" for name in sorted(card.measurements)]
    for record in records.values():
        assert record["run"] == "acrobot/seminorm/0.json"
        assert record["provenance"]["packages"]["torch"]
    errors = records["gradient_errors-acrobot.json"]
    assert (len(errors["rows"]), errors["num_batches"], errors["reference"]) == (3 * 1 * 2, 3, [1e-9, 1e-9])
    reading = caption("gradient-errors", str(tmp_path / "results")).reading
    assert "3 batches of 4 samples" in reading
    assert "1e-9, 1e-9, 6 decades tighter" in reading
    assert f"{max(row['reference_error'] for row in errors['rows']):.1g} or less away" in reading
    assert {row["method"] for row in records["methods-acrobot.json"]["rows"]} == {"bosh3", "dopri5"}
    assert len(records["control-acrobot.json"]["motion"]["q1"]) == 401
    assert records["step_errors-acrobot.json"]["batch_size"] == 8
    steps = records["step_errors-acrobot.json"]["steps"]
    assert "a_theta" in steps["default"]
    assert "a_theta" not in steps["seminorm"]


def test_batches_come_from_all_over_and_share_no_sample():
    batches = diagnostics.batches_of((torch.arange(100),), 10, 3)
    assert [x.tolist() for (x,) in batches] == [list(range(number, 100, 10)) for number in range(3)]


def test_measurements_are_of_the_test_set_and_other_data_are_told(caplog):
    config = flow.Config("cpu", "seminorm", data="moons")
    data = load_data("flow", config)
    assert torch.equal(diagnostics.test_set("flow", config, data.digest)[0], data.test.tensors[0])
    assert not caplog.records
    diagnostics.test_set("flow", config, "other")
    assert "their split is another" in caplog.text


def test_a_measurement_that_cannot_be_written_keeps_the_one_before(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError("no room")

    path = tmp_path / "diagnostics" / "law-acrobot.json"
    diagnostics.save_record(path, {"cases": [1]})
    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="no room"):
        diagnostics.save_record(path, {"cases": [1, 2]})
    assert json.loads(path.read_bytes()) == {"cases": [1]}
