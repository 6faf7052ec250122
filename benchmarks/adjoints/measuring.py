"""Measures contestants side by side at one problem and tolerance; `__main__` goes through what is asked for.

They take turns in each round, so that a machine's moods touch all of them alike. Seconds are those of the CPU, on the
core and the thread that the process has.
"""

import contextlib
import math
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from benchmarks.memory import peak_growth

from .contract import Gradient, Problem, Step
from .names import Contestant
from .references import Reference, distance
from .results import Measurement

ATOL = 1e-2
"""The absolute tolerance, over the relative one; torchdiffeq's defaults have the same ratio."""
NUM_ROUNDS = 3
TURN = 0.02
"""Seconds that a turn takes at least: a step is repeated in it."""
LONG = 0.5
"""A step that takes so many CPU seconds takes part in the first round alone."""
TOO_LONG = 2.0
"""A contestant whose step takes so many gets no tighter tolerance."""
VAIN = 5.0
"""Nor does one that takes so many to fail, compilation apart."""
LIMIT = 300.0
"""Seconds by the clock after which the first step is given up, compilation included, where Python has the word."""


@dataclass
class Trial:
    """A contestant that is about to be measured."""

    contestant: Contestant
    measurement: Measurement
    step: Step | None = None
    repetitions: int = 1
    is_long: bool = False
    seconds: list[float] = field(default_factory=list)


def measure(
    problem: Problem, reference: Reference, contestants: Sequence[Contestant], *, rtol: float, dtype: str
) -> list[Measurement]:
    """What each contestant takes, in their order, interleaved; sessions are for others to number."""
    trials = [Trial(contestant, Measurement(rtol=rtol, atol=ATOL * rtol, session=0)) for contestant in contestants]
    for trial in trials:
        _warm_up(trial, problem, reference, dtype)
    for number in range(NUM_ROUNDS):
        for trial in trials:
            if not (trial.measurement.failure or (trial.is_long and number > 0)):
                trial.seconds.append(_turn(trial))
    for trial in trials:
        trial.measurement.seconds = trial.seconds
    return [trial.measurement for trial in trials]


def _warm_up(trial: Trial, problem: Problem, reference: Reference, dtype: str) -> None:
    """The first steps: whether it comes to an end, its error, its counts and its memory."""
    measurement, contestant = trial.measurement, trial.contestant
    started = time.perf_counter()
    try:
        with _limited(LIMIT):
            trial.step = contestant.prepare(
                problem, contestant.way, rtol=measurement.rtol, atol=measurement.atol, dtype=dtype
            )
            trial.step()
        measurement.first_seconds = time.perf_counter() - started
        measured = time.process_time()
        measurement.mebibytes, gradient = peak_growth(trial.step)
        taken = time.process_time() - measured
        _note(measurement, gradient, problem, reference)
    # Whatever a contestant raises is its result.
    except Exception as error:
        measurement.failure = _first_line(error)
        measurement.first_seconds = time.perf_counter() - started
        if trial.step is not None and TooLong.__name__ not in measurement.failure:
            measurement.failed_seconds = _seconds_to_fail(trial.step)
        return
    trial.is_long = taken > LONG
    trial.repetitions = max(1, math.ceil(TURN / max(taken, 1e-6)))


def _seconds_to_fail(step: Step) -> float:
    """CPU seconds of a step that has failed once, when it was compiled."""
    started = time.process_time()
    with contextlib.suppress(Exception), _limited(LIMIT):
        step()
    return time.process_time() - started


def _note(measurement: Measurement, gradient: Gradient, problem: Problem, reference: Reference) -> None:
    error = distance(gradient.flat(problem), reference.gradient)
    if not math.isfinite(error):
        raise ArithmeticError("the gradient is not finite")
    measurement.error = error
    measurement.forward_nfe, measurement.backward_nfe = gradient.forward_nfe, gradient.backward_nfe


def _turn(trial: Trial) -> float:
    """CPU seconds of one step."""
    started = time.process_time()
    for _ in range(trial.repetitions):
        trial.step()
    return (time.process_time() - started) / trial.repetitions


def is_too_long(measurement: Measurement) -> bool:
    """Whether nothing tighter needs to be tried."""
    if measurement.failed_seconds is not None:
        return measurement.failed_seconds > VAIN
    return measurement.first_seconds > VAIN if measurement.failure else is_slow(measurement)


def is_slow(measurement: Measurement) -> bool:
    """Whether it shows a way that is too slow, not one that fails."""
    if measurement.failure:
        # Maybe within the message of who was interrupted.
        return TooLong.__name__ in measurement.failure
    return measurement.median > TOO_LONG


class TooLong(Exception):
    """A step took longer than the limit."""


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raises `TooLong` in what runs for more seconds, as soon as Python has the word again."""

    def stop(*_):
        raise TooLong(f"given up after {seconds:g} s")

    previous = signal.signal(signal.SIGALRM, stop)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, previous)


def _first_line(error: Exception) -> str:
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    message = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
    return message if len(message) <= 160 else f"{message[:157]}..."
