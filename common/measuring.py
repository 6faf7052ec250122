"""What a pass over a data set adds up, batch by batch; the trainer keeps one and makes metrics of it."""

import math
import time
from dataclasses import dataclass, field

from torchadjoint.statistics import SolveStatistics

from .records import Record, read_as
from .results import MEASURES, Metrics

MAX_TIMES = 256
"""How many times of each kind the metrics of a pass keep at most."""


@dataclass
class Pass(Record):
    """What a pass over a data set has added up so far."""

    num_batches: int = 0
    num_samples: int = 0
    totals: dict[str, int | float] = field(default_factory=dict)
    times: dict[str, list[float]] = field(default_factory=dict)
    timestamp: float = field(default_factory=time.time)
    timespan: float = 0.0
    cpu_seconds: float = 0.0

    def add(self, num_samples: int, sums: dict[str, float], statistics: SolveStatistics) -> None:
        for name, number in {**sums, **_counts(statistics)}.items():
            self.totals[name] = self.totals.get(name, 0) + number
        self.times = self.times or _times(statistics)
        self.num_samples += num_samples
        self.num_batches += 1

    def means(self) -> dict[str, float]:
        return {name: self.totals[name] / self.num_samples for name in ("loss", *MEASURES) if name in self.totals}

    def metrics(self) -> Metrics:
        passed = {"dataset_size": self.num_samples, "timestamp": self.timestamp, "timespan": self.timespan}
        return read_as(Metrics, {**self.totals, **self.means(), **passed, **self.times})


def _counts(statistics: SolveStatistics) -> dict[str, int]:
    forward, backward = statistics.forward, statistics.backward
    return {
        "forward_nfe": forward.nfe,
        "backward_nfe": backward.nfe,
        "forward_accepted": forward.num_accepted,
        "forward_rejected": forward.num_rejected,
        "backward_accepted": backward.num_accepted,
        "backward_rejected": backward.num_rejected,
    }


def _times(statistics: SolveStatistics) -> dict[str, list[float]]:
    forward, backward = statistics.forward, statistics.backward
    times = {
        "forward_ts": forward.evaluation_times,
        "backward_ts": backward.evaluation_times,
        "forward_accept_ts": forward.accept_times,
        "forward_reject_ts": forward.reject_times,
        "backward_accept_ts": backward.accept_times,
        "backward_reject_ts": backward.reject_times,
    }
    return {name: _thinned(values) for name, values in times.items()}


def _thinned(times: list[float]) -> list[float]:
    stride = max(1, math.ceil(len(times) / MAX_TIMES))
    return [float(f"{t:.6g}") for t in times[::stride]]
