"""What a way to differentiate saves at the same error of the gradient, by the curves that `equal_error.py` measured.

The curve of `default` with dopri5 over the tolerances says what that costs at any error. A way's cost at one of its
tolerances, over the cost of `default` at the error that the way has there, is a ratio that no choice of tolerances can
flatter.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy

from .summary import half_width

Row = Mapping[str, Any]
Cost = Literal["nfe", "cpu_seconds"]
DECADES = (1e-2, 1e-3, 1e-4)
"""The relative tolerances at which ways are compared."""


@dataclass(frozen=True)
class Ratio:
    """A geometric mean over batches, with its interval by Student's t on the logarithms."""

    middle: float
    low: float
    high: float
    """The ends are NaN of a single batch."""
    num_batches: int


def cost_of(row: Row, cost: Cost) -> float:
    """Evaluations forward and backward, or CPU seconds."""
    return row["forward_nfe"] + row["backward_nfe"] if cost == "nfe" else row["cpu_seconds"]


def cost_at(error: float, curve: Iterable[Row], cost: Cost) -> float | None:
    """What the curve costs at this error, by lines in log-log between its points; None if it never gets there.

    Points that a cheaper one beats are left out. An error larger than that of the cheapest point costs what that does:
    nothing is cheaper.
    """
    front: list[tuple[float, float]] = []
    for point in sorted((cost_of(row, cost), row["error"]) for row in curve):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    costs, errors = (numpy.log(values) for values in zip(*front, strict=True))
    if math.log(error) < errors[-1]:
        return None
    return float(numpy.exp(numpy.interp(math.log(error), errors[::-1], costs[::-1])))


def geometric(ratios: Mapping[int, Sequence[float]]) -> Ratio | None:
    """Of the ratios of each batch, one for each set of weights: the mean over the weights is what a batch counts with.

    None if there are none.
    """
    logarithms = numpy.array([numpy.mean(numpy.log(values)) for values in ratios.values() if len(values)])
    if not len(logarithms):
        return None
    middle, half = logarithms.mean(), half_width(logarithms)
    return Ratio(*(float(numpy.exp(value)) for value in (middle, middle - half, middle + half)), len(logarithms))


@dataclass(frozen=True)
class Fair:
    """A way at one of its tolerances, against `default`."""

    adjoint: str
    warm_start: bool
    method: str
    rtol: float
    error: Ratio
    """Its error over that of `default` with dopri5 at the same tolerance."""
    at_equal_tolerance: Ratio
    """Its cost over that of `default` with dopri5 at the same tolerance."""
    at_equal_error: Ratio | None
    """Its cost over that of `default` with dopri5 at the same error; None if most gradients are beyond its curve."""
    num_beyond: int
    """How many gradients are more exact than any of `default`, and so are not in `at_equal_error`."""


def compare(rows: Sequence[Row], cost: Cost) -> list[Fair]:
    """Every way at every tolerance that `default` with dopri5 has too."""
    found = []
    ways, curves = defaultdict(list), defaultdict(list)
    for row in rows:
        ways[row["adjoint"], row["warm_start"], row["method"], row["rtol"]].append(row)
        if (row["adjoint"], row["method"]) == ("default", "dopri5"):
            curves[row["seed"], row["batch"]].append(row)
    for (adjoint, warm_start, method, rtol), mine in ways.items():
        errors, equal_tolerance, equal_error = ({row["batch"]: [] for row in mine} for _ in range(3))
        num_beyond = 0
        for row in mine:
            curve = curves[row["seed"], row["batch"]]
            [same] = [point for point in curve if point["rtol"] == rtol]
            errors[row["batch"]].append(row["error"] / same["error"])
            equal_tolerance[row["batch"]].append(cost_of(row, cost) / cost_of(same, cost))
            expected = cost_at(row["error"], curve, cost)
            if expected is None:
                num_beyond += 1
            else:
                equal_error[row["batch"]].append(cost_of(row, cost) / expected)
        # What is left of them if most are beyond would be the least exact ones.
        fair = geometric(equal_error) if 2 * num_beyond <= len(mine) else None
        ratios = geometric(errors), geometric(equal_tolerance), fair
        found.append(Fair(adjoint, warm_start, method, rtol, *ratios, num_beyond))
    return found
