"""`compare` tells the ways apart by what they take and err, and says which are on the front."""

import importlib.util
import math
from unittest import mock

import pytest
import torch
import torchdiffeq
from problems import Linear, Network, Pair, random

import torchadjoint
from torchadjoint import compare, comparing

T = torch.linspace(0, 1, 4)
QUICK = dict(rtol=1e-3, atol=1e-4, repeats=2)


def squares(y):
    pieces = y if isinstance(y, tuple) else (y,)
    return sum(piece.pow(2).sum() for piece in pieces)


@pytest.fixture(scope="module")
def network():
    return compare(Network(dtype=torch.float32), random(4, 3, dtype=torch.float32), T, squares, **QUICK)


def test_every_way_is_a_row_with_all_its_numbers(network):
    assert [row.way for row in network.rows] == [
        "default", "per-tensor", "seminorm", "seminorm, warm start", "discrete", "discrete, all stages kept",
        "torchdiffeq, adjoint", "torchdiffeq, through the solver",
    ]  # fmt: skip
    for row in network.rows:
        assert row.method == "dopri5"
        assert not row.failure
        assert row.forward_nfe == network.rows[0].forward_nfe
        assert row.milliseconds > 0
        assert row.mebibytes > 0
        assert 0 < row.error < 0.01


def test_counts_are_those_of_the_solves(network):
    by_way = {row.way: row for row in network.rows}
    y0 = random(4, 3, dtype=torch.float32).requires_grad_()
    for way in ("seminorm", "discrete"):
        solution = torchadjoint.solve(Network(dtype=torch.float32), y0, T, rtol=1e-3, atol=1e-4, adjoint=way)
        squares(solution.y).backward()
        counted = (by_way[way].forward_nfe, by_way[way].backward_nfe)
        assert counted == (solution.statistics.forward.nfe, solution.statistics.backward.nfe)
    assert by_way["torchdiffeq, adjoint"].backward_nfe == by_way["per-tensor"].backward_nfe
    assert by_way["torchdiffeq, through the solver"].backward_nfe is None


def test_the_reference_is_the_true_gradient():
    """Of a linear field, against the derivative of its exact solution."""
    func, y0 = Linear(random(3, 3)), random(3)
    found = compare(func, y0, T.double(), squares, **QUICK, methods=("dopri8",))
    start = y0.clone().requires_grad_()
    exact = torch.autograd.grad(squares(func.exact(start, T.double())), [func.matrix, start])
    solution = torchadjoint.solve(func, start, T.double(), rtol=1e-3, atol=1e-4, method="dopri8", adjoint="discrete")
    ours = torch.autograd.grad(squares(solution.y), [func.matrix, start])
    exact, ours = (torch.cat([tensor.reshape(-1) for tensor in pair]) for pair in (exact, ours))
    expected = ((ours - exact).norm() / exact.norm()).item()
    [discrete] = [row for row in found.rows if row.way == "discrete"]
    assert discrete.error == pytest.approx(expected, rel=0.05, abs=10 * found.reference_error)
    assert found.reference_error < 1e-5


def test_the_front_is_what_nothing_beats_in_both(network):
    assert any(row.is_on_front for row in network.rows)
    for row in network.rows:
        others = [other for other in network.rows if other is not row]
        beaten = any(other.milliseconds <= row.milliseconds and other.error <= row.error for other in others)
        assert row.is_on_front == (not beaten)


def test_it_prints_as_a_table_and_as_html(network):
    text = str(network)
    assert text.splitlines()[0].split() == ["way", "method", "NFE", "ms", "MiB", "error"]
    assert "seminorm, warm start" in text
    assert network.advice in text
    assert "On the front" in network.advice or "The fastest is also" in network.advice
    page = network._repr_html_()
    assert page.count("<tr>") == 1 + len(network.rows)
    assert "<table>" in page


def test_each_number_stands_under_its_heading():
    rows = [
        comparing.Row("one", "dopri5", 10, 20, milliseconds=2.0, mebibytes=7.0, error=0.5, is_on_front=True),
        comparing.Row("other", "bosh3", 30, None, milliseconds=5.0, mebibytes=3.0, error=0.25, is_on_front=True),
    ]
    assert str(comparing.Comparison(rows, 1e-9)).splitlines() == [
        "way    method  NFE      ms  MiB   error",
        "one    dopri5  10 + 20  2   7.00  5.0e-01  *",
        "other  bosh3   30       5   3.00  2.5e-01  *",
        "",
        "On the front of error and time the fastest is one with dopri5 (2 ms, error 5.0e-01), the most exact "
        "other with bosh3 (5 ms, error 2.5e-01).",
        "Errors are from a float64 reference, on which two ways agree to 1e-09. *: on the front.",
    ]


