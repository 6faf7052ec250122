"""The functions that `compile="solve"` compiles: a loop over attempted steps, and one that reverses the accepted ones.

They are called as those of `compiled_steps` are. Time and step size are float64 in them, as they are in `solver`.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._higher_order_ops.while_loop import while_loop_op as while_loop

from .compiled_steps import Places, Table, attempt, derivative_of, reverse_step, table_of
from .methods.runge_kutta import RungeKutta
from .norms import Block, block_norm

OLDEST_TORCH = "2.14"
"""Whose loops can write into a tensor from outside; older ones were not tried."""
IS_TORCH_NEW_ENOUGH = torch.__version__ >= OLDEST_TORCH


class Loop(NamedTuple):
    """What stays in all loops of a solve, but for the field and the shape of its state."""

    table: Table
    nodes: tuple[float, ...]
    order: int
    capacity: int
    """How many attempts one call records at most; fewer by the jumps that it crosses."""


T0, T1, OUTCOME, FIRST_TIME = range(4)
"""Columns of a log of attempts, in float64. Behind the time of the first stage are those of the others."""
ACCEPTED, REJECTED, FAILED = 1.0, 0.0, -1.0
"""Outcomes: an attempt has failed that is rejected though it is as small as it may be."""


class Settings(NamedTuple):
    """What a call of `attempt_steps` gets besides the state: numbers of a solve, as those of `Solver` and `Stepping`.

    They are given as one tensor of float64.
    """

    t: float
    """Where the first attempt starts."""
    dt: float
    """Its size, if it is known."""
    first_time: float
    """Where its first slope was evaluated, or is to be."""
    needs_slope: float
    """1 if that is to be evaluated, else 0."""
    needs_dt: float
    """1 if the size is to be guessed, for which the slope is evaluated too, else 0."""
    direction: float
    t_end: float
    """A step that reaches it is the last."""
    most_attempts: float
    """How many attempts there may be, jumps between them counted as one each."""
    rtol: float
    atol: float
    safety: float
    ifactor: float
    dfactor: float
    min_step: float
    max_step: float


def loop_of(method: RungeKutta, size: int) -> Loop:
    """That of a method and the size of a state. The record holds LARGEST_RECORD numbers, or FEWEST_ATTEMPTS."""
    capacity = min(max(LARGEST_RECORD // (method.num_stages * size), FEWEST_ATTEMPTS), MOST_ATTEMPTS)
    return Loop(table_of(method), method.nodes, method.order, capacity)


LARGEST_RECORD, FEWEST_ATTEMPTS, MOST_ATTEMPTS = 2**18, 4, 128


def attempt_steps(
    func: nn.Module,
    shape: torch.Size,
    loop: Loop,
    blocks: tuple[Block, ...],
    places: Places,
    tensors: tuple[Tensor, ...],
    start: Tensor,
    first_slope: Tensor,
    stops: Tensor,
    settings: Tensor,
) -> tuple[Tensor, ...]:
    """Attempt steps until one reaches the end, none can be smaller, or the record is full.

    Args:
        func: the field.
        shape: that of its state.
        loop: the method, and how many attempts are recorded.
        blocks: what the error is measured over.
        places: where the field has which tensors.
        tensors: what they are.
        start: where the first attempt starts (size).
        first_slope: the slope there (size), if it is known.
        stops: the next jumps (capacity + 1), in order, each of which ends a step; infinitely far ahead if there are
            fewer.
        settings: those of `Settings`, in its order.

    Returns:
        Of each attempt its start (capacity + 1, size), its slopes (capacity, stages, size), and its log (capacity,
        columns). The start after those of all attempts is where the loop has ended. Then the state there (size); the
        slope there (size); and in float64 the time there, the size of the next step, the time where that slope was
        evaluated, or is to be if the next number is 1, the number of attempts, and where the field was evaluated to
        guess the first size. A size is NaN if the state or its slope is not finite.
    """
    dtype, num_stages = start.dtype, len(loop.nodes)
    starts = start.new_empty(loop.capacity + 1, start.numel())
    slopes = start.new_empty(loop.capacity, num_stages, start.numel())
    log = settings.new_empty(loop.capacity, FIRST_TIME + num_stages)

    def slope_at(tensors: tuple[Tensor, ...], t: Tensor, y: Tensor) -> Tensor:
        return derivative_of(func, places, tensors, t.to(dtype), y.view(shape)).reshape(-1)

    first_slope, dt, t_trial = _guess_first(slope_at, loop.order, blocks, tensors, start, first_slope, settings)

    def goes_on(number: Tensor, num_jumps: Tensor, is_over: Tensor, *_: Tensor) -> Tensor:
        return (number + num_jumps < Settings(*settings.unbind()).most_attempts) & ~is_over

    def reach_jump(number, num_jumps, _, needs_slope, t0, dt, first_time, y, slope, *tensors):
        """Attempt steps up to the next jump."""

        def is_needed(number: Tensor, *_: Tensor) -> Tensor:
            return number < needs_slope

        def find_slope(number, _, *tensors):
            return number + 1, slope_at(tensors, first_time, y).clone()

        def goes_on(number: Tensor, is_at_jump: Tensor, is_over: Tensor, *_: Tensor) -> Tensor:
            return (number + num_jumps < Settings(*settings.unbind()).most_attempts) & ~is_at_jump & ~is_over

        _, slope = while_loop(is_needed, find_slope, (torch.zeros_like(number), slope.clone()), tensors)
        stop = stops.index_select(0, num_jumps.reshape(1)).squeeze(0)
        is_at_jump = torch.zeros_like(number, dtype=torch.bool)
        position = (t0.clone(), dt.clone(), first_time.clone())
        carried = (number.clone(), is_at_jump, is_at_jump.clone(), *position, y.clone(), slope)
        number, is_at_jump, is_over, t0, dt, first_time, y, slope = while_loop(
            goes_on, functools.partial(take, stop), carried, tensors
        )
        # There the slope is asked just behind the jump.
        towards = stops.index_select(0, num_jumps.reshape(1) + 1).squeeze(0)
        next_time = torch.nextafter(t0.to(dtype), towards.to(dtype)).to(t0.dtype)
        first_time = torch.where(is_at_jump, next_time, first_time)
        return number, num_jumps + is_at_jump, is_over, is_at_jump.to(number.dtype), t0, dt, first_time, y, slope

    def take(stop, number, _, __, t0, dt, first_time, y, slope, *tensors):
        """Attempt a step, which is not to go beyond the time `stop`."""
        # Views of one tensor must not come in from outside.
        given = Settings(*settings.unbind())
        direction = given.direction
        t1 = t0 + direction * dt
        is_on_stop = (stop - t1) * direction <= 0
        t1 = torch.where(is_on_stop, stop, t1)
        dt = torch.where(is_on_stop, (t1 - t0).abs(), dt)
        # At the end they are asked just before it, in case of a jump there.
        last_time = torch.nextafter(t1.to(dtype), t0.to(dtype)).to(t1.dtype)
        times = [last_time if node == 1 else t0 + node * (t1 - t0) for node in loop.nodes[1:]]
        numbers = torch.stack([*times, t1 - t0, given.rtol, given.atol]).to(dtype)
        stages, end, ratio = attempt(lambda t, y: slope_at(tensors, t, y), loop.table, blocks, y, slope, numbers)
        ratio = ratio.to(t1.dtype)
        is_smallest = dt <= given.min_step
        is_accepted = (ratio <= 1) | (is_smallest & ratio.isfinite())

        place = number.reshape(1)
        starts.index_copy_(0, place, y.unsqueeze(0))
        slopes.index_copy_(0, place, stages.unsqueeze(0))
        has_failed = is_smallest & ~is_accepted
        outcome = torch.where(is_accepted, ACCEPTED, torch.where(has_failed, FAILED, REJECTED)).to(t1.dtype)
        entries = torch.stack([t0, t1, outcome, first_time, *times])
        log.index_copy_(0, place, entries.unsqueeze(0))

        dt = _next_step_size(given, loop.order, dt, ratio)
        t0 = torch.where(is_accepted, t1, t0)
        t1 = t0 + direction * dt
        has_ended = is_accepted & ((t0 - given.t_end) * direction >= 0)
        is_stuck = (t1 == t0) | ~t1.isfinite() | has_failed
        return (
            number + 1,
            is_accepted & is_on_stop,
            has_ended | is_stuck,
            t0,
            dt,
            torch.where(is_accepted, last_time, first_time),
            torch.where(is_accepted, end, y),
            torch.where(is_accepted, stages[-1], slope),
        )

    given = Settings(*settings.unbind())
    number = torch.zeros((), dtype=torch.int64, device=start.device)
    t1 = given.t + given.direction * dt
    is_over = (t1 == given.t) | ~t1.isfinite()
    # The guess of a size has found the slope.
    needs_slope = (given.needs_slope > given.needs_dt).to(number.dtype)
    position = (given.t.clone(), dt, given.first_time.clone())
    carried = (number, number.clone(), is_over, needs_slope, *position, start.clone(), first_slope)
    number, _, _, needs_slope, t, dt, first_time, y, slope = while_loop(goes_on, reach_jump, carried, tensors)
    starts.index_copy_(0, number.reshape(1), y.unsqueeze(0))
    position = torch.stack([t, dt, first_time, needs_slope.to(t.dtype), number.to(t.dtype), t_trial])
    return starts, slopes, log, y.clone(), slope.clone(), position


def _guess_first(
    slope_at: Callable[[tuple[Tensor, ...], Tensor, Tensor], Tensor],
    order: int,
    blocks: tuple[Block, ...],
    tensors: tuple[Tensor, ...],
    start: Tensor,
    first_slope: Tensor,
    settings: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The first slope, the size of the first step, and where the field was evaluated to guess it; see `attempt_steps`.

    If the size is known, it is taken over, and the slope too, by a loop that runs not once.
    """

    def is_needed(number: Tensor, *_: Tensor) -> Tensor:
        return number < Settings(*settings.unbind()).needs_dt

    def guess(number, _, __, ___, *tensors):
        """As `Solver` does."""
        given = Settings(*settings.unbind())
        slope = slope_at(tensors, given.first_time, start)
        scale = given.atol.to(start.dtype) + given.rtol.to(start.dtype) * start.abs()
        state_norm, slope_norm = (block_norm(of / scale, blocks).to(given.t.dtype) for of in (start, slope))
        is_tiny = (state_norm < 1e-5) | (slope_norm < 1e-5)
        trial = torch.where(is_tiny, 1e-6, 0.01 * state_norm / slope_norm)
        trial = torch.minimum(trial, (given.t_end - given.t).abs())
        change = given.direction * trial
        trial_slope = slope_at(tensors, given.t + change, start + change.to(start.dtype) * slope)
        curvature = block_norm((trial_slope - slope) / scale, blocks).to(given.t.dtype) / trial
        is_still = (slope_norm <= 1e-15) & (curvature <= 1e-15)
        steepest = torch.where(curvature > slope_norm, curvature, slope_norm)
        dt = torch.where(is_still, (trial * 1e-3).clamp(min=1e-6), (0.01 / steepest) ** (1 / order))
        dt = torch.minimum(torch.maximum(torch.minimum(100 * trial, dt), given.min_step), given.max_step)
        dt = torch.where((state_norm + slope_norm).isfinite(), dt, torch.nan)
        return number + 1, slope.clone(), dt, given.t + change

    given = Settings(*settings.unbind())
    number = torch.zeros((), dtype=torch.int64, device=start.device)
    carried = (number, first_slope.clone(), given.dt.clone(), given.t.clone())
    _, slope, dt, t_trial = while_loop(is_needed, guess, carried, tensors)
    return slope, dt, t_trial


