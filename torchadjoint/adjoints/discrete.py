"""The exact gradient of the steps that a solve took, from their records: no solve backwards in time."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from .. import arguments
from ..compiled import CompiledField, CompiledSolver
from ..compiled_solve import Piece, StepReversal
from ..field import Field
from ..problem import Gradients, Problem
from ..solver import Solver
from ..statistics import SolveStatistics
from ..systems import ForwardSystem
from .forward import compiled_system, forward_solver, loop_solver, make_field

Extent = Literal["stage", "step", "solve"]


@dataclass(frozen=True)
class Discrete:
    """The gradient of the steps that the forward solve took, with their sizes taken as given.

    That of the output times is the flow's: an output moves with the field there.

    Raises:
        ValueError: if a field is not as described.
    """

    checkpoint_interval: int = 1
    """How many steps from one stored state to the next; those between are solved again."""
    linearised: Extent = "step"
    """Of what the linearised stages are kept at once: more memory, fewer evaluations.

    solve: of the whole solve, which linearises as it goes; the way back evaluates nothing. Without CUDA graphs.
    step: of one step, which the way back evaluates again.
    stage: a single one, for a field whose stages are large; the way back evaluates everything twice.
    """
    name = "discrete"

    def __post_init__(self):
        interval = arguments.whole_number("checkpoint_interval", self.checkpoint_interval)
        object.__setattr__(self, "checkpoint_interval", interval)
        arguments.choice("linearised", self.linearised, get_args(Extent))
        if self.linearised == "solve" and self.checkpoint_interval > 1:
            raise ValueError(
                f"checkpoint_interval is {self.checkpoint_interval}, but linearised is 'solve', which keeps more than "
                "the states: leave one away"
            )

    def differentiate(self, problem: Problem, statistics: SolveStatistics) -> "_Discrete":
        return _Discrete(self, problem, statistics)


@dataclass
class _Step:
    """An accepted step, as far as its reversal needs it."""

    t0: float
    t1: float
    stage_times: list[float]
    """Where its slopes were evaluated: the first at t0, or on one side of it."""
    piece_end: float
    """The next jump, or the solve's last time: the field was told so, and t1 may lie beyond the last time."""
    start: Tensor | None
    """The state at t0, flat; None between checkpoints, where it is solved for again."""
    end: Tensor | None = None
    """The state at t1, flat, of a compiled step."""
    outputs: dict[int, Sequence[float]] = field(default_factory=dict)
    """The dense output's weights of each output time in this step, by its index."""
    first_slot: int = 0
    """The field's slot of its first stage; the others follow."""
    is_linearised: bool = False
    """Whether the slots hold the stages after the first: true of the last step, right after the solve."""


class _RecordingSystem(ForwardSystem):
    """The state alone. While it `linearises`, the stages stay in the field's slots."""

    linearises = False
    first_slot = 0

    def evaluate(self, stage: int, t: float) -> None:
        if self.linearises:
            self.field.linearise(self.first_slot + stage, t, *self.buffers[stage])
        else:
            super().evaluate(stage, t)


class _KeepingSystem(_RecordingSystem):
    """The same, with slots of its own for every step; a stage that two steps share has one."""

    linearises = True

    def evaluate(self, stage: int, t: float) -> None:
        if stage == 0:
            self.first_slot += len(self.buffers)
        super().evaluate(stage, t)

    def reuse_stage(self, stage: int) -> None:
        self.first_slot += stage


class _Recording:
    """What a solver has besides that keeps a record of its steps and outputs."""

    checkpoint_interval: int

    def begin(self, times: Sequence[float], state: Tensor, **options) -> None:
        self.record: list[_Step] = []
        self.num_outputs = 1
        super().begin(times, state, **options)

    def advance(self) -> None:
        super().advance()
        is_kept = len(self.record) % self.checkpoint_interval == 0
        times = [self.first_stage_time, *self.stage_times]
        self.record.append(_Step(self.t0, self.t1, times, self._piece_end, self._kept_start() if is_kept else None))

    def _kept_start(self) -> Tensor:
        return self.start.clone()

    def interpolate(self, t: float) -> Tensor:
        state = super().interpolate(t)
        self.record[-1].outputs[self.num_outputs] = self.weights_at(t)
        self.num_outputs += 1
        return state