def test_times_are_medians_in_milliseconds_and_memory_is_in_mebibytes(monkeypatch):
    monkeypatch.setattr(comparing, "_peak_memory", lambda *_: 3 * 2**20)
    trial = comparing._Trial("seminorm", "dopri5", torchadjoint.solve)
    y0 = random(4, 3, dtype=torch.float32)
    trial.warm_up(Network(dtype=torch.float32), y0, T, squares, torch.ones(1, dtype=torch.float64))
    trial.seconds = [9.0, 1.0, 2.0]
    assert (trial.row().milliseconds, trial.row().mebibytes) == (2000.0, 3.0)


def test_each_way_is_what_its_name_says(network):
    by_way = {row.way: row for row in network.rows}
    assert by_way["discrete, all stages kept"].backward_nfe == 0 < by_way["discrete"].backward_nfe
    assert by_way["seminorm, warm start"].backward_nfe < by_way["seminorm"].backward_nfe
    assert 0 < network.reference_error < 1e-4, "two ways agree, and are two"
    for name, options in comparing.WAYS.items():
        adjoint = options["adjoint"]
        assert (adjoint if isinstance(adjoint, str) else adjoint.name) == name.split(",")[0]
        assert getattr(adjoint, "warm_start", False) == ("warm start" in name)
        assert options.get("compile", False) == ("solve" if "compiled solve" in name else "compiled" in name)


def test_a_way_that_fails_is_a_row_that_says_why():
    func, y0 = Network(dtype=torch.float32), random(3, dtype=torch.float32)
    found = compare(func, y0, T, squares, **QUICK, methods=("tsit5", "bosh3"))
    failed = {(row.way, row.method): row.failure for row in found.rows if row.failure}
    assert set(failed) == {(way, "tsit5") for way in comparing.TORCHDIFFEQ}  # it has none
    assert "Invalid method" in failed["torchdiffeq, adjoint", "tsit5"]
    assert "Invalid method" in str(found)


def test_backward_options_are_torchdiffeqs_too():
    options = QUICK | dict(repeats=1, adjoint_rtol=1e-7, adjoint_atol=1e-8, adjoint_options={})
    rows = {row.way: row for row in compare(Network(), random(4, 3), T.double(), squares, **options).rows}
    assert not any(row.failure for row in rows.values())
    assert rows["torchdiffeq, adjoint"].backward_nfe == rows["per-tensor"].backward_nfe > rows["default"].forward_nfe


def test_tuple_states_and_options_of_the_solve(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # no torchdiffeq
    found = compare(Pair(), Pair.start(), T.double(), squares, **QUICK, methods=["dopri5", "rk4"], jump_t=[0.5])
    assert {row.way for row in found.rows} == {way for way in comparing.WAYS if "compiled" not in way}
    assert ("seminorm, warm start", "rk4") not in {(row.way, row.method) for row in found.rows}
    assert all(math.isfinite(row.error) for row in found.rows)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (dict(y0=[1.0]), r"y0 is \[1.0\], but must be a tensor or a tuple of tensors"),
        (dict(compile="steps"), "compile is 'steps', but must be True or False or 'solve'"),
        (dict(adjoint_rtol="a"), "adjoint_rtol is 'a', but must be a finite number above 0"),
        (dict(loss=lambda y: 0 * y.sum()), "the gradient of the loss is zero here"),
        (dict(adjoint_params=()), "adjoint_params is given, but compare chooses it: the gradient is that of all"),
        (dict(func=lambda t, y: y), "func is <function.*, but must be an nn.Module"),
        (dict(loss=3), "loss is 3, but must be a function of the solution"),
        (dict(methods="dopri5"), "methods is 'dopri5', but must be a sequence of methods"),
        (dict(methods=("rk45",)), "methods is 'rk45', but must be one of 'dopri5'"),
        (dict(methods=("rk45",), t=torch.linspace(0, 1, 3)), "methods is 'rk45', but must be one of 'dopri5'"),
        (dict(adjoint="seminorm"), "adjoint is given, but compare chooses it: every way is tried"),
        (dict(method="bosh3"), "method is given, but compare chooses it: give methods"),
        (dict(loss=torch.square), r"loss returned shape \(.*, 3\), but must return a tensor without dimensions"),
        (dict(loss=lambda y: 1.0), "loss returned a float, but must return a tensor without dimensions"),
        (dict(repeats=0), "repeats is 0"),
        (dict(rtol=-1.0), "rtol is -1.0"),
        (dict(atol=[1e-3, 1e-4]), r"atol is \[0.001, 0.0001\], but must be a finite number above 0"),
        (dict(y0=torch.ones(3) * torch.nan), "the reference cannot be solved: the state is not finite"),
    ],
)
def test_bad_arguments_are_named(changes, sentence):
    given = {"func": Network(dtype=torch.float32), "y0": torch.ones(3), "t": T, "loss": squares, **QUICK, **changes}
    with pytest.raises(ValueError, match=sentence):
        compare(given.pop("func"), given.pop("y0"), given.pop("t"), given.pop("loss"), **given)


