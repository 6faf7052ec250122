"""A solve as it was asked for, every argument checked and normalised once: what all that solves starts from."""

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from . import arguments
from .field import checked_derivative
from .methods import RungeKutta, find_method
from .norms import Adjoint
from .solver import DEFAULT_MAX_NUM_STEPS

State = Tensor | tuple[Tensor, ...]
Posing = ParamSpec("Posing")
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Problem:
    """What `pose` makes of its arguments. The state is one tensor here; one of several is laid out flat."""

    asked: nn.Module
    """func as the user gave it."""
    func: nn.Module
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
    method: RungeKutta
    adjoint: Adjoint
    rtol: float
    atol: float
    adjoint_rtol: float
    adjoint_atol: float
    first_step: float | None
    warm_start: bool
    checkpoint_interval: int
    max_num_steps: int
    compile: bool

    @property
    def sizes(self) -> list[int]:
        """The number of entries of each of the state's tensors."""
        return [shape.numel() for shape in self.shapes]

    def split(self, flat: Tensor) -> State:
        """The state that lies flat in the last dimension of `flat`, in the user's form."""
        pieces = zip(flat.split(self.sizes, dim=-1), self.shapes, strict=True)
        tensors = tuple(piece.reshape(*flat.shape[:-1], *shape) for piece, shape in pieces)
        return tensors if self.is_tuple else tensors[0]

    def split_both(self, flat: Tensor) -> tuple[State, State]:
        """The state and its adjoint, at the start of the flat vector of the backward solve."""
        size = sum(self.sizes)
        return self.split(flat[:size]), self.split(flat[size : 2 * size])

    def read_besides(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """What func reads besides these parameters: its buffers, and parameters that are frozen."""
        if not isinstance(self.func, nn.Module):
            return []
        known = {id(parameter) for parameter in parameters}
        return [tensor for tensor in (*self.func.parameters(), *self.func.buffers()) if id(tensor) not in known]


def pose(
    func: nn.Module,
    y0: State,
    t: Tensor,
    *,
    rtol: float = 1e-7,
    atol: float = 1e-9,
    method: str | RungeKutta = "dopri5",
    adjoint: str | bool | Adjoint = Adjoint.SEMINORM,
    jump_t: Tensor | Sequence[float] = (),
    adjoint_rtol: float | None = None,
    adjoint_atol: float | None = None,
    adjoint_params: Sequence[Tensor] | None = None,
    first_step: float | None = None,
    warm_start: bool = False,
    checkpoint_interval: int = 1,
    max_num_steps: int = DEFAULT_MAX_NUM_STEPS,
    compile: bool = False,
) -> Problem:
    """The problem that these arguments pose; `torchadjoint.solve` describes them.

    Raises:
        ValueError: if an argument is not as described there.
        NotImplementedError: for tensors inside a transform of torch.func, or of forward-mode differentiation.
    """
    adjoint = Adjoint.parse(adjoint)
    if not callable(func):
        arguments.refuse("func", func, "a function of t and y")
    if adjoint_params is None and not isinstance(func, nn.Module):
        raise ValueError("func is no nn.Module, so its parameters are not known: name them by adjoint_params=(...)")
    shapes = arguments.state_shapes(y0)
    asked, is_tuple = func, isinstance(y0, tuple)
    if is_tuple:
        func, y0 = _TupleFunction(func, shapes), torch.cat([component.reshape(-1) for component in y0])
    parameters = arguments.parameters(adjoint_params, func, y0.device)
    # Up to here, a step beyond a time and sums of a few errors over their tolerance are still finite.
    largest = torch.finfo(y0.dtype).max / 100
    times = arguments.output_times(t, largest)
    arguments.refuse_transforms([y0, t, *parameters])
    if adjoint is Adjoint.DISCRETE and t.requires_grad:
        raise ValueError("t requires a gradient, but 'discrete' takes its steps as given: use 'seminorm' or t.detach()")
    rtol = arguments.number("rtol", rtol, maximum=largest)
    atol = arguments.number("atol", atol, maximum=largest)
    if first_step is not None:
        first_step = arguments.number("first_step", first_step, maximum=largest)
    compile = arguments.flag("compile", compile)
    if compile and not (adjoint is Adjoint.SEMINORM and adjoint_params is None):
        raise ValueError("compile=True needs adjoint='seminorm' and no adjoint_params")
    return Problem(
        asked=asked,
        func=func,
        y0=y0,
        t=t.to(y0.device),
        times=times,
        jumps=arguments.jump_times(jump_t, largest, times=times, dtypes=(t.dtype, y0.dtype)),
        shapes=shapes,
        is_tuple=is_tuple,
        parameters=parameters,
        are_all_parameters=adjoint_params is None and all(parameter.requires_grad for parameter in func.parameters()),
        method=find_method(method),
        adjoint=adjoint,
        rtol=rtol,
        atol=atol,
        adjoint_rtol=arguments.number("adjoint_rtol", rtol if adjoint_rtol is None else adjoint_rtol, maximum=largest),
        adjoint_atol=arguments.number("adjoint_atol", atol if adjoint_atol is None else adjoint_atol, maximum=largest),
        first_step=first_step,
        warm_start=arguments.flag("warm_start", warm_start),
        checkpoint_interval=arguments.whole_number("checkpoint_interval", checkpoint_interval),
        max_num_steps=arguments.whole_number("max_num_steps", max_num_steps),
        compile=compile,
    )


def of_its_arguments(function: Callable[[Problem], Answer]) -> Callable[Posing, Answer]:
    """`function` of a problem as one of the arguments of `pose`, so that these are listed once."""

    @functools.wraps(function)
    def posed(*arguments: Posing.args, **options: Posing.kwargs) -> Answer:
        return function(pose(*arguments, **options))

    returned = inspect.signature(function).return_annotation
    posed.__signature__ = inspect.signature(pose).replace(return_annotation=returned)
    return posed


class _TupleFunction(nn.Module):
    """A function of a tuple of tensors as one of a flat vector."""

    def __init__(self, func: nn.Module, shapes: list[torch.Size]):
        super().__init__()
        self.func = func
        self.shapes = shapes

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        pieces = y.split([shape.numel() for shape in self.shapes])
        pieces = tuple(piece.view(shape) for piece, shape in zip(pieces, self.shapes, strict=True))
        derivatives = self.func(t, pieces)
        if not isinstance(derivatives, tuple | list) or len(derivatives) != len(pieces):
            raise ValueError(
                f"the vector field returned {arguments.shown(derivatives)} for a state of {len(pieces)} tensors: "
                "it must return a tuple of as many"
            )
        derivatives = map(checked_derivative, derivatives, pieces)
        return torch.cat([derivative.reshape(-1) for derivative in derivatives])
