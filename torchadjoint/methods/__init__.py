"""Runge-Kutta methods, each a table: to add one, write its file and list it here."""

from typing import Any

from ..arguments import refuse
from .adaptive_heun import ADAPTIVE_HEUN
from .bosh3 import BOSH3
from .dopri5 import DOPRI5
from .dopri8 import DOPRI8
from .fehlberg2 import FEHLBERG2
from .fixed import EULER, HEUN2, HEUN3, MIDPOINT, RK4
from .runge_kutta import RungeKutta
from .tsit5 import TSIT5

METHODS = {
    method.name: method
    for method in (DOPRI5, TSIT5, BOSH3, DOPRI8, FEHLBERG2, ADAPTIVE_HEUN, EULER, MIDPOINT, HEUN2, HEUN3, RK4)
}
"""By name: first those with error control, then those of fixed steps."""


def find_method(name: str, method: Any) -> RungeKutta:
    """The method of this name, or the table itself. ValueError, about the argument `name`, if there is none such."""
    if isinstance(method, RungeKutta):
        return method
    if not (isinstance(method, str) and method in METHODS):
        refuse(
            name,
            method,
            f"one of {', '.join(map(repr, METHODS))}, or a RungeKutta of your own; for implicit and multistep methods "
            "and those of SciPy use torchdiffeq",
        )
    return METHODS[method]
