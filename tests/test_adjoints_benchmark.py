"""The benchmark of adjoints: its contract, what it makes of wrong gradients, what it keeps, and what its page says."""

import dataclasses
import json
import math
import os
import re
import time
import types
from unittest import mock

import numpy as np
import pytest
import torch
import torchdiffeq

from benchmarks.adjoints import measuring, names, results, sessions
from benchmarks.adjoints.arrays import TORCH
from benchmarks.adjoints.contestants import interpolated, ours, with_diffrax, with_torchdiffeq, with_torchode
from benchmarks.adjoints.contract import MAX_STEPS, Gradient, Problem, loss
from benchmarks.adjoints.names import Contestant, choose, contestants_of, find_contestants, find_problems
from benchmarks.adjoints.references import refer
from torchadjoint import METHODS, solve

RTOL = 1e-6


def decay(arrays, t, y, parameters):
    return -parameters["rate"] * y


PROBLEM = Problem(
    name="decay",
    title="Decay",
    field=decay,
    parameters={"rate": np.array(0.5)},
    y0=np.array([[1.0, 2.0]]),
    times=np.array([0.0, 1.0]),
    exact=lambda times, y0, parameters: y0 * torch.exp(-parameters["rate"] * times)[:, None, None],
    traits=("equation",),
)


@pytest.fixture(scope="module")
def reference():
    return refer(PROBLEM)


def by_hand(problem, way, *, rtol, atol, dtype):
    """A toy contestant, by the contract alone. It knows the solution of `PROBLEM`; `way` is a factor of the rate's."""
    calls.append((problem.name, rtol, atol, dtype))

    def step():
        y0, rate, factor = problem.y0, problem.parameters["rate"], np.exp(-problem.parameters["rate"])
        by_rate = way * -2 * ((y0 * factor) ** 2).sum()
        assert rate.shape == ()
        return Gradient(2 * y0 * (1 + factor**2), {"rate": by_rate}, 3, 4)

    return step


calls: list = []
TOY = types.SimpleNamespace(
    PACKAGES=(), WAYS={"toy, right": 1.0, "toy, wrong": -1.0}, SMALL=("toy, right",), prepare=by_hand
)


@pytest.fixture
def toys():
    calls.clear()
    return contestants_of(TOY)


def measure(contestant, reference, problem=PROBLEM, rtol=RTOL):
    [measurement] = measuring.measure(problem, reference, [contestant], rtol=rtol, dtype="float64")
    return measurement


def test_a_contestant_that_keeps_the_contract_is_measured(toys, reference):
    right, _ = toys
    measurement = measure(right, reference)
    assert measurement.failure == ""
    assert measurement.error < 1e-12
    assert (measurement.forward_nfe, measurement.backward_nfe) == (3, 4)
    assert len(measurement.seconds) == measuring.NUM_ROUNDS
    assert calls == [("decay", RTOL, RTOL / 100, "float64")]


def test_a_wrong_gradient_is_a_large_error(toys, reference):
    _, wrong = toys
    assert measure(wrong, reference).error > 0.1


@pytest.mark.parametrize(
    ("gradient", "sentence"),
    [
        (Gradient(np.zeros((1, 2)), {}), "the gradient of rate is missing"),
        (Gradient(np.zeros(2), {"rate": 0.0}), r"the gradient of y0 has the shape (2,), but must have (1, 2)"),
        (Gradient(np.zeros((1, 2)), {"rate": math.nan}), "the gradient is not finite"),
    ],
)
def test_what_breaks_the_contract_is_a_failure_with_a_reason(gradient, sentence, reference):
    contestant = Contestant("broken", None, lambda *_, **__: lambda: gradient, (), is_small=False)
    measurement = measure(contestant, reference)
    assert sentence in measurement.failure
    assert measurement.error is None
    assert measurement.seconds == []


