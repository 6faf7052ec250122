"""torchdiffeq as it is, by dopri5, its default. Its own jumps are told to both directions.

Through the solver, autograd keeps all that the solve did, so that the gradient evaluates nothing.
"""

from dataclasses import dataclass
from typing import Any

import torchdiffeq

from ..contract import Problem, Step
from ..with_torch import CountingField, options_of, prepare_step

PACKAGES = ()


@dataclass(frozen=True)
class Way:
    """Which of torchdiffeq's functions, and the norm of its backward solve; None is its default."""

    is_adjoint: bool
    norm: str | None = None


WAYS = {
    "torchdiffeq, through the solver": Way(is_adjoint=False),
    "torchdiffeq, adjoint": Way(is_adjoint=True),
    "torchdiffeq, adjoint, seminorm": Way(is_adjoint=True, norm="seminorm"),
}
SMALL = tuple(WAYS)


def prepare(problem: Problem, way: Way, *, rtol: float, atol: float, dtype: str) -> Step:
    """A gradient step by `torchdiffeq.odeint` or `odeint_adjoint`."""
    options = options_of(problem)
    solve, arguments = torchdiffeq.odeint, {}
    if way.is_adjoint:
        norm: dict[str, Any] = {} if way.norm is None else {"norm": way.norm}
        solve, arguments = torchdiffeq.odeint_adjoint, {"adjoint_options": {**options, **norm}}

    def by_torchdiffeq(func, y0, t):
        func.num_evaluations = 0
        y = solve(func, y0, t, rtol=rtol, atol=atol, method="dopri5", options=options, **arguments)
        forward = func.num_evaluations
        return y, lambda: (forward, func.num_evaluations - forward)

    return prepare_step(problem, by_torchdiffeq, dtype, kind=CountingField)
