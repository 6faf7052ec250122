"""Ways to differentiate a solve, by name: to add one, write its file and list it here."""

from typing import Any

from ..arguments import refuse
from ..problem import Adjoint
from .backsolve import Backsolve
from .discrete import Discrete
from .forward import forward_solver, make_field

ADJOINTS: dict[str, Adjoint] = {
    "default": Backsolve("default"),
    "seminorm": Backsolve("seminorm"),
    "per-tensor": Backsolve("per-tensor"),
    "discrete": Discrete(),
    "as-published": Backsolve("as-published"),
}
"""By name; `norms` describes those that are norms."""

__all__ = [
    "ADJOINTS",
    "Backsolve",
    "Discrete",
    "find_adjoint",
    "forward_solver",
    "make_field",
]


def find_adjoint(adjoint: Any) -> Adjoint:
    """The way of this name, or the way itself. ValueError if there is none such."""
    if hasattr(adjoint, "differentiate") and not isinstance(adjoint, type):
        return adjoint
    if not (isinstance(adjoint, str) and adjoint in ADJOINTS):
        refuse("adjoint", adjoint, f"one of {', '.join(map(repr, ADJOINTS))}, or an Adjoint such as Backsolve(norm)")
    return ADJOINTS[adjoint]
