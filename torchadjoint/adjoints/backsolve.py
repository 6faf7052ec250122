"""The continuous adjoints: a solve backwards in time, by any norm of its error.

The seminorm takes the paper at its word: the adjoint of the parameters is an integral, so it does not ride in the
solver's state. It is summed up by the quadrature that belongs to each accepted step, and a rejected step never computes
it. Any other norm weighs it, so it rides.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import arguments
from ..compiled import CompiledSeminormSystem, CompiledSolver
from ..errors import SolverError
from ..field import CoupledField, Field
from ..norms import NORMS, BlockNorm, Norm, Sizes
from ..problem import Gradients, Problem
from ..solver import Solver
from ..statistics import SolveStatistics
from ..systems import AdjointSystem, SeminormSystem
from .forward import make_field, plain_solver, state_norm

SEMINORM = "seminorm"
READS_INTEGRALS = "check that the vector field reads none of the integrals"
WEIGH_TIME = ("default", "per-tensor")
"""As in torchdiffeq, these weigh the adjoint of t whether or not t needs a gradient; so does a norm of one's own."""


@dataclass(frozen=True)
class Backsolve:
    """The gradient by a solve backwards in time, whose error is measured by a norm.

    Raises:
        ValueError: if a field is not as described.
    """

    norm: str | Callable[[tuple[Tensor, ...]], Tensor] = SEMINORM
    """One of `NORMS` by its name. Or a function as torchdiffeq takes it: of the tuple (a_t, z, a_z, the adjoint of each
    parameter ...), with z and a_z spread out where the state is a tuple, each divided by its tolerance, to a tensor
    without dimensions: steps of up to 1 are accepted."""
    warm_start: bool = False
    """Whether it starts with the forward solve's last step size, carries its own from one output time to the next and
    stops at each of them, where otherwise it guesses anew and interpolates."""

    def __post_init__(self):
        if not callable(self.norm) and not (isinstance(self.norm, str) and self.norm in NORMS):
            names = ", ".join(map(repr, NORMS))
            arguments.refuse(
                "norm", self.norm, f"one of {names}, or a function of (a_t, z, a_z, parameter adjoints ...)"
            )
        arguments.flag("warm_start", self.warm_start)

    @property
    def name(self) -> str:
        """That of the norm."""
        return self.norm if isinstance(self.norm, str) else getattr(self.norm, "__name__", "a norm of one's own")

    def differentiate(self, problem: Problem, statistics: SolveStatistics) -> "_Backsolve":
        return _Backsolve(self, problem, statistics)


