"""A solver whose loop over steps is compiled, and the way back through its steps: `compile="solve"`.

Between two calls of a loop Python is back: at a jump, and when the record of attempts is full. `compiled_loops` has the
loops.
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
        settings = torch.zeros(len(Settings._fields), dtype=torch.float64, device=state.device)
        self.attempts.prepare(state, torch.zeros_like(state), settings)


@dataclass
class Outputs:
    """Some output times in a row, and where among the steps of a piece they lie."""

    first: int
    """The number of the first among all output times."""
    steps: list[int]
    """Of each time the number of the step."""
    weights: Tensor
    """The dense output's times the size of the step (times, stages), in the dtype of the state."""
    are_inside: list[bool]
    """Whether they lie before the end of the step, so that its last slope has a weight."""


@dataclass
class Piece:
    """The steps that one call of the loop has taken."""

    starts: Tensor
    """What `attempt_steps` returns of this name."""
    log: Tensor
    """Likewise."""
    rows: list[int]
    """Which of the attempts were accepted."""
    entries: list[list[float]]
    """Their rows of the log."""
    has_next: bool
    """Whether the last slope is the first of the next piece."""
    outputs: list[Outputs] = field(default_factory=list)

    @property
    def uses_last_slope(self) -> bool:
        """Whether the dense output uses the last slope of the last step."""
        last = len(self.rows) - 1
        return any(
            step == last and is_inside
            for outputs in self.outputs
            for step, is_inside in zip(outputs.steps, outputs.are_inside, strict=True)
        )


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
        """Take those up to the next stop or the end, or as many as a call can record: they are `piece`."""
        needs_dt = math.isnan(self.dt)
        if not needs_dt:
            self._check_step()
        self.starts, self.slopes, log, self.end, self.last_slope, position = self.system.attempts(
            self.start, self.first_slope, self._settings(needs_dt)
        )
        self.t1, self.dt, first_time, number, t_trial = position.tolist()
        if needs_dt:
            self.statistics.evaluation_times.append(t_trial)
            if math.isnan(self.dt):
                is_sound = self.start.isfinite().all()
                raise self._failure("the vector field is not finite" if is_sound else "the state is not finite")
        entries = log[: int(number)].tolist()
        self.num_attempts += len(entries)
        self._count(entries)
        rows = [row for row, entry in enumerate(entries) if entry[OUTCOME] == ACCEPTED]
        self._is_on_stop = rows[-1:] == [len(entries) - 1] and self.t1 == self._next_stop
        self._is_start_current, self._has_last_stage, self.stage_times = False, True, [first_time]
        self.piece = Piece(self.starts, log, rows, [entries[row] for row in rows], has_next=not self._is_on_stop)
        if rows and self.record is not None:
            self.record.append(self.piece)

    def _check_step(self) -> None:
        """SolverError if the next step cannot be taken."""
        t1 = self.t0 + self.direction * self.dt
        if t1 == self.t0 or not math.isfinite(t1):
            is_sound = self.needs_slope or self.last_slope.isfinite().all()
            raise self._failure("the step became too small" if is_sound else "the vector field is not finite")

    def _settings(self, needs_dt: bool) -> Tensor:
        stepping = self.stepping
        most_attempts = min(self.system.loop.capacity, stepping.max_num_steps - self.num_attempts)
        if not most_attempts:
            raise self._failure(f"more than {stepping.max_num_steps} steps were attempted")
        settings = Settings(
            t=self.t0,
            dt=self.dt,
            first_time=self.first_stage_time,
            needs_slope=self.needs_slope,
            needs_dt=needs_dt,
            direction=self.direction,
            stop=self.direction * math.inf if self._next_stop is None else self._next_stop,
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
        for entry in entries:
            statistics.evaluation_times.extend(entry[FIRST_TIME + 1 :])
            if entry[OUTCOME] == ACCEPTED:
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
        entries, steps, points, are_inside = self.piece.entries, [], [], []
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
            are_inside.append(t != t1)
        weights = torch.tensor(points, dtype=torch.float64, device=states.device) @ self.dense_output
        weights = weights.to(states.dtype)
        rows = torch.tensor([self.piece.rows[step] for step in steps], device=states.device)
        changes = weights.unsqueeze(1) @ self.slopes.index_select(0, rows)
        next_first = first + len(steps)
        torch.add(self.starts.index_select(0, rows), changes.squeeze(1), out=states[first:next_first])
        # The first of all output times is that of the start.
        self.piece.outputs.append(Outputs(first + 1, steps, weights, are_inside))
        return next_first


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
        log = starts.new_full((len(starts), FIRST_TIME + len(self.loop.nodes)), t, dtype=torch.float64)
        piece = Piece(starts, log, rows=[], entries=[], has_next=False)
        # No step is reversed.
        self.reversal.prepare(*self._arguments(piece, []), *self._gradients(piece, starts), state)

    def reverse(self, record: Sequence[Piece], solution_gradient: Tensor, gradient: Tensor) -> Tensor:
        """The gradient of the state at the start (size), its own output apart; adds to that of the parameters.

        Args:
            record: the pieces, at least one.
            solution_gradient: that of the solution (times, size).
            gradient: that of the parameters (parameters).
        """
        end_gradient = torch.zeros_like(solution_gradient[0])
        slope_gradients, start_gradients = self._gradients(record[-1], solution_gradient)
        for index in reversed(range(len(record))):
            piece, before = record[index], record[index - 1] if index > 0 else None
            rows, times = piece.rows, [entry[FIRST_TIME:-1] for entry in piece.entries]
            shares_last_slope = piece.has_next and index + 1 < len(record)
            if piece.uses_last_slope and not shares_last_slope:
                # The row behind the last step is one of size 0, whose first slope this is.
                rows, times = [*rows, rows[-1] + 1], [*times, piece.entries[-1][-1:]]
            if before is not None:
                gradients_before = self._gradients(before, solution_gradient)
                if before.has_next:
                    slope_gradients[0, 0] += gradients_before[0][len(before.rows), 0]
            end_gradient, by_parameters = self.reversal(
                *self._arguments(piece, rows), slope_gradients, start_gradients, end_gradient
            )
            gradient += by_parameters
            self.statistics.evaluation_times.extend(time for of_step in times for time in of_step)
            if before is not None:
                slope_gradients, start_gradients = gradients_before
        return end_gradient

    def _arguments(self, piece: Piece, rows: Sequence[int]) -> tuple[Tensor, ...]:
        padding = [0] * (self.loop.capacity + 1 - len(rows))
        device = piece.log.device
        return (
            piece.starts,
            piece.log,
            torch.tensor([*rows, *padding], device=device),
            torch.tensor(len(rows), device=device),
        )

    def _gradients(self, piece: Piece, solution_gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Those of the slopes (capacity + 1, stages, size) and starts (capacity + 1, size) of steps, by outputs alone.

        A last slope's is with the first slope behind it.
        """
        num_stages, size = len(self.loop.nodes), solution_gradient.shape[1]
        of_slopes = solution_gradient.new_zeros(self.loop.capacity + 1, num_stages, size)
        of_starts = solution_gradient.new_zeros(self.loop.capacity + 1, size)
        for outputs in piece.outputs:
            steps = torch.tensor(outputs.steps, device=of_starts.device)
            given = solution_gradient[outputs.first : outputs.first + len(steps)]
            of_starts.index_add_(0, steps, given)
            of_slopes.index_add_(0, steps, outputs.weights.unsqueeze(2) * given.unsqueeze(1))
        of_slopes[1:, 0] += of_slopes[:-1, -1]
        return of_slopes, of_starts