def test_what_a_contestant_raises_is_kept_on_one_line(reference):
    def prepare(*_, **__):
        raise RuntimeError("too many steps\nand much more")

    measurement = measure(Contestant("raises", None, prepare, (), is_small=False), reference)
    assert measurement.failure == "RuntimeError: too many steps"


@pytest.mark.parametrize(
    "name", ["ours, default", "ours, seminorm, warm start", "ours, discrete, tsit5", "interpolated"]
)
@pytest.mark.parametrize("problem", ["linear", "lotka-volterra"])
def test_ours_find_the_gradient_and_count(name, problem):
    problem, contestant = find_problems()[problem], find_contestants()[name]
    problem = dataclasses.replace(problem, times=problem.times[:3])
    gradient = contestant.prepare(problem, contestant.way, rtol=1e-8, atol=1e-10, dtype="float64")()
    exact = refer(problem)
    assert 0 < exact.agreement < 1e-10, "two ways agree, and are two"
    flat = gradient.flat(problem)
    assert np.linalg.norm(flat - exact.gradient) < 1e-5 * np.linalg.norm(exact.gradient)
    assert gradient.forward_nfe > 0 < gradient.backward_nfe


@pytest.mark.parametrize("name", ["ours, seminorm", "ours, discrete", "interpolated", "torchdiffeq, adjoint"])
def test_tolerances_and_dtype_reach_the_solver(name):
    problem, contestant = find_problems()["lotka-volterra"], find_contestants()[name]
    problem = dataclasses.replace(problem, times=problem.times[:3])

    def step(rtol, atol, dtype):
        return contestant.prepare(problem, contestant.way, rtol=rtol, atol=atol, dtype=dtype)()

    loose, by_rtol, by_atol = (step(rtol, atol, "float64") for rtol, atol in ((1e-2, 1e-2), (1e-7, 1e-2), (1e-2, 1e-7)))
    assert loose.forward_nfe < by_rtol.forward_nfe
    assert loose.forward_nfe < by_atol.forward_nfe
    rounded = step(1e-2, 1e-2, "float32").flat(problem)
    assert 0 < np.linalg.norm(rounded - loose.flat(problem)) < 1e-3 * np.linalg.norm(rounded)


def test_each_contestant_is_what_its_name_says():
    for name, way in ours.WAYS.items():
        words = name.removeprefix("ours, ").split(", ")
        adjoint, others = way.adjoint, set(words[1:])
        assert (adjoint if isinstance(adjoint, str) else adjoint.name) == words[0]
        assert getattr(adjoint, "warm_start", False) == ("warm start" in others)
        extents = {"one stage at a time": "stage", "all stages kept": "solve"}
        extent = next((extents[word] for word in others if word in extents), "step")
        assert getattr(adjoint, "linearised", "step") == extent
        assert way.method == next((word for word in others if word in METHODS), "dopri5")
        assert way.compile == ("solve" if "compiled solve" in others else "compiled" in others)
    for name, way in with_torchdiffeq.WAYS.items():
        assert way.is_adjoint == ("adjoint" in name)
        assert way.norm == ("seminorm" if "seminorm" in name else None)
        assert way.is_compiled == ("compiled" in name)
    classes = {"recursive checkpoints": "RecursiveCheckpoint", "direct": "Direct", "backsolve": "Backsolve"}
    for name, way in with_diffrax.WAYS.items():
        _, adjoint, *others = name.split(", ")
        assert way.adjoint == f"{classes[adjoint]}Adjoint"
        assert way.solver.lower() == next((word for word in others if word in METHODS), "dopri5")
        assert way.is_seminorm == ("seminorm" in others)
    for name, (adjoint, method) in with_torchode.WAYS.items():
        assert adjoint == ("JointBacksolveAdjoint" if "joint backsolve" in name else "AutoDiffAdjoint")
        assert method == ("Tsit5" if "tsit5" in name else "Dopri5")


JUMPING = dataclasses.replace(find_problems()["neural-cde"], times=np.array([0.0, 3.0]), jumps=(1.0, 2.0))


