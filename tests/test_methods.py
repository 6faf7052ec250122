"""Every method is of the order that it says, forward and in the gradient; a table of one's own is as good as ours."""

import math
from collections import Counter
from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest
import torch
from problems import F64, Growth, Linear, Network, differentiate, differentiate_exactly, distance, random, steps

from common.config import SAME_STEPS
from common.torchdiffeq_reference import solve as solve_by_torchdiffeq
from torchadjoint import METHODS, RungeKutta, solve

ADAPTIVE = {name: method for name, method in METHODS.items() if method.is_adaptive}
FIXED = {name: method for name, method in METHODS.items() if not method.is_adaptive}
methods = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
T = torch.tensor([0.0, 1.0], dtype=F64)


@cache
def trees(order):
    """All rooted trees of so many nodes, each the sorted tuple of the trees that hang from its root."""
    return sorted({tuple(sorted(branches)) for branches in _branches(order - 1, order - 1)})


def _branches(total, largest):
    if total == 0:
        yield ()
    for size in range(1, min(total, largest) + 1):
        for tree in trees(size):
            yield from ((tree, *others) for others in _branches(total - size, size))


def size(tree):
    return 1 + sum(map(size, tree))


def density(tree):
    return size(tree) * math.prod(map(density, tree))


def elementary_weights(method, tree):
    """Phi_i of each stage: the product over the branches of sum_j a_ij Phi_j (Butcher's order conditions)."""
    matrix = torch.tensor(method.stage_matrix, dtype=F64)
    products = torch.ones(method.num_stages, dtype=F64)
    for branch in tree:
        products = products * (matrix @ elementary_weights(method, branch))
    return products


def residuals(method, weights, order, end=1.0):
    """How far the weights are from the order conditions of `order`, for a solution at t0 + end dt."""
    weights = torch.tensor(weights, dtype=F64)
    return [
        abs(weights @ elementary_weights(method, tree) - end**order / density(tree)).item() for tree in trees(order)
    ]


def test_there_are_as_many_trees_as_there_should_be():
    assert [len(trees(order)) for order in range(1, 7)] == [1, 1, 2, 4, 9, 20]
    assert Counter(map(size, trees(5))) == {5: 9}


@methods
def test_the_step_is_of_its_order_and_of_no_higher(method):
    for order in range(1, method.order + 1):
        assert max(residuals(method, method.step_weights, order)) < 1e-12
    assert max(residuals(method, method.step_weights, method.order + 1)) > 5e-6


@pytest.mark.parametrize("method", ADAPTIVE.values(), ids=ADAPTIVE)
def test_the_embedded_solution_is_of_one_order_less(method):
    embedded = [b - e for b, e in zip(method.step_weights, method.error_weights, strict=True)]
    for order in range(1, method.order):
        assert max(residuals(method, embedded, order)) < 1e-12
    assert max(residuals(method, embedded, method.order)) > 1e-6


@methods
def test_the_dense_output_is_of_one_order_less_and_meets_the_step_at_its_ends(method):
    """Of order four at most, as it is a quartic."""
    for order in range(1, min(method.order, 5)):
        assert max(residuals(method, method.midpoint_weights, order, end=0.5)) < 1e-10
    assert method.interpolation_weights(0.0) == pytest.approx([0.0] * method.num_stages, abs=1e-14)
    assert method.interpolation_weights(1.0) == pytest.approx(method.step_weights, abs=1e-14)
    assert method.interpolation_weights(0.5) == pytest.approx(method.midpoint_weights, abs=1e-14)


def errors(method, adjoint, num_steps):
    """Of the solutions of two problems, and of their gradients, in steps of one size, whatever their error is."""
    size = 1 / num_steps
    ends = torch.linspace(0, 1, num_steps + 1, dtype=F64)
    options = dict(step_t=ends, first_step=1.0, rtol=1e9, atol=1e9) if method.is_adaptive else dict(step_size=size)
    found = []
    # A constant of the error may vanish on one of them.
    for func in (Growth(), Linear(random(3, 3))):
        ours = differentiate(func, random(3), T, method=method, adjoint=adjoint, **options)
        assert ours.statistics.forward.num_accepted == num_steps
        exact = differentiate_exactly(func, random(3), T)
        found.append((distance(ours.y[-1], exact.y[-1]), distance(ours.gradient, exact.gradient)))
    return [math.hypot(*of_both) for of_both in zip(*found, strict=True)]


@methods
@pytest.mark.parametrize("adjoint", ["seminorm", "default", "discrete"])
def test_solution_and_gradient_converge_at_the_order_of_the_method(method, adjoint):
    fewest = {5: 6, 8: 2}.get(method.order, 16)  # where rounding does not show
    found = [errors(method, adjoint, fewest * factor) for factor in (1, 2, 4)]
    for quantity in zip(*found, strict=True):
        for coarse, fine in pairwise(quantity):
            assert math.log2(coarse / fine) > method.order - 0.5


