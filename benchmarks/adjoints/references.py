"""What the gradient of a problem is, in float64, and how far two independent ways agree on it."""

from dataclasses import dataclass

import numpy as np
import torch
import torchdiffeq

from torchadjoint import solve

from .contract import Gradient, Problem, loss
from .with_torch import make_field, options_of, prepare_step, tensor_of

TIGHT = 1e-12
"""rtol of the reference's solves; atol is a hundredth of it."""
MAX_NUM_STEPS = 100_000
"""How many steps the reference's solves may take."""
TRUSTED = 10
"""An error is measured if it is so many times as large as what the two ways differ by."""


@dataclass(frozen=True)
class Reference:
    """The gradient that errors are measured from."""

    gradient: np.ndarray
    """Flat, as `Gradient.flat` has it."""
    agreement: float
    """The relative difference between the two ways."""
    ways: str
    """What they are."""


def refer(problem: Problem) -> Reference:
    """The reference of a problem: where there is no exact solution, by our own `discrete` with dopri8.

    It is checked by another library and its method of the same order, with autograd through the solver; or, where the
    solution is exact, by ours.
    """
    ours = _by_discrete(problem)
    if problem.exact is not None:
        expected, checked, ways = _exactly(problem), ours, "the exact solution; discrete, dopri8"
    else:
        expected, checked = ours, _through_torchdiffeq(problem)
        ways = "discrete, dopri8; torchdiffeq through its dopri8"
    gradient = expected.flat(problem)
    return Reference(gradient, distance(checked.flat(problem), gradient), ways)


def distance(gradient: np.ndarray, expected: np.ndarray) -> float:
    """The norm of the difference over the norm of what is expected."""
    return float(np.linalg.norm(gradient - expected) / np.linalg.norm(expected))


def _by_discrete(problem: Problem) -> Gradient:
    options = options_of(
        problem, adjoint="discrete", method="dopri8", step_t=problem.times[1:], max_num_steps=MAX_NUM_STEPS
    )

    def by_solve(func, y0, t):
        solution = solve(func, y0, t, rtol=TIGHT, atol=TIGHT / 100, **options)
        return solution.y, lambda: (None, None)

    return prepare_step(problem, by_solve, "float64")()


def _through_torchdiffeq(problem: Problem) -> Gradient:
    # Its dense output is of a lower order than its method, so every output time ends a step.
    inner = [time for time in problem.times[1:] if time not in problem.jumps]
    options = options_of(problem, step_t=torch.tensor(inner, dtype=torch.float64), max_num_steps=MAX_NUM_STEPS)

    def by_torchdiffeq(func, y0, t):
        tolerances = dict(rtol=TIGHT, atol=TIGHT / 100)
        return torchdiffeq.odeint(func, y0, t, method="dopri8", options=options, **tolerances), lambda: (None, None)

    return prepare_step(problem, by_torchdiffeq, "float64")()


def _exactly(problem: Problem) -> Gradient:
    y0, times = (tensor_of(value, "float64") for value in (problem.y0, problem.times))
    func = make_field(problem, "float64")
    y0.requires_grad_()
    y = problem.exact(times, y0, dict(func.named_parameters()))
    by_y0, *others = torch.autograd.grad(loss(y), [y0, *func.parameters()])
    return Gradient(by_y0, dict(zip(problem.parameters, others, strict=True)))
