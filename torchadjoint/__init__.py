"""Adjoints of neural differential equations for PyTorch: solves whose gradient you choose how to take.

`odeint` and `odeint_adjoint` stand in for torchdiffeq's; `solve` also chooses the adjoint and says what it did. Where
no norm is named, `odeint_adjoint` differentiates by the seminorm. Needs torch alone.
"""

from .adjoints import ADJOINTS, Backsolve, Discrete
from .api import Solution, odeint, odeint_adjoint, solve
from .comparing import Comparison, compare
from .errors import SolverError
from .field import Field
from .methods import METHODS, RungeKutta
from .norms import NORMS, make_norm
from .observer import Attempt, Observer
from .problem import Adjoint, Differentiation, Gradients
from .statistics import SolveStatistics, Statistics

__version__ = "0.1.0"

__all__ = [
    "ADJOINTS",
    "METHODS",
    "NORMS",
    "Adjoint",
    "Attempt",
    "Backsolve",
    "Comparison",
    "Differentiation",
    "Discrete",
    "Field",
    "Gradients",
    "Observer",
    "RungeKutta",
    "Solution",
    "SolveStatistics",
    "SolverError",
    "Statistics",
    "compare",
    "make_norm",
    "odeint",
    "odeint_adjoint",
    "solve",
]
