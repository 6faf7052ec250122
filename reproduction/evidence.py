"""What the results say, as numbers with intervals, for `claims.py` to judge: of runs, of measurements, of the law.

Every number comes with the files that it was computed from. What there are no files for is None.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy

from common.results import Results, load_all
from common.training import FREE_TO_DIFFER

from .fair_saving import Cost, Fair, compare
from .measurements import path_of, read_record
from .runs import whole_config
from .summary import clock_of, half_width, seconds

NOT_MEASURED = "not measured"
NAMED = ("rtol", "atol", "norm", "method", "warm_start", "integrals")
"""Settings that a comparison names."""
PAIRED = (*NAMED, "seed", "max_epochs")
"""Those, and others in which runs of one kind may differ."""
INCIDENTAL = (*FREE_TO_DIFFER, "data_root")
"""Those that change nothing of what is compared; what the data were, the digest of their split tells."""


@dataclass(frozen=True)
class Finding:
    """A number, the ends of its 95 % interval, of how many things, and the files behind.

    The ends are NaN where there is no interval. One is infinite if the number is a bound, both if it is one by some of
    the weights.
    """

    value: float
    low: float
    high: float
    num: int
    unit: str
    """What `num` counts: pairs of runs, batches."""
    files: tuple[Path, ...]
    note: str = ""
    of_weights: tuple[tuple[float, float], ...] = ()
    """The number by each set of weights alone, where gradients are measured: twice, or a bound and infinity."""


def interval(values: Sequence[float], unit: str, files: Iterable[Path], note: str = "") -> Finding | None:
    """The mean of these values with its interval by Student's t; None if there are none."""
    if not len(values):
        return None
    array = numpy.asarray(values, dtype=float)
    middle, half = float(array.mean()), half_width(array)
    return Finding(middle, middle - half, middle + half, len(array), unit, tuple(dict.fromkeys(files)), note)


@dataclass(frozen=True)
class Way:
    """A way to train: what a comparison of runs is about."""

    experiment: str
    rtol: float
    atol: float
    norm: str
    method: str = "dopri5"
    warm_start: bool = False
    integrals: str = "none"
    data: str | None = None
    """Of an experiment that has several data sets."""


@dataclass(frozen=True)
class Evidence:
    """A folder of results."""

    results_dir: str
    runs: Mapping[Path, Results] = field(repr=False)
    compared_before: dict[tuple, Mapping[tuple[str, float], Fair]] = field(default_factory=dict, repr=False)
    """What `fair` has found, as many claims ask for it."""

    @classmethod
    def of(cls, results_dir: str) -> "Evidence":
        """All that this folder holds."""
        completed = {path: run for path, run in load_all(results_dir).items() if run.status == "completed"}
        return cls(results_dir, completed)

    def pairs(self, way: Way, baseline: Way, num_epochs: int | None = None) -> list[tuple[Path, Path]]:
        """Runs of both with the same seed, data, epochs and other settings.

        Of several numbers of epochs the one asked for counts, or else the one with the most pairs, among equals the
        largest.
        """
        mine, theirs = self._keyed(way), self._keyed(baseline)
        shared = [key for key in mine if key in theirs]
        counts = Counter(epochs for epochs, *_ in shared)
        chosen = num_epochs or max(counts, key=lambda epochs: (counts[epochs], epochs), default=0)
        return [(mine[key], theirs[key]) for key in shared if key[0] == chosen]

    def _keyed(self, way: Way) -> dict[tuple, Path]:
        found = {}
        for path, run in self.runs.items():
            if run.experiment != way.experiment:
                continue
            config = whole_config(run.experiment, run.config)
            if any(config.get(name, getattr(Way, name, None)) != getattr(way, name) for name in (*NAMED, "data")):
                continue
            others = {name: value for name, value in config.items() if name not in (*PAIRED, *INCIDENTAL)}
            key = (len(run.epochs), config["seed"], json.dumps(others, sort_keys=True), run.provenance["split"])
            # As in the tables, the latest results of a run count.
            if key not in found or run.start_time > self.runs[found[key]].start_time:
                found[key] = path
        return found

    def compared(
        self,
        way: Way,
        baseline: Way,
        quantity: Callable[[Results], float],
        *,
        is_share: bool,
        num_epochs: int | None = None,
    ) -> Finding | None:
        """The share of the baseline's quantity that the way saves, or the way's minus the baseline's, over pairs.

        Seconds are compared on equal devices, on as many threads and by the same clock only.
        """
        pairs = self.pairs(way, baseline, num_epochs)
        if quantity is seconds:
            pairs = [pair for pair in pairs if len({self._clock(run) for run in pair}) == 1]
        values = []
        for path, other in pairs:
            mine, theirs = quantity(self.runs[path]), quantity(self.runs[other])
            values.append(1 - mine / theirs if is_share else mine - theirs)
        if not pairs:
            return None
        run = self.runs[pairs[0][0]]
        note = f"{len(run.epochs)} epochs, {run.train_metrics.dataset_size:,} samples, batch {run.config['batch_size']}"
        return interval(values, "pairs of runs", [path for pair in pairs for path in pair], note)

    def _clock(self, path: Path) -> tuple:
        """What must be equal for seconds to compare: the device, its threads and the kind of clock."""
        run = self.runs[path]
        return run.provenance["device_name"], run.provenance["num_threads"], clock_of(run)

    def measurement(self, name: str, subject: str, group: str | None = None) -> tuple[Path, dict[str, Any]] | None:
        """A file of `diagnostics` and what it holds."""
        path = path_of(self.results_dir, name, subject, group)
        record = read_record(path)
        return None if record is None else (path, record)

    def fair(self, experiment: str, cost: Cost) -> Mapping[tuple[str, float], Fair]:
        """What each way at each tolerance costs and how it errs, over what `default` does; empty if not measured."""
        key = (experiment, cost)
        if key not in self.compared_before:
            _, record = self.measurement("equal_error", experiment) or (None, {"rows": []})
            self.compared_before[key] = {(fair.way, fair.rtol): fair for fair in compare(record["rows"], cost)}
        return self.compared_before[key]


def backward_nfe(run: Results) -> float:
    """Of all training steps."""
    return sum(epoch.backward_nfe for epoch in run.epochs)


def loss(run: Results) -> float:
    """Of the test set, in the logarithm, so that a difference is that of a factor."""
    return math.log(run.test_metrics.loss)


accuracy = attrgetter("test_metrics.accuracy")
bits_per_dim = attrgetter("test_metrics.bits_per_dim")
nll = attrgetter("test_metrics.nll")

Find = Callable[[Evidence], Finding | str]
"""Looks for the number of a claim: a finding, or in a few words why there is none."""


def comparison(
    way: Way, baseline: Way, quantity: Callable[[Results], float], *, is_share: bool, num_epochs: int | None = None
) -> Find:
    """`Evidence.compared` of these."""

    def find(evidence: Evidence) -> Finding | str:
        found = evidence.compared(way, baseline, quantity, is_share=is_share, num_epochs=num_epochs)
        return found or "runs missing"

    return find


def measured(name: str, subject: str, read: Callable[[Path, dict[str, Any]], Finding | str]) -> Find:
    """What `read` makes of a file of `diagnostics` and what it holds."""

    def find(evidence: Evidence) -> Finding | str:
        found = evidence.measurement(name, subject)
        return NOT_MEASURED if found is None else read(*found)

    return find
