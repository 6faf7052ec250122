"""What the results say: the time that a way needs for an error, who is on the front, and who fails; `page` shows it."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from .measuring import is_slow
from .references import TRUSTED
from .results import Measurement, Results

TARGETS = (1e-2, 1e-4, 1e-6)
"""The errors of the gradient at which ways are compared."""
CLOSE = 1.4
"""Up to how many times the least time counts as good as the best: about what the rounds of a measurement differ by."""
DISCRETE = "ours, discrete"
"""What others are compared with."""
WRONG = 0.1
"""A gradient with such an error or a larger one has failed."""
BACKSOLVES = ("default", "per-tensor", "seminorm", "adjoint", "backsolve")
"""One of these words is in the name of every way that solves state and adjoint backwards in time."""


def is_backsolve(contestant: str) -> bool:
    """Whether this is a continuous adjoint: a solve of state and adjoint backwards in time."""
    return any(word in contestant for word in BACKSOLVES)


def scientific(number: float) -> str:
    """A tolerance or an error as people write it, such as 1e-4."""
    mantissa, _, exponent = f"{number:.0e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def library_of(contestant: str) -> str:
    """The part of the name before the comma."""
    return contestant.partition(",")[0]


def shown_error(results: Results, measurement: Measurement) -> float:
    """The error of a measurement, but no less than what the reference allows to tell."""
    return max(measurement.error, TRUSTED * results.agreement)


@dataclass(frozen=True)
class Point:
    """One measurement on a diagram."""

    rtol: float
    error: float
    seconds: float


def curve(results: Results) -> list[Point]:
    """The measurements that came to an end, from the largest tolerance to the smallest."""
    return [
        Point(measurement.rtol, shown_error(results, measurement), measurement.median)
        for measurement in results.measurements
        if not measurement.failure
    ]


def seconds_for(points: Sequence[Point], target: float) -> float | None:
    """CPU seconds of a step whose error is at most `target`; None if there is none.

    Between two neighbouring tolerances, of which one misses the target and the next reaches it, it is interpolated in
    logarithms.
    """
    times = [point.seconds for point in points if point.error <= target]
    for before, after in itertools.pairwise(points):
        if after.error <= target < before.error:
            fraction = math.log(before.error / target) / math.log(before.error / after.error)
            times.append(before.seconds ** (1 - fraction) * after.seconds**fraction)
    return min(times, default=None)


def front(curves: Mapping[str, Sequence[Point]]) -> list[tuple[str, Point]]:
    """The points than which no other is both as fast and as exact, from the fastest on."""
    points = [(name, point) for name, points in curves.items() for point in points if point.error < WRONG]
    on_front = [
        (name, point)
        for name, point in points
        if not any(
            other.seconds <= point.seconds
            and other.error <= point.error
            and (other.seconds, other.error) != (point.seconds, point.error)
            for _, other in points
        )
    ]
    return sorted(on_front, key=lambda item: item[1].seconds)


@dataclass(frozen=True)
class Cell:
    """A problem and an error that its gradient must not exceed."""

    problem: str
    target: float
    seconds: Mapping[str, float]
    """Of the ways that reach it, by name."""
    measured: frozenset[str]
    """The ways that tried."""
    stopped: frozenset[str] = frozenset()
    """Those of them that do not reach it, but were so slow that tighter tolerances were not tried."""

    def ratios(self, ways: Iterable[str]) -> dict[str, float]:
        """The time of each of these ways that reaches the error, over the least time of these."""
        reached = {way: self.seconds[way] for way in ways if way in self.seconds}
        return {way: seconds / min(reached.values()) for way, seconds in reached.items()}


def cells(all_results: Iterable[Results]) -> list[Cell]:
    """A cell for each problem and target, where some way reaches it."""
    by_problem: dict[str, list[Results]] = {}
    for results in all_results:
        by_problem.setdefault(results.problem, []).append(results)
    found = []
    for problem, of_problem in by_problem.items():
        slow = {it.contestant for it in of_problem if any(map(is_slow, it.measurements))}
        for target in TARGETS:
            seconds = {it.contestant: seconds_for(curve(it), target) for it in of_problem}
            reached = {way: time for way, time in seconds.items() if time is not None}
            found.append(Cell(problem, target, reached, frozenset(seconds), frozenset(slow - reached.keys())))
    return [cell for cell in found if cell.seconds]


def measured_everywhere(some: Sequence[Cell], ways: Sequence[str]) -> Sequence[str]:
    """Those of these ways that were measured at all problems of the cells, so that they can be ranked; else all."""
    return [way for way in ways if all(way in cell.measured for cell in some)] or ways


@dataclass(frozen=True)
class Standing:
    """How a way does among others, over some cells."""

    way: str
    num_cells: int
    """In how many it was measured."""
    num_reached: int
    num_stopped: int
    """In how many more it was too slow to be tried to the end."""
    num_close: int
    """In how many it takes at most `CLOSE` times the least time."""
    typical: float
    """The geometric mean of its time over the least, where it reaches the error."""

    @property
    def reach(self) -> float:
        """The share of the cells in which it was measured whose error it reaches."""
        return self.num_reached / self.num_cells

    @property
    def reached(self) -> str:
        """The same in words."""
        stopped = f" ({self.num_stopped} cut)" if self.num_stopped else ""
        return f"{self.num_reached} of {self.num_cells}{stopped}"


def standings(some: Sequence[Cell], ways: Sequence[str]) -> list[Standing]:
    """How each of these ways does among them, the best first."""
    ratios = [cell.ratios(ways) for cell in some]
    found = []
    for way in ways:
        own = [ratio[way] for ratio in ratios if way in ratio]
        if own:
            typical = math.exp(sum(map(math.log, own)) / len(own))
            num_cells, num_stopped = (
                sum(way in ways for ways in of_cells)
                for of_cells in ([cell.measured for cell in some], [cell.stopped for cell in some])
            )
            num_close = sum(ratio <= CLOSE for ratio in own)
            found.append(Standing(way, num_cells, len(own), num_stopped, num_close, typical))
    return sorted(
        found, key=lambda standing: (-standing.num_close / standing.num_cells, -standing.reach, standing.typical)
    )


@dataclass(frozen=True)
class Failures:
    """Who of those that were tried fails at one problem and tolerance."""

    problem: str
    rtol: float
    backsolves: dict[str, bool]
    """Of each backward solve, whether it fails."""
    discrete: bool
    """Whether `discrete` fails, with the same method."""


def failures(all_results: Iterable[Results]) -> list[Failures]:
    """Who fails, wherever `discrete` and some backward solve were measured."""
    all_results = list(all_results)
    found = []
    for problem, rtol in sorted({(it.problem, m.rtol) for it in all_results for m in it.measurements}):
        ways = {it.contestant: _has_failed(it, rtol) for it in all_results if it.problem == problem}
        backsolves = {way: fails for way, fails in ways.items() if is_backsolve(way) and fails is not None}
        if backsolves and ways.get(DISCRETE) is not None:
            found.append(Failures(problem, rtol, backsolves, ways[DISCRETE]))
    return found


def _has_failed(results: Results, rtol: float) -> bool | None:
    """None if nobody knows: it was not tried, or given up."""
    measurement = results.at(rtol)
    if measurement is None or (measurement.failure and is_slow(measurement)):
        return None
    return bool(measurement.failure) or measurement.error >= WRONG
