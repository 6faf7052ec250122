"""Parts of a state that stand in no right-hand side: the same gradient with a smaller backward state."""

import math

import pytest
import torch
from problems import F64, Plain, random
from torch import nn

from flows.continuous import FlowField
from flows.networks import ConcatSquash
from torchadjoint import ADJOINTS, SolverError, solve

BACKSOLVES = sorted(ADJOINTS.keys() - {"as-published", "discrete"})


class Decay(nn.Module):
    """z' = -k z with the integrals l' = scale sum(z^2) and m' = k z, which nothing reads."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.k = nn.Parameter(torch.tensor(1.5, dtype=F64))
        self.scale = scale

    def forward(self, t, state):
        z, *_ = state
        return -self.k * z, self.scale * z.pow(2).sum(dim=1), self.k * z


def decayed(t, *, scale=1.0, requires_grad=True, **options):
    func, z0 = Decay(scale), random(4, 3).requires_grad_(requires_grad)
    start = (z0, torch.full((4,), 0.25, dtype=F64, requires_grad=True), torch.zeros(4, 3, dtype=F64))
    return func, start, solve(func, start, t, **options)


@pytest.mark.parametrize("adjoint", [*BACKSOLVES, "discrete"])
def test_values_and_gradients_are_the_closed_form(adjoint):
    t = torch.tensor([0.0, 0.3, 0.8], dtype=F64)
    options = dict(rtol=1e-10, atol=1e-10, adjoint=adjoint, integrals=2)
    func, (z0, l0, _), solution = decayed(t, **options)
    weights = random(3, 4)
    _, found, _ = solution.y

    def exact(z0, l0, k):
        return torch.stack([l0 + z0.pow(2).sum(dim=1) * (1 - torch.exp(-2 * k * time)) / (2 * k) for time in t])

    torch.testing.assert_close(found, exact(z0, l0, func.k), rtol=1e-8, atol=1e-8)
    gradients = torch.autograd.grad((found * weights).sum(), [z0, l0, func.k])
    expected = torch.autograd.grad((exact(z0, l0, func.k) * weights).sum(), [z0, l0, func.k])
    torch.testing.assert_close(gradients, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("wrap", [Plain, lambda func: func], ids=["autograd", "fused"])
@pytest.mark.parametrize("adjoint", BACKSOLVES)
def test_gradients_of_a_flow_are_those_of_the_ordinary_adjoint(adjoint, wrap):
    found = []
    for integrals in (0, 1):
        torch.manual_seed(0)
        func, x = FlowField(ConcatSquash([2, 8, 8, 2], "tanh").double(), None), random(5, 2).requires_grad_()
        t = torch.tensor([0.0, 0.2, 0.5], dtype=F64)
        options = dict(rtol=1e-9, atol=1e-9, adjoint=adjoint, integrals=integrals)
        points, changes = solve(wrap(func), (x, x.new_zeros(5)), t, **options).y
        (points[1:].pow(3).sum() + (changes * random(3, 5)).sum()).backward()
        found.append([x.grad, *(parameter.grad for parameter in func.parameters())])
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-7)


def test_output_times_have_gradients():
    gradients = []
    for integrals in (0, 2):
        t = torch.tensor([0.0, 0.3, 0.8], dtype=F64, requires_grad=True)
        _, _, solution = decayed(t, rtol=1e-10, atol=1e-10, integrals=integrals)
        (solution.y[0].sum() + (solution.y[1] * random(3, 4)).sum()).backward()
        gradients.append(t.grad)
    torch.testing.assert_close(*gradients, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize(("adjoint", "num_more"), [("seminorm", 0), ("default", 2)])
def test_the_backward_state_is_without_integrals_and_their_adjoints(adjoint, num_more):
    sizes, parts = set(), set()

    def observe(attempt):
        if attempt.direction == "backward":
            sizes.add(len(attempt.state))
            parts.update(attempt.errors)

    _, _, solution = decayed(torch.tensor([0.0, 1.0], dtype=F64), adjoint=adjoint, integrals=2, observer=observe)
    solution.y[1][-1].sum().backward()
    # z and its adjoint; the adjoints of k and of t.
    assert sizes == {2 * 12 + num_more}
    assert {"z", "a_z"} <= parts


@pytest.mark.parametrize("adjoint", ["seminorm", "discrete"])
def test_integrals_that_are_not_weighed_set_no_steps(adjoint):
    def counts(**options):
        times = torch.tensor([0.0, 2.0], dtype=F64)
        _, _, solution = decayed(times, rtol=1e-6, atol=1e-6, adjoint=adjoint, **options)
        solution.y[1][-1].sum().backward()
        return solution.statistics.forward.nfe, solution.statistics.backward.nfe

    bare, huge = (counts(scale=scale, integrals=2, weigh_integrals=False) for scale in (1.0, 1e6))
    assert bare[0] == huge[0]
    assert counts(scale=1e6, integrals=2)[0] > huge[0]
    if adjoint == "seminorm":
        # Backward they are never weighed, forward unless one says so.
        assert counts(scale=1.0, integrals=2)[1] == bare[1] < counts(scale=1.0)[1]


class ReadsItsIntegral(nn.Module):
    def __init__(self):
        super().__init__()
        self.k = nn.Parameter(torch.tensor(1.0, dtype=F64))

    def forward(self, t, state):
        z, integral = state
        return -self.k * z + integral, z


@pytest.mark.parametrize("adjoint", BACKSOLVES)
def test_a_function_that_reads_its_integrals_gets_no_wrong_gradient(adjoint):
    z0 = random(3).requires_grad_()
    t = torch.tensor([0.0, 1.0], dtype=F64)
    solution = solve(ReadsItsIntegral(), (z0, torch.zeros(3, dtype=F64)), t, adjoint=adjoint, integrals=1)
    with pytest.raises(SolverError, match="not finite"):
        solution.y[0][-1].sum().backward()


@pytest.mark.parametrize("is_trained", [True, False])
@pytest.mark.parametrize("adjoint", BACKSOLVES)
def test_nor_by_fixed_steps(adjoint, is_trained):
    func, z0 = ReadsItsIntegral().requires_grad_(is_trained), random(3).requires_grad_()
    t = torch.tensor([0.0, 1.0], dtype=F64)
    options = dict(adjoint=adjoint, integrals=1, method="rk4", step_size=0.1)
    solution = solve(func, (z0, torch.zeros(3, dtype=F64)), t, **options)
    with pytest.raises(SolverError, match="not finite: check that the vector field reads none of the integrals"):
        solution.y[0][-1].sum().backward()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (dict(integrals=3), "integrals is 3, but y0 is a tuple of 3 tensors: at least one in front"),
        (dict(integrals=-1), "integrals is -1"),
        (dict(integrals=1.5), "integrals is 1.5"),
        (dict(weigh_integrals=False), "weigh_integrals is False, but there are no integrals"),
        (dict(integrals=1, weigh_integrals="no"), "weigh_integrals is 'no'"),
        (dict(integrals=1, compile=True), "integrals and compile are given"),
        (dict(integrals=1, compile="solve", adjoint="discrete"), "integrals and compile are given"),
        (
            dict(integrals=1, adjoint_method="rk4", adjoint_options=dict(grid_constructor=lambda func, y, t: t)),
            "integrals and grid_constructor are given",
        ),
        (dict(integrals=1, norm=lambda state: state[0].norm()), "integrals and norm are given"),
    ],
)
def test_what_integrals_cannot_be_is_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        decayed(torch.tensor([0.0, 1.0], dtype=F64), **options)


def test_a_state_of_one_tensor_has_no_integrals():
    with pytest.raises(ValueError, match="integrals is 1, but y0 is no tuple"):
        solve(Decay(), random(3), torch.tensor([0.0, math.pi], dtype=F64), integrals=1)


class SlowsItsIntegral(nn.Module):
    """z' = -k z and l' = z - l / 2: products with it are finite whatever l is."""

    def __init__(self):
        super().__init__()
        self.k = nn.Parameter(torch.tensor(1.0, dtype=F64))

    def forward(self, t, state):
        z, integral = state
        return -self.k * z, z - 0.5 * integral


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
@pytest.mark.parametrize("adjoint", BACKSOLVES)
def test_nor_one_that_reads_them_linearly(adjoint, method):
    z0 = torch.ones(3, dtype=F64, requires_grad=True)
    start, t = (z0, torch.zeros(3, dtype=F64)), torch.tensor([0.0, 1.0], dtype=F64)
    solution = solve(SlowsItsIntegral(), start, t, adjoint=adjoint, integrals=1, method=method)
    with pytest.raises(SolverError, match="not constant: check that the vector field reads none of the integrals"):
        solution.y[1][-1].sum().backward()
    # Where all is weighed there is no such promise: 2 exp(-1/2) (1 - exp(-1/2)).
    solve(SlowsItsIntegral(), start, t, adjoint=adjoint).y[1][-1].sum().backward()
    torch.testing.assert_close(z0.grad, torch.full((3,), 0.47730, dtype=F64), rtol=1e-4, atol=0)


def test_a_whole_number_of_integrals_may_be_a_float():
    t = torch.tensor([0.0, 1.0], dtype=F64)
    gradients = []
    for integrals in (2, 2.0):
        _, (z0, *_), solution = decayed(t, integrals=integrals)
        solution.y[1][-1].sum().backward()
        gradients.append(z0.grad)
    assert torch.equal(*gradients)
