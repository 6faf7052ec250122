"""The third experiment through its own doors, on toys, tables and images, and what it refuses."""

import inspect
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch

import flow
from common import command_line
from common.errors import TrainingFailed
from common.results import load
from datasets import flow as dataset
from flows.continuous import ContinuousFlow
from flows.densities import PointDensity

SMALL = {
    "checkerboard": dict(batch_size=5000, width=6),
    "wine": dict(batch_size=100, width=6),
    "digits": dict(batch_size=1000, width=1, rtol=1e-1, atol=1e-1),
}


def settings(data, tmp_path, **changes):
    return dict(data=data, max_epochs=1, results_dir=tmp_path, **SMALL[data]) | changes


def saved(tmp_path):
    return sorted(Path(tmp_path).glob("*/*/*.json"))


def test_signature():
    parameters = inspect.signature(flow.main).parameters
    positional = [name for name, parameter in parameters.items() if parameter.kind is not parameter.KEYWORD_ONLY]
    assert positional == ["device", "norm", "rtol", "atol"]
    defaults = dict(rtol=1e-5, atol=1e-5, data="digits", max_epochs=100, batch_size=200, width=None, integrals="none",
                    divergence="automatic", weight_decay=1e-5)  # fmt: skip
    assert {name: parameters[name].default for name in defaults} == defaults
    assert "width:\n    Width of the hidden layers" in flow.main.__doc__


@pytest.mark.parametrize(("data", "measure"), [("checkerboard", "nll"), ("wine", "nll"), ("digits", "bits_per_dim")])
def test_end_to_end(tmp_path, data, measure):
    results = flow.main("cpu", "seminorm", **settings(data, tmp_path))
    (other,) = {"nll", "bits_per_dim"} - {measure}
    metrics = results.test_metrics
    assert metrics[measure] == pytest.approx(metrics.loss)
    assert other not in metrics
    assert results.epochs[0][measure] == pytest.approx(results.epochs[0].loss)
    assert metrics.forward_nfe > 0
    assert metrics.backward_nfe > 0
    (path,) = saved(tmp_path)
    assert load(path).test_metrics == metrics
    assert path.parent.name.endswith("" if data == "digits" else f"data-{data}-width-6")


def test_a_flow_learns(tmp_path):
    first, last = (
        flow.main("cpu", True, **settings("checkerboard", tmp_path, max_epochs=epochs, batch_size=500, save=False))
        for epochs in (1, 4)
    )
    # A uniform density on its dark fields has log 32 = 3.47 nats, and no other density has fewer.
    assert first.test_metrics.nll > last.test_metrics.nll > 3.4


def test_the_same_seed_trains_to_the_same_bits_and_another_does_not(tmp_path):
    def losses(seed):
        results = flow.main("cpu", True, seed=seed, **settings("wine", tmp_path, save=False, metric_interval=1))
        return [results.epochs[0].loss, results.history[0].val_metrics.loss, results.test_metrics.loss]

    assert losses(0) == losses(0) != losses(1)


@pytest.mark.parametrize("norm", ["default", "per-tensor", "seminorm", "discrete"])
@pytest.mark.parametrize("integrals", ["none", "backward", "unweighed"])
def test_every_way_has_a_gradient_near_the_others(norm, integrals):
    if (norm, integrals) == ("discrete", "backward"):
        with pytest.raises(ValueError, match="'discrete' has no backward solve"):
            flow.Config("cpu", norm, integrals=integrals)
        return
    x = dataset.load(batch_size=20, device="cpu", generator=None, data="moons").test.tensors[0][:20].double()
    gradients = []
    for options in (dict(norm=norm, integrals=integrals), dict(norm="discrete")):
        config = flow.Config("cpu", rtol=1e-7, atol=1e-9, data="moons", width=8, **options)
        model = flow.build(config).double()
        losses, statistics = model(x)
        losses.mean().backward()
        assert statistics.backward.nfe > 0
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


def test_our_solver_takes_the_steps_of_torchdiffeq(tmp_path):
    found = []
    for solver in ("torchadjoint", "torchdiffeq"):
        results = flow.main("cpu", "default", solver=solver, **settings("checkerboard", tmp_path, save=False))
        found.append((results.test_metrics.nll, results.test_metrics.forward_nfe, results.test_metrics.backward_nfe))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    assert found[0][1:] == found[1][1:]


def test_a_resumed_run_draws_on_where_it_stopped(tmp_path):
    """Its probes go on from the batch that the checkpoint knows, in the same bits as if nothing had happened."""
    whole = flow.main("cpu", True, **settings("wine", tmp_path, max_epochs=3, save=False))

    def interrupted(density, x):
        if density.training and density.draws.number == 5:  # in the third of three epochs
            raise KeyboardInterrupt
        return forward(density, x)

    forward = PointDensity.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PointDensity, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            flow.main("cpu", True, **settings("wine", tmp_path, max_epochs=3))
    resumed = flow.main("cpu", True, resume=True, **settings("wine", tmp_path, max_epochs=3))
    assert [epoch.loss for epoch in resumed.epochs] == [epoch.loss for epoch in whole.epochs]
    assert len({epoch.loss for epoch in resumed.epochs}) == 3