class _RecordingSolver(_Recording, Solver):
    """Records steps, and linearises the last one or all of them."""

    linearised: Extent

    def advance(self) -> None:
        super().advance()
        self.record[-1].first_slot = self.system.first_slot

    def _run_attempt(self) -> Tensor | None:
        is_last = self.has_passed(self.t_end)
        self.system.linearises = self.linearised == "solve" or (self.linearised == "step" and is_last)
        # A replay would leave nothing in the slots.
        return self._error_ratio() if self.system.linearises else super()._run_attempt()

    def _find_first_slope(self, t: float) -> None:
        if self.system.linearises:
            self.system.evaluate(0, t)
        else:
            super()._find_first_slope(t)


class _CompiledRecordingSolver(_Recording, CompiledSolver):
    """Records compiled steps with their ends, which nothing overwrites: a step's end is the next one's start."""

    def advance(self) -> None:
        super().advance()
        self.record[-1].end = self.end

    def _kept_start(self) -> Tensor:
        return self.start


class _Discrete:
    def __init__(self, adjoint: Discrete, problem: Problem, statistics: SolveStatistics):
        if problem.compile and adjoint != Discrete():
            raise ValueError(
                f"the adjoint is {adjoint}, but compile={problem.compile!r} keeps every state and no stage: take "
                "adjoint='discrete', or leave compile away"
            )
        self.adjoint, self.problem, self.statistics = adjoint, problem, statistics
        self.field = make_field(problem, time_gradient=False)
        self.record: list[_Step] | list[Piece] = []

    def begin(self) -> Solver:
        if self.problem.compile == "solve":
            solver = loop_solver(self.problem, self.statistics, self.field)
            solver.record, solver.prepare_backward = [], self.step_reversal.prepare
            return solver
        if self.problem.compile:
            system = compiled_system(self.problem, self.field)
            solver = forward_solver(self.problem, self.statistics, system, kind=_CompiledRecordingSolver)
            solver.prepare_backward = self._stages().prepare
        else:
            kind = _KeepingSystem if self.adjoint.linearised == "solve" else _RecordingSystem
            system = kind(self.field, self.problem.y0.shape)
            solver = forward_solver(self.problem, self.statistics, system, kind=_RecordingSolver)
            solver.linearised = self.adjoint.linearised
        solver.checkpoint_interval = self.adjoint.checkpoint_interval
        return solver

    def end(self, solver: Solver) -> None:
        self.record = solver.record
        if not self.problem.compile:
            self.record[-1].is_linearised = self.adjoint.linearised == "step"

    @functools.cached_property
    def step_reversal(self) -> StepReversal:
        """What reverses the steps that a compiled loop has taken."""
        problem = self.problem
        return StepReversal(self.field, problem.forward.method, problem.y0.numel(), self.statistics.backward)

    def _stages(self) -> "_Stages":
        kinds = {"stage": _SingleStages, "step": _Stages, "solve": _KeptStages}
        kind = _CompiledStages if self.problem.compile else kinds[self.adjoint.linearised]
        return kind(self.field, self.problem, self.statistics)

    def gradients(self, solution: Tensor, solution_gradient: Tensor) -> Gradients:
        flat = solution_gradient.reshape(len(solution_gradient), -1)
        gradient = flat.new_zeros(sum(self.field.parameter_sizes))
        if self.problem.compile == "solve":
            adjoint = self.step_reversal.reverse(self.record, flat, gradient)
        else:
            adjoint = self._reverse(flat, gradient)
        times = self._time_gradient(solution, flat, adjoint) if self.problem.t.requires_grad else None
        return Gradients((adjoint + flat[0]).view(self.problem.y0.shape), gradient, times)

    def _time_gradient(self, solution: Tensor, solution_gradient: Tensor, adjoint: Tensor) -> Tensor:
        """How the loss changes if an output time moves, or with the first the start, where the adjoint is `adjoint`."""
        times = self.problem.times
        slopes = torch.empty_like(solution)
        for time, state, slope in zip(times, solution, slopes, strict=True):
            self.field.evaluate(time, state, slope)
        self.statistics.backward.evaluation_times.extend(times)
        moved = solution_gradient.clone()
        moved[0] = -adjoint
        return (slopes.reshape(len(times), -1) * moved).sum(dim=1)

    def _reverse(self, solution_gradient: Tensor, gradient: Tensor) -> Tensor:
        """The gradient of the state at the start (flat), its own output apart; adds to that of the parameters.

        Memory: the states kept in the record, those of one `checkpoint_interval`, and the stages that are `linearised`:
        if those of one step, at first of the last, as the forward solve leaves it.
        """
        stages = self._stages()
        record, interval, last = self.record, self.adjoint.checkpoint_interval, stages.method.num_stages - 1
        end_gradient = torch.zeros_like(solution_gradient[0])
        for first in reversed(range(0, len(record), interval)):
            steps = record[first : first + interval]
            starts = [steps[0].start]
            for step in steps[:-1]:
                self.field.enter(step.t0, step.piece_end)
                stages.solve_again(step, starts[-1])
                starts.append(stages.state(step, starts[-1], last))
            for index in reversed(range(len(steps))):
                number = first + index
                end_gradient = _reverse_step(
                    stages,
                    steps[index],
                    starts[index],
                    end_gradient,
                    solution_gradient,
                    gradient,
                    before=record[number - 1] if number > 0 else None,
                    after=record[number + 1] if number + 1 < len(record) else None,
                )
        return end_gradient


