"""Solves of ordinary differential equations with a choice of gradient: models use `solve`, others `odeint_adjoint`.

Four ways are adjoint solves that differ in their norm. Of these the seminorm takes the paper at its word: the adjoint
of the parameters is an integral, so it does not ride in the solver's state. It is summed up by the quadrature that
belongs to each accepted step, and a rejected step never computes it. The fifth way, `discrete`, has no backward solve:
it is the exact gradient of the steps that the forward solve took.
"""

from dataclasses import dataclass

import torch

from . import callbacks
from .field import AutogradField
from .norms import Adjoint, norm_blocks
from .passes import DifferentiableSolve, Plan
from .problem import Problem, State, of_its_arguments
from .statistics import SolveStatistics


@dataclass
class Solution:
    """What a solve returns."""

    y: State
    """The state at each output time: the shape of `y0` with the times in front, or a tuple of such tensors."""
    statistics: SolveStatistics
    """What the solve did; the backward part is filled by `.backward()`."""


@of_its_arguments
def solve(problem: Problem) -> Solution:
    """Solve dy/dt = func(t, y) with error control, differentiable with respect to y0, t and parameters.

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
        method: how to step, forward and backward: the name of a method with error control, or a `RungeKutta`.
        adjoint: how to differentiate: a name of `Adjoint`, or False for `default` and True for `seminorm`.
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
    return _solve(problem)


@of_its_arguments
def odeint_adjoint(problem: Problem) -> State:
    """In place of `torchdiffeq.odeint_adjoint`: the `y` of `solve`, whose arguments it takes."""
    return _solve(problem).y


def _solve(problem: Problem) -> Solution:
    t, adjoint = problem.t, problem.adjoint
    may_be_fused = problem.are_all_parameters and not problem.compile and not t.requires_grad
    if may_be_fused and hasattr(problem.func, "fused_field"):
        vector_field = problem.func.fused_field(problem.y0)
    else:
        # As in torchdiffeq, these two weigh the adjoint of t whether or not t needs a gradient.
        weighs_time = adjoint in (Adjoint.DEFAULT, Adjoint.PER_TENSOR)
        vector_field = AutogradField(
            problem.func, problem.parameters, problem.y0.shape, time_gradient=t.requires_grad or weighs_time
        )
    inputs = (problem.y0, t, *vector_field.parameters)
    plan = Plan(
        problem=problem,
        vector_field=vector_field,
        is_differentiated=torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs),
        guarded=problem.read_besides(vector_field.parameters),
        forward_listener=callbacks.listener(problem.asked, "", problem.split),
        backward_listener=callbacks.listener(problem.asked, callbacks.ADJOINT, problem.split_both),
    )
    if plan.is_differentiated and adjoint is not Adjoint.DISCRETE:
        plan.backward_blocks = norm_blocks(
            adjoint,
            state_sizes=problem.sizes,
            parameter_sizes=vector_field.parameter_sizes,
            solution_size=len(problem.times) * problem.y0.numel(),
        )
    solution = DifferentiableSolve.apply(plan, *inputs)
    return Solution(problem.split(solution) if problem.is_tuple else solution, plan.statistics)