@pytest.mark.parametrize("data", ["checkerboard", "wine", "digits"])
def test_the_flows_treat_integrals_as_the_settings_say(data):
    model = flow.build(flow.Config("cpu", True, data=data, width=2, integrals="unweighed"))
    flows = [module for module in model.modules() if isinstance(module, ContinuousFlow)]
    assert {module.integrals for module in flows} == {"unweighed"}


def test_a_seed_draws_the_weights_and_the_order(monkeypatch):
    monkeypatch.setattr(
        flow,
        "train",
        lambda config, *, model, data, **_: (next(model.parameters()), data.train.generator.initial_seed()),
    )
    (first, order), (second, another) = (flow.main("cpu", True, data="moons", seed=seed) for seed in (0, 1))
    assert not torch.equal(first, second)
    assert order != another


def test_full_makes_repeats(monkeypatch):
    configs = []
    monkeypatch.setattr(flow, "run", configs.append)
    flow.full("cpu", True, data="moons")
    assert [(config.seed, config.data, config.norm) for config in configs] == [
        (seed, "moons", "seminorm") for seed in range(5)
    ]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (dict(norm="as-published"), "norm is 'as-published', which is acrobot's alone"),
        (dict(data="swissroll"), "data is 'swissroll', but must be one of 'checkerboard', "),
        (dict(integrals="unweighed", solver="torchdiffeq"), "integrals is 'unweighed', but solver='torchdiffeq' kno"),
        (dict(width=0), "width is 0"),
        (dict(width=1.5), "width is 1.5"),
        (dict(divergence="none"), "divergence is 'none'"),
        (dict(data="mnist", divergence="exact"), "the samples have 784 numbers, and more than 64 are too many"),
    ],
    ids=str,
)
def test_what_is_not_allowed_is_refused_in_a_sentence(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        flow.main(**{"device": "cpu", "norm": "seminorm", "save": False, **options})


def test_on_the_command_line_missing_torchvision_is_one_sentence(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setattr(sys, "argv", ["flow.py", "--device", "cpu", "--norm", "seminorm", "--data", "mnist"])
    with pytest.raises(SystemExit) as caught:
        command_line.run(flow.Config, flow.run)
    assert caught.value.code == 2
    assert "data is 'mnist', which needs torchvision" in capsys.readouterr().err


def test_a_likelihood_that_is_not_finite_is_explained_and_saved(monkeypatch, tmp_path):
    def infinite(density, x):
        losses, statistics = forward(density, x)
        return losses / 0, statistics

    forward = PointDensity.forward
    monkeypatch.setattr(PointDensity, "forward", infinite)
    with pytest.raises(TrainingFailed, match=r"epoch 1 \(training\), batch 1 of 2.*the loss is inf"):
        flow.main("cpu", True, **settings("checkerboard", tmp_path))
    (path,) = saved(tmp_path)
    assert load(path).status == "failed"


def test_data_outside_the_unit_cube_are_refused(monkeypatch, tmp_path):
    monkeypatch.setitem(dataset.NUM_LEVELS, "digits", 9)
    with pytest.raises(ValueError, match="hold levels from 0 to 16, outside the unit cube: give levels from 0 to 8"):
        flow.main("cpu", True, **settings("digits", tmp_path, save=False))


def test_toys_need_nothing_of_the_other_experiments():
    assert set(dataset.TOYS) == set(get_args(dataset.Toy))
    assert set(dataset.SHAPES) == set(dataset.NUM_LEVELS) == set(get_args(dataset.Image))
    assert set(dataset.NUM_COLUMNS) == set(get_args(dataset.Table))


def build(**settings):
    return flow.build(flow.Config("cpu", True, **settings))


def test_the_models_are_ffjords():
    toy, table, wider = (
        build(data=data, width=width).flow for data, width in (("moons", None), ("wine", None), ("wine", 7))
    )
    assert (toy.end_time, toy.network.activation) == (0.5, "tanh")
    assert [tuple(weight.shape) for weight in toy.network.weights] == [(64, 2), (64, 64), (64, 64), (2, 64)]
    assert (table.end_time, table.network.activation) == (1.0, "softplus")
    assert [tuple(weight.shape) for weight in table.network.weights] == [(260, 13), (260, 260), (13, 260)]
    assert [tuple(weight.shape) for weight in wider.network.weights] == [(7, 13), (7, 7), (13, 7)]


def test_each_seed_draws_its_own_probes():
    first, again, other = (build(data="wine", seed=seed).draws.signs("probes", torch.ones(50)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_models_of_images_are_ffjords():
    scales = build(data="digits").flows.scales
    assert {each.end_time for scale in scales for each in scale} == {1.0}
    assert scales[0][0].network.layers[0].out_channels == 64
    build(data="digits", divergence="exact", width=1)  # of 64 numbers, the most that there may be
