"""A solver whose loop over steps is compiled, and the way back through its steps: `compile="solve"`.

Between two calls of a loop Python is back: when the record of attempts is full. `compiled_loops` has the loops.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .compiled import CompiledField, CompiledSolver
from .compiled_loops import (
    ACCEPTED,
    FIRST_TIME,
    OUTCOME,
    REJECTED,
    T0,
    T1,
    Settings,
    attempt_steps,
    loop_of,
    reverse_steps,
)
from .methods.runge_kutta import RungeKutta
from .norms import Block
from .statistics import Statistics
from .systems import ForwardSystem


class LoopSystem(ForwardSystem):
    """The state alone, with a compiled loop of attempts."""

    def __init__(self, vector_field: CompiledField, method: RungeKutta, blocks: Sequence[Block]):
        super().__init__(vector_field, vector_field.shape)
        self.loop = loop_of(method, self.size)
        self.attempts = vector_field.loop(attempt_steps, (self.loop, tuple(blocks)))

    def prepare(self, t: float, state: Tensor) -> None:
        """Compile what was not compiled before. ValueError if that cannot be done."""
        if self.attempts.is_prepared:
            return
        self.field.check(t, state)
        # Nothing is evaluated, and no attempt is made.
        stops, settings = state.new_zeros(self.loop.capacity + 1), state.new_zeros(len(Settings._fields))
        self.attempts.prepare(state, torch.zeros_like(state), stops.double(), settings.double())


@dataclass
class Outputs:
    """Some output times in a row, and where among the steps of a piece they lie."""

    first: int
    """The number of the first among all output times."""
    steps: list[int]
    """Of each time the number of the step."""
    weights: Tensor
    """The dense output's times the size of the step (times, stages), in the dtype of the state."""


@dataclass
class Piece:
    """The steps that one call of the loop has taken."""

    starts: Tensor
    """What `attempt_steps` returns of this name."""
    rows: list[int]
    """Which of the attempts were accepted."""
    entries: list[list[float]]
    """Their rows of the log."""
    next_time: float | None
    """Where the first slope of the next piece is evaluated; None if that is evaluated anew."""
    outputs: list[Outputs] = field(default_factory=list)
    steps_inside: set[int] = field(default_factory=set)
    """The numbers of the steps that have outputs before their ends, which use their last slopes."""


