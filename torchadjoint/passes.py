"""The two passes of a solve, forward and backward, as one differentiable function: `api` is what calls it."""

import functools
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .callbacks import Listener
from .compiled import CompiledForwardSystem, CompiledSeminormSystem, CompiledSolver, prepare
from .discrete import StepRecord, reverse_steps
from .field import Field
from .norms import Adjoint, Block, consecutive_blocks
from .problem import Problem
from .solver import Solver, System
from .statistics import SolveStatistics
from .systems import AdjointSystem, ForwardSystem, SeminormSystem


@dataclass
class Plan:
    """All that the two directions of one solve share, apart from the tensors that are differentiated."""

    problem: Problem
    vector_field: Field
    """An `AutogradField` if attempts are compiled or the output times are differentiated."""
    is_differentiated: bool
    guarded: list[Tensor]
    """Tensors that the field may read, besides its parameters: they must not change before the backward pass."""
    forward_listener: Listener | None
    backward_listener: Listener | None
    backward_blocks: list[Block] | None = None
    """The norm of the backward solve, if there is one."""
    last_step: float | None = None
    record: list[StepRecord] = field(default_factory=list)
    statistics: SolveStatistics = field(default_factory=SolveStatistics)

    def make_solver(self, system: System, blocks: list[Block], **options) -> Solver:
        """The solver of one direction; `options` are those of `Solver` that the directions do not share."""
        problem = self.problem
        kind = CompiledSolver if problem.compile else Solver
        return kind(system, problem.method, blocks, jumps=problem.jumps, max_num_steps=problem.max_num_steps, **options)


class DifferentiableSolve(torch.autograd.Function):
    """The solution (times, *shape of y0) of a plan, for its y0, t and the parameters of its field."""

    @staticmethod
    def forward(ctx, plan: Plan, y0: Tensor, t: Tensor, *parameters: Tensor) -> Tensor:
        versions = [tensor._version for tensor in plan.guarded]
        solution = _solve_forward(plan, y0)
        ctx.plan = plan
        # They are saved so that autograd refuses to go on if somebody has changed them in between. What the field
        # itself changes when it is evaluated, such as a count, may change again.
        unchanged = [
            tensor for tensor, version in zip(plan.guarded, versions, strict=True) if tensor._version == version
        ]
        ctx.save_for_backward(solution, *parameters, *unchanged)
        return solution

    @staticmethod
    def backward(ctx, solution_gradient: Tensor):
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "the gradient of a solve cannot be differentiated again: call backward without create_graph=True"
            )
        plan, (solution, *_) = ctx.plan, ctx.saved_tensors
        vector_field = plan.vector_field
        plan.statistics.backward.clear()  # A retained graph may have come here before.
        time_gradient = None
        if plan.problem.adjoint is Adjoint.DISCRETE:
            state_gradient, gradient = reverse_steps(
                vector_field,
                plan.problem.method,
                plan.record,
                solution_gradient,
                checkpoint_interval=plan.problem.checkpoint_interval,
                statistics=plan.statistics.backward,
            )
        else:
            state_gradient, gradient, time_gradient = _solve_backward(plan, solution, solution_gradient)
        gradients = vector_field.unflatten(gradient)
        return None, state_gradient, time_gradient if ctx.needs_input_grad[2] else None, *gradients


def _solve_forward(plan: Plan, y0: Tensor) -> Tensor:
    """The states at the output times (times, *shape)."""
    problem = plan.problem
    records_steps = plan.is_differentiated and problem.adjoint is Adjoint.DISCRETE
    times = problem.times
    make_system = functools.partial(CompiledForwardSystem, method=problem.method) if problem.compile else ForwardSystem
    solver = plan.make_solver(
        make_system(plan.vector_field, y0.shape, keeps_last_step=records_steps),
        consecutive_blocks(problem.sizes),
        rtol=problem.rtol,
        atol=problem.atol,
        like=y0,
        statistics=plan.statistics.forward,
        listener=plan.forward_listener,
    )
    solution = y0.new_empty(len(times), *y0.shape)
    solution[0] = y0
    solver.begin(times[0], times[-1], y0.reshape(-1), first_step=problem.first_step)
    if problem.compile:
        prepare(solver, plan.backward_blocks)
    for index, time in enumerate(times[1:], start=1):
        while not solver.has_passed(time):
            solver.advance()
            if records_steps:
                is_kept = len(plan.record) % problem.checkpoint_interval == 0
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
    problem, vector_field, statistics = plan.problem, plan.vector_field, plan.statistics.backward
    times = problem.times
    shape = solution.shape[1:]
    half, num_parameters = shape.numel(), sum(vector_field.parameter_sizes)
    by_quadrature = problem.adjoint is Adjoint.SEMINORM
    # (a_theta, a_t): beside the state for the quadrature, else the end of the state itself.
    integrals = solution.new_zeros(num_parameters + 1)
    if by_quadrature:
        make_system = CompiledSeminormSystem if problem.compile else SeminormSystem
        system = make_system(vector_field, problem.method, shape, integrals)
    else:
        system = AdjointSystem(vector_field, shape, carries_integrals=True)
    solver = plan.make_solver(
        system,
        plan.backward_blocks,
        rtol=problem.adjoint_rtol,
        atol=problem.adjoint_atol,
        like=solution,
        statistics=statistics,
        exact_end=problem.warm_start,
        listener=plan.backward_listener,
    )
    solution, solution_gradient = solution.reshape(len(times), -1), solution_gradient.reshape(len(times), -1)
    state = solution.new_zeros(system.size)
    state[half : 2 * half] = solution_gradient[-1]
    time_gradient = solution.new_zeros(len(times))
    step = plan.last_step if problem.warm_start else None
    for index in range(len(times) - 1, 0, -1):
        state[:half] = solution[index]
        if problem.t.requires_grad:
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
                weights = solver.weights_at(times[index - 1]) if is_last else problem.method.step_weights
                system.add_step(solver.t1 - solver.t0, weights)
        state = solver.interpolate(times[index - 1])
        state[half : 2 * half] += solution_gradient[index - 1]
        step = solver.next_step if problem.warm_start else None
    if not by_quadrature:
        integrals = state[2 * half :]
    time_gradient[0] = integrals[-1]
    return state[half : 2 * half].view(shape), integrals[:num_parameters], time_gradient
