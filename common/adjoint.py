"""Solves of ordinary differential equations with a choice of gradient: models use `solve`, others `odeint_adjoint`.

Four ways are adjoint solves that differ in their norm. Of these the seminorm takes the paper at its word: the adjoint
of the parameters is an integral, so it does not ride in the solver's state. It is summed up by the quadrature that
belongs to each accepted step, and a rejected step never computes it. The fifth way, `discrete`, has no backward solve:
it is the exact gradient of the steps that the forward solve took.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from . import arguments, callbacks, torchdiffeq_reference
from .field import AutogradField, checked_derivative
from .norms import Adjoint, norm_blocks
from .passes import DifferentiableSolve, Plan
from .solver import DEFAULT_MAX_NUM_STEPS
from .statistics import SolveStatistics

State = Tensor | tuple[Tensor, ...]


@dataclass
class Solution:
    """What a solve returns."""

    y: State
    """The state at each output time: the shape of `y0` with the times in front, or a tuple of such tensors."""
    statistics: SolveStatistics
    """What the solve did; the backward part is filled by `.backward()`."""


def solve(
    func: nn.Module,
    y0: State,
    t: Tensor,
    *,
    rtol: float = 1e-7,
    atol: float = 1e-9,
    adjoint: str | bool | Adjoint = Adjoint.SEMINORM,
    solver: Literal["dopri5", "torchdiffeq"] = "dopri5",
    jump_t: Tensor | Sequence[float] = (),
    adjoint_rtol: float | None = None,
    adjoint_atol: float | None = None,
    adjoint_params: Sequence[Tensor] | None = None,
    first_step: float | None = None,
    warm_start: bool = False,
    checkpoint_interval: int = 1,
    max_num_steps: int = DEFAULT_MAX_NUM_STEPS,
    compile: bool = False,
) -> Solution:
    """Solve dy/dt = func(t, y) by Dormand and Prince's method, differentiable with respect to y0, t and parameters.

    Keywords that torchdiffeq has too mean the same here; those of its `options` stand beside the others. Its callbacks
    are called too: methods of func named `callback_step`, `callback_accept_step` and `callback_reject_step` get the
    time, the state and the size of each step, before it is attempted and after it was accepted or rejected. With
    `_adjoint` behind the name they belong to the backward solve, whose state is the pair of y and its adjoint.

    Args:
        func: called with `t`, a tensor without dimensions, and `y`, of the shape of `y0`; returns dy/dt of that shape.
            If it has a method `fused_field(y0)`, that `Field` is evaluated in its place where y0 and all parameters of
            func are what is differentiated.
        y0: the initial state, of dtype float32 or float64: a tensor of any shape, or a tuple of tensors.
        t: the output times, of shape (times,): at least two, strictly increasing or decreasing. The first is y0's.
        rtol: relative tolerance.
        atol: absolute tolerance.
        adjoint: how to differentiate: a name of `Adjoint`, or False for `default` and True for `seminorm`.
        solver: `torchdiffeq` is the reference: stock torchdiffeq with the same norm. It forgets all later jumps once a
            step happens to end on one.
        jump_t: times at which func is discontinuous in t. Every one between the first and the last time, or at the last
            one, is the end of a step in both directions.
        adjoint_rtol: relative tolerance of the backward solve; `rtol` if not given.
        adjoint_atol: absolute tolerance of the backward solve; `atol` if not given.
        adjoint_params: the tensors to differentiate with respect to; `func.parameters()` if not given.
        first_step: size of the first step of the forward solve; guessed if not given, at the price of one evaluation.
        warm_start: whether the backward solve starts with the forward solve's last step size, carries its own from one
            output time to the next and stops at each of them, where otherwise it guesses anew and interpolates.
        checkpoint_interval: how many steps `discrete` takes from one stored state to the next; those between are solved
            again.
        max_num_steps: how many steps may be attempted from one start of a solve on.
        compile: whether torch.compile makes one function of each direction's attempted steps, at the first use for a
            field and a shape, which takes tens of seconds. It compiles `func` even if that has a `fused_field`. The
            adjoint must be the seminorm, and func an nn.Module that torch.compile can take as a whole. A compiled
            attempt computes its parameters' part before it is accepted.

    Raises:
        ValueError: if an argument is not as described.
        SolverError: if a solve, forward or backward, cannot go on.
    """
    adjoint = Adjoint.parse(adjoint)
    if not callable(func):
        arguments.refuse("func", func, "a function of t and y")
    if adjoint_params is None and not isinstance(func, nn.Module):
        raise ValueError("func is no nn.Module, so its parameters are not known: name them by adjoint_params=(...)")
    shapes = arguments.state_shapes(y0)
    y0_is_tuple = isinstance(y0, tuple)
    listeners = [
        callbacks.listener(func, suffix, split)
        for suffix, split in (
            ("", lambda state: _split(state, shapes, y0_is_tuple)),
            (callbacks.ADJOINT, lambda state: _split_both(state, shapes, y0_is_tuple)),
        )
    ]
    if y0_is_tuple:
        func, y0 = _TupleFunction(func, shapes), torch.cat([component.reshape(-1) for component in y0])
    parameters = arguments.parameters(adjoint_params, func, y0.device)
    # Up to here, a step beyond a time and sums of a few errors over their tolerance are still finite.
    largest = torch.finfo(y0.dtype).max / 100
    times = arguments.output_times(t, largest)
    arguments.refuse_transforms([y0, t, *parameters])
    jumps = arguments.jump_times(jump_t, largest, times=times, dtypes=(t.dtype, y0.dtype))
    t = t.to(y0.device)
    if adjoint is Adjoint.DISCRETE and t.requires_grad:
        raise ValueError("t requires a gradient, but 'discrete' takes its steps as given: use 'seminorm' or t.detach()")
    rtol = arguments.number("rtol", rtol, maximum=largest)
    atol = arguments.number("atol", atol, maximum=largest)
    adjoint_rtol = arguments.number("adjoint_rtol", rtol if adjoint_rtol is None else adjoint_rtol, maximum=largest)
    adjoint_atol = arguments.number("adjoint_atol", atol if adjoint_atol is None else adjoint_atol, maximum=largest)
    if first_step is not None:
        first_step = arguments.number("first_step", first_step, maximum=largest)
    warm_start = arguments.flag("warm_start", warm_start)
    checkpoint_interval = arguments.whole_number("checkpoint_interval", checkpoint_interval)
    max_num_steps = arguments.whole_number("max_num_steps", max_num_steps)
    solver = arguments.choice("solver", solver, ("dopri5", "torchdiffeq"))
    compile = arguments.flag("compile", compile)
    if compile and not (adjoint is Adjoint.SEMINORM and solver == "dopri5" and adjoint_params is None):
        raise ValueError("compile=True needs adjoint='seminorm' and solver='dopri5', and no adjoint_params")

    statistics = SolveStatistics()
    state_sizes = [shape.numel() for shape in shapes]
    if solver == "torchdiffeq":
        if warm_start or any(listeners):
            what = "warm_start=True needs" if warm_start else "the callbacks of func need"
            raise ValueError(f"{what} solver='dopri5'")
        solution = torchdiffeq_reference.solve(
            func,
            y0,
            t,
            adjoint=adjoint,
            jumps=jumps,
            state_sizes=state_sizes,
            parameters=parameters,
            statistics=statistics,
            tolerances=(rtol, atol, adjoint_rtol, adjoint_atol),
            first_step=first_step,
            max_num_steps=max_num_steps,
        )
    else:
        has_fused_field = adjoint_params is None and hasattr(func, "fused_field") and not compile
        if has_fused_field and not t.requires_grad and all(parameter.requires_grad for parameter in func.parameters()):
            vector_field = func.fused_field(y0)
        else:
            # As in torchdiffeq, these two weigh the adjoint of t whether or not t needs a gradient.
            weighs_time = adjoint in (Adjoint.DEFAULT, Adjoint.PER_TENSOR)
            vector_field = AutogradField(func, parameters, y0.shape, time_gradient=t.requires_grad or weighs_time)
        plan = Plan(
            vector_field=vector_field,
            adjoint=adjoint,
            times=times,
            jumps=jumps,
            rtol=rtol,
            atol=atol,
            adjoint_rtol=adjoint_rtol,
            adjoint_atol=adjoint_atol,
            state_sizes=state_sizes,
            first_step=first_step,
            warm_start=warm_start,
            checkpoint_interval=checkpoint_interval,
            max_num_steps=max_num_steps,
            compile=compile,
            statistics=statistics,
            guarded=_read_besides(func, vector_field.parameters),
            has_time_gradient=t.requires_grad,
            forward_listener=listeners[0],
            backward_listener=listeners[1],
        )
        inputs = (y0, t, *vector_field.parameters)
        plan.is_differentiated = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
        if plan.is_differentiated and adjoint is not Adjoint.DISCRETE:
            plan.backward_blocks = norm_blocks(
                adjoint,
                state_sizes=plan.state_sizes,
                parameter_sizes=vector_field.parameter_sizes,
                solution_size=len(times) * y0.numel(),
            )
        solution = DifferentiableSolve.apply(plan, *inputs)
    return Solution(_split(solution, shapes, y0_is_tuple) if y0_is_tuple else solution, statistics)


def odeint_adjoint(func: nn.Module, y0: State, t: Tensor, **options) -> State:
    """In place of `torchdiffeq.odeint_adjoint`: the `y` of `solve`, whose keywords it takes."""
    return solve(func, y0, t, **options).y


def _split(flat: Tensor, shapes: Sequence[torch.Size], is_tuple: bool) -> State:
    """The state that lies flat in the last dimension of `flat`, in its own form."""
    pieces = flat.split([shape.numel() for shape in shapes], dim=-1)
    tensors = tuple(piece.reshape(*flat.shape[:-1], *shape) for piece, shape in zip(pieces, shapes, strict=True))
    return tensors if is_tuple else tensors[0]


def _split_both(flat: Tensor, shapes: Sequence[torch.Size], is_tuple: bool) -> tuple[State, State]:
    """The state and its adjoint, at the start of the flat vector of the backward solve."""
    size = sum(shape.numel() for shape in shapes)
    return _split(flat[:size], shapes, is_tuple), _split(flat[size : 2 * size], shapes, is_tuple)


def _read_besides(func: nn.Module, parameters: Sequence[Tensor]) -> list[Tensor]:
    """What a module reads besides these parameters: its buffers, and parameters that are frozen."""
    if not isinstance(func, nn.Module):
        return []
    known = {id(parameter) for parameter in parameters}
    return [tensor for tensor in (*func.parameters(), *func.buffers()) if id(tensor) not in known]


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
