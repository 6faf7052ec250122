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


def cost_at(error: float, curve: Iterable[Row], cost: Cost) -> float:
    """What the curve costs at this error, by lines in log-log between its points.

    Points that a cheaper one beats are left out. An error larger than that of the cheapest point costs what that does:
    nothing is cheaper. One smaller than that of the dearest costs more than that, but what that does is returned.
    """
    front: list[tuple[float, float]] = []
    for point in sorted((cost_of(row, cost), row["error"]) for row in curve):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    costs, errors = (numpy.log(values) for values in zip(*front, strict=True))
    return float(numpy.exp(numpy.interp(math.log(error), errors[::-1], costs[::-1])))


def geometric(ratios: Mapping[int, Sequence[float]]) -> Ratio:
    """The mean of all: of a batch's ratios, one for each set of weights, the mean is what the batch counts with."""
    logarithms = numpy.array([numpy.mean(numpy.log(values)) for values in ratios.values()])
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
    at_equal_error: Ratio
    """Its cost over that of `default` with dopri5 at the same error; at most so much if some are beyond."""
    num_beyond: int
    """How many gradients are more exact than any of `default`, which would cost more than its dearest."""


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
            equal_error[row["batch"]].append(cost_of(row, cost) / cost_at(row["error"], curve, cost))
            num_beyond += row["error"] < min(point["error"] for point in curve)
        ratios = geometric(errors), geometric(equal_tolerance), geometric(equal_error)
        found.append(Fair(adjoint, warm_start, method, rtol, *ratios, num_beyond))
    return found
