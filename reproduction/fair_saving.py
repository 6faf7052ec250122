"""What a way to differentiate saves at the same error of the gradient, by the curves that `equal_error.py` measured.

The curve of `default` with dopri5 over the tolerances says what that costs at any error. A way's cost at one of its
tolerances, over the cost of `default` at the error that the way has there, is a ratio that no choice of tolerances can
flatter. Costs and errors are geometric means over the batches before they are compared: the gradient of a single batch
may err less at a looser tolerance by chance, and a curve of such points would be too cheap. Of several sets of weights
an interval holds how batches differ, and how weights do.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy

from .runs import way_of
from .summary import half_width

Row = Mapping[str, Any]
Cost = Literal["nfe", "cpu_seconds"]
Batches = Mapping[int, numpy.ndarray]
"""Of a way at a tolerance, by batch: the logarithms of its cost and of its error, means over the weights."""
COMPARED_AT = {
    "speech_commands": (1e-2, 1e-3, 1e-4),
    "acrobot": (1e-2, 1e-3, 1e-4),
    "flow": (1e-3, 1e-4, 1e-5),
}
"""The relative tolerances of an experiment at which ways are compared."""


@dataclass(frozen=True)
class Ratio:
    """A ratio of geometric means over batches and weights, with its interval by Student's t on the logarithms."""

    middle: float
    low: float
    high: float
    """The ends are NaN of a single batch. One is infinite if the middle is a bound, both if it is by some weights."""
    num_batches: int
    of_weights: tuple["Ratio", ...] = ()
    """By each set of weights alone, if there are several."""

    @property
    def known(self) -> tuple[float, float]:
        """The middle as both ends, one of which is infinite where it is a bound."""
        return (self.low if math.isinf(self.low) else self.middle, self.high if math.isinf(self.high) else self.middle)

    @property
    def open_ends(self) -> tuple[bool, bool]:
        """Which ends are infinite, the low one and the high one."""
        return math.isinf(self.low), math.isinf(self.high)

    def widened(self, alone: Sequence["Ratio"]) -> "Ratio":
        """This ratio, whose interval is over the batches, widened to cover the interval over the weights.

        Where all the ratios by each set of weights `alone` are such bounds as this one, they count as numbers. Where
        some are others, there is no interval over the weights, and both ends are open.
        """
        if {ratio.open_ends for ratio in alone} != {self.open_ends}:
            return replace(self, low=-math.inf, high=math.inf, of_weights=tuple(alone))
        logarithms = numpy.log([ratio.middle for ratio in alone])
        half = half_width(logarithms)
        low, high = (float(numpy.exp(logarithms.mean() + side * half)) for side in (-1, 1))
        return replace(self, low=min(self.low, low), high=max(self.high, high), of_weights=tuple(alone))


@dataclass(frozen=True)
class Fair:
    """A way at one of its tolerances, against `default`."""

    way: str
    """As `way_of` names it."""
    rtol: float
    error: Ratio
    """Its error over that of `default` with dopri5 at the same tolerance."""
    at_equal_error: Ratio
    """Its cost over that of `default` with dopri5 at the same error."""


def name_of(row: Row) -> str:
    """How a row differentiates."""
    return way_of({**row, "norm": row["adjoint"]})


def cost_of(row: Row, cost: Cost) -> float:
    """Evaluations forward and backward, or CPU seconds."""
    return row["forward_nfe"] + row["backward_nfe"] if cost == "nfe" else row["cpu_seconds"]


def cost_at(error: float, curve: Iterable[tuple[float, float]]) -> float:
    """What a curve of costs and errors costs at this error, by lines between its points; all are logarithms.

    Points that a cheaper one beats are left out. Beyond its ends the curve goes on level.
    """
    front: list[tuple[float, float]] = []
    for point in sorted(curve):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    costs, errors = zip(*front, strict=True)
    return float(numpy.interp(error, errors[::-1], costs[::-1]))


def compare(rows: Iterable[Row], cost: Cost) -> list[Fair]:
    """Every way at every tolerance that `default` with dopri5 has too."""
    rows = list(rows)
    by_seed = defaultdict(list)
    for row in rows:
        by_seed[row["seed"]].append(row)
    found = _over_batches(rows, cost)
    if len(by_seed) == 1:
        return found
    of_seeds = [{(fair.way, fair.rtol): fair for fair in _over_batches(of_seed, cost)} for of_seed in by_seed.values()]
    return [
        replace(
            fair,
            **{
                name: getattr(fair, name).widened([getattr(of[fair.way, fair.rtol], name) for of in of_seeds])
                for name in ("error", "at_equal_error")
            },
        )
        for fair in found
    ]


def _over_batches(rows: Iterable[Row], cost: Cost) -> list[Fair]:
    """What `compare` finds, for the weights that were there."""
    ways = _by_way(rows, cost)
    curve = {rtol: batches for (way, rtol), batches in ways.items() if way == "default"}
    found = []
    for (way, rtol), mine in ways.items():
        if rtol in curve:
            errors = numpy.array([mine[batch] - curve[rtol][batch] for batch in mine])[:, 1]
            found.append(Fair(way, rtol, _ratio(errors.mean(), errors), _at_equal_error(mine, curve.values())))
    return found


def _by_way(rows: Iterable[Row], cost: Cost) -> dict[tuple[str, float], Batches]:
    cells = defaultdict(lambda: defaultdict(list))
    for row in rows:
        cell = cells[name_of(row), row["rtol"]]
        cell[row["batch"]].append((math.log(cost_of(row, cost)), math.log(row["error"])))
    return {
        way: {batch: numpy.mean(of_weights, axis=0) for batch, of_weights in batches.items()}
        for way, batches in cells.items()
    }


def _at_equal_error(mine: Batches, curve: Iterable[Batches]) -> Ratio:
    """A ratio with its interval by the jackknife over the batches.

    Of a way more exact than all of the curve it is an upper bound, and of one less exact a lower one, as the curve ends
    before. If that is level at its loose end, to a hundredth, it goes on so.
    """

    def log_ratio(batches: Sequence[int]) -> float:
        def mean(of: Batches) -> numpy.ndarray:
            return numpy.mean([of[batch] for batch in batches], axis=0)

        own_cost, own_error = mean(mine)
        return own_cost - cost_at(own_error, [tuple(mean(of)) for of in curve])

    batches = list(mine)
    middle, count = log_ratio(batches), len(batches)
    without = (
        [log_ratio([other for other in batches if other != batch]) for batch in batches] if count > 1 else [middle]
    )
    ratio = _ratio(middle, numpy.array([count * middle - (count - 1) * without_one for without_one in without]))
    (_, own_error), *points = (tuple(numpy.mean([of[batch] for batch in mine], axis=0)) for of in (mine, *curve))
    *finer, (coarsest_cost, largest_error) = sorted(points, key=lambda point: point[1])
    if own_error < min(error for _, error in points):
        return replace(ratio, low=-math.inf)
    if own_error > largest_error and all(cost > coarsest_cost + 0.01 for cost, _ in finer):
        return replace(ratio, high=math.inf)
    return ratio


def _ratio(middle: float, logarithms: numpy.ndarray) -> Ratio:
    half = half_width(logarithms)
    return Ratio(*(float(numpy.exp(value)) for value in (middle, middle - half, middle + half)), len(logarithms))