class _Stages:
    """The stages of one step at a time, all linearised at once."""

    def __init__(self, vector_field: Field, problem: Problem, statistics: SolveStatistics):
        self.field, self.method = vector_field, problem.forward.method
        self.shape = problem.y0.shape
        self.statistics = statistics.backward
        self.slopes = problem.y0.new_empty(self.method.num_stages, problem.y0.numel())
        self.tableau = self.slopes.new_tensor(self.method.stage_matrix)

    def state(self, step: _Step, start: Tensor, stage: int) -> Tensor:
        """The state at a stage, or for the last stage at the end of the step, from the slopes before it."""
        if stage == 0:
            return start
        weights = self.tableau[stage, :stage] * (step.t1 - step.t0)
        return torch.addmv(start, self.slopes[:stage].T, weights)

    def share_a_slope(self, step: _Step | None, after: _Step | None) -> bool:
        """Whether the last slope of `step` served as the first of `after`, the step after it: not at a jump."""
        if step is None or after is None:
            return False
        return after.stage_times[0] == step.stage_times[-1]

    def solve_again(self, step: _Step, start: Tensor) -> None:
        """Make the slopes ready that the step's end is made of."""
        for stage in range(self.method.num_stages - 1):
            self._evaluate(self.field.evaluate, step, start, stage)

    def prepare_step(self, step: _Step, start: Tensor) -> None:
        """Make all slopes ready but the last, which most steps do not need."""
        for stage in range(self.method.num_stages - 1):
            self._linearise(stage, step, start, stage)

    def pull_back_last(self, step: _Step, start: Tensor, cotangent: Tensor, gradient: Tensor) -> Tensor:
        """The gradient of the step's end (flat) through its last slope; adds to that of the parameters."""
        return self._pull_back(self._slot(step, start, self.method.num_stages - 1), cotangent, gradient)

    def pull_back(
        self, step: _Step, start: Tensor, slope_gradients: Tensor, *, start_gradient: Tensor, gradient: Tensor
    ) -> None:
        """Add to the gradients of the step's start (flat) and of the parameters what comes through its other slopes.

        Those of the slopes, `slope_gradients` (stages, size), are spent.
        """
        dt = step.t1 - step.t0
        for stage in reversed(range(self.method.num_stages - 1)):
            product = self._pull_back(self._slot(step, start, stage), slope_gradients[stage], gradient)
            start_gradient += product
            if stage > 0:
                slope_gradients[:stage].addr_(self.tableau[stage, :stage] * dt, product)

    def _slot(self, step: _Step, start: Tensor, stage: int) -> int:
        """The field's slot where a stage is linearised."""
        if stage == self.method.num_stages - 1:
            self._linearise(stage, step, start, stage)
        return stage

    def _linearise(self, slot: int, step: _Step, start: Tensor, stage: int) -> None:
        if not (step.is_linearised and stage > 0):
            self._evaluate(functools.partial(self.field.linearise, slot), step, start, stage)

    def _evaluate(self, way: Callable[[float, Tensor, Tensor], None], step: _Step, start: Tensor, stage: int) -> None:
        time = step.stage_times[stage]
        self.statistics.evaluation_times.append(time)
        way(time, self.state(step, start, stage).view(self.shape), self.slopes[stage].view(self.shape))

    def _pull_back(self, slot: int, cotangent: Tensor, gradient: Tensor) -> Tensor:
        """cotangent^T df/dy (flat) at a stage; adds the product with the parameters to `gradient`."""
        product = torch.empty_like(cotangent)
        self.field.pullback(slot, cotangent.view(self.shape), product.view(self.shape))
        self.field.add_parameter_product(slot, 1.0, gradient)
        return product


