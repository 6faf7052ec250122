"""How exact gradients are and what backward solves step by, as measured on models whose answer is known."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from problems import F64, Growth, Model, Network, random, squares
from torch import nn

from reproduction import gradients
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
from torchadjoint import solve


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
    judge, _ = gradient_of(model, (batch[0].double(),), squares, adjoint="discrete", rtol=1e-6, atol=1e-8)
    judged = exact_gradient(model, batch, squares, (1e-3, 1e-3), (1e-6, 1e-8))
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


def test_solves_have_the_tolerances_that_rows_say(monkeypatch):
    def spy(*arguments, **options):
        given.append((options["rtol"], options["atol"]))
        return solve(*arguments, **options)

    given = []
    monkeypatch.setattr(gradients, "solve", spy)
    model, y0, pairs, reference = Model(Growth()), random(4, 3), [(1e-2, 1e-4), (1e-3, 1e-6)], (1e-5, 1e-8)
    rows = gradient_errors(model, [(y0,)], squares, tolerances=pairs, adjoints=("discrete",), reference=reference)
    assert [(row["rtol"], row["atol"]) for row in rows] == pairs
    assert given == [reference, reference, *pairs]
    given.clear()
    rows = losses(model, (y0, y0), nn.functional.mse_loss, tolerances=pairs, methods=("dopri5",))
    assert [(row["rtol"], row["atol"]) for row in rows] == given == pairs


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
