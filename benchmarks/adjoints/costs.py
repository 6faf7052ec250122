"""What a gradient step takes besides its evaluations, and what an evaluation takes: lines through measurements."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .results import Results

OWN, PEER = "ours, discrete, tsit5, compiled solve", "diffrax, recursive checkpoints, tsit5"
"""Ways that take about the same steps; only the first counts its evaluations, so they stand for those of both."""
FEWEST = 4
"""How many tolerances a line needs at least."""
RANGE = 2.0
"""How many times as many evaluations one of them must take as another."""


@dataclass(frozen=True)
class Line:
    """Seconds of a gradient step as a linear function of its evaluations."""

    fixed: float
    """Seconds without any."""
    slope: float
    """Seconds of each, forward or backward."""
    miss: float
    """How much of a measurement the line misses at most."""


def line_through(evaluations: Sequence[int], seconds: Sequence[float]) -> Line:
    """That with the least squares of relative differences."""
    measured = np.array(seconds)
    relative = np.stack([np.ones(len(measured)), np.array(evaluations)], axis=1) / measured[:, None]
    found, *_ = np.linalg.lstsq(relative, np.ones(len(measured)), rcond=None)
    return Line(*map(float, found), miss=float(abs(relative @ found - 1).max()))


def lines(of_problem: Mapping[str, Results]) -> tuple[Line, Line] | None:
    """Those of `OWN` and `PEER` at a problem, given the results of each way; None if they tell too little."""
    if not {OWN, PEER} <= of_problem.keys():
        return None
    pairs = [(own, of_problem[PEER].at(own.rtol)) for own in of_problem[OWN].measurements if not own.failure]
    pairs = [(own, peer) for own, peer in pairs if peer is not None and not peer.failure]
    evaluations = [own.forward_nfe + own.backward_nfe for own, _ in pairs]
    if len(pairs) < FEWEST or max(evaluations) < RANGE * min(evaluations):
        return None
    of_own, of_peer = zip(*pairs, strict=True)
    return (
        line_through(evaluations, [measurement.median for measurement in of_own]),
        line_through(evaluations, [measurement.median for measurement in of_peer]),
    )
