"""An interpolated adjoint, outside the library: the backward solve takes the state from the forward solve's steps.

Only the adjoint of the state is solved for backwards. The state is the dense output of the forward solve, for which the
start and the slopes of every accepted step are kept, so that no error of the state can grow backwards. As under the
seminorm, the parameters' gradient is summed by the quadrature of the accepted steps. As with a warm start, a step size
is carried from one output time to the next, and no step goes beyond one.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchadjoint import Field, Gradients, RungeKutta, SolveStatistics
from torchadjoint.adjoints import forward_solver, make_field
from torchadjoint.norms import BlockNorm, consecutive_blocks
from torchadjoint.problem import Problem
from torchadjoint.solver import Solver
from torchadjoint.systems import ForwardSystem

from .ours import PACKAGES, Way, prepare

__all__ = ["PACKAGES", "SMALL", "WAYS", "prepare"]


@dataclass(frozen=True)
class KeptStep:
    """An accepted step of the forward solve."""

    t0: float
    t1: float
    start: Tensor
    """(size,)"""
    slopes: Tensor
    """(stages, size)"""


class KeepingSolver(Solver):
    """A solver that keeps what the dense output of all its steps needs."""

    def begin(self, times: Sequence[float], state: Tensor, **options) -> None:
        self.kept: list[KeptStep] = []
        super().begin(times, state, **options)

    def advance(self) -> None:
        super().advance()
        self.kept.append(KeptStep(self.t0, self.t1, self.start.clone(), self.slopes.clone()))


class DenseOutput:
    """The state at any time of a forward solve that went upwards in time."""

    def __init__(self, steps: Sequence[KeptStep], method: RungeKutta):
        self.steps, self.method = steps, method
        self.starts = [step.t0 for step in steps]

    def at(self, t: float) -> Tensor:
        """Flat. Where two steps meet, the same from either side."""
        step = self.steps[max(0, bisect.bisect_right(self.starts, t) - 1)]
        dt = step.t1 - step.t0
        weights = self.method.interpolation_weights(min(1.0, (t - step.t0) / dt))
        return torch.addmv(step.start, step.slopes.T, step.start.new_tensor([dt * weight for weight in weights]))


class InterpolatedSystem:
    """The adjoint of the state alone, along a dense output."""

    direction = "backward"
    is_static = False

    def __init__(self, vector_field: Field, shape: torch.Size, dense: DenseOutput, gradient: Tensor):
        self.field, self.shape, self.dense, self.gradient = vector_field, shape, dense, gradient
        self.size = self.num_coupled = shape.numel()
        self.parts = {"a_z": (0, self.size)}
        self.enter = vector_field.enter
        self.reuse_stage = vector_field.reuse_slot

    def bind(self, states: Sequence[Tensor], slopes: Sequence[Tensor]) -> None:
        self.buffers = [
            (state.view(self.shape), slope.view(self.shape)) for state, slope in zip(states, slopes, strict=True)
        ]
        self.unused = torch.empty_like(self.buffers[0][0])

    def evaluate(self, stage: int, t: float) -> None:
        adjoint, slope = self.buffers[stage]
        self.field.linearise(stage, t, self.dense.at(t).view(self.shape), self.unused)
        self.field.pullback(stage, adjoint, slope)
        slope.neg_()

    def add_step(self, dt: float, weights: Sequence[float]) -> None:
        """Add an accepted step's part of the parameters' gradient."""
        for slot, weight in enumerate(weights):
            if weight:
                self.field.add_parameter_product(slot, -dt * weight, self.gradient)


class Interpolated:
    """The way to differentiate, as `torchadjoint.solve` takes it."""

    name = "interpolated"

    def differentiate(self, problem: Problem, statistics: SolveStatistics) -> "_Interpolated":
        """What differentiates one solve.

        Raises:
            ValueError: if t needs a gradient, or goes downwards.
        """
        if problem.t.requires_grad or problem.times[-1] < problem.times[0]:
            raise ValueError("interpolated needs times that go upwards and are not differentiated")
        return _Interpolated(problem, statistics)


class _Interpolated:
    def __init__(self, problem: Problem, statistics: SolveStatistics):
        self.problem, self.statistics = problem, statistics
        self.field = make_field(problem, time_gradient=False)

    def begin(self) -> Solver:
        system = ForwardSystem(self.field, self.problem.y0.shape)
        return forward_solver(self.problem, self.statistics, system, kind=KeepingSolver)

    def end(self, solver: KeepingSolver) -> None:
        self.dense = DenseOutput(solver.kept, self.problem.forward.method)
        self.first_step = solver.next_step

    def gradients(self, solution: Tensor, solution_gradient: Tensor) -> Gradients:
        problem, shape = self.problem, self.problem.y0.shape
        gradient = solution.new_zeros(sum(self.field.parameter_sizes))
        system = InterpolatedSystem(self.field, shape, self.dense, gradient)
        solver = Solver(
            system,
            problem.backward,
            BlockNorm(tuple(consecutive_blocks(problem.sizes))),
            jumps=problem.jumps,
            like=problem.y0,
            statistics=self.statistics.backward,
            exact_end=True,
        )
        by_output = solution_gradient.reshape(len(problem.times), -1)
        adjoint, first_step = by_output[-1], self.first_step
        for index in range(len(problem.times) - 1, 0, -1):
            end = problem.times[index - 1]
            solver.begin((problem.times[index], end), adjoint, first_step=first_step)
            while not solver.has_passed(end):
                solver.advance()
                system.add_step(solver.t1 - solver.t0, problem.backward.method.step_weights)
            adjoint, first_step = solver.end + by_output[index - 1], solver.next_step
        return Gradients(adjoint.view(shape), gradient, None)


WAYS = {"interpolated": Way(Interpolated())}
SMALL = tuple(WAYS)
