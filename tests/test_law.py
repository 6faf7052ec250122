"""The law behind the saving: what is measured for it, and that the judges of a collapse know one when they see it."""

import json
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from problems import Network, random, squares
from records import saved_run
from torch import nn

import acrobot
from reproduction import collapse, law, law_figures
from reproduction.gradients import gradient_of
from reproduction.law_subjects import FURTHER, GRIDS, Case, Grid, Subject, narrowed, neural_ode_subject, subject_of
from reproduction.trained import TrainedRun
from torchadjoint.norms import rms_norm

GRID = Grid(1e-4, (1e-8, 1e-6, 1e-4), (Case("untrained", 8, 4), Case("untrained", 16, 4)))


class Model(nn.Module):
    """What a subject's model looks like."""

    def __init__(self, width):
        super().__init__()
        self.vector_field = Network(width=width, dtype=torch.float32)
        self.readout = nn.Linear(3, 3)

    def forward(self, y0):
        solution = self.solve(self.vector_field, y0, torch.tensor([0.0, 1.0, 2.0]))
        return self.readout(solution.y[-1]), solution.statistics


def batch(size):
    return (random(size, 3, dtype=torch.float32),)


SUBJECT = Subject(lambda case: Model(case.width), batch, squares, {"run": None, "config": {}})


def test_sizes_are_those_of_the_backward_solve_and_go_with_the_loss():
    model, options = Model(16), dict(rtol=1e-6, atol=1e-9)
    sizes = law.adjoint_sizes(model, batch(4), squares, **options)
    prediction, _ = model(batch(4)[0])
    # The loss's gradient of the last state, and the gradient of the field's parameters, not of the readout's.
    at_the_start = 2 * prediction @ model.readout.weight
    y0 = batch(4)[0].requires_grad_()
    [at_the_end] = torch.autograd.grad(squares(model(y0)[0], y0), y0)
    # It grows backwards here, and the last step is seen from its start.
    start, end = (rms_norm(a_z).item() for a_z in (at_the_start, at_the_end))
    assert start + 0.5 * (end - start) < sizes["a_z_rms_largest"] < end
    gradient, _ = gradient_of(model, batch(4), squares, adjoint="discrete", **options)
    gradient = gradient[: sum(parameter.numel() for parameter in model.vector_field.parameters())]
    assert sizes["a_theta_rms_last"] == pytest.approx(rms_norm(gradient).item(), rel=1e-3)
    scaled = law.adjoint_sizes(model, batch(4), law.scaled(squares, 1e3), **options)
    for name, size in sizes.items():
        assert scaled[name] == pytest.approx(1e3 * size, rel=0.03)


def test_a_case_is_measured_by_every_norm_and_its_error_knows_no_factor():
    settings = [(1.0, 1e-6), (2.0**10, 2.0**10 * 1e-6), (2.0**10, 1e-6)]
    case = law.measure_case(SUBJECT, GRID, Case("untrained", 16, 4), settings)
    assert [(row["loss_scale"], row["atol"]) for row in case["rows"][::3]] == settings
    assert [row["norm"] for row in case["rows"][:3]] == list(law.NORMS)
    assert case["num_parameters"] == sum(parameter.numel() for parameter in Model(16).vector_field.parameters())
    # The gradient over the factor: errors are of one size, where they would be a thousand times that.
    assert all(case["reference_error"] < row["error"] < 0.05 for row in case["rows"])
    # The same after a factor on loss and atol, up to z's part; more evaluations after one on the loss alone.
    nfe = {norm: [row["backward_nfe"] for row in case["rows"] if row["norm"] == norm] for norm in law.NORMS}
    assert nfe["default"][2] > nfe["default"][0]
    assert nfe["per-tensor"][2] >= nfe["default"][2] >= nfe["seminorm"][2]