class LoopSolver(CompiledSolver):
    """A `CompiledSolver` that takes as many steps at once as it can."""

    record: list[Piece] | None = None
    """Of a solve that is differentiated: its pieces."""

    def _make_buffers(self, like: Tensor) -> None:
        super()._make_buffers(like)
        self.dense_output = torch.tensor(self.method.dense_output, dtype=torch.float64, device=like.device)

    def _find_first_slope(self, t: float) -> None:
        """The loop does."""
        self.first_slope, self.needs_slope = torch.zeros_like(self.start), True

    def _guess_first_step(self) -> float:
        """The loop does."""
        return math.nan

    def _reuse_last_slope(self) -> None:
        self.first_slope, self.needs_slope = self.last_slope, False

    def write_states(self, times: Sequence[float], states: Tensor) -> None:
        number = 0
        while number < len(times):
            self._move_on()
            self._take_steps()
            while number < len(times) and self.has_passed(times[number]):
                number = self._write_some(times, states, number)

    def _take_steps(self) -> None:
        """Take those up to the end, or as many as a call can record: they are `piece`."""
        needs_dt = math.isnan(self.dt)
        if not needs_dt:
            self._check_step()
        self.starts, self.slopes, log, self.end, self.last_slope, position = self.system.attempts(
            self.start, self.first_slope, self._stops(), self._settings(needs_dt)
        )
        self.t1, self.dt, first_time, needs_slope, number, t_trial = position.tolist()
        if needs_dt:
            self.statistics.evaluation_times.append(t_trial)
            if math.isnan(self.dt):
                for what, values in (("the state", self.start), ("the vector field", self.last_slope)):
                    if not values.isfinite().all():
                        raise self._failure(f"{what} is not finite")
                raise self._failure("the vector field over its tolerance is too large a number")
        entries = log[: int(number)].tolist()
        self.num_attempts += len(entries)
        self._count(entries)
        rows = [row for row, entry in enumerate(entries) if entry[OUTCOME] == ACCEPTED]
        self._is_on_stop = bool(needs_slope)
        self._is_start_current, self._has_last_stage, self.stage_times = False, True, [first_time]
        next_time = None if needs_slope else first_time
        self.piece = Piece(self.starts, rows, [entries[row] for row in rows], next_time)
        if rows and self.record is not None:
            self.record.append(self.piece)

    def _check_step(self) -> None:
        """SolverError if the next step cannot be taken."""
        t1 = self.t0 + self.direction * self.dt
        if t1 == self.t0 or not math.isfinite(t1):
            is_sound = self.needs_slope or self.last_slope.isfinite().all()
            raise self._failure("the step became too small" if is_sound else "the vector field is not finite")

    def _stops(self) -> Tensor:
        """The next jumps: one more than a call can cross."""
        number = self.system.loop.capacity + 1
        ahead = [jump for jump in self.jumps if (jump - self.t0) * self.direction > 0]
        stops = [*sorted(ahead, reverse=self.direction < 0), *[self.direction * math.inf] * number][:number]
        return torch.tensor(stops, dtype=torch.float64, device=self.start.device)

    def _settings(self, needs_dt: bool) -> Tensor:
        stepping = self.stepping
        most_attempts = min(self.system.loop.capacity, stepping.max_num_steps - self.num_attempts)
        if not most_attempts:
            raise self._too_many()
        settings = Settings(
            t=self.t0,
            dt=self.dt,
            first_time=self.first_stage_time,
            needs_slope=self.needs_slope,
            needs_dt=needs_dt,
            direction=self.direction,
            t_end=self.t_end,
            most_attempts=most_attempts,
            rtol=self.rtol,
            atol=self.atol,
            safety=stepping.safety,
            ifactor=stepping.ifactor,
            dfactor=stepping.dfactor,
            min_step=stepping.min_step,
            max_step=stepping.max_step,
        )
        return torch.tensor(settings, dtype=torch.float64, device=self.start.device)

    def _count(self, entries: Sequence[Sequence[float]]) -> None:
        """Add attempts to the statistics, given their rows of the log."""
        statistics = self.statistics
        known_time = entries[0][FIRST_TIME] if entries else None
        for entry in entries:
            is_behind_jump = entry[FIRST_TIME] != known_time
            known_time = entry[FIRST_TIME]
            statistics.evaluation_times.extend(entry[FIRST_TIME if is_behind_jump else FIRST_TIME + 1 :])
            if entry[OUTCOME] == ACCEPTED:
                known_time = entry[-1]
                statistics.accept_times.append(entry[T0])
            elif entry[OUTCOME] == REJECTED:
                statistics.reject_times.append(entry[T0])
            else:
                self.t0, self.dt = entry[T0], abs(entry[T1] - entry[T0])
                raise self._failure("the vector field is not finite, and the step is as small as min_step allows,")

    def _write_some(self, times: Sequence[float], states: Tensor, first: int) -> int:
        """Write the states at the times from number `first` on that lie in the piece, and return the next number.

        They are as many as a call records attempts, so that the copies of slopes need no more memory than the record.
        """
        entries, steps, points = self.piece.entries, [], []
        step = 0
        for t in times[first : first + self.system.loop.capacity]:
            if not self.has_passed(t):
                break
            while (entries[step][T1] - t) * self.direction < 0:
                step += 1
            t0, t1 = entries[step][T0], entries[step][T1]
            steps.append(step)
            fraction, dt = (t - t0) / (t1 - t0), t1 - t0
            points.append((fraction * dt, fraction**2 * dt, fraction**3 * dt, fraction**4 * dt))
            if t != t1:
                self.piece.steps_inside.add(step)
        weights = torch.tensor(points, dtype=torch.float64, device=states.device) @ self.dense_output
        weights = weights.to(states.dtype)
        rows = torch.tensor([self.piece.rows[step] for step in steps], device=states.device)
        changes = weights.unsqueeze(1) @ self.slopes.index_select(0, rows)
        next_first = first + len(steps)
        torch.add(self.starts.index_select(0, rows), changes.squeeze(1), out=states[first:next_first])
        # The first of all output times is that of the start.
        self.piece.outputs.append(Outputs(first + 1, steps, weights))
        return next_first