@pytest.mark.gpu
def test_on_a_gpu_the_allocator_counts_the_memory():
    func = Network(dtype=torch.float32).cuda()
    found = compare(func, random(4, 3, dtype=torch.float32).cuda(), T.cuda(), squares, **QUICK)
    for row in found.rows:
        assert not row.failure
        assert row.milliseconds > 0
        assert row.mebibytes > 0
        assert 0 < row.error < 0.01


def test_a_gradient_that_is_no_number_is_on_no_front():
    row = comparing.Row("a", "rk4", milliseconds=1.0, error=math.nan)
    assert not comparing._placed(row, [row]).is_on_front


def test_the_reference_has_none_of_the_fixed_steps(network):
    options = dict(step_size=0.1, adjoint_options=dict(step_size=0.05), adjoint_method="rk4")
    arguments = Network(dtype=torch.float32), random(4, 3, dtype=torch.float32), T, squares
    found = compare(*arguments, **QUICK, methods=("rk4",), **options)
    assert found.reference_error == network.reference_error
    nfe = {row.way: row.forward_nfe for row in found.rows}
    assert [nfe[way] for way in comparing.TORCHDIFFEQ] == [40, 40], "ten steps of four evaluations"


def test_torchdiffeq_gets_the_jumps(monkeypatch):
    spies = {name: mock.Mock(wraps=getattr(torchdiffeq, name)) for name in comparing.TORCHDIFFEQ.values()}
    for name, spy in spies.items():
        monkeypatch.setattr(torchdiffeq, name, spy)
    monkeypatch.setattr(comparing, "WAYS", {})
    options = dict(jump_t=[0.5], max_num_steps=99, adjoint_options=dict(jump_t=[0.25]))
    found = compare(Network(), random(4, 3), T.double(), squares, **QUICK | dict(repeats=1), **options)
    assert not any(row.failure for row in found.rows)
    by_adjoint, through = (spies[name].call_args.kwargs for name in ("odeint_adjoint", "odeint"))
    for given, jump in (
        (by_adjoint["options"], 0.5),
        (by_adjoint["adjoint_options"], 0.25),
        (through["options"], 0.5),
    ):
        torch.testing.assert_close(given["jump_t"], torch.tensor([jump], dtype=torch.float64))
    assert by_adjoint["options"]["max_num_steps"] == through["options"]["max_num_steps"] == 99


def test_the_reference_of_a_module_with_tensors_as_attributes():
    class Plane(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.matrix = torch.tensor([[-0.1, 2.0], [-2.0, -0.1]])
            self.rate = torch.nn.Parameter(torch.ones(()))

        def forward(self, t, y):
            return self.rate * y @ self.matrix

    assert all(row.error < 0.01 for row in compare(Plane(), torch.ones(1, 2), T, squares, **QUICK).rows)


def test_a_module_that_cannot_be_copied_is_a_sentence(network):
    func = Network(dtype=torch.float32)
    func.context = 2 * func.first.weight
    with pytest.raises(ValueError, match="func cannot be copied for the reference: "):
        compare(func, random(4, 3, dtype=torch.float32), T, squares, **QUICK)


def test_a_tighter_reference_has_its_backward_tolerances_too():
    arguments = Network(dtype=torch.float32), random(4, 3, dtype=torch.float32), T, squares
    assert compare(*arguments, **QUICK, adjoint_rtol=1e-3, adjoint_atol=1e-4).reference_error < 1e-5


def test_every_way_is_timed_as_often_as_asked_for():
    calls = []

    def counted(y):
        calls.append(1)
        return squares(y)

    numbers = []
    for repeats in (1, 3):
        calls.clear()
        rows = compare(
            Network(dtype=torch.float32), random(4, 3, dtype=torch.float32), T, counted, **{**QUICK, "repeats": repeats}
        ).rows
        numbers.append(len(calls))
    assert numbers[1] - numbers[0] == 2 * len(rows)


def test_a_loss_may_have_parameters_of_the_solutions_dtype():
    readout = torch.nn.Linear(3, 1)
    arguments = Network(dtype=torch.float32), random(4, 3, dtype=torch.float32), T
    found = compare(*arguments, lambda y: readout(y[-1]).mean(), **QUICK)
    assert all(0 < row.error < 0.01 for row in found.rows)
    assert found.reference_error < 1e-5


@pytest.mark.usefixtures("traced")
def test_compiled_ways_are_tried_if_asked_for():
    func, y0 = Network(dtype=torch.float32), random(4, 3, dtype=torch.float32)
    ways = [
        {row.way for row in compare(func, y0, T, squares, compile=compile, **QUICK).rows}
        for compile in (False, True, "solve")
    ]
    assert {way for way in ways[1] if "compiled" in way} == ways[1] - ways[0] != set()
    assert ways[2] - ways[1] == {"discrete, compiled solve"}
