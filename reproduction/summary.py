"""Results to numbers, in pandas: a row a run, or a row a condition with what its runs have in common.

`typesetting.py` makes the tables of it, and figures and report read it too.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Literal

import numpy
import pandas
from scipy.special import stdtrit

from common.records import one_line
from common.results import MEASURES, Results

from .experiments import EXPERIMENTS
from .runs import identity, identity_of
from .status import Status

CONDITION = ["experiment", "group", "rtol", "atol", "max_epochs", "way"]
"""The columns that a condition's runs share; they differ in the seed."""
MEASURED = [
    "epochs", *MEASURES, "loss", "backward_nfe", "forward_nfe", "test_backward_nfe", "seconds", "epoch_seconds",
    "memory",
]  # fmt: skip
BASELINES = ("default", "per-tensor")
"""The norms that savings are against: the paper's baseline, and what torchdiffeq does today."""
SAVINGS = {
    (quantity, baseline): f"{quantity}_saving_{baseline}"
    for quantity in ("backward_nfe", "test_backward_nfe")
    for baseline in BASELINES
}
"""The columns of the savings in a summary, by what is saved and against which norm; with `SAVING_ENDS`."""
SAVING_ENDS = ("", "_low", "_high", "_pairs")
"""What follows such a name in the columns of a saving: the share, the ends of its interval, and how many pairs."""
CONFIDENCE = 0.95
"""Of the interval of a saving."""


def collect(standing: Iterable[Status], results: Iterable[Results]) -> pandas.DataFrame:
    """One row for each run, condition by condition, from how it stands with them and from all results there are.

    The columns are those of `CONDITION`, then `seed`, `metric` (the column of what was learnt),
    `synthetic` (whether the data are the sample that is not speech), `status` (`completed`, `failed` or `missing`),
    `failure`, `MEASURED` (NFE and seconds of all training steps, loss and measures of the test set, the peak of GPU
    memory in bytes) and what the run was made on. `seconds` are those of the process on all CPU cores where `clock` is
    `CPU`, else (on a GPU, or in a file of schema 1) those of the wall clock. What was not measured is NaN. A run that
    was completed several times counts once, by its latest results. `elsewhere` is how many completed results differ
    from the run in nothing but their data.
    """
    standing = list(standing)
    experiments = {status.run.experiment for status in standing}
    completed = [result for result in results if result.status == "completed" and result.experiment in experiments]
    completed.sort(key=lambda result: result.start_time)
    found = {identity_of(result): result for result in completed}
    on_any_data = Counter(identity(result.experiment, result.config, None) for result in completed)
    on_its_data = Counter(map(identity_of, completed))
    rows = []
    for status in standing:
        run, config = status.run, status.run.config
        condition = (run.experiment, run.group, config.rtol, config.atol, config.max_epochs, run.way)
        row = {**dict(zip(CONDITION, condition, strict=True)), "seed": config.seed}
        row["metric"] = EXPERIMENTS[run.experiment].metric(vars(config))
        row["elsewhere"] = on_any_data[replace(run, digest=None).identity] - on_its_data[run.identity]
        row["synthetic"] = getattr(config, "data_root", None) == "synthetic"
        if run.identity in found:
            row |= {"status": "completed", **_measured(found[run.identity])}
        elif status.state == "failed":
            row |= {"status": "failed", "failure": status.reason}
        else:
            row |= {"status": "missing"}
        rows.append(row)
    about = ["seed", "metric", "synthetic", "status", "failure", "elsewhere"]
    made_on = ["clock", "split", "training_samples", "batch_size", "device", "num_threads"]
    collected = pandas.DataFrame(rows, columns=[*CONDITION, *about, *MEASURED, *made_on])
    return collected.iloc[collected.groupby(CONDITION, sort=False).ngroup().argsort(kind="stable")]


def clock_of(result: Results) -> Literal["CPU", "wall"]:
    """The clock of the seconds of a run's training steps: of the process on all cores, or of the wall."""
    on_cpu = result.config["device"] == "cpu"
    return "CPU" if on_cpu and all(epoch.cpu_seconds is not None for epoch in result.epochs) else "wall"


def seconds(result: Results) -> float:
    """Of all training steps, by that clock."""
    clock = clock_of(result)
    return sum(epoch.cpu_seconds if clock == "CPU" else epoch.seconds for epoch in result.epochs)


