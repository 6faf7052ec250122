"""The contract of the benchmark: what a file of a problem and a file of a contestant give.

**A problem** is a file in `problems/` with the list `PROBLEMS`. Each `Problem` in it has the field, the numbers, and
what is known about it. Its field is one function, which both PyTorch and JAX call, with their own `Arrays`.

**A contestant** is a file in `contestants/` with four names:

- `PACKAGES`: what it imports besides the requirements, a tuple of names. The file itself must not import them at its
  top. If one is not installed, all its ways are skipped by name.
- `WAYS`: a dict from the name of each way, as the tables show it, to anything that tells `prepare` what to do.
- `SMALL`: the names of those that take part in the small half too.
- `prepare(problem, way, *, rtol, atol, dtype)`: given the problem, the value in `WAYS`, the tolerances and "float32" or
  "float64", it returns a function without arguments. Each call of that does one gradient step from scratch: solve the
  problem, compute the `loss`, and differentiate it with respect to y0 and all parameters. It returns a `Gradient`, and
  must have finished all work before it returns. What can be done once is done in `prepare`, or in the first call, which
  is not timed: compile, and convert the numbers. Tolerances apply in both directions. No solve may attempt more than
  `MAX_STEPS` steps.

To fail, raise: a solve that needs too many steps or meets infinity is a result too, and the first line of its message
is kept. `NotImplementedError` says that the installed version of a package lacks the way: it is skipped by name. A
contestant is free in all else, but it must solve the problem as it stands: no field rewritten by hand, no step sizes
from an earlier call, no gradient kept.

A file that is put into either folder takes part; nothing else is edited.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .arrays import Arrays

MAX_STEPS = 16**3
"""How many steps a solve may attempt: what diffrax allows by default, and a power of 16, for its `DirectAdjoint`."""
Field = Callable[[Arrays, Any, Any, Mapping[str, Any]], Any]


@dataclass(frozen=True, eq=False)
class Problem:
    """dy/dt = field(t, y) from y0, and a loss that is to be differentiated. All numbers are float64 here."""

    name: str
    """For the command line and for files."""
    title: str
    """For tables and figures."""
    field: Field
    """f(arrays, t, y, given): t without dimensions, or (batch,) where samples step alone; y (batch, channels); `given`
    has the parameters and the constants by name."""
    parameters: Mapping[str, np.ndarray]
    y0: np.ndarray
    """(batch, channels)"""
    times: np.ndarray
    """The output times, (times,); the first is y0's."""
    constants: Mapping[str, np.ndarray] = field(default_factory=dict)
    """What the field reads besides the parameters, by name: it gets them in one mapping."""
    jumps: tuple[float, ...] = ()
    """Times within, at which the field is discontinuous."""
    exact: Callable[[Any, Any, Mapping[str, Any]], Any] | None = None
    """The solution at the times (times, batch, channels), by PyTorch, from (times, y0, parameters), if there is one."""
    traits: tuple[str, ...] = ()
    """What kind of problem it is, from `TRAITS`."""
    is_small: bool = False
    """Whether it belongs to the small half."""

    @property
    def num_parameters(self) -> int:
        """The number of entries of all parameters."""
        return sum(parameter.size for parameter in self.parameters.values())


TRAITS = {
    "equation": "scientific models",
    "network": "neural networks of up to 10,000 parameters",
    "unstable backward": "problems whose state, solved backwards, amplifies errors by more than 10^6",
    "kinks": "fields with kinks or jumps",
}
"""The kinds of problems, for the decision list, and what it calls them."""


def loss(y: Any) -> Any:
    """The loss of a solution (times, batch, channels): squares, summed over times and channels; the mean of the batch.

    With the mean over all entries the adjoint would often be smaller than its absolute tolerance, and the gradient of a
    backward solve would be worthless at loose tolerances.
    """
    return (y**2).sum() / y.shape[1]


@dataclass(frozen=True)
class Gradient:
    """What one gradient step found. Arrays are anything that `numpy.asarray` takes."""

    y0: Any
    """In the shape of the problem's y0."""
    parameters: Mapping[str, Any]
    """By the names of the problem's parameters, in their shapes."""
    forward_nfe: int | None = None
    """Evaluations of the field in the solve; None if the way cannot say."""
    backward_nfe: int | None = None
    """And those for the gradient, forward passes that are done again included; 0 if there are none."""

    def flat(self, problem: Problem) -> np.ndarray:
        """All entries, float64: the parameters in the problem's order, then y0.

        Raises:
            ValueError: if an array is missing or has another shape than the problem's.
        """
        expected = {**problem.parameters, "y0": problem.y0}
        found = {**self.parameters, "y0": self.y0}
        pieces = []
        for name, value in expected.items():
            if name not in found:
                raise ValueError(f"the gradient of {name} is missing: return one for y0 and for every parameter")
            piece = np.asarray(found[name], dtype=np.float64)
            if piece.shape != value.shape:
                raise ValueError(f"the gradient of {name} has the shape {piece.shape}, but must have {value.shape}")
            pieces.append(piece.ravel())
        return np.concatenate(pieces)


Step = Callable[[], Gradient]
