"""Solves of ordinary differential equations with a choice of gradient: models use `solve`, others `odeint_adjoint`.

Four ways are adjoint solves that differ in their norm. Of these the seminorm takes the paper at its word: the adjoint
of the parameters is an integral, so it does not ride in the solver's state. It is summed up by the quadrature that
belongs to each accepted step, and a rejected step never computes it. The fifth way, `discrete`, has no backward solve:
it is the exact gradient of the steps that the forward solve took.
"""

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from . import torchdiffeq_reference
from .field import AutogradField
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
) -> Solution:
    """Solve dy/dt = func(t, y) by Dormand and Prince's method, differentiable with respect to y0, t and parameters.

    Keywords that torchdiffeq has too mean the same here; those of its `options` stand beside the others.

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
            step happens to end on one, and where it cannot go on it raises AssertionError.
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

    Raises:
        ValueError: if an argument is not as described.
        SolverError: if a solve, forward or backward, cannot go on.
    """
    adjoint = Adjoint.parse(adjoint)
    times = _checked_times(t)
    _check_positive(rtol=rtol, atol=atol, adjoint_rtol=adjoint_rtol, adjoint_atol=adjoint_atol, first_step=first_step)
    _check_counts(checkpoint_interval=checkpoint_interval, max_num_steps=max_num_steps)
    if adjoint is Adjoint.DISCRETE and t.requires_grad:
        raise ValueError("t requires a gradient, but 'discrete' takes its steps as given: use 'seminorm' or t.detach()")
    if adjoint_params is None and not isinstance(func, nn.Module):
        raise ValueError("func is no nn.Module, so its parameters are not known: name them by adjoint_params=(...)")
    if not isinstance(y0, (Tensor, tuple)):
        raise ValueError(f"y0 is a {type(y0).__name__}, but must be a tensor or a tuple of tensors")
    if isinstance(y0, tuple):
        shapes = [component.shape for component in y0]
        flat = torch.cat([component.reshape(-1) for component in y0])
        func, y0, adjoint_params = _TupleFunction(func, shapes), flat, _parameters(func, adjoint_params)
    else:
        shapes = [y0.shape]
    if y0.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"y0 is of dtype {y0.dtype}, but must be float32 or float64")

    statistics = SolveStatistics()
    jumps = torch.as_tensor(jump_t, dtype=torch.float64).tolist()
    if not all(map(math.isfinite, jumps)):
        raise ValueError(f"jump_t must be finite, not {jumps}")
    if solver == "torchdiffeq":
        if warm_start:
            raise ValueError("warm_start=True needs solver='dopri5'")
        solution = torchdiffeq_reference.solve(
            func,
            y0,
            t,
            adjoint=adjoint,
            jumps=jumps,
            state_sizes=[shape.numel() for shape in shapes],
            parameters=_parameters(func, adjoint_params),
            statistics=statistics,
            tolerances=(rtol, atol, adjoint_rtol or rtol, adjoint_atol or atol),
            options=dict(first_step=first_step, max_num_steps=max_num_steps),
        )
    elif solver == "dopri5":
        has_fused_field = adjoint_params is None and hasattr(func, "fused_field")
        if has_fused_field and not t.requires_grad and all(parameter.requires_grad for parameter in func.parameters()):
            vector_field = func.fused_field(y0)
        else:
            parameters = _parameters(func, adjoint_params)
            vector_field = AutogradField(func, parameters, y0.shape, time_gradient=t.requires_grad)
        plan = Plan(
            vector_field=vector_field,
            adjoint=adjoint,
            times=times,
            jumps=jumps,
            rtol=rtol,
            atol=atol,
            adjoint_rtol=adjoint_rtol or rtol,
            adjoint_atol=adjoint_atol or atol,
            state_sizes=[shape.numel() for shape in shapes],
            first_step=first_step,
            warm_start=warm_start,
            checkpoint_interval=checkpoint_interval,
            max_num_steps=max_num_steps,
            statistics=statistics,
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
    else:
        raise ValueError(f"unknown solver {solver!r}: use 'dopri5' or 'torchdiffeq'")
    if len(shapes) > 1 or isinstance(func, _TupleFunction):
        pieces = solution.split([shape.numel() for shape in shapes], dim=-1)
        solution = tuple(piece.view(len(times), *shape) for piece, shape in zip(pieces, shapes, strict=True))
    return Solution(solution, statistics)


def odeint_adjoint(func: nn.Module, y0: State, t: Tensor, **options) -> State:
    """In place of `torchdiffeq.odeint_adjoint`: the `y` of `solve`, whose keywords it takes."""
    return solve(func, y0, t, **options).y


class _TupleFunction(nn.Module):
    """A function of a tuple of tensors as one of a flat vector."""

    def __init__(self, func: nn.Module, shapes: list[torch.Size]):
        super().__init__()
        self.func = func
        self.shapes = shapes

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        pieces = y.split([shape.numel() for shape in self.shapes])
        derivatives = self.func(t, tuple(piece.view(s) for piece, s in zip(pieces, self.shapes, strict=True)))
        found = [tuple(derivative.shape) for derivative in derivatives]
        if found != [tuple(shape) for shape in self.shapes]:
            raise ValueError(
                f"the vector field returned shapes {found} for a state of shapes {[tuple(s) for s in self.shapes]}: "
                "both must be the same"
            )
        return torch.cat([derivative.reshape(-1) for derivative in derivatives])


def _parameters(func: nn.Module, adjoint_params: Sequence[Tensor] | None) -> tuple[Tensor, ...]:
    candidates = func.parameters() if adjoint_params is None else adjoint_params
    return tuple(parameter for parameter in candidates if parameter.requires_grad)


def _checked_times(t: Tensor) -> list[float]:
    if not isinstance(t, Tensor) or t.dim() != 1 or not t.is_floating_point() or len(t) < 2:
        given = f"shape {tuple(t.shape)} and dtype {t.dtype}" if isinstance(t, Tensor) else type(t).__name__
        raise ValueError(f"t must be a floating-point tensor of shape (times,) with two times or more, not {given}")
    times = t.detach().double().tolist()
    steps = [after - before for before, after in pairwise(times)]
    if not (all(step > 0 for step in steps) or all(step < 0 for step in steps)) or not math.isfinite(sum(times)):
        raise ValueError(f"t must be finite and strictly increasing or decreasing, not {times}")
    return times


def _check_counts(**values: int) -> None:
    for name, value in values.items():
        if not isinstance(value, numbers.Integral) or value < 1:
            raise ValueError(f"{name} is {value!r}, but must be a whole number of at least 1")


def _check_positive(**values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not (isinstance(value, numbers.Real) and 0 < value < math.inf):
            raise ValueError(f"{name} is {value!r}, but must be a finite number above 0")
