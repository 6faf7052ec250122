"""The two passes of a solve, forward and backward, as one differentiable function: `adjoint.solve` is what calls it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .discrete import StepRecord, reverse_steps
from .dopri5 import STEP_WEIGHTS
from .field import Field
from .norms import Adjoint, Block, consecutive_blocks
from .replay import Replay
from .solver import Solver
from .statistics import SolveStatistics


@dataclass
class Plan:
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
    backward_blocks: list[Block] | None = None
    """The norm of the backward solve, if there is one."""
    last_step: float | None = None
    record: list[StepRecord] = field(default_factory=list)


class DifferentiableSolve(torch.autograd.Function):
    """The solution (times, *shape of y0) of a plan, for its y0, t and the parameters of its field."""

    @staticmethod
    def forward(ctx, plan: Plan, y0: Tensor, t: Tensor, *parameters: Tensor) -> Tensor:
        solution = _solve_forward(plan, y0)
        ctx.plan = plan
        # The parameters are saved so that autograd refuses to go on if an optimiser has changed them in between.
        ctx.save_for_backward(solution, *parameters)
        return solution

    @staticmethod
    def backward(ctx, solution_gradient: Tensor):
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "the gradient of a solve cannot be differentiated again: call backward without create_graph=True"
            )
        plan, (solution, *_) = ctx.plan, ctx.saved_tensors
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
    """The state alone.

    With `keeps_last_step` the field is linearised where a step reaches the end, for the backward pass to begin there.
    """

    def __init__(self, vector_field: Field, shape: torch.Size, *, keeps_last_step: bool):
        self.field = vector_field
        self.keeps_last_step = keeps_last_step
        self.shape = shape
        self.size = self.num_coupled = shape.numel()
        self.is_static = vector_field.is_static
        self.enter = vector_field.enter

    def bind(self, states: Sequence[Tensor], slopes: Sequence[Tensor]) -> None:
        self.buffers = [
            (state.view(self.shape), slope.view(self.shape)) for state, slope in zip(states, slopes, strict=True)
        ]

    def evaluate(self, stage: int, t: float, *, is_last_step: bool) -> None:
        if self.keeps_last_step and is_last_step:
            self.field.linearise(stage, t, *self.buffers[stage])
        else:
            self.field.evaluate(t, *self.buffers[stage])

    def reuse_last_stage(self) -> None:
        """An evaluation leaves nothing behind but the slope."""


class _AdjointSystem:
    """The state and its adjoint (z, a_z), and with `carries_integrals` (a_theta, a_t) behind them."""

    keeps_last_step = False

    def __init__(self, vector_field: Field, shape: torch.Size, *, carries_integrals: bool):
        self.field = vector_field
        self.shape = shape
        self.carries_integrals = carries_integrals
        self.num_coupled = 2 * shape.numel()
        self.size = self.num_coupled + carries_integrals * (sum(vector_field.parameter_sizes) + 1)
        self.is_static = vector_field.is_static
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

    def evaluate(self, stage: int, t: float, *, is_last_step: bool) -> None:
        z, adjoint, z_slope, adjoint_slope, integral_slopes = self.buffers[stage]
        self.field.linearise(stage, t, z, z_slope)
        self.field.pullback(stage, adjoint, adjoint_slope)
        adjoint_slope.neg_()
        if self.carries_integrals:
            integral_slopes.zero_()
            self.field.add_parameter_product(stage, -1.0, integral_slopes)


class _Quadrature:
    """The parameters' part of the backward solve, summed over its accepted steps into `integrals`."""

    def __init__(self, vector_field: Field, integrals: Tensor):
        self.field = vector_field
        self.integrals = integrals
        self.rate = torch.zeros_like(integrals)
        """The weighted mean of the parameters' slopes in a step."""
        self._whole_steps = Replay(device=integrals.device, is_static=vector_field.is_static)

    def add_step(self, dt: float, weights: Sequence[float]) -> None:
        """Add the integral over a step of size `dt`, given the weights of its stages."""
        if weights is STEP_WEIGHTS:
            self._whole_steps(lambda: self._average(STEP_WEIGHTS))
        else:
            self._average(weights)
        self.integrals.add_(self.rate, alpha=-dt)

    def _average(self, weights: Sequence[float]) -> None:
        self.rate.zero_()
        for slot, weight in enumerate(weights):
            if weight:
                self.field.add_parameter_product(slot, weight, self.rate)


def _solve_forward(plan: Plan, y0: Tensor) -> Tensor:
    """The states at the output times (times, *shape)."""
    records_steps = plan.is_differentiated and plan.adjoint is Adjoint.DISCRETE
    times = plan.times
    solver = Solver(
        _ForwardSystem(plan.vector_field, y0.shape, keeps_last_step=records_steps),
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
    if records_steps:
        plan.record[-1].is_linearised = True
    plan.last_step = solver.next_step
    return solution


def _solve_backward(plan: Plan, solution: Tensor, solution_gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of y0 (its shape), of the parameters (flat) and of the output times."""
    vector_field, times, statistics = plan.vector_field, plan.times, plan.statistics.backward
    shape = solution.shape[1:]
    half, num_parameters = shape.numel(), sum(vector_field.parameter_sizes)
    by_quadrature = plan.adjoint is Adjoint.SEMINORM
    has_time_gradient = getattr(vector_field, "time_gradient", False)
    system = _AdjointSystem(vector_field, shape, carries_integrals=not by_quadrature)
    solver = Solver(
        system,
        plan.backward_blocks,
        rtol=plan.adjoint_rtol,
        atol=plan.adjoint_atol,
        jumps=plan.jumps,
        like=solution,
        statistics=statistics,
        exact_end=plan.warm_start,
        max_num_steps=plan.max_num_steps,
    )
    solution, solution_gradient = solution.reshape(len(times), -1), solution_gradient.reshape(len(times), -1)
    state = solution.new_zeros(system.size)
    state[half : 2 * half] = solution_gradient[-1]
    # (a_theta, a_t): beside the state for the quadrature, else the end of the state itself.
    integrals = solution.new_zeros(num_parameters + 1)
    quadrature = _Quadrature(vector_field, integrals) if by_quadrature else None
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
                quadrature.add_step(solver.t1 - solver.t0, weights)
        state = solver.interpolate(times[index - 1])
        state[half : 2 * half] += solution_gradient[index - 1]
        step = solver.next_step if plan.warm_start else None
    if not by_quadrature:
        integrals = state[2 * half :]
    time_gradient[0] = integrals[-1]
    return state[half : 2 * half].view(shape), integrals[:num_parameters], time_gradient