class _Backsolve:
    def __init__(self, adjoint: Backsolve, problem: Problem, statistics: SolveStatistics):
        if problem.compile is True and adjoint.norm != SEMINORM:
            raise ValueError("compile=True needs adjoint='seminorm' or adjoint='discrete'")
        self.problem, self.statistics, self.adjoint_name = problem, statistics, adjoint.name
        self.warm_start = adjoint.warm_start
        self.by_quadrature = adjoint.norm == SEMINORM
        weighs_time = callable(adjoint.norm) or adjoint.norm in WEIGH_TIME
        self.field = make_field(problem, time_gradient=weighs_time)
        self.asked_norm = adjoint.norm
        self.last_step: float | None = None

    def _norm(self, norm: str | Callable) -> Norm:
        problem = self.problem
        num_solution = len(problem.times) * sum(problem.coupled_sizes)
        sizes = Sizes(problem.coupled_sizes, self.field.parameter_sizes, num_solution)
        if callable(norm):
            # Without self, which holds the norm: a circle would keep the whole solve.
            as_torchdiffeq = functools.partial(_as_torchdiffeq, problem, self.field)
            return lambda flat: torch.as_tensor(norm(as_torchdiffeq(flat)), dtype=flat.dtype).abs()
        blocks = NORMS[norm](sizes)
        if problem.forward.norm is None or norm == "as-published":
            return BlockNorm(tuple(blocks))
        # What measures the state measures its adjoint too, as in torchdiffeq.
        of_state, half = state_norm(problem), sizes.num_state // 2
        rest = BlockNorm(tuple(block for block in blocks if block[0] >= sizes.num_state))

        def mixed(flat: Tensor) -> Tensor:
            parts = [of_state(flat[:half]), of_state(flat[half : 2 * half])]
            return torch.stack([*parts, rest(flat)] if rest.blocks else parts).amax()

        return mixed

    def begin(self) -> Solver:
        if self.problem.compile == "solve":
            raise ValueError(
                f"the adjoint is {self.adjoint_name!r}, but compile='solve' goes with adjoint='discrete' alone: "
                "take that, or compile=True"
            )
        for name in ("rtol", "atol"):
            if isinstance(getattr(self.problem.backward, name), Tensor):
                raise ValueError(
                    f"{name} of the backward solve is not one number, as it must be: give one as adjoint_{name}"
                )
        self.norm = self._norm(self.asked_norm)
        solver = plain_solver(self.problem, self.statistics, self.field)
        if self.problem.compile:
            solver.prepare_backward = self._system(self._no_integrals()).prepare
        return solver

    def end(self, solver: Solver) -> None:
        self.last_step = solver.next_step

    def gradients(self, solution: Tensor, solution_gradient: Tensor) -> Gradients:
        problem, times, shape = self.problem, self.problem.times, self.problem.y0.shape
        half, num_parameters = sum(problem.coupled_sizes), sum(self.field.parameter_sizes)
        system = self._system(integrals := self._no_integrals())
        solver = self._solver(system)
        solution, solution_gradient = solution.reshape(len(times), -1), solution_gradient.reshape(len(times), -1)
        adjoint = solution_gradient[-1, :half]
        integral_adjoint = solution_gradient[-1, half:].clone()
        time_gradient = solution.new_zeros(len(times)) if problem.t.requires_grad else None
        first_step = self.last_step if self.warm_start else problem.backward.first_step
        for index in range(len(times) - 1, 0, -1):
            if time_gradient is not None:
                time_gradient[index] = self._slope(solution, index).dot(solution_gradient[index])
                integrals[-1] -= time_gradient[index]
            if problem.num_integrals:
                system.field.integral_adjoint.copy_(integral_adjoint)
                integral_adjoint.add_(solution_gradient[index - 1, half:])
            carried = [integrals] if system.carries_integrals else []
            end, start = times[index - 1], solution[index, :half]
            solver.begin((times[index], end), torch.cat([start, adjoint, *carried]), first_step=first_step)
            while not solver.has_passed(end):
                solver.advance()
                is_last = solver.has_passed(end)
                system.add_step(
                    solver.t1 - solver.t0, solver.weights_at(end) if is_last else problem.backward.method.step_weights
                )
            state = solver.interpolate(end)
            if problem.num_integrals and not problem.backward.method.is_adaptive and not state.isfinite().all():
                raise SolverError(f"the backward solve is not finite: {READS_INTEGRALS}")
            if system.carries_integrals:
                integrals.copy_(state[2 * half :])
            adjoint = state[half : 2 * half]
            if index == 1 and time_gradient is not None:
                # The integral of df/dt, which the norm may weigh, lacks what the field's jumps add.
                whole = torch.cat([adjoint, integral_adjoint - solution_gradient[0, half:]])
                time_gradient[0] = -self._slope(solution, 0).dot(whole)
            adjoint = adjoint.add_(solution_gradient[index - 1, :half])
            if self.warm_start:
                first_step = solver.next_step
        if problem.num_integrals and system.field.reads.any():
            raise SolverError(f"the adjoints of the integrals are not constant: {READS_INTEGRALS}")
        return Gradients(torch.cat([adjoint, integral_adjoint]).view(shape), integrals[:num_parameters], time_gradient)

    def _slope(self, solution: Tensor, index: int) -> Tensor:
        """The field (size) at an output time, where the solution (times, size) is."""
        time, slope = self.problem.times[index], torch.empty_like(solution[index])
        self.field.evaluate(time, solution[index].view_as(self.problem.y0), slope.view_as(self.problem.y0))
        self.statistics.backward.evaluation_times.append(time)
        return slope

    def _system(self, integrals: Tensor) -> AdjointSystem:
        field, shape, method = self.field, self.problem.y0.shape, self.problem.backward.method
        if self.problem.num_integrals:
            shape = torch.Size([sum(self.problem.coupled_sizes)])
            field = CoupledField(field, shape.numel(), self.problem.y0)
        if not self.by_quadrature:
            return AdjointSystem(field, shape, integrals)
        if self.problem.compile:
            return CompiledSeminormSystem(field, integrals, method, self.norm.blocks)
        return SeminormSystem(field, shape, integrals, method)

    def _no_integrals(self) -> Tensor:
        """Zeros for the gradient of the parameters and of t (parameters + 1)."""
        return self.problem.y0.new_zeros(sum(self.field.parameter_sizes) + 1)

    def _solver(self, system: AdjointSystem) -> Solver:
        problem = self.problem
        kind = CompiledSolver if problem.compile else Solver
        return kind(
            system,
            problem.backward,
            self.norm,
            jumps=problem.jumps,
            like=problem.y0,
            statistics=self.statistics.backward,
            exact_end=self.warm_start,
            make_grid=problem.make_grid(problem.backward),
            observer=problem.observer("backward", problem.split_both),
        )


def _as_torchdiffeq(problem: Problem, vector_field: Field, flat: Tensor) -> tuple[Tensor, ...]:
    """The backward state (flat) as torchdiffeq's norms get it: (a_t, z, a_z, the adjoint of each parameter ...)."""
    half = sum(problem.coupled_sizes)
    states = problem.split_both(flat)
    states = [tensor for state in states for tensor in (state if problem.is_tuple else (state,))]
    return flat[-1], *states, *vector_field.unflatten(flat[2 * half : -1])
