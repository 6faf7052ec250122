"""Solves of ordinary differential equations with a choice of gradient: models use `solve`, others `odeint_adjoint`.

Four ways are adjoint solves that differ in their norm. Of these the seminorm takes the paper at its word. The adjoint of
the parameters is an integral, so it does not ride in the solver's state at all: it is summed up by the quadrature that
belongs to each accepted step, and a rejected step never computes it. The fifth way, `discrete`, has no backward solve:
it is the exact gradient of the steps that the forward solve took.
"""

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from . import torchdiffeq_reference
from .discrete import StepRecord, reverse_steps
from .dopri5 import STEP_WEIGHTS
from .field import AutogradField, Field
from .norms import Adjoint, consecutive_blocks, norm_blocks
from .solver import DEFAULT_MAX_NUM_STEPS, Solver
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
        func: called with `t`, a tensor without dimensions, and `y`, of the shape of `y0`; returns dy/dt of that shape. If
            it has a method `fused_field(y0)`, that `Field` is evaluated in its place.
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

    Raises:
        ValueError: if an argument is not as described.
        SolverError: if a solve, forward or backward, cannot go on.
    """
    adjoint = Adjoint.parse(adjoint)
    times = _checked_times(t)
    _check_positive(rtol=rtol, atol=atol, adjoint_rtol=adjoint_rtol, adjoint_atol=adjoint_atol, first_step=first_step)
    _check_positive(checkpoint_interval=checkpoint_interval, max_num_steps=max_num_steps)
    if adjoint is Adjoint.DISCRETE and t.requires_grad:
        raise ValueError("'discrete' takes the steps as they are and has no gradient of t: use 'seminorm', or a t without")
    if adjoint_params is None and not isinstance(func, nn.Module):
        raise ValueError("func is no nn.Module, so its parameters are not known: name them by adjoint_params=(...)")
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
        fused = getattr(func, "fused_field", None)
        if fused is not None and adjoint_params is None and not t.requires_grad:
            vector_field = fused(y0)
        else:
            parameters = _parameters(func, adjoint_params)
            vector_field = AutogradField(func, parameters, y0.shape, time_gradient=t.requires_grad)
        plan = _Plan(
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
        solution = _Solve.apply(plan, *inputs)
    else:
        raise ValueError(f"unknown solver {solver!r}: use 'dopri5' or 'torchdiffeq'")
    if len(shapes) > 1 or isinstance(func, _TupleFunction):
        pieces = solution.split([shape.numel() for shape in shapes], dim=-1)
        solution = tuple(piece.view(len(times), *shape) for piece, shape in zip(pieces, shapes, strict=True))
    return Solution(solution, statistics)


def odeint_adjoint(func: nn.Module, y0: State, t: Tensor, **options) -> State:
    """In place of `torchdiffeq.odeint_adjoint`: the `y` of `solve`, whose keywords it takes."""
    return solve(func, y0, t, **options).y


@dataclass
class _Plan:
    """All that the two directions of one solve share, apart from the tensors that are differentiated."""

    vector_field: Field
    adjoint: Adjoint
    times: list[float]
    jumps: list[float]
    rtol: float
    atol: float
    adjoint_rtol: float
    adjoint_atol: float
    state_sizes: list[int]
    first_step: float | None
    warm_start: bool
    checkpoint_interval: int
    max_num_steps: int
    statistics: SolveStatistics
    is_differentiated: bool = False
    last_step: float | None = None
    record: list[StepRecord] = field(default_factory=list)


class _Solve(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plan: _Plan, y0: Tensor, t: Tensor, *parameters: Tensor) -> Tensor:
        solution = _solve_forward(plan, y0)
        ctx.plan = plan
        ctx.save_for_backward(solution)
        return solution

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, solution_gradient: Tensor):
        plan, (solution,) = ctx.plan, ctx.saved_tensors
        vector_field = plan.vector_field
        time_gradient = None
        if plan.adjoint is Adjoint.DISCRETE:
            state_gradient, gradient = reverse_steps(
                vector_field,
                plan.record,
                solution_gradient,
                checkpoint_interval=plan.checkpoint_interval,
                statistics=plan.statistics.backward,
            )
        else:
            state_gradient, gradient, time_gradient = _solve_backward(plan, solution, solution_gradient)
        gradients = vector_field.unflatten(gradient)
        return None, state_gradient, time_gradient if ctx.needs_input_grad[2] else None, *gradients


class _ForwardSystem:
    """The state alone."""

    def __init__(self, vector_field: Field, shape: torch.Size):
        self.field = vector_field
        self.shape = shape
        self.size = self.num_coupled = shape.numel()
        self.enter = vector_field.enter

    def bind(self, states: Sequence[Tensor], slopes: Sequence[Tensor]) -> None:
        self.buffers = [
            (state.view(self.shape), slope.view(self.shape)) for state, slope in zip(states, slopes, strict=True)
        ]

    def evaluate(self, stage: int, t: float) -> None:
        self.field.evaluate(t, *self.buffers[stage])

    def reuse_last_stage(self) -> None:
        """An evaluation leaves nothing behind but the slope."""


class _AdjointSystem:
    """The state and its adjoint (z, a_z), and with `carries_integrals` (a_theta, a_t) behind them."""

    def __init__(self, vector_field: Field, shape: torch.Size, *, carries_integrals: bool):
        self.field = vector_field
        self.shape = shape
        self.carries_integrals = carries_integrals
        self.num_coupled = 2 * shape.numel()
        self.size = self.num_coupled + carries_integrals * (sum(vector_field.parameter_sizes) + 1)
        self.enter = vector_field.enter
        self.reuse_last_stage = vector_field.reuse_last_slot

    def bind(self, states: Sequence[Tensor], slopes: Sequence[Tensor]) -> None:
        half = self.shape.numel()
        self.buffers = [
            (
                state[:half].view(self.shape),
                state[half:].view(self.shape),
                slope[:half].view(self.shape),
                slope[half : 2 * half].view(self.shape),
                slope[2 * half :],
            )
            for state, slope in zip(states, slopes, strict=True)
        ]

    def evaluate(self, stage: int, t: float) -> None:
        z, adjoint, z_slope, adjoint_slope, integral_slopes = self.buffers[stage]
        self.field.linearise(stage, t, z, z_slope)
        self.field.pullback(stage, adjoint, adjoint_slope)
        adjoint_slope.neg_()
        if self.carries_integrals:
            integral_slopes.zero_()
            self.field.add_parameter_product(stage, -1.0, integral_slopes)


def _solve_forward(plan: _Plan, y0: Tensor) -> Tensor:
    """The states at the output times (times, *shape)."""
    records_steps = plan.is_differentiated and plan.adjoint is Adjoint.DISCRETE
    times = plan.times
    solver = Solver(
        _ForwardSystem(plan.vector_field, y0.shape),
        consecutive_blocks(plan.state_sizes),
        rtol=plan.rtol,
        atol=plan.atol,
        jumps=plan.jumps,
        like=y0,
        statistics=plan.statistics.forward,
        max_num_steps=plan.max_num_steps,
    )
    solution = y0.new_empty(len(times), *y0.shape)
    solution[0] = y0
    solver.begin(times[0], times[-1], y0.reshape(-1), first_step=plan.first_step)
    for index, time in enumerate(times[1:], start=1):
        while not solver.has_passed(time):
            solver.advance()
            if records_steps:
                is_kept = len(plan.record) % plan.checkpoint_interval == 0
                start = solver.start.view(y0.shape).clone() if is_kept else None
                plan.record.append(StepRecord(solver.t0, solver.t1, solver.first_stage_time, start))
        solution[index] = solver.interpolate(time).view(y0.shape)
        if records_steps:
            plan.record[-1].outputs[index] = solver.weights_at(time)
    plan.last_step = solver.next_step
    return solution


def _solve_backward(plan: _Plan, solution: Tensor, solution_gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of y0 (its shape), of the parameters (flat) and of the output times."""
    vector_field, times, statistics = plan.vector_field, plan.times, plan.statistics.backward
    shape = solution.shape[1:]
    half, num_parameters = shape.numel(), sum(vector_field.parameter_sizes)
    by_quadrature = plan.adjoint is Adjoint.SEMINORM
    has_time_gradient = getattr(vector_field, "time_gradient", False)
    system = _AdjointSystem(vector_field, shape, carries_integrals=not by_quadrature)
    solver = Solver(
        system,
        norm_blocks(
            plan.adjoint,
            state_sizes=plan.state_sizes,
            parameter_sizes=vector_field.parameter_sizes,
            solution_size=solution.numel(),
        ),
        rtol=plan.adjoint_rtol,
        atol=plan.adjoint_atol,
        jumps=plan.jumps,
        like=solution,
        statistics=statistics,
        exact_end=plan.warm_start,
        max_num_steps=plan.max_num_steps,
    )
    solution, solution_gradient = solution.flatten(1), solution_gradient.flatten(1)
    state = solution.new_zeros(system.size)
    state[half : 2 * half] = solution_gradient[-1]
    # (a_theta, a_t): beside the state for the quadrature, else the end of the state itself.
    integrals = solution.new_zeros(num_parameters + 1)
    time_gradient = solution.new_zeros(len(times))
    step = plan.last_step if plan.warm_start else None
    for index in range(len(times) - 1, 0, -1):
        state[:half] = solution[index]
        if has_time_gradient:
            slope = torch.empty_like(state[:half])
            vector_field.evaluate(times[index], state[:half].view(shape), slope.view(shape))
            statistics.evaluation_times.append(times[index])
            time_gradient[index] = slope.dot(solution_gradient[index])
            (integrals if by_quadrature else state)[-1] -= time_gradient[index]
        solver.begin(times[index], times[index - 1], state, first_step=step)
        while not solver.has_passed(times[index - 1]):
            solver.advance()
            if by_quadrature:
                is_last = solver.has_passed(times[index - 1])
                weights = solver.weights_at(times[index - 1]) if is_last else STEP_WEIGHTS
                dt = solver.t1 - solver.t0
                for slot, weight in enumerate(weights):
                    if weight:
                        vector_field.add_parameter_product(slot, -dt * weight, integrals)
        state = solver.interpolate(times[index - 1])
        state[half : 2 * half] += solution_gradient[index - 1]
        step = solver.next_step if plan.warm_start else None
    if not by_quadrature:
        integrals = state[2 * half :]
    time_gradient[0] = integrals[-1]
    return state[half : 2 * half].view(shape), integrals[:num_parameters], time_gradient


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
    steps = [after - before for before, after in zip(times, times[1:])]
    if not (all(step > 0 for step in steps) or all(step < 0 for step in steps)) or not math.isfinite(sum(times)):
        raise ValueError(f"t must be finite and strictly increasing or decreasing, not {times}")
    return times


def _check_positive(**values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not (isinstance(value, numbers.Real) and 0 < value < math.inf):
            raise ValueError(f"{name} is {value!r}, but must be a finite number above 0")