@pytest.mark.parametrize("way", ours.WAYS.values(), ids=ours.WAYS)
def test_our_solve_gets_the_way_and_the_jumps(way, monkeypatch):
    def spy(*arguments, **options):
        calls.append(options)
        return solve(*arguments, **{**options, "compile": False})

    calls = []
    monkeypatch.setattr(ours, "solve", spy)
    monkeypatch.setattr(ours, "IS_TORCH_NEW_ENOUGH", True)
    ours.prepare(JUMPING, way, rtol=1e-2, atol=1e-3, dtype="float64")()
    [options] = calls
    assert (options["adjoint"], options["method"], options["compile"]) == (way.adjoint, way.method, way.compile)
    assert (options["rtol"], options["atol"], options["max_num_steps"]) == (1e-2, 1e-3, MAX_STEPS)
    assert options["jump_t"].tolist() == [1.0, 2.0]


@pytest.mark.parametrize("way", with_torchdiffeq.WAYS.values(), ids=with_torchdiffeq.WAYS)
def test_torchdiffeq_gets_the_way_and_the_jumps(way, monkeypatch):
    asked, other = ("odeint_adjoint", "odeint") if way.is_adjoint else ("odeint", "odeint_adjoint")
    spy = mock.Mock(wraps=getattr(torchdiffeq, asked))
    monkeypatch.setattr(torchdiffeq, asked, spy)
    monkeypatch.setattr(torchdiffeq, other, None)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    with_torchdiffeq.prepare(JUMPING, way, rtol=1e-2, atol=1e-3, dtype="float64")()
    [((func, *_), options)] = spy.call_args_list
    assert isinstance(func, with_torchdiffeq.CompiledField) == way.is_compiled
    assert (options["method"], options["rtol"], options["atol"]) == ("dopri5", 1e-2, 1e-3)
    for given in (options["options"], *([options["adjoint_options"]] if way.is_adjoint else [])):
        assert (given["jump_t"].tolist(), given["max_num_steps"]) == ([1.0, 2.0], MAX_STEPS)
    assert options.get("adjoint_options", {}).get("norm") == way.norm


@pytest.mark.parametrize("way", with_diffrax.WAYS.values(), ids=with_diffrax.WAYS)
def test_diffrax_gets_the_way_and_the_jumps(way, monkeypatch):
    diffrax = pytest.importorskip("diffrax", reason="diffrax is not installed: pip install -r requirements-bench.txt")

    def spy(term, solver, t0, t1, dt0, y0, **options):
        calls.append((solver, options))
        return types.SimpleNamespace(ys=y0[None])

    calls = []
    monkeypatch.setattr(diffrax, "diffeqsolve", spy)
    monkeypatch.setattr("jax.jit", lambda function: function)
    with_diffrax.prepare(JUMPING, way, rtol=1e-2, atol=1e-3, dtype="float64")()
    [(solver, options)] = calls
    assert (type(solver).__name__, type(options["adjoint"]).__name__) == (way.solver, way.adjoint)
    controllers = [options["stepsize_controller"]]
    if way.is_seminorm:
        controllers.append(options["adjoint"].kwargs["stepsize_controller"])
        assert controllers[1].controller.norm is diffrax.adjoint_rms_seminorm
    assert controllers[0].controller.norm is not diffrax.adjoint_rms_seminorm
    for controller in controllers:
        assert controller.jump_ts.tolist() == [1.0, 2.0]
        assert (controller.controller.rtol.item(), controller.controller.atol.item()) == (1e-2, 1e-3)


def test_the_loss_is_a_mean_over_the_batch_alone():
    assert loss(torch.full((2, 4, 3), 2.0)) == 2 * 3 * 4