def _next_step_size(given: Settings, order: int, dt: Tensor, error_ratio: Tensor) -> Tensor:
    """As `RungeKutta.next_step_size`, within the limits."""
    smallest = torch.where(error_ratio < 1, torch.ones_like(dt), given.dfactor)
    factor = torch.minimum(given.ifactor, torch.maximum(given.safety / error_ratio ** (1 / order), smallest))
    factor = torch.where(error_ratio < torch.inf, factor, given.dfactor)
    return torch.minimum(torch.maximum(dt * factor, given.min_step), given.max_step)


def reverse_steps(
    func: nn.Module,
    shape: torch.Size,
    loop: Loop,
    num_parameters: int,
    places: Places,
    tensors: tuple[Tensor, ...],
    starts: Tensor,
    rows: Tensor,
    numbers: Tensor,
    number: Tensor,
    slope_gradients: Tensor,
    start_gradients: Tensor,
    end_gradient: Tensor,
) -> tuple[Tensor, Tensor]:
    """The gradients of the first start (size) and of the parameters (parameters) through some steps.

    Args:
        func: the field.
        shape: that of its state.
        loop: the method.
        num_parameters: how many of the tensors are differentiated: the first.
        places: where the field has which tensors.
        tensors: what they are.
        starts: where attempts start (capacity + 1, size).
        rows: which of them are the starts of the steps (capacity + 1), in order.
        numbers: the times of their stages but the last, and their sizes (capacity + 1, stages), in the state's dtype.
        number: how many steps there are.
        slope_gradients: the gradients of their slopes besides what comes through their ends (capacity + 1, stages,
            size); that of a last slope is not read.
        start_gradients: those of their starts, likewise (capacity + 1, size).
        end_gradient: that of the end of the last step (size).
    """
    step_weights = end_gradient.new_tensor(loop.table[0][-1]).unsqueeze(1)

    def remains(number: Tensor, *_: Tensor) -> Tensor:
        return number > 0

    def reverse(number, end_gradient, gradient, *tensors):
        parameters, others = tensors[:num_parameters], tensors[num_parameters:]
        step = number.reshape(1) - 1
        of_step = numbers.index_select(0, step).squeeze(0)
        by_slopes = slope_gradients.index_select(0, step).squeeze(0)[:-1] + step_weights * of_step[-1] * end_gradient
        start = starts.index_select(0, rows.index_select(0, step)).squeeze(0)
        by_start, by_parameters = reverse_step(
            func, shape, loop.table, places, parameters, others, start, by_slopes, of_step
        )
        start_gradient = end_gradient + start_gradients.index_select(0, step).squeeze(0) + by_start
        return number - 1, start_gradient, gradient + by_parameters

    gradient = end_gradient.new_zeros(sum(parameter.numel() for parameter in tensors[:num_parameters]))
    _, start_gradient, gradient = while_loop(
        remains, reverse, (number.clone(), end_gradient.clone(), gradient), tensors
    )
    return start_gradient.clone(), gradient.clone()