@pytest.mark.parametrize("method", SAME_STEPS)
def test_forward_steps_and_evaluations_are_torchdiffeqs(method):
    options = dict(rtol=1e-5, atol=1e-7, method=method)
    theirs, ours = (
        differentiate(Network(), random(4, 3), T * 3, solver=solver, **options).statistics.forward
        for solver in ("torchdiffeq", "torchadjoint")
    )
    assert ours.nfe == theirs.nfe
    assert ours.accept_times == pytest.approx(theirs.accept_times, abs=1e-9)
    assert ours.reject_times == pytest.approx(theirs.reject_times, abs=1e-9)


def test_the_reference_refuses_methods_that_torchdiffeq_lacks_or_has_wrong():
    with pytest.raises(ValueError, match=r"method is 'tsit5', but solver='torchdiffeq' has dopri5, bosh3"):
        solve_by_torchdiffeq(Growth(), random(3), T, method="tsit5")


def test_a_table_of_ones_own_is_used_as_it_is():
    own = replace(METHODS["bosh3"], name="mine")
    assert isinstance(own, RungeKutta)
    options = dict(rtol=1e-4, atol=1e-6)
    mine, named = (differentiate(Network(), random(4, 3), T, method=method, **options) for method in (own, "bosh3"))
    assert steps(mine.statistics) == steps(named.statistics)
    assert torch.equal(mine.gradient, named.gradient)
    assert mine.statistics.forward.nfe == 2 + 3 * (
        mine.statistics.forward.num_accepted + mine.statistics.forward.num_rejected
    )


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (dict(nodes=(0.0, 1 / 2, 3 / 4, 0.9)), "the first 0 and the last 1"),
        (dict(stage_weights=((), (1 / 2,), (0.0, 3 / 4), (2 / 9, 1 / 3, 1 / 9))), "must add up to 1.0"),
        (dict(stage_weights=((), (1 / 2,), (3 / 4,), (2 / 9, 1 / 3, 4 / 9))), "must have 0, 1, ..., 3 entries"),
        (dict(error_weights=(1.0, 0.0, 0.0, 0.0)), "must add up to 0.0"),
        (dict(midpoint_weights=(0.5, 0.0)), "it must have 4 error weights and midpoint weights"),
        (dict(order=0), "its order must be at least 1"),
    ],
)
def test_a_wrong_table_is_refused_where_it_is_written(changes, sentence):
    with pytest.raises(ValueError, match=r"the method 'bosh3' cannot be used") as caught:
        replace(METHODS["bosh3"], **changes)
    assert sentence in str(caught.value)


@pytest.mark.parametrize("method", ["implicit_adams", "rk45", None, 3])
def test_what_is_no_method_is_refused(method):
    with pytest.raises(
        ValueError, match=r"method is .*, but must be one of 'dopri5', .*'rk4', or a RungeKutta.*use torchdiffeq"
    ):
        solve(Growth(), random(3), T, method=method)


@pytest.mark.parametrize("name", ["adaptive_heun", "fehlberg2"])
def test_the_error_is_the_difference_from_the_stage_before(name):
    method = METHODS[name]
    expected = [b - before for b, before in zip(method.step_weights, method.stage_matrix[-2], strict=True)]
    assert method.error_weights == pytest.approx(expected, abs=1e-15)


OWN = dict(
    name="own",
    order=2,
    nodes=(0.0, 0.5, 1.0, 1.0),
    stage_weights=((), (0.5,), (0.0, 1.0), (0.5, 0.0, 0.5)),
    error_weights=(-0.5, 0.0, 0.5, 0.0),
    midpoint_weights=(0.25, 0.25, 0.0, 0.0),
)
"""A stage has a weight in the middle of a step alone."""


@pytest.mark.usefixtures("traced")
def test_a_stage_that_only_the_middle_weighs_is_there_when_compiled():
    gradients = []
    for compile in (False, True):
        func, y0 = Network(), random(4, 3).requires_grad_()
        options = dict(method=RungeKutta(**OWN), rtol=1e-3, atol=1e-3, compile=compile)
        solve(func, y0, torch.tensor([0.0, 0.3, 1.0], dtype=F64), **options).y.square().sum().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in func.parameters()]))
    assert distance(*gradients) < 1e-9


def test_a_table_of_lists_is_one_of_tuples():
    lists = {name: [*map(list, value)] if name == "stage_weights" else value for name, value in OWN.items()}
    lists["nodes"], lists["error_weights"] = list(OWN["nodes"]), list(OWN["error_weights"])
    assert RungeKutta(**lists) == RungeKutta(**OWN)
    assert hash(RungeKutta(**lists)) == hash(RungeKutta(**OWN))


@pytest.mark.parametrize(
    "options",
    [
        dict(max_step=0.01),
        dict(safety=0.5),
        dict(step_t=[0.5]),
        dict(adjoint_method="bosh3"),
        dict(adjoint_options=dict(max_num_steps=3)),
    ],
    ids=str,
)
def test_the_reference_refuses_what_it_would_not_hand_on(options):
    [name] = options
    name = {"adjoint_options": "max_num_steps"}.get(name, name)
    with pytest.raises(
        ValueError, match=f"{name} is given, or differs between the two directions, which solver='torchdiffeq'"
    ):
        solve_by_torchdiffeq(Network(), random(3), torch.tensor([0.0, 1.0], dtype=F64), **options)