def test_the_three_steps_follow_on_each_other(tmp_path, monkeypatch):
    monkeypatch.setitem(law.FURTHER, "neural_ode", ((Case("untrained", 12, 4), 10.0, 1e-7),))
    monkeypatch.setattr(law, "LOSS_SCALES", (1e-4, 1.0, 1e4))
    path = law.path_of(str(tmp_path), "law", "neural_ode")
    law.measure_grid("neural_ode", SUBJECT, GRID, str(tmp_path))
    cases = json.loads(path.read_bytes())["cases"]
    assert [case["width"] for case in cases] == [8, 16]
    assert all(len(case["rows"]) == 3 * 3 * 3 for case in cases)
    # A case that is there is not measured again.
    record = json.loads(path.read_bytes())
    path.write_text(json.dumps(record | {"cases": cases[1:]}))
    law.measure_grid("neural_ode", SUBJECT, GRID, str(tmp_path))
    assert [case["width"] for case in json.loads(path.read_bytes())["cases"]] == [16, 8]
    law.predict("neural_ode", SUBJECT, GRID, str(tmp_path))
    predictions = law.path_of(str(tmp_path), "law_predictions", "neural_ode")
    [predicted] = json.loads(predictions.read_bytes())["settings"]
    assert "measured_saving" not in predicted
    law.check("neural_ode", SUBJECT, GRID, str(tmp_path))
    [checked] = json.loads(predictions.read_bytes())["settings"]
    cases = json.loads(path.read_bytes())["cases"]
    assert checked["predicted_saving"] == collapse.predicted_saving(cases, predicted, predicted)
    assert {(row["loss_scale"], row["atol"]) for row in checked["rows"]} == {(10.0, 1e-7)}
    nfe = {row["norm"]: row["backward_nfe"] for row in checked["rows"]}
    assert checked["measured_saving"] == 1 - nfe["seminorm"] / nfe["default"]


def test_a_step_before_those_that_it_needs_says_which(tmp_path):
    path = law.path_of(str(tmp_path), "law", "neural_ode")
    law.save_record(path, {"cases": [{}]})
    with pytest.raises(
        ValueError, match=r"has 1 of 2 cases: .* `python -m reproduction\.law grid --models neural_ode`"
    ):
        law.predict("neural_ode", SUBJECT, GRID, str(tmp_path))
    with pytest.raises(ValueError, match=r"has 0 of 3 settings: .* reproduction\.law predict --models neural_ode`"):
        law.check("neural_ode", SUBJECT, GRID, str(tmp_path))


@pytest.mark.parametrize("step", [law.measure_grid, law.predict, law.check])
def test_measurements_with_weights_of_other_settings_are_not_mixed(tmp_path, step):
    config = vars(acrobot.Config("cpu", "seminorm", max_epochs=2))
    for measurement, holds in (("law", {"cases": []}), ("law_predictions", {"settings": []})):
        record = {"run": "acrobot/a/0.json", "config": {**config, "solver": "dopri5", "resume": True}, **holds}
        law.save_record(law.path_of(str(tmp_path), measurement, "acrobot"), record)
    other = replace(SUBJECT, source={"run": "acrobot/b/0.json", "config": {**config, "max_epochs": 3}})
    with pytest.raises(ValueError, match=r"was measured with the weights of acrobot/a/0\.json"):
        step("acrobot", other, GRID, str(tmp_path))
    same = replace(SUBJECT, source={"run": "acrobot/c/5.json", "config": config})
    assert law._saved("acrobot", law.path_of(str(tmp_path), "law", "acrobot"), same)["cases"] == []


def lawful(size, *, exponent=0.25, largest_of_z=1e-2):
    """A case whose NFE are 100 for z, and more where the adjoint over atol is large: of `default` by a_theta."""
    sizes = {"a_z_rms_largest": size, "a_theta_rms_last": 1e3 * size}
    rows = []
    for loss_scale in (1e-4, 1e-2, 1.0, 1e2, 1e4):
        for atol in (1e-6, 1e-3):
            for norm, of_norm in (("seminorm", size), ("default", 1e3 * size), ("per-tensor", 1e3 * size)):
                nfe = 100 * max(1.0, largest_of_z * loss_scale * of_norm / atol) ** exponent
                rows.append({"loss_scale": loss_scale, "atol": atol, "norm": norm, "backward_nfe": nfe})
    return {"sizes": sizes, "rows": rows, "num_parameters": 10, "batch_size": 4, "weights": "trained", "width": 8}