class _SingleStages(_Stages):
    """The same, with one stage linearised at a time, always in slot 0."""

    def prepare_step(self, step: _Step, start: Tensor) -> None:
        self.solve_again(step, start)

    def _slot(self, step: _Step, start: Tensor, stage: int) -> int:
        self._linearise(0, step, start, stage)
        return 0


class _KeptStages(_Stages):
    """The same, with all stages as the forward solve has left them."""

    def prepare_step(self, step: _Step, start: Tensor) -> None:
        """They are ready."""

    def _slot(self, step: _Step, start: Tensor, stage: int) -> int:
        return step.first_slot + stage


class _CompiledStages(_Stages):
    """The same by compiled functions, which keep nothing."""

    def __init__(self, vector_field: CompiledField, problem: Problem, statistics: SolveStatistics):
        super().__init__(vector_field, problem, statistics)
        self.reversal = vector_field.reversal(self.method)

    def prepare(self, t: float, state: Tensor) -> None:
        """Compile what was not compiled before. ValueError if that cannot be done."""
        if not self.reversal.is_prepared:
            gradients = torch.zeros_like(self.slopes[1:])
            self.reversal.prepare(state, gradients, state.new_full((self.method.num_stages,), t))

    def prepare_step(self, step: _Step, start: Tensor) -> None:
        """What pulls back evaluates too."""

    def pull_back_last(self, step: _Step, start: Tensor, cotangent: Tensor, gradient: Tensor) -> Tensor:
        last = self.method.num_stages - 1
        self.statistics.evaluation_times.append(step.stage_times[last])
        state, slope = step.end.view(self.shape), self.slopes[last].view(self.shape)
        self.field.linearise(last, step.stage_times[last], state, slope)
        return self._pull_back(last, cotangent, gradient)

    def pull_back(
        self, step: _Step, start: Tensor, slope_gradients: Tensor, *, start_gradient: Tensor, gradient: Tensor
    ) -> None:
        times = step.stage_times[:-1]
        self.statistics.evaluation_times.extend(times)
        numbers = start.new_tensor([*times, step.t1 - step.t0])
        by_start, by_parameters = self.reversal(start, slope_gradients[:-1], numbers)
        start_gradient += by_start
        gradient += by_parameters


def _reverse_step(
    stages: _Stages,
    step: _Step,
    start: Tensor,
    end_gradient: Tensor,
    solution_gradient: Tensor,
    gradient: Tensor,
    *,
    before: _Step | None,
    after: _Step | None,
) -> Tensor:
    """The gradient of the state at the start of a step (flat), from that at its end; adds to that of the parameters.

    Where a step's last slope is the first of the next, the next step pulls both back at once.
    """
    dt = step.t1 - step.t0
    stages.field.enter(step.t0, step.piece_end)
    stages.prepare_step(step, start)
    if not stages.share_a_slope(step, after):
        last_slope_gradient = _last_slope_gradient(step, solution_gradient)
        if last_slope_gradient is not None:
            end_gradient = end_gradient + stages.pull_back_last(step, start, last_slope_gradient, gradient)

    # The tableau's last row is the step: weights that are already on the device.
    slope_gradients = torch.outer(stages.tableau[-1] * dt, end_gradient)
    start_gradient = end_gradient.clone()
    for index, weights in step.outputs.items():
        start_gradient += solution_gradient[index]
        slope_gradients.addr_(end_gradient.new_tensor(weights) * dt, solution_gradient[index])
    if stages.share_a_slope(before, step):
        last_slope_gradient = _last_slope_gradient(before, solution_gradient)
        if last_slope_gradient is not None:
            slope_gradients[0] += last_slope_gradient

    stages.pull_back(step, start, slope_gradients, start_gradient=start_gradient, gradient=gradient)
    # Should the gradient be asked for again, other steps will have taken the slots.
    step.is_linearised = False
    return start_gradient


def _last_slope_gradient(step: _Step, solution_gradient: Tensor) -> Tensor | None:
    """The gradient of a step's last slope, which only the dense output uses; None where it does not."""
    dt = step.t1 - step.t0
    terms = [dt * weights[-1] * solution_gradient[index] for index, weights in step.outputs.items() if weights[-1]]
    return sum(terms) if terms else None
