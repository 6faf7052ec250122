"""The exact gradient of the steps that a solve took, from their records: the adjoint named `discrete`."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .field import Field
from .methods.runge_kutta import RungeKutta
from .solver import stage_times
from .statistics import Statistics


@dataclass
class StepRecord:
    """An accepted step, as far as its reversal needs it."""

    t0: float
    t1: float
    first_stage_time: float
    """Where the first slope was evaluated: at t0, or on one side of it."""
    start: Tensor | None
    """The state at t0, in its shape; None between checkpoints, where it is solved for again."""
    outputs: dict[int, Sequence[float]] = field(default_factory=dict)
    """The dense output's weights of each output time in this step, by its index."""
    is_linearised: bool = False
    """Whether the field's slots hold the stages after the first: true of the last step, right after the solve."""


class _Stages:
    """The stages of one step at a time, linearised."""

    def __init__(self, vector_field: Field, method: RungeKutta, like: Tensor, statistics: Statistics):
        self.field, self.method = vector_field, method
        self.shape = like.shape
        self.statistics = statistics
        self.slopes = like.new_empty(method.num_stages, like.numel())
        self.tableau = like.new_tensor(method.stage_matrix)

    def state(self, step: StepRecord, start: Tensor, stage: int) -> Tensor:
        """The state at a stage, or for the last stage at the end of the step, from the slopes before it."""
        if stage == 0:
            return start
        weights = self.tableau[stage, :stage] * (step.t1 - step.t0)
        return torch.addmv(start.view(-1), self.slopes[:stage].T, weights).view(self.shape)

    def share_a_slope(self, step: StepRecord | None, after: StepRecord | None) -> bool:
        """Whether the last slope of `step` served as the first of `after`, the step after it: not at a jump."""
        if step is None or after is None:
            return False
        return after.first_stage_time == stage_times(self.method, step.t0, step.t1, self.slopes.dtype)[-1]

    def linearise(self, step: StepRecord, start: Tensor, stage: int) -> None:
        if step.is_linearised and stage > 0:
            return
        times = [step.first_stage_time, *stage_times(self.method, step.t0, step.t1, start.dtype)]
        self.statistics.evaluation_times.append(times[stage])
        slope = self.slopes[stage].view(self.shape)
        self.field.linearise(stage, times[stage], self.state(step, start, stage), slope)

    def pullback(self, stage: int, cotangent: Tensor, gradient: Tensor) -> Tensor:
        """cotangent^T df/dy (flat) at a stage; adds the product with the parameters to `gradient`."""
        product = torch.empty_like(cotangent)
        self.field.pullback(stage, cotangent.view(self.shape), product.view(self.shape))
        self.field.add_parameter_product(stage, 1.0, gradient)
        return product


def reverse_steps(
    vector_field: Field,
    method: RungeKutta,
    record: list[StepRecord],
    solution_gradient: Tensor,
    *,
    checkpoint_interval: int,
    statistics: Statistics,
) -> tuple[Tensor, Tensor]:
    """The gradients of y0 (its shape) and of the parameters (flat), from those of the solution (times, *shape).

    Memory: the states kept in `record`, those of one `checkpoint_interval`, and the linearised stages of one step: at
    first the last, as the forward solve leaves it.
    """
    stages = _Stages(vector_field, method, solution_gradient[0], statistics)
    last = method.num_stages - 1
    gradient = solution_gradient.new_zeros(sum(vector_field.parameter_sizes))
    flat = solution_gradient.reshape(len(solution_gradient), -1)
    end_gradient = torch.zeros_like(flat[0])
    for first in reversed(range(0, len(record), checkpoint_interval)):
        steps = record[first : first + checkpoint_interval]
        # The steps before it take the slots.
        steps[-1].is_linearised &= len(steps) == 1
        starts = [steps[0].start]
        for step in steps[:-1]:
            vector_field.enter(step.t0, step.t1)
            for stage in range(last):
                stages.linearise(step, starts[-1], stage)
            starts.append(stages.state(step, starts[-1], last))
        for index in reversed(range(len(steps))):
            number = first + index
            end_gradient = _reverse_step(
                stages,
                steps[index],
                starts[index],
                end_gradient,
                flat,
                gradient,
                before=record[number - 1] if number > 0 else None,
                after=record[number + 1] if number + 1 < len(record) else None,
            )
    return (end_gradient + flat[0]).view_as(solution_gradient[0]), gradient


def _reverse_step(
    stages: _Stages,
    step: StepRecord,
    start: Tensor,
    end_gradient: Tensor,
    solution_gradient: Tensor,
    gradient: Tensor,
    *,
    before: StepRecord | None,
    after: StepRecord | None,
) -> Tensor:
    """The gradient of the state at the start of a step (flat), from that at its end; adds to that of the parameters.

    Where a step's last slope is the first of the next, the next step pulls both back at once.
    """
    dt, last = step.t1 - step.t0, stages.method.num_stages - 1
    stages.field.enter(step.t0, step.t1)
    for stage in range(last):
        stages.linearise(step, start, stage)
    if not stages.share_a_slope(step, after):
        last_slope_gradient = _last_slope_gradient(step, solution_gradient)
        if last_slope_gradient is not None:
            stages.linearise(step, start, last)
            end_gradient = end_gradient + stages.pullback(last, last_slope_gradient, gradient)

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

    for stage in reversed(range(last)):
        product = stages.pullback(stage, slope_gradients[stage], gradient)
        start_gradient += product
        if stage > 0:
            slope_gradients[:stage].addr_(stages.tableau[stage, :stage] * dt, product)
    # Should the gradient be asked for again, other steps will have taken the slots.
    step.is_linearised = False
    return start_gradient


def _last_slope_gradient(step: StepRecord, solution_gradient: Tensor) -> Tensor | None:
    """The gradient of a step's last slope, which only the dense output uses; None where it does not."""
    dt = step.t1 - step.t0
    terms = [dt * weights[-1] * solution_gradient[index] for index, weights in step.outputs.items() if weights[-1]]
    return sum(terms) if terms else None
