"""Results to numbers, in pandas: a row a run, or a row a condition with what its runs have in common.

`typesetting.py` makes the tables of it, and figures and report read it too.
"""

from collections.abc import Iterable

import numpy
import pandas

from common.results import Results

from .runs import identity
from .status import Status

CONDITION = ["experiment", "rtol", "atol", "norm", "warm_start"]
"""The columns that a condition's runs share; they differ in the seed."""
MEASURED = [
    "epochs", "accuracy", "loss", "backward_nfe", "forward_nfe", "test_backward_nfe", "seconds", "epoch_seconds",
    "memory",
]  # fmt: skip
BASELINES = ("default", "per-tensor")
"""The norms that savings are against: the paper's baseline, and what torchdiffeq does today."""
SAVINGS = {
    (quantity, baseline): f"{quantity}_saving_{baseline}"
    for quantity in ("backward_nfe", "test_backward_nfe")
    for baseline in BASELINES
}
"""The columns of the savings in a summary, by what is saved and against which norm; `_low`, `_high`: interval."""
CONFIDENCE = 0.95
NUM_RESAMPLES = 10_000
RESAMPLING_SEED = 0


def collect(standing: Iterable[Status], results: Iterable[Results]) -> pandas.DataFrame:
    """One row for each run, condition by condition, from how it stands with them and from all results there are.

    The columns are those of `CONDITION`, then `seed`, `synthetic` (whether the data are the sample that is not speech),
    `status` (`completed`, `failed` or `missing`), `failure`, `MEASURED` (NFE and seconds of all training steps, loss
    and accuracy of the test set, the peak of GPU memory in bytes) and what the run was made on. `seconds` are those of
    the process on all CPU cores where `clock` is `CPU`, else (on a GPU, or in a file of schema 1) those of the wall
    clock. What was not measured is NaN. A run that was completed several times counts once, by its latest results.
    """
    standing = list(standing)
    experiments = {status.run.experiment for status in standing}
    completed = [result for result in results if result.status == "completed" and result.experiment in experiments]
    completed.sort(key=lambda result: result.start_time)
    found = {identity(result.experiment, result.config): result for result in completed}
    rows = []
    for status in standing:
        run, config = status.run, status.run.config
        row = {"experiment": run.experiment, **{name: getattr(config, name) for name in [*CONDITION[1:], "seed"]}}
        row["synthetic"] = getattr(config, "data_root", None) == "synthetic"
        if run.identity in found:
            row |= {"status": "completed", **_measured(found[run.identity])}
        elif status.state == "failed":
            row |= {"status": "failed", "failure": status.reason}
        else:
            row |= {"status": "missing"}
        rows.append(row)
    about = ["seed", "synthetic", "status", "failure"]
    made_on = ["clock", "split", "training_samples", "batch_size", "device"]
    collected = pandas.DataFrame(rows, columns=[*CONDITION, *about, *MEASURED, *made_on])
    return collected.iloc[collected.groupby(CONDITION, sort=False).ngroup().argsort(kind="stable")]


def _measured(result: Results) -> dict[str, float | str | None]:
    epochs, test, on_cpu = result.epochs, result.test_metrics, result.config["device"] == "cpu"
    clock = "CPU" if on_cpu and all(epoch.cpu_seconds is not None for epoch in epochs) else "wall"
    seconds = sum(epoch.cpu_seconds if clock == "CPU" else epoch.seconds for epoch in epochs)
    return {
        "epochs": len(epochs),
        "accuracy": test.get("accuracy"),
        "loss": test.loss,
        "backward_nfe": sum(epoch.backward_nfe for epoch in epochs),
        "forward_nfe": sum(epoch.forward_nfe for epoch in epochs),
        "test_backward_nfe": test.backward_nfe,
        "seconds": seconds,
        "epoch_seconds": seconds / len(epochs),
        "memory": result.memory_usage,
        "clock": clock,
        "split": result.provenance["split"],
        "training_samples": result.train_metrics.dataset_size,
        "batch_size": result.config["batch_size"],
        "device": result.provenance["device_name"],
    }


def summarise(collected: pandas.DataFrame, *, all_seeds: bool = False) -> pandas.DataFrame:
    """One row for each condition of `collect`'s rows (each run with `all_seeds`), in their order.

    The columns are those of `CONDITION` (and `seed`); how many runs are `wanted`, `completed` and `failed`; the `clock`
    of the seconds; `<name>_mean` and `<name>_sd` (sample standard deviation; NaN for a single run) of all `MEASURED`;
    and the `SAVINGS`, each a share with the ends of its interval in `_low` and `_high`.

    Where only some of a condition's runs have CPU seconds, the mean is over these: the two clocks do not mix.
    """
    keys = [*CONDITION, "seed"] if all_seeds else CONDITION
    known = collected.assign(**{name: collected[name].astype(float) for name in MEASURED})
    has_cpu = (known["clock"] == "CPU").groupby([known[key] for key in keys]).transform("any")
    known.loc[has_cpu & (known["clock"] != "CPU"), ["seconds", "epoch_seconds", "clock"]] = None
    groups = known.groupby(keys, sort=False)
    summary = groups.agg(
        wanted=("status", "size"),
        completed=("status", lambda status: (status == "completed").sum()),
        failed=("status", lambda status: (status == "failed").sum()),
        clock=("clock", "first"),
    )
    for name in MEASURED:
        summary[f"{name}_mean"], summary[f"{name}_sd"] = groups[name].mean(), groups[name].std()
    completed = known[known["status"] == "completed"]
    for (quantity, baseline), column in SAVINGS.items():
        saved = _savings(completed, keys, quantity=quantity, baseline=baseline)
        summary[[column, f"{column}_low", f"{column}_high"]] = saved.reindex(summary.index)
    return summary.reset_index()


def _savings(completed: pandas.DataFrame, keys: list[str], *, quantity: str, baseline: str) -> pandas.DataFrame:
    """The savings of all conditions but the baseline itself, from its and their runs of equal seed and data."""
    is_baseline = (completed["norm"] == baseline) & ~completed["warm_start"]
    shared = ["experiment", "rtol", "atol", "seed", "split"]
    pairs = completed[~is_baseline].merge(completed.loc[is_baseline, [*shared, quantity]], on=shared)
    savings = {
        condition: saving(pair[f"{quantity}_x"].to_numpy(), pair[f"{quantity}_y"].to_numpy())
        for condition, pair in pairs.groupby(keys, sort=False)
    }
    index = pandas.MultiIndex.from_tuples(savings, names=keys) if savings else None
    return pandas.DataFrame(savings.values(), index=index, columns=range(3), dtype=float)


def saving(costs: numpy.ndarray, baseline: numpy.ndarray) -> tuple[float, float, float]:
    """The share of the baseline's total cost that is saved, and the two ends of its bootstrap interval.

    `costs` and `baseline` hold one number for each pair of runs, and pairs are what is resampled. A single pair has no
    interval: its ends are NaN.
    """
    num_pairs = len(costs)
    share = 1 - costs.sum() / baseline.sum()
    if num_pairs == 1:
        return share, numpy.nan, numpy.nan
    picked = numpy.random.default_rng(RESAMPLING_SEED).integers(num_pairs, size=(NUM_RESAMPLES, num_pairs))
    shares = 1 - costs[picked].sum(axis=1) / baseline[picked].sum(axis=1)
    tail = (1 - CONFIDENCE) / 2
    low, high = numpy.quantile(shares, [tail, 1 - tail])
    return share, low, high
