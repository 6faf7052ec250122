"""Runge-Kutta methods with error control, each a table: to add one, write its file and list it here."""

from typing import Any

from ..arguments import refuse
from .bosh3 import BOSH3
from .dopri5 import DOPRI5
from .runge_kutta import RungeKutta
from .tsit5 import TSIT5

METHODS = {method.name: method for method in (DOPRI5, TSIT5, BOSH3)}
"""By name."""


def find_method(method: Any) -> RungeKutta:
    """The method of this name, or the table itself. ValueError if there is none such."""
    if isinstance(method, RungeKutta):
        return method
    if not (isinstance(method, str) and method in METHODS):
        refuse("method", method, f"one of {', '.join(map(repr, METHODS))}, or a RungeKutta of your own")
    return METHODS[method]