def test_what_falls_on_one_curve_is_seen_to():
    cases = [lawful(size) for size in (1e-6, 1e-5, 1e-3)]
    for norm in ("default", "seminorm"):
        found = collapse.spreads(cases, norm)
        assert found[collapse.CHOSEN[norm]] < 0.01 < 0.3 * found["nothing"]
        for name in ("loss scale", "parameters / state", "loss scale / atol"):
            assert found[name] > 5 * found[collapse.CHOSEN[norm]]


def test_how_far_nfe_differ_where_the_loss_scale_over_atol_is_equal():
    case = lawful(1e-5)
    of_one = [row for row in case["rows"] if row["atol"] == 1e-3]
    case["rows"] += [row | {"atol": 1e-4, "loss_scale": row["loss_scale"] / 10} for row in of_one]
    for norm in ("default", "seminorm"):
        assert collapse.asymmetry(case, norm) == pytest.approx(0, abs=1e-9)
    [row] = (row for row in case["rows"] if (row["norm"], row["atol"], row["loss_scale"]) == ("default", 1e-4, 1e3))
    row["backward_nfe"] *= 1.25
    assert collapse.asymmetry(case, "default") == pytest.approx(0.25)
    assert collapse.asymmetry(case, "seminorm") == pytest.approx(0, abs=1e-9)


def test_a_case_is_judged_by_the_curve_of_the_others():
    cases = [lawful(size) for size in (1e-6, 1e-5, 1e-4, 1e-3)]
    about = collapse.spreads(cases, "default")["RMS(a_theta) / atol"]
    left_out = collapse.spread_left_out(cases, "default", "RMS(a_theta) / atol")
    assert about < left_out < 0.2 * collapse.spreads(cases, "default")["nothing"]
    lawless = [*cases, lawful(1e-4, exponent=0.6)]
    assert collapse.spread_left_out(lawless, "default", "RMS(a_theta) / atol") > 5 * left_out


def test_what_is_constant_in_a_case_can_matter_within_settings():
    sizes = (1e-6, 1e-5, 1e-4, 1e-3)
    cases = [lawful(size) | {"num_parameters": number} for number, size in enumerate(sizes, start=1)]
    assert (
        collapse.spreads(cases, "default")["parameters / state"] > 0.5 * collapse.spreads(cases, "default")["nothing"]
    )
    number, nothing, about = collapse.spreads_within_settings(cases, "default", "parameters / state", least=0.1)
    assert 0 < number < 10
    assert about < 0.5 * nothing
    # The other way round it grows with smaller sizes, which no curve that rises can follow.
    turned = [case | {"num_parameters": 1 / case["num_parameters"]} for case in cases]
    _, nothing, about = collapse.spreads_within_settings(turned, "default", "parameters / state", least=0.1)
    assert about == pytest.approx(nothing)
    assert collapse.spreads_within_settings(cases[:1], "default", "parameters / state", least=0.1)[0] == 0


def test_a_saving_is_predicted_from_sizes_alone():
    cases = [lawful(size) for size in (1e-6, 1e-5, 1e-3)]
    setting = {"loss_scale": 30.0, "atol": 1e-5}
    further = {"sizes": lawful(1e-4)["sizes"], "weights": "trained", "width": 8}
    expected = 1 - (max(1, 1e-2 * 30 * 1e-4 / 1e-5) / (1e-2 * 30 * 1e-1 / 1e-5)) ** 0.25
    assert collapse.predicted_saving(cases, further, setting) == pytest.approx(expected, abs=0.05)
    # Cases of the other kind of weights or another width obey another law, and are not asked.
    others = [lawful(1e-4, exponent=2.0) | kind for kind in ({"weights": "untrained"}, {"width": 16})]
    assert collapse.predicted_saving([*cases, *others], further, setting) == pytest.approx(expected, abs=0.05)
    assert collapse.predicted_saving(others, further, setting) > expected + 0.1


