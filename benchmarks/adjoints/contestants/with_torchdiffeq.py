"""torchdiffeq as it is, by dopri5, its default. Its own jumps are told to both directions.

Through the solver, autograd keeps all that the solve did, so that the gradient evaluates nothing. torchdiffeq has no
compiled solve; its users give their field to torch.compile.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torchdiffeq

from ..contract import Problem, Step
from ..with_torch import CountingField, options_of, prepare_step

PACKAGES = ()


@dataclass(frozen=True)
class Way:
    """Which of torchdiffeq's functions, the norm of its backward solve, where None is its default, and the field."""

    is_adjoint: bool
    norm: str | None = None
    is_compiled: bool = False


WAYS = {
    "torchdiffeq, through the solver": Way(is_adjoint=False),
    "torchdiffeq, through the solver, compiled field": Way(is_adjoint=False, is_compiled=True),
    "torchdiffeq, adjoint": Way(is_adjoint=True),
    "torchdiffeq, adjoint, seminorm": Way(is_adjoint=True, norm="seminorm"),
}
SMALL = ("torchdiffeq, through the solver", "torchdiffeq, adjoint", "torchdiffeq, adjoint, seminorm")


class CompiledField(CountingField):
    """The same, compiled by torch: its function alone, as the count would be compiled anew whenever it changes."""

    def __init__(self, function, parameters, constants):
        super().__init__(torch.compile(function, fullgraph=True, dynamic=False), parameters, constants)


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

    return prepare_step(problem, by_torchdiffeq, dtype, kind=CompiledField if way.is_compiled else CountingField)
