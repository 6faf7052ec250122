"""The solver: Runge-Kutta steps of one system in one direction of time. The adjoint drives it.

Time, step size and controller are Python floats, so an attempted step waits for the device once, to read its error; a
fixed step never does. The steps are those of torchdiffeq but for what docs/from_torchdiffeq.md lists: above all, a step
that ends exactly on a jump counts as having met it (torchdiffeq forgets every later jump then), the evaluation after a
jump is made when the next step needs it, so not after the last one, and so is the last stage of methods that are not
FSAL.
"""

import bisect
import math
import struct
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from .errors import SolverError
from .methods.runge_kutta import RungeKutta, trial_step_size
from .norms import Norm
from .observer import Attempt, Observer
from .replay import Replay
from .statistics import Statistics
from .stepping import Stepping

FLOAT32, INT32 = struct.Struct("<f"), struct.Struct("<i")


class System(Protocol):
    """What is integrated: a flat state of which the first `num_coupled` entries stand in the right-hand side.

    The others are integrals: their slopes are written, but no stage ever reads them.
    """

    size: int
    num_coupled: int
    is_static: bool
    """See `Field.is_static`."""
    direction: str
    """`forward` or `backward`, as an observer is told."""
    parts: dict[str, tuple[int, int]]
    """Where in the flat state what lies, by the names that an observer is told."""

    def enter(self, t0: float, t1: float) -> None:
        """See `Field.enter`."""

    def bind(self, states: Sequence[Tensor], slopes: Sequence[Tensor]) -> None:
        """Learn where each stage's coupled state is read (num_coupled) and its slope is to be written (size)."""

    def evaluate(self, stage: int, t: float) -> None:
        """Write the slope of stage number `stage`."""

    def reuse_stage(self, stage: int) -> None:
        """This stage, the last, has become the first."""


def beside(t: float, towards: float, dtype: torch.dtype) -> float:
    """The number of `dtype` next to `t` on the side of `towards`: a field with a jump at `t` is asked on that side."""
    if dtype == torch.float64:
        return math.nextafter(t, towards)
    # Of positive numbers, and of negative ones, the bits are in the order of their sizes.
    t, towards = _float32(t), _float32(towards)
    if t == towards:
        return t
    if t == 0:
        return math.copysign(2.0**-149, towards)
    (bits,) = INT32.unpack(FLOAT32.pack(t))
    return FLOAT32.unpack(INT32.pack(bits + (1 if (towards > t) == (t > 0) else -1)))[0]


def _float32(number: float) -> float:
    return FLOAT32.unpack(FLOAT32.pack(number))[0]


def stage_times(method: RungeKutta, t0: float, t1: float, end: float) -> list[float]:
    """Where the stages after the first are evaluated; those at the end of the step are asked at `end`."""
    return [end if node == 1 else t0 + node * (t1 - t0) for node in method.nodes[1:]]


