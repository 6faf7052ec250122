"""Adjoints of neural differential equations for PyTorch: adaptive solves whose gradient you choose how to take.

`odeint_adjoint` stands in for torchdiffeq's; `solve` also says what the solve did. Needs torch alone.
"""

from .api import Solution, odeint_adjoint, solve
from .errors import SolverError
from .field import Field
from .methods import METHODS, RungeKutta
from .norms import Adjoint, make_norm
from .statistics import SolveStatistics, Statistics

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "Adjoint",
    "Field",
    "RungeKutta",
    "Solution",
    "SolveStatistics",
    "SolverError",
    "Statistics",
    "make_norm",
    "odeint_adjoint",
    "solve",
]