@dataclass
class Reversed:
    """The steps of a piece as they are reversed.

    Behind a step whose last slope is used, but is not the first of the next, is one of size 0, whose first slope it is.
    """

    rows: list[int]
    """Which rows of `starts` they start from."""
    numbers: list[list[float]]
    """The times of all their stages but the last, and their sizes."""
    of_step: list[int]
    """Which of them the steps of the piece are."""

    def __init__(self, piece: Piece, *, is_last: bool):
        self.rows, self.numbers, self.of_step = [], [], []
        next_times = [entry[FIRST_TIME] for entry in piece.entries[1:]]
        next_times.append(None if is_last else piece.next_time)
        for step, (row, entry, next_time) in enumerate(zip(piece.rows, piece.entries, next_times, strict=True)):
            *times, last_time = entry[FIRST_TIME:]
            self.of_step.append(len(self.rows))
            self.rows.append(row)
            self.numbers.append([*times, entry[T1] - entry[T0]])
            if step in piece.steps_inside and last_time != next_time:
                self.rows.append(row + 1)
                self.numbers.append([*[last_time] * len(times), 0.0])


class StepReversal:
    """The way back through the pieces of a solve."""

    def __init__(self, vector_field: CompiledField, method: RungeKutta, size: int, statistics: Statistics):
        self.loop = loop_of(method, size)
        self.reversal = vector_field.loop(reverse_steps, (self.loop, len(vector_field.parameters)))
        self.statistics = statistics

    def prepare(self, t: float, state: Tensor) -> None:
        """Compile what was not compiled before. ValueError if that cannot be done."""
        if self.reversal.is_prepared:
            return
        starts = state.new_zeros(self.loop.capacity + 1, state.numel())
        numbers = state.new_full((self.loop.capacity + 1, len(self.loop.nodes)), t)
        rows = torch.zeros(self.loop.capacity + 1, dtype=torch.int64, device=state.device)
        # No step is reversed.
        self.reversal.prepare(starts, rows, numbers, rows.new_zeros(()), *self._new_gradients(state), state)

    def reverse(self, record: Sequence[Piece], solution_gradient: Tensor, gradient: Tensor) -> Tensor:
        """The gradient of the state at the start (size), its own output apart; adds to that of the parameters.

        Args:
            record: the pieces, at least one.
            solution_gradient: that of the solution (times, size).
            gradient: that of the parameters (parameters).
        """
        end_gradient = torch.zeros_like(solution_gradient[0])
        all_steps = [Reversed(piece, is_last=piece is record[-1]) for piece in record]
        gradients = self._gradients(record[-1], all_steps[-1], solution_gradient)
        for index in reversed(range(len(record))):
            piece, steps = record[index], all_steps[index]
            if index > 0:
                before = self._gradients(record[index - 1], all_steps[index - 1], solution_gradient)
                gradients[0][0, 0] += before[0][len(all_steps[index - 1].rows) - 1, -1]
            end_gradient, by_parameters = self.reversal(
                piece.starts, *self._tensors(steps, piece.starts), *gradients, end_gradient
            )
            gradient += by_parameters
            for *times, _ in steps.numbers:
                self.statistics.evaluation_times.extend(times)
            if index > 0:
                gradients = before
        return end_gradient

    def _tensors(self, steps: Reversed, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, numbers and how many they are, as `reverse_steps` takes them."""
        number, num_rows = len(steps.rows), self.loop.capacity + 1
        rows = torch.tensor([*steps.rows, *[0] * (num_rows - number)], device=like.device)
        numbers = like.new_zeros(num_rows, len(self.loop.nodes))
        numbers[:number] = like.new_tensor(steps.numbers)
        return rows, numbers, torch.tensor(number, device=like.device)

    def _new_gradients(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Those of slopes (capacity + 1, stages, size) and starts (capacity + 1, size), all 0; `like` is a state."""
        num_rows, size = self.loop.capacity + 1, like.numel()
        return like.new_zeros(num_rows, len(self.loop.nodes), size), like.new_zeros(num_rows, size)

    def _gradients(self, piece: Piece, steps: Reversed, solution_gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Those of slopes and starts of steps, by outputs alone. A last slope's is with the first slope behind it."""
        of_slopes, of_starts = self._new_gradients(solution_gradient[0])
        for outputs in piece.outputs:
            places = torch.tensor([steps.of_step[step] for step in outputs.steps], device=of_starts.device)
            given = solution_gradient[outputs.first : outputs.first + len(places)]
            of_starts.index_add_(0, places, given)
            of_slopes.index_add_(0, places, outputs.weights.unsqueeze(2) * given.unsqueeze(1))
        of_slopes[1:, 0] += of_slopes[:-1, -1]
        return of_slopes, of_starts
