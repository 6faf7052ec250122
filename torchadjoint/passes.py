"""The two passes of a solve, forward and backward, as one differentiable function: `api` is what calls it."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from . import arguments
from .adjoints.forward import plain_solver
from .captured import leaves_behind
from .casting import uncast
from .field import AutogradField
from .held import Held, as_they_were, held_by
from .problem import Differentiation, Problem
from .statistics import SolveStatistics


@dataclass
class Plan:
    """All that the two directions of one solve share, apart from the tensors that are differentiated."""

    problem: Problem
    differentiation: Differentiation
    is_differentiated: bool
    statistics: SolveStatistics
    held: list[Held] = field(init=False)
    """What the field may read, besides its arguments: the backward pass reads the same."""
    made: dict[int, Held] = field(init=False, default_factory=dict)
    """What it has made itself in its first evaluation, by where that is held."""
    without_gradient: list[str] = field(init=False, default_factory=list)
    """The names of tensors that it holds and that require a gradient, but get none, as they are no parameters."""

    def __post_init__(self):
        self.held = held_by(self.problem.func) if self.is_differentiated else []

    def after_first(self) -> None:
        """Note what the field has made in its first evaluation."""
        self.made = {id(it): it.as_made_anew() for it in self.held if it.is_made_anew}

    def after_forward(self) -> None:
        """Hold what the backward pass reads: all that is as it was, and what the field has made."""
        # What the field itself changes when it is evaluated, such as a count, may change again.
        kept = [it for it in self.held if it.is_as_it_was]
        made = [(self.made.get(id(it)), it.as_made_anew()) for it in self.held if it.is_made_anew]
        self.held = kept + [replace(now, may_change=not (then and then.is_as_it_was)) for then, now in made]
        if self.problem.are_all_parameters:
            known = {*map(id, self.problem.parameters)}
            others = [it for it in kept if isinstance(it.value, Tensor) and id(it.value) not in known]
            # What was computed from parameters passes its gradient on to them.
            self.without_gradient = sorted(
                {it.name for it in others if not {*map(id, leaves_behind(it.value))} <= known}
            )


class DifferentiableSolve(torch.autograd.Function):
    """The solution (times, *shape of y0) of a plan, for its y0, t and the parameters of its field."""

    @staticmethod
    def forward(ctx, plan: Plan, y0: Tensor, t: Tensor, *parameters: Tensor) -> Tensor:
        with uncast(y0.device.type):
            solution = _solve(plan, y0)
        ctx.plan = plan
        plan.after_forward()
        ctx.save_for_backward(solution, *parameters)
        return solution

    @staticmethod
    def backward(ctx, solution_gradient: Tensor):
        arguments.refuse_transforms([solution_gradient])
        _refuse_cached_parametrizations()
        plan, (solution, *_) = ctx.plan, ctx.saved_tensors
        for it in plan.held:
            it.refuse_changes()
        differentiation = plan.differentiation
        plan.statistics.backward.clear()  # A retained graph may have come here before.
        with torch.no_grad(), uncast(solution.device.type), as_they_were(plan.held):
            gradients = differentiation.gradients(solution, solution_gradient)
            parameters = differentiation.field.unflatten(gradients.parameters)
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            # As autograd lets go of what it saved, whoever holds the solution.
            ctx.plan = None
        time_gradient = gradients.t if ctx.needs_input_grad[2] else None
        gradients = (gradients.y0, time_gradient, *parameters)
        if torch.is_grad_enabled():  # create_graph=True
            gradients = _OnceDifferentiable.apply(solution, solution_gradient, *gradients)
        return None, *gradients


class Standstill(torch.autograd.Function):
    """The solution (1, *shape of y0) at a single time: y0, whatever the time and the parameters, which follow it."""

    @staticmethod
    def forward(ctx, y0: Tensor, *others: Tensor) -> Tensor:
        return y0.unsqueeze(0).clone()

    @staticmethod
    def backward(ctx, solution_gradient: Tensor):
        return solution_gradient[0], *(None for _ in ctx.needs_input_grad[1:])


class _OnceDifferentiable(torch.autograd.Function):
    """Gradients as they are, which cannot be differentiated with respect to anything that they depend on."""

    @staticmethod
    def forward(
        ctx, solution: Tensor, solution_gradient: Tensor, *gradients: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        return tuple(None if gradient is None else gradient.view_as(gradient) for gradient in gradients)

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(
            "the gradient of a solve cannot be differentiated again: what follows backward(create_graph=True) must not "
            "depend on it"
        )


def _refuse_cached_parametrizations() -> None:
    if parametrize._cache_enabled:
        raise ValueError(
            "a solve inside parametrize.cached() would lose gradients, and so would its backward pass: what is "
            "evaluated without a graph would be kept. Leave out cached() around it"
        )


def _solve(plan: Plan, y0: Tensor) -> Tensor:
    """The states at the output times (times, *shape)."""
    problem, differentiation = plan.problem, plan.differentiation
    if plan.is_differentiated:
        _refuse_cached_parametrizations()
        if isinstance(differentiation.field, AutogradField):
            differentiation.field.after_first = plan.after_first
        solver = differentiation.begin()
    else:
        solver = plain_solver(problem, plan.statistics, differentiation.field)
    solution = y0.new_empty(len(problem.times), *y0.shape)
    solution[0] = y0
    solver.begin(problem.times, y0.reshape(-1), first_step=problem.forward.first_step)
    solver.write_states(problem.times[1:], solution.view(len(solution), -1)[1:])
    if plan.is_differentiated:
        differentiation.end(solver)
        if isinstance(differentiation.field, AutogradField):
            differentiation.field.after_first = None  # not called by a compiled field, and holds the plan in a circle
    return solution