class Solver:
    """Steps of one system from one time towards another.

    After `advance`, the last step went from `t0` to `t1`, its stages' slopes are in `slopes` (stages, size), its start
    in `start` (size) and its end in `end` (size).

    Args:
        system: what to integrate.
        stepping: how to step.
        norm: how large an error is, from the error over the tolerance (size).
        jumps: where the system is discontinuous in time, in any order; every one is the end of a step.
        like: a tensor of the dtype and on the device of the state.
        statistics: where evaluations and steps are counted.
        exact_end: whether the last step ends at the end asked for. Otherwise it may go beyond, as in torchdiffeq, and
            the end is interpolated. Fixed steps always end there.
        make_grid: where fixed steps end, from the state at the first output time and the output times; by default from
            `stepping` alone.
        observer: is told of every attempt, before and after.
    """

    def __init__(
        self,
        system: System,
        stepping: Stepping,
        norm: Norm,
        *,
        jumps: Sequence[float],
        like: Tensor,
        statistics: Statistics,
        exact_end: bool = False,
        make_grid: Callable[[Tensor, Sequence[float]], Sequence[float]] | None = None,
        observer: Observer | None = None,
    ):
        self.system, self.stepping, self.norm = system, stepping, norm
        self.method = method = stepping.method
        self.rtol, self.atol = stepping.rtol, stepping.atol
        self.jumps = sorted(jumps)
        self.dtype = like.dtype
        self.statistics = statistics
        self.exact_end = exact_end
        self.make_grid = make_grid
        self.observer = observer

        self.num_attempted = method.num_stages if self.attempts_last_stage else method.num_stages - 1
        """How many stages an attempt needs, the first among them."""
        self._make_buffers(like)

    def _make_buffers(self, like: Tensor) -> None:
        """Make everything that attempts read and write, of the dtype and on the device of `like`."""
        system, method = self.system, self.method
        size, coupled, num_stages = system.size, system.num_coupled, method.num_stages
        self.start, self.end, self.error, self.scale = like.new_zeros(4, size).unbind()
        self.slopes = like.new_zeros(num_stages, size)
        self.first_slope = self.slopes[0]
        inner = like.new_empty(num_stages - 2, coupled).unbind()
        self.stage_states = (self.start[:coupled], *inner, self.end[:coupled])
        error_weights = method.error_weights or (0.0,) * num_stages
        self.tableau = like.new_tensor((*method.stage_matrix, error_weights))
        # Views made once: slicing costs as much as a small kernel, and every attempt would do it again.
        self.step_size = like.new_empty(())
        self.weights = torch.empty_like(self.tableau)
        self.stage_weights = [self.weights[i, :i] for i in range(num_stages)]
        self.slopes_before = [self.slopes[:i, :coupled].T for i in range(num_stages)]
        self.slopes_before[-1] = self.slopes[: num_stages - 1].T
        self.starts = [*[self.start[:coupled]] * (num_stages - 1), self.start]
        self.ends = [*self.stage_states[: num_stages - 1], self.end]
        system.bind(self.stage_states, self.slopes.unbind())
        self._first_slopes = Replay(device=like.device, is_static=system.is_static)
        self._attempts = Replay(device=like.device, is_static=system.is_static)

    @property
    def attempts_last_stage(self) -> bool:
        """Whether an attempt evaluates the stage that is the next step's first."""
        return self.method.is_fsal

    def begin(self, times: Sequence[float], state: Tensor, *, first_step: float | None = None) -> None:
        """Stand at the first of `times` with `state` (size), ready to step towards the last.

        The first step is guessed at the price of one evaluation if its size `first_step` is not given.

        Raises:
            SolverError: if the state or the field is not finite, and `first_step` is not given.
        """
        t0, t_end = times[0], times[-1]
        self.direction = 1.0 if t_end > t0 else -1.0
        self.t_end = t_end
        self.num_attempts = 0
        self.dt = math.nan
        self.t0 = self.t1 = t0
        self._stand_at(state)
        self._is_start_current = True
        self._enter_piece()
        self._ends = sorted(
            self.stepping.step_t if self.method.is_adaptive else self._grid(times), reverse=self.direction > 0
        )
        at_edge = t0 in self.jumps or self.stepping.perturb
        self._evaluate_first(beside(t0, self._piece_end, self.dtype) if at_edge else t0)
        if not self.method.is_adaptive:
            return
        first_step = self._guess_first_step() if first_step is None else abs(first_step)
        self.dt = self._within_limits(first_step)

    def advance(self) -> None:
        """Take a step: attempt some until one is accepted.

        Raises:
            SolverError: if the step becomes too small for the time it starts at, the field is not finite there, or the
            attempts are too many.
        """
        self._move_on()
        while self._ends and (self._ends[-1] - self.t0) * self.direction <= 0:
            self._ends.pop()
        while not self._attempt_succeeds():
            pass
        self._is_start_current = False

    def _attempt_succeeds(self) -> bool:
        stepping = self.stepping
        self.num_attempts += 1
        if self.num_attempts > stepping.max_num_steps:
            raise self._too_many()
        t0, dt = self.t0, self.dt
        if self.method.is_adaptive:
            t1 = t0 + self.direction * dt
            if t1 == t0 or not math.isfinite(t1):
                is_sound = self.first_slope.isfinite().all()
                raise self._failure("the step became too small" if is_sound else "the vector field is not finite")
        if not self.method.is_adaptive or (self._ends and (self._ends[-1] - t1) * self.direction < 0):
            t1 = self._ends[-1]
            dt = abs(t1 - t0)
        # With `<`, a step that lands on the jump of its own accord would not count as having met it.
        self._is_on_stop = self._next_stop is not None and (self._next_stop - t1) * self.direction <= 0
        if self._is_on_stop:
            t1 = self._next_stop
            dt = abs(t1 - t0)
        self.t1 = t1
        self.uncut_dt = self.dt = self.dt if self.method.is_adaptive else dt
        self._tell(dt)
        error_ratio = self._attempt(t0, t1)
        accepted = error_ratio <= 1
        if dt <= stepping.min_step and not accepted:
            if not math.isfinite(error_ratio):
                raise self._failure("the vector field is not finite, and the step is as small as min_step allows,")
            accepted = True
        (self.statistics.accept_times if accepted else self.statistics.reject_times).append(t0)
        self._tell(dt, error_ratio, accepted)
        if self.method.is_adaptive:
            self.dt = self._within_limits(
                self.method.next_step_size(
                    dt,
                    error_ratio,
                    safety=stepping.safety,
                    ifactor=stepping.ifactor,
                    dfactor=stepping.dfactor,
                )
            )
        return accepted

    @property
    def next_step(self) -> float | None:
        """The size to go on with after the last step, whatever stop cut it short; None of fixed steps."""
        return max(self.dt, self.uncut_dt) if self.method.is_adaptive else None

    def has_passed(self, t: float) -> bool:
        """Whether the last step ends at `t` or beyond."""
        return (self.t1 - t) * self.direction >= 0

    def weights_at(self, t: float) -> tuple[float, ...]:
        """The weights of the dense output at a time `t` within the last step; at its end, those of the step.

        If they need the last stage, it is evaluated now unless it was.
        """
        if t == self.t1:
            return self.method.step_weights
        fraction = (t - self.t0) / (self.t1 - self.t0)
        if not self.method.is_adaptive and self.stepping.interp == "linear":
            return tuple(fraction * weight for weight in self.method.step_weights)
        weights = self.method.interpolation_weights(fraction)
        if weights[-1] and not self._has_last_stage:
            self.statistics.evaluation_times.append(self.stage_times[-1])
            self.system.evaluate(self.method.num_stages - 1, self.stage_times[-1])
            self._has_last_stage = True
        return weights

    def interpolate(self, t: float) -> Tensor:
        """The state at a time `t` within the last step, behind its start."""
        if t == self.t1:
            return self.end.clone()
        dt = self.t1 - self.t0
        weights = self.slopes.new_tensor([dt * weight for weight in self.weights_at(t)])
        return torch.addmv(self.start, self.slopes.T, weights)

    def write_states(self, times: Sequence[float], states: Tensor) -> None:
        """Step as far as needed for the states (times, size) at some times in a row, all behind the first.

        Raises:
            SolverError: see `advance`.
        """
        for time, state in zip(times, states, strict=True):
            while not self.has_passed(time):
                self.advance()
            state.copy_(self.interpolate(time))

    def _tell(self, dt: float, error_ratio: float | None = None, is_accepted: bool | None = None) -> None:
        if self.observer is None:
            return
        has_error = self.method.is_adaptive and error_ratio is not None
        self.observer(
            Attempt(
                self.system.direction,
                self.t0,
                self.t1,
                dt=dt,
                start=self.start,
                error=self.error if has_error else None,
                parts=self.system.parts,
                error_ratio=error_ratio,
                is_accepted=is_accepted,
            )
        )

    def _within_limits(self, dt: float) -> float:
        return min(max(dt, self.stepping.min_step), self.stepping.max_step)

    def _grid(self, times: Sequence[float]) -> list[float]:
        """Where fixed steps end, jumps apart: from the first to the last of `times`, without the first."""
        t0, t_end, size = times[0], times[-1], self.stepping.step_size
        if size is not None:
            # A last step of a millionth would be rounding.
            number = abs(t_end - t0) / size - 1e-6
            if number > self.stepping.max_num_steps:
                raise self._too_many()
            inner = (t0 + self.direction * size * i for i in range(1, math.ceil(number)))
            # No step need end just beside a jump: one ends at the jump.
            times = [t0, *(time for time in inner if not self._is_beside_a_jump(time, 1e-6 * size)), t_end]
        elif self.make_grid is not None:
            times = self.make_grid(self.start, times)
        return times[1:]

    def _is_beside_a_jump(self, t: float, distance: float) -> bool:
        place = bisect.bisect_left(self.jumps, t)
        return any(0 < abs(t - jump) < distance for jump in self.jumps[max(0, place - 1) : place + 1])

    def _enter_piece(self) -> None:
        """Find where the next step must stop, and tell the system between which times the coming evaluations lie."""
        if self.direction > 0:
            ahead = self.jumps[bisect.bisect_right(self.jumps, self.t0) :][:1]
        else:
            ahead = self.jumps[: bisect.bisect_left(self.jumps, self.t0)][-1:]
        self._next_stop = ahead[0] if ahead else None
        if self.exact_end and (not ahead or (ahead[0] - self.t_end) * self.direction > 0):
            self._next_stop = self.t_end
        self._piece_end = self.t_end if self._next_stop is None else self._next_stop
        self.system.enter(self.t0, self._piece_end)

    def _move_on(self) -> None:
        """Make the end of the last step the start of the next."""
        if self._is_start_current:
            return
        self.t0 = self.t1
        self._stand_at(self.end)
        if self._is_on_stop:
            self._enter_piece()
            self._evaluate_first(beside(self.t0, self._piece_end, self.dtype))
        elif self._has_last_stage and not self.stepping.perturb:  # which asks before a step's end and after it
            self._reuse_last_slope()
            self.first_stage_time = self.stage_times[-1]
            self.system.reuse_stage(self.method.num_stages - 1)
        else:
            perturbed = self.stepping.perturb
            self._evaluate_first(beside(self.t0, self._piece_end, self.dtype) if perturbed else self.stage_times[-1])
        self._is_start_current = True

    def _evaluate_first(self, t: float) -> None:
        self.statistics.evaluation_times.append(t)
        self.first_stage_time = t
        self._find_first_slope(t)

    def _stand_at(self, state: Tensor) -> None:
        """Make `state` (size) the start of the next step."""
        self.start.copy_(state)

    def _find_first_slope(self, t: float) -> None:
        """Evaluate the first stage of the next step, at the time `t`."""
        self._first_slopes(lambda: self.system.evaluate(0, t))

    def _reuse_last_slope(self) -> None:
        """Make the last slope of the last step the first of the next."""
        self.first_slope.copy_(self.slopes[-1])

    def _slope_along(self, change: float, t: float) -> Tensor:
        """The slope (size) at the time `t`, where the first slope leads in the time `change`."""
        coupled = self.system.num_coupled
        torch.add(self.start[:coupled], self.first_slope[:coupled], alpha=change, out=self.stage_states[1])
        self.system.evaluate(1, t)
        return self.slopes[1]

    def _attempt(self, t0: float, t1: float) -> float:
        """Take the step from `t0` to `t1`; return its error over the tolerance, which is 0 without error control."""
        # Methods with error control ask just before the end, in case of a jump there; others only if there is one.
        is_before = self.method.is_adaptive or self.stepping.perturb or self._is_on_stop
        self.stage_times = stage_times(self.method, t0, t1, beside(t1, t0, self.dtype) if is_before else t1)
        self.statistics.evaluation_times.extend(self.stage_times[: self.num_attempted - 1])
        self.step_size.fill_(t1 - t0)
        self._has_last_stage = self.attempts_last_stage
        error_ratio = self._run_attempt()
        return error_ratio.item() if self.method.is_adaptive else 0.0

    def _run_attempt(self) -> Tensor | None:
        return self._attempts(self._error_ratio)

    def _error_ratio(self) -> Tensor | None:
        """All the work of an attempt, from buffers to buffers; None without error control."""
        torch.mul(self.tableau, self.step_size, out=self.weights)
        for stage, t in enumerate(self.stage_times, start=1):
            torch.addmv(self.starts[stage], self.slopes_before[stage], self.stage_weights[stage], out=self.ends[stage])
            if stage < self.num_attempted:
                self.system.evaluate(stage, t)
        if not self.method.is_adaptive:
            return None
        torch.mv(self.slopes.T, self.weights[-1], out=self.error)
        torch.maximum(self.start.abs(), self.end.abs(), out=self.scale)
        self.error.div_(self.scale.mul_(self.rtol).add_(self.atol))
        return self.norm(self.error)

    def _guess_first_step(self) -> float:
        start, slope = self.start, self.first_slope
        if isinstance(self.rtol, Tensor) or isinstance(self.atol, Tensor):
            scale = self.atol + self.rtol * start.abs()
        else:
            scale = torch.add(self.atol, start.abs(), alpha=self.rtol)
        norms = torch.stack([self.norm(start / scale), self.norm(slope / scale)])
        state_norm, slope_norm = norms.tolist()
        if not math.isfinite(state_norm + slope_norm):
            what, values = ("the vector field", slope) if math.isfinite(state_norm) else ("the state", start)
            is_finite = values.isfinite().all()
            raise self._failure(
                f"{what} {'over its tolerance is too large a number' if is_finite else 'is not finite'}"
            )
        # Beyond the last time the field need not be of use.
        trial = min(trial_step_size(state_norm, slope_norm), abs(self.t_end - self.t0))
        t_trial = self.t0 + self.direction * trial
        self.system.enter(t_trial, t_trial)
        self.statistics.evaluation_times.append(t_trial)
        trial_slope = self._slope_along(self.direction * trial, t_trial)
        self._enter_piece()
        change_norm = self.norm((trial_slope - slope) / scale).item()
        return self.method.first_step_size(trial, slope_norm, change_norm)

    def _too_many(self) -> SolverError:
        what = f"more than {self.stepping.max_num_steps} steps were attempted"
        if self.method.is_adaptive:
            return self._failure(what)
        return SolverError(f"{what}, by fixed steps: give a larger max_num_steps, or fewer steps")

    def _failure(self, what: str) -> SolverError:
        rtol, atol = (f"{tol:g}" if isinstance(tol, float) else "a tensor" for tol in (self.rtol, self.atol))
        where = "in the backward solve " if self.system.direction == "backward" else ""
        return SolverError(
            f"{where}{what} at t = {self.t0:.9g} (step size {self.dt:.3g}, "
            f"rtol {rtol}, atol {atol}, {self.statistics.num_accepted} steps accepted and "
            f"{self.statistics.num_rejected} rejected so far): try larger tolerances or float64, and check that the "
            "data and the vector field are finite"
        )