def _measured(result: Results) -> dict[str, float | str | None]:
    epochs, test = result.epochs, result.test_metrics
    return {
        "epochs": len(epochs),
        **{name: test.get(name) for name in MEASURES},
        "loss": test.loss,
        "backward_nfe": sum(epoch.backward_nfe for epoch in epochs),
        "forward_nfe": sum(epoch.forward_nfe for epoch in epochs),
        "test_backward_nfe": test.backward_nfe,
        "seconds": seconds(result),
        "epoch_seconds": seconds(result) / len(epochs),
        "memory": result.memory_usage,
        "clock": clock_of(result),
        "split": result.provenance["split"],
        "training_samples": result.train_metrics.dataset_size,
        "batch_size": result.config["batch_size"],
        "device": one_line(result.provenance["device_name"]),
        "num_threads": result.provenance["num_threads"],
    }


def summarise(collected: pandas.DataFrame, *, all_seeds: bool = False) -> pandas.DataFrame:
    """One row for each condition of `collect`'s rows (each run with `all_seeds`), in their order.

    The columns are those of `CONDITION` (and `seed`); how many runs are `wanted`, `completed`, `failed` and, for the
    means of seconds, `timed`; the `clock` of these; `<name>_mean` and `<name>_sd` (sample standard deviation; NaN for a
    single run) of all `MEASURED`; and the `SAVINGS`, each a share with the ends of its interval in `_low` and `_high`
    and its pairs in `_pairs`.

    Where only some of a condition's runs have CPU seconds, the mean is over these: the two clocks do not mix. Nor do
    two devices or numbers of threads: runs count whose device and threads are those of most runs at the same tolerances
    and of the same length.
    """
    keys = [*CONDITION, "seed"] if all_seeds else CONDITION
    known = collected.assign(**{name: collected[name].astype(float) for name in MEASURED})
    known["machine"] = known["device"].astype("string") + ", " + known["num_threads"].astype("string")
    has_cpu = (known["clock"] == "CPU").groupby([known[key] for key in keys]).transform("any")
    alike = known.groupby([name for name in CONDITION if name != "way"])
    usual = alike["machine"].transform(lambda machines: next(iter(machines.mode()), None))
    is_other = known["machine"].notna() & (known["machine"] != usual)
    known.loc[(has_cpu & (known["clock"] != "CPU")) | is_other, ["seconds", "epoch_seconds", "clock"]] = None
    groups = known.groupby(keys, sort=False)
    summary = groups.agg(
        wanted=("status", "size"),
        completed=("status", lambda status: (status == "completed").sum()),
        failed=("status", lambda status: (status == "failed").sum()),
        timed=("seconds", "count"),
        clock=("clock", "first"),
    )
    for name in MEASURED:
        summary[f"{name}_mean"], summary[f"{name}_sd"] = groups[name].mean(), groups[name].std()
    completed = known[known["status"] == "completed"]
    for (quantity, baseline), column in SAVINGS.items():
        saved = _savings(completed, keys, quantity=quantity, baseline=baseline)
        summary[[column + end for end in SAVING_ENDS]] = saved.reindex(summary.index)
    return summary.reset_index()


def _savings(completed: pandas.DataFrame, keys: list[str], *, quantity: str, baseline: str) -> pandas.DataFrame:
    """The savings of all conditions but the baseline itself, from its and their runs of equal seed, data and epochs."""
    is_baseline = completed["way"] == baseline
    shared = ["experiment", "group", "rtol", "atol", "max_epochs", "epochs", "seed", "split"]
    pairs = completed[~is_baseline].merge(completed.loc[is_baseline, [*shared, quantity]], on=shared)
    savings = {
        condition: saving(pair[f"{quantity}_x"].to_numpy(), pair[f"{quantity}_y"].to_numpy())
        for condition, pair in pairs.groupby(keys, sort=False)
    }
    index = pandas.MultiIndex.from_tuples(savings, names=keys) if savings else None
    return pandas.DataFrame(savings.values(), index=index, columns=range(len(SAVING_ENDS)), dtype=float)


def saving(costs: numpy.ndarray, baseline: numpy.ndarray) -> tuple[float, float, float, int]:
    """The share of the baseline's cost that is saved, the two ends of its interval, and the number of pairs.

    `costs` and `baseline` hold one number for each pair of runs. The share is the mean of what the pairs save, and the
    interval is Student's t about it. A single pair has no interval: its ends are NaN.
    """
    shares = 1 - costs / baseline
    middle, half = shares.mean(), half_width(shares)
    return middle, middle - half, middle + half, len(shares)


def half_width(values: numpy.ndarray) -> float:
    """Half of the interval about the mean of these values, by Student's t; NaN if there is one alone."""
    if len(values) == 1:
        return numpy.nan
    standard_error = values.std(ddof=1) / numpy.sqrt(len(values))
    return float(stdtrit(len(values) - 1, (1 + CONFIDENCE) / 2) * standard_error)