def test_where_atol_lies_between_is_by_the_sizes_of_the_case():
    inside, outside = collapse.between(lawful(2e-3))
    # a_theta is 2. At atol 1e-6 it is between for factors from 5e-7 to 5e-4, at 1e-3 from 5e-4 to 0.5: one of each.
    assert (len(inside), len(outside)) == (2, 8)


def test_further_settings_are_none_of_the_grid():
    assert sum(map(len, FURTHER.values())) >= 6
    for model, settings in FURTHER.items():
        grid = GRIDS[model]
        for case, loss_scale, atol in settings:
            assert case not in grid.cases or loss_scale not in law.LOSS_SCALES or atol not in grid.atols


def test_a_narrow_symplectic_network_has_the_same_layers_otherwise():
    build = partial(acrobot.build, acrobot.Config("cpu", "seminorm"))
    assert narrowed(build(), 400).vector_field.potential.layers[0].out_features == 300
    model = narrowed(build(), 20)
    widths = {
        name: [layer.out_features for layer in getattr(model.vector_field, name).layers]
        for name in ("factor", "potential", "control")
    }
    assert widths == {"factor": [20, 20, 20, 3], "potential": [20, 20, 1], "control": [20, 20, 4]}
    model.solve = acrobot.Config("cpu", "seminorm").solve
    assert model(random(2, 8, 8, dtype=torch.float32))[0].shape == (2, 8, 8)


def test_the_small_network_trains_and_has_the_width_asked_for(monkeypatch):
    subject = neural_ode_subject()
    monkeypatch.setattr("reproduction.law_subjects.NUM_TRAINING_STEPS", 2)
    untrained, trained = (subject.build(Case(weights, 8, 4)) for weights in ("untrained", "trained"))
    assert untrained.vector_field.layers[0].out_features == 8
    assert not torch.equal(untrained.vector_field.layers[0].weight, trained.vector_field.layers[0].weight)
    assert math.isfinite(sum(parameter.abs().sum().item() for parameter in trained.parameters()))


def test_an_experiments_subject_has_the_trained_weights_or_others_of_any_width(tmp_path, monkeypatch):
    weights = saved_run(tmp_path, "speech_commands", hidden_hidden_channels=12).with_suffix(".pt")
    stored = {name: tensor + 1 for name, tensor in torch.load(weights, weights_only=True).items()}
    torch.save(stored, weights)
    monkeypatch.setattr(TrainedRun, "test_set", lambda self: (torch.arange(20),))
    subject = subject_of("speech_commands", str(tmp_path), None)
    trained, untrained = (subject.build(case) for case in (Case("trained", 12, 4), Case("untrained", 7, 4)))
    assert all(torch.equal(tensor, stored[name]) for name, tensor in trained.state_dict().items())
    assert [layer.out_features for layer in untrained.vector_field.hidden] == [7] * 4
    assert untrained.initial.weight.shape == trained.initial.weight.shape
    assert subject.batch(4)[0].tolist() == [0, 5, 10, 15]
    assert subject.source["run"] == weights.with_suffix(".json").relative_to(tmp_path).as_posix()
    with pytest.raises(ValueError, match="has no weights of width 40: train without --hidden-hidden-channels"):
        subject.build(Case("trained", 40, 4))


def test_the_figure_of_the_law_tells_predictions_from_measurements():
    further = lawful(1e-5) | dict(loss_scale=1.0, atol=1e-5, predicted_saving=0.2, measured_saving=0.4)
    cases = [lawful(1e-6), lawful(1e-4)]
    *_, savings = law_figures.law(
        {"acrobot": {"rtol": 1e-4, "cases": cases}}, {"acrobot": {"settings": [further]}}
    ).axes
    drawn = {line.get_label(): list(line.get_ydata()) for line in savings.get_lines()}
    assert drawn["further, predicted"] == [0.2]
    assert drawn["further, measured"] == [0.4]
