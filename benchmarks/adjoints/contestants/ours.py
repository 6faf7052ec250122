"""The ways of this project's library."""

from dataclasses import dataclass
from typing import Literal

import torch

from torchadjoint import Adjoint, Backsolve, Discrete, solve
from torchadjoint.compiled_loops import IS_TORCH_NEW_ENOUGH, OLDEST_TORCH

from ..contract import Problem, Step
from ..with_torch import options_of, prepare_step

PACKAGES = ()


@dataclass(frozen=True)
class Way:
    """Arguments of `torchadjoint.solve`."""

    adjoint: str | Adjoint
    method: str = "dopri5"
    compile: bool | Literal["solve"] = False


WAYS = {
    "ours, default": Way("default"),
    "ours, per-tensor": Way("per-tensor"),
    "ours, seminorm": Way("seminorm"),
    "ours, seminorm, warm start": Way(Backsolve(warm_start=True)),
    "ours, seminorm, warm start, compiled": Way(Backsolve(warm_start=True), compile=True),
    "ours, discrete": Way("discrete"),
    "ours, discrete, one stage at a time": Way(Discrete(linearised="stage")),
    "ours, discrete, all stages kept": Way(Discrete(linearised="solve")),
    "ours, discrete, compiled": Way("discrete", compile=True),
    "ours, discrete, bosh3": Way("discrete", "bosh3"),
    "ours, discrete, tsit5": Way("discrete", "tsit5"),
    "ours, discrete, tsit5, compiled solve": Way("discrete", "tsit5", compile="solve"),
    "ours, discrete, dopri8": Way("discrete", "dopri8"),
}
SMALL = (
    "ours, default",
    "ours, seminorm",
    "ours, seminorm, warm start",
    "ours, discrete",
    "ours, discrete, all stages kept",
    "ours, discrete, tsit5",
    "ours, discrete, tsit5, compiled solve",
    "ours, discrete, dopri8",
)


def prepare(problem: Problem, way: Way, *, rtol: float, atol: float, dtype: str) -> Step:
    """A gradient step by `torchadjoint.solve`.

    Raises:
        NotImplementedError: if the installed torch is too old for the way.
    """
    if way.compile == "solve" and not IS_TORCH_NEW_ENOUGH:
        raise NotImplementedError(f"torch {torch.__version__} has no compiled solve: it needs {OLDEST_TORCH}")
    options = options_of(problem, adjoint=way.adjoint, method=way.method, compile=way.compile)

    def by_solve(func, y0, t):
        solution = solve(func, y0, t, rtol=rtol, atol=atol, **options)
        statistics = solution.statistics
        return solution.y, lambda: (statistics.forward.nfe, statistics.backward.nfe)

    return prepare_step(problem, by_solve, dtype)
