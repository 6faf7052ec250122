"""A solve as it was asked for, every argument checked and normalised once, and what differentiates it.

Ways to differentiate are known here, and to the doors of the library, by their protocol alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from . import arguments, callbacks
from .field import Field
from .observer import Attempt, Observer
from .solver import Solver
from .statistics import SolveStatistics
from .stepping import Stepping

State = Tensor | tuple[Tensor, ...]


class Gradients(NamedTuple):
    """Of a loss."""

    y0: Tensor
    """In the shape of the problem's y0."""
    parameters: Tensor
    """Of all parameters of the field, one behind the other (parameters,)."""
    t: Tensor | None
    """Of the output times (times,); None if they need none."""


class Differentiation(Protocol):
    """One solve and its gradient."""

    field: Field
    """What is solved; `adjoints.make_field` makes one of the problem."""

    def begin(self) -> Solver:
        """The solver of the forward solve, whose steps are about to be taken; `adjoints.forward_solver` makes one."""

    def end(self, solver: Solver) -> None:
        """The forward solve is over: keep of its solver what the gradient needs."""

    def gradients(self, solution: Tensor, solution_gradient: Tensor) -> Gradients:
        """The gradients, given the solution (times, *shape) and the loss's gradient of it. May be called again."""


class Adjoint(Protocol):
    """A way to differentiate a solve: what `solve` takes for its argument `adjoint`."""

    name: str
    """What messages call it."""

    def differentiate(self, problem: "Problem", statistics: SolveStatistics) -> Differentiation:
        """What differentiates one solve of `problem`, and counts in `statistics.backward` what it does for that.

        Raises:
            ValueError: if it cannot differentiate this problem.
        """


@dataclass(frozen=True)
class Problem:
    """What `pose` makes of its arguments. The state is one tensor here; one of several is laid out flat."""

    asked: Callable[..., Any]
    """func as the user gave it."""
    func: Callable[..., Tensor]
    """The same for the state as it is here."""
    y0: Tensor
    t: Tensor
    times: list[float]
    """The entries of t."""
    jumps: list[float]
    """In ascending order, each once."""
    shapes: list[torch.Size]
    """Of the state's tensors."""
    is_tuple: bool
    """Whether the user's state is a tuple of tensors."""
    parameters: tuple[Tensor, ...]
    """What is differentiated besides y0 and t."""
    are_all_parameters: bool
    """Whether these are all the parameters that func has, and nothing else."""
    adjoint: Adjoint
    forward: Stepping
    backward: Stepping
    num_integrals: int
    """How many of the state's tensors, at its end, stand in no right-hand side."""
    weigh_integrals: bool
    """Whether the forward solve's norm weighs these."""
    observe: Observer | None
    compile: bool | Literal["solve"]

    @property
    def sizes(self) -> list[int]:
        """The number of entries of each of the state's tensors."""
        return [shape.numel() for shape in self.shapes]

    @property
    def coupled_sizes(self) -> list[int]:
        """Those of the tensors that are no integrals: all that the backward solve has of the state."""
        return self.sizes[: len(self.shapes) - self.num_integrals]

    def split(self, flat: Tensor) -> State:
        """The state that lies flat in the last dimension of `flat`, in the user's form."""
        pieces = zip(flat.split(self.sizes, dim=-1), self.shapes, strict=True)
        tensors = tuple(piece.reshape((*flat.shape[:-1], *shape)) for piece, shape in pieces)
        return tensors if self.is_tuple else tensors[0]

    def split_both(self, flat: Tensor) -> tuple[State, State]:
        """The state and its adjoint, integrals apart, at the start of the flat vector of the backward solve."""
        sizes = self.coupled_sizes
        pieces = flat[: 2 * sum(sizes)].split([*sizes, *sizes])
        tensors = tuple(piece.view(shape) for piece, shape in zip(pieces, 2 * self.shapes[: len(sizes)], strict=True))
        half = len(sizes)
        return (tensors[:half], tensors[half:]) if self.is_tuple else tensors

    def make_grid(self, stepping: Stepping) -> Callable[[Tensor, Sequence[float]], list[float]] | None:
        """The `grid_constructor` as the solver calls it, with the flat state and times; None if there is none."""
        if stepping.grid_constructor is None:
            return None

        def make(flat: Tensor, times: Sequence[float]) -> list[float]:
            start = self.split(flat[: sum(self.sizes)])
            grid = stepping.grid_constructor(self.asked, start, self.t.new_tensor(times))
            # Rounding in the dtype of t is no difference.
            found = arguments.output_times(grid, torch.finfo(self.y0.dtype).max, name="what grid_constructor returned")
            ends = self.t.new_tensor([found[0], found[-1]]).tolist()
            if ends != self.t.new_tensor([times[0], times[-1]]).tolist():
                raise ValueError(
                    f"grid_constructor returned times from {found[0]:g} to {found[-1]:g}, but they must go from "
                    f"{times[0]:g} to {times[-1]:g}"
                )
            return [times[0], *found[1:-1], times[-1]]

        return make

    def observer(self, direction: str, unflatten: Callable[[Tensor], Any]) -> Observer | None:
        """Who is told of the steps of one direction: the user's observer, and func by its callbacks."""
        told = (self.observe, callbacks.observer(self.asked, direction, unflatten))
        told = [observer for observer in told if observer is not None]
        if len(told) < 2:
            return told[0] if told else None

        def tell(attempt: Attempt) -> None:
            for observer in told:
                observer(attempt)

        return tell
