"""What the figures rest on beside the runs: the command that measures it, its files and their captions."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from problems import Model, Network, random, squares
from records import saved_run

import flow
from reproduction import diagnostics, gradients
from reproduction.captions import caption
from reproduction.experiments import EXPERIMENTS, FLOW
from reproduction.integral_errors import set_integrals
from reproduction.measurements import path_of, save_record
from reproduction.trained import TrainedRun
from torchadjoint import METHODS, solve
from torchadjoint.statistics import SolveStatistics


def test_the_caption_says_what_the_reference_was(tmp_path):
    rows = [dict(batch=number, rtol=rtol, atol=rtol) for number in range(5) for rtol in (1e-2, 1e-5)]
    record = {"batch_size": 16, "reference": [1e-6, 1e-9], "rows": rows}
    path = path_of(str(tmp_path), "gradient_errors", "speech_commands")
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


def test_a_flow_is_measured_by_the_norms_that_the_measurement_is_named_after(tmp_path, monkeypatch):
    saved_run(tmp_path, "flow", data="checkerboard", integrals="unweighed")
    seen = []

    def change(run, model, data):
        seen.append(model.flow.integrals)
        set_integrals(model, "unweighed")
        return {}

    measured = ("integrals", "step_errors")
    for name in measured:
        monkeypatch.setitem(diagnostics.MEASUREMENTS, name, change)
    diagnostics.main(diagnostics.Options(str(tmp_path), experiments=("flow",), measurements=measured))
    assert seen == ["none", "none"], "one measurement is not the next one's business"


def test_the_command_saves_strict_json_with_its_source(tmp_path, small_networks, monkeypatch):
    saved_run(tmp_path)
    monkeypatch.setattr(TrainedRun, "test_set", lambda self: (random(40, 8, 8, dtype=torch.float32),))
    card, few = (
        EXPERIMENTS["acrobot"],
        dict(adjoints=("default", "discrete"), batch_size=4, tolerances=((1e-3, 1e-3), (1e-6, 1e-6))),
    )
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
    assert (len(errors["rows"]), errors["num_batches"], errors["reference"]) == (3 * 2 * 2, 3, [1e-9, 1e-9])
    reading = caption("gradient-errors", str(tmp_path / "results")).reading
    assert "3 batches of 4 samples" in reading
    assert "1e-9, 1e-9, 3 decades tighter" in reading
    assert f"{max(row['reference_error'] for row in errors['rows']):.1g} or less away" in reading
    methods = records["methods-acrobot.json"]
    assert {row["method"] for row in methods["rows"]} == {"bosh3", "dopri5"}
    assert {row["rtol"] for row in methods["rows"]} == {1e-3, 1e-4}
    assert methods["reference"] == [pytest.approx(1e-7)] * 2
    assert len(records["control-acrobot.json"]["motion"]["q1"]) == 401
    assert records["step_errors-acrobot.json"]["batch_size"] == 8
    loose, tight = records["step_errors-acrobot.json"]["shares"]
    assert (loose["rtol"], tight["rtol"]) == (1e-3, 1e-6)
    assert loose["num_steps"] < tight["num_steps"]
    steps = records["step_errors-acrobot.json"]["steps"]
    assert "a_theta" in steps["default"]
    assert "a_theta" not in steps["seminorm"]


@pytest.mark.parametrize(
    ("measurement", "pairs"),
    [
        ("gradient_errors", [(1e-6, 1e-7), (1e-2, 1e-4), (1e-3, 1e-5)]),
        ("methods", [(1e-5, 1e-6), (1e-1, 1e-2), (1e-2, 1e-3)]),
        ("losses", [(1e-1, 1e-2), (1e-2, 1e-3)]),
        ("step_errors", [(1e-2, 1e-3), (1e-2, 1e-4), (1e-3, 1e-5)]),
    ],
)
def test_solves_have_the_tolerances_that_records_say(measurement, pairs, monkeypatch):
    def spy(*arguments, **options):
        given.append((options["rtol"], options["atol"]))
        return solve(*arguments, **options)

    given = []
    monkeypatch.setattr(gradients, "solve", spy)
    monkeypatch.setattr(diagnostics, "METHODS", {"dopri5": METHODS["dopri5"]})
    few = dict(loss_function=squares, adjoints=("discrete",), batch_size=2, num_batches=1)
    setting = dataclasses.replace(
        FLOW.gradients, **few, tolerances=((1e-2, 1e-4), (1e-3, 1e-5)), reference=(1e-6, 1e-7)
    )
    config = SimpleNamespace(rtol=1e-2, atol=1e-3, batch_size=2)
    run = SimpleNamespace(card=SimpleNamespace(gradients=setting), config=config)
    record = diagnostics.MEASUREMENTS[measurement](run, Model(Network()), (random(4, 3),))
    said = [record["reference"]] if "reference" in record else []
    rows = (record, *record.get("rows", ()), *record.get("shares", ()))
    said += [(row["rtol"], row["atol"]) for row in rows if "rtol" in row]
    assert list(dict.fromkeys(said)) == list(dict.fromkeys(given)) == pairs


def test_growth_is_that_of_models_that_do_not_train(monkeypatch):
    def spy(model, *_, **__):
        is_training.append(model.training)
        return None, SolveStatistics()

    is_training = []
    monkeypatch.setattr(diagnostics, "gradient_of", spy)
    config = flow.Config("cpu", "seminorm", data="digits", width=1, batch_size=2)
    run = SimpleNamespace(card=FLOW, config=config)
    record = diagnostics.measure_growth(run, flow.build(config), (torch.zeros(6, 1, 8, 8),))
    assert is_training == [False] * len(record["rows"]) != []


def test_a_measurement_that_cannot_be_written_keeps_the_one_before(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError("no room")

    path = tmp_path / "diagnostics" / "law-acrobot.json"
    save_record(path, {"cases": [1]})
    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="no room"):
        save_record(path, {"cases": [1, 2]})
    assert json.loads(path.read_bytes()) == {"cases": [1]}