@pytest.mark.parametrize("way", with_torchdiffeq.WAYS.values(), ids=str)
def test_torchdiffeq_counts_each_direction(way, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # counts are the same, and it takes seconds
    step = with_torchdiffeq.prepare(PROBLEM, way, rtol=1e-4, atol=1e-6, dtype="float64")
    first, second = step(), step()
    assert (first.forward_nfe, first.backward_nfe) == (second.forward_nfe, second.backward_nfe)
    assert first.forward_nfe > 0
    assert (first.backward_nfe > 0) == way.is_adjoint


@pytest.mark.parametrize("way", with_torchode.WAYS.values(), ids=with_torchode.WAYS)
def test_torchode_counts_each_direction(way):
    pytest.importorskip("torchode", reason="torchode is not installed: docs/which_adjoint.md says how")
    gradient = with_torchode.prepare(PROBLEM, way, rtol=1e-4, atol=1e-6, dtype="float64")()
    assert gradient.forward_nfe > 0
    assert (gradient.backward_nfe > 0) == (way[0] == "JointBacksolveAdjoint")


def test_diffrax_solves_the_same_problems():
    pytest.importorskip("diffrax", reason="diffrax is not installed: pip install -r requirements-bench.txt")
    contestant = find_contestants()["diffrax, recursive checkpoints"]
    gradient = contestant.prepare(PROBLEM, contestant.way, rtol=1e-8, atol=1e-10, dtype="float64")()
    np.testing.assert_allclose(gradient.flat(PROBLEM), refer(PROBLEM).gradient, rtol=1e-6)


def test_diffrax_says_why_it_fails(monkeypatch):
    pytest.importorskip("diffrax", reason="diffrax is not installed: pip install -r requirements-bench.txt")
    from benchmarks.adjoints.contestants import with_diffrax

    monkeypatch.setattr(with_diffrax, "MAX_STEPS", 2)
    contestant = find_contestants()["diffrax, recursive checkpoints"]
    # Another problem: what an earlier test has compiled allows more steps.
    problem = dataclasses.replace(PROBLEM)
    step = contestant.prepare(problem, contestant.way, rtol=1e-9, atol=1e-11, dtype="float64")
    with pytest.raises(RuntimeError, match=r"^\w*EquinoxRuntimeError: The maximum number of solver steps"):
        step()


def test_a_piece_is_that_of_one_time_or_of_each_sample():
    values = torch.arange(24.0).view(4, 3, 2)
    assert torch.equal(TORCH.piece(values, torch.tensor(1.5)), values[1])
    assert torch.equal(TORCH.piece(values, torch.tensor(9.0)), values[3])
    each = TORCH.piece(values, torch.tensor([0.2, 2.0, -1.0]))
    assert torch.equal(each, torch.stack([values[0, 0], values[2, 1], values[0, 2]]))


def test_an_interpolated_adjoint_does_not_solve_the_state_backwards():
    problem = dataclasses.replace(find_problems()["damped"])
    exact = refer(problem)
    errors = {}
    for name, module, way in (
        ("interpolated", interpolated, interpolated.WAYS["interpolated"]),
        ("seminorm", ours, ours.WAYS["ours, seminorm"]),
    ):
        gradient = module.prepare(problem, way, rtol=1e-5, atol=1e-7, dtype="float64")()
        errors[name] = np.linalg.norm(gradient.flat(problem) - exact.gradient) / np.linalg.norm(exact.gradient)
    assert errors["interpolated"] < 1e-4
    assert errors["seminorm"] > 1


def test_an_interpolated_adjoint_refuses_what_it_cannot_do():
    func = torch.nn.Linear(2, 2)
    field = type("Field", (torch.nn.Module,), {"forward": lambda self, t, y: func(y)})()
    with pytest.raises(ValueError, match="interpolated needs times that go upwards"):
        solve(field, torch.ones(2), torch.tensor([1.0, 0.0]), adjoint=interpolated.Interpolated())


@pytest.mark.parametrize("problem", find_problems().values(), ids=lambda problem: problem.name)
def test_every_problem_is_well_posed(problem):
    given = {name: torch.tensor(value) for name, value in {**problem.parameters, **problem.constants}.items()}
    y0 = torch.tensor(problem.y0)
    slope = problem.field(TORCH, torch.tensor(problem.times[0]), y0, given)
    assert slope.shape == y0.shape
    assert slope.isfinite().all()
    assert slope.abs().max() > 0
    assert all(problem.times[0] < jump < problem.times[-1] for jump in problem.jumps)
    assert problem.traits
    y = y0.expand(len(problem.times), *y0.shape)
    assert loss(y).shape == ()


def test_names_choose_each_once_and_in_order(toys):
    available = {toy.name: toy for toy in toys}
    right, wrong = toys
    assert choose("contestant", ("toy, wrong", "toy*"), available) == [right, wrong]
    assert choose("contestant", ("small",), available) == [right]
    assert choose("contestant", ("all", "toy, right"), available) == [right, wrong]


@pytest.mark.parametrize("unknown", ["toy", "tay*", ""])
def test_an_unknown_name_is_refused_in_a_sentence(toys, unknown):
    sentence = f"there is no contestant '{unknown}': use 'small', 'all', or some of 'toy, right', 'toy, wrong'"
    with pytest.raises(ValueError, match=re.escape(sentence)):
        choose("contestant", (unknown,), {toy.name: toy for toy in toys})


def test_a_contestant_whose_package_is_missing_is_skipped_by_name(monkeypatch, tmp_path, capsys):
    absent = types.SimpleNamespace(**{**vars(TOY), "PACKAGES": ("no_such_package",)})
    monkeypatch.setattr(names, "_modules", lambda package: [absent] if package is names.contestants else PROBLEMS)
    if hasattr(os, "sched_setaffinity"):
        monkeypatch.setattr(os, "sched_setaffinity", lambda *_: None)
    with pytest.raises(ValueError, match="none of the contestants asked for is installed"):
        sessions.run(problems=("decay",), contestants=("toy, right",), tolerances=(1e-3,), output=tmp_path)
    assert "toy, right is left out: no_such_package is not installed" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


PROBLEMS = [types.SimpleNamespace(PROBLEMS=[PROBLEM])]


def test_what_is_there_is_not_measured_again(toys, reference, tmp_path):
    def go(contestants, tolerances):
        calls.clear()
        sessions.measure_problem(
            PROBLEM, contestants, tolerances, "float64", tmp_path, reference_of=lambda _: reference
        )
        return [rtol for _, rtol, _, _ in calls]

    right, wrong = toys
    assert go([right], [1e-3]) == [1e-3]
    assert go([right], [1e-3, 1e-6]) == [1e-6]
    assert go(toys, [1e-3, 1e-6]) == [1e-3, 1e-6]
    assert go(toys, [1e-3, 1e-6]) == []
    kept = results.load(results.path_of(tmp_path, "decay", "toy, right", "float64"))
    assert [(it.rtol, it.session) for it in kept.measurements] == [(1e-3, 0), (1e-6, 1)]
    assert len(kept.sessions) == 2
    assert kept.sessions[0].packages["torch"] == torch.__version__.partition("+")[0]
    assert {it.contestant for it in results.load_all(tmp_path)} == {right.name, wrong.name}
    sessions.measure_problem(PROBLEM, [right], [1e-3], "float32", tmp_path, reference_of=lambda _: reference)
    assert [it.dtype for it in results.load_all(tmp_path) if it.contestant == right.name] == ["float32", "float64"]


def test_a_long_step_takes_part_in_one_round(reference, monkeypatch):
    def prepare(*arguments, **options):
        step = by_hand(*arguments, **options)

        def counted():
            steps.append(1)
            return step()

        return counted

    steps = []
    monkeypatch.setattr(measuring, "LONG", -1.0)
    monkeypatch.setattr(measuring, "TURN", 0.0)
    measurement = measure(Contestant("long", 1.0, prepare, (), is_small=False), reference)
    assert len(measurement.seconds) == 1
    # The first, that for memory, and the one that is timed.
    assert len(steps) == 3


def test_after_a_step_that_took_too_long_nothing_tighter_is_tried(toys, reference, tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "TOO_LONG", -1.0)
    sessions.measure_problem(PROBLEM, toys[:1], [1e-3, 1e-6], "float64", tmp_path, reference_of=lambda _: reference)
    assert [rtol for _, rtol, _, _ in calls] == [1e-3]


@pytest.mark.parametrize("vain", [0.0, 1000.0])
def test_what_fails_slowly_is_not_tried_at_tighter_tolerances(vain, reference, tmp_path, monkeypatch):
    def prepare(*_, rtol, **__):
        tried.append(rtol)
        raise RuntimeError("too many steps")

    tried = []
    monkeypatch.setattr(measuring, "VAIN", vain)
    failing = Contestant("fails", None, prepare, (), is_small=False)
    sessions.measure_problem(PROBLEM, [failing], [1e-3, 1e-6], "float64", tmp_path, reference_of=lambda _: reference)
    assert tried == ([1e-3] if vain == 0 else [1e-3, 1e-6])


def test_compilation_is_no_part_of_the_time_that_a_failure_takes(reference, tmp_path, monkeypatch):
    def prepare(*_, rtol, **__):
        compiled = []

        def step():
            if not compiled:
                compiled.append(rtol)
                time.sleep(0.2)
            raise RuntimeError("too many steps")

        tried.append(rtol)
        return step

    tried = []
    monkeypatch.setattr(measuring, "VAIN", 0.1)
    failing = Contestant("fails", None, prepare, (), is_small=False)
    sessions.measure_problem(PROBLEM, [failing], [1e-3, 1e-6], "float64", tmp_path, reference_of=lambda _: reference)
    assert tried == [1e-3, 1e-6]
    [kept] = results.load_all(tmp_path)
    assert all(it.first_seconds > 0.2 > it.failed_seconds for it in kept.measurements)


@pytest.mark.parametrize("is_told", [False, True])
def test_what_is_given_up_is_slow_and_is_not_tried_again(is_told, reference, tmp_path, monkeypatch):
    def prepare(*_, rtol, **__):
        def step():
            tried.append(rtol)
            try:
                time.sleep(60)
            except measuring.TooLong as error:
                if is_told:
                    raise ValueError(f"cannot be compiled (TooLong: {error})") from error
                raise

        return step

    tried = []
    monkeypatch.setattr(measuring, "LIMIT", 0.05)
    monkeypatch.setattr(measuring, "VAIN", 0.01)
    slow = Contestant("slow", None, prepare, (), is_small=False)
    sessions.measure_problem(PROBLEM, [slow], [1e-3, 1e-6], "float64", tmp_path, reference_of=lambda _: reference)
    assert tried == [1e-3]
    [[measurement]] = [it.measurements for it in results.load_all(tmp_path)]
    assert measurement.failed_seconds is None
    assert measuring.is_slow(measurement)


@pytest.mark.parametrize("kind", [NotImplementedError, ImportError, ModuleNotFoundError])
def test_a_way_that_the_installed_version_lacks_is_skipped(kind, reference, tmp_path, capsys):
    def prepare(*_, **__):
        raise kind("thing 1.0 has no such way")

    lacking = Contestant("thing, new", None, prepare, (), is_small=True)
    sessions.measure_problem(PROBLEM, [lacking], [1e-3], "float64", tmp_path, reference_of=lambda _: reference)
    assert "thing, new is left out: thing 1.0 has no such way" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_file_that_holds_something_else_is_refused(tmp_path):
    path = results.path_of(tmp_path, "decay", "toy, right", "float64")
    path.write_text(json.dumps({"problem": "decay"}))
    with pytest.raises(ValueError, match=r"cannot be read as results, so move it away: .*lacks 'agreement'"):
        results.load(path)


def test_seconds_are_those_of_one_step_though_a_turn_has_several(monkeypatch):
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(measuring.time, "process_time", lambda: clock.now)

    def step():
        clock.now += 0.005

    assert measuring._turn(types.SimpleNamespace(step=step, repetitions=4)) == pytest.approx(0.005)
