"""Figures of finished runs: evaluations and learning, by epoch and over the tolerances.

Each takes the results of any number of runs of one experiment, as `comparable` gives them, and returns a matplotlib
figure, which `style.render` turns into bytes. `figures.py` writes them to files, a report may put them on its page.
"""

import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence

import pandas
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from common.results import Results

from .evidence import INCIDENTAL, PAIRED
from .experiments import EXPERIMENTS
from .runs import way_of, whole_config
from .style import (
    GREY,
    LOOKS,
    UNWEIGHED,
    WIDTH,
    Look,
    NothingToDraw,
    count_axis,
    legend_above,
    looks_of,
    styled,
    tolerance_axis,
    tolerance_label,
)

logger = logging.getLogger(__name__)

MAY_DIFFER = {*PAIRED, *INCIDENTAL, "metric_interval"} - {"method"}
"""Settings in which runs of one figure may differ; what data there were is told by the digest of the split."""
TOLERANCES = ["rtol", "atol"]


def comparable(results: Iterable[Results], experiment: str, group: str = "") -> list[Results]:
    """The completed runs of a group that belong in one figure; a warning goes to the log for those left out.

    They have the same data, model and batches, and are those which saw the most samples in all. At one pair of
    tolerances they have the same `max_epochs`, that of most runs beside which there is the norm default, and among
    equals the largest. Of several results of one run the latest count, as in the tables.
    """
    group_of = EXPERIMENTS[experiment].group
    mine = [
        result
        for result in results
        if result.experiment == experiment and group_of(whole_config(experiment, result.config)) == group
    ]
    completed = [result for result in mine if result.status == "completed"]
    groups: dict[str, list[Results]] = {}
    for result in completed:
        whole = whole_config(experiment, result.config)
        settings = {name: value for name, value in whole.items() if name not in MAY_DIFFER}
        groups.setdefault(json.dumps([settings, result.provenance["split"]], sort_keys=True), []).append(result)
    if not groups:
        card = EXPERIMENTS[experiment]
        raise NothingToDraw(
            f"There is no completed run of {card.title_of(group)}: make one by `python {experiment}.py --device cpu "
            f"--norm seminorm{card.options_of(group)}`, or all by `python tables.py run cpu`."
        )
    chosen = max(
        map(_of_one_length, groups.values()),
        key=lambda runs: sum(len(run.epochs) * run.train_metrics.dataset_size for run in runs),
    )
    if len(mine) > len(chosen):
        logger.warning(
            "%d of %d runs of %s are not drawn: unfinished, repeated, or of another length, other data, models, "
            "methods or batches.",
            len(mine) - len(chosen), len(mine), EXPERIMENTS[experiment].title_of(group),
        )  # fmt: skip
    return chosen


def _of_one_length(results: Iterable[Results]) -> list[Results]:
    """Those of one `max_epochs` at each pair of tolerances, each once; see `comparable`."""
    by_pair: dict[tuple, dict[int, dict[tuple, Results]]] = {}
    for result in sorted(results, key=lambda result: result.start_time):
        config = result.config
        lengths = by_pair.setdefault((config["rtol"], config["atol"]), {})
        lengths.setdefault(config["max_epochs"], {})[way_of(config), config["seed"]] = result

    def merit(length: tuple[int, dict[tuple, Results]]) -> tuple[bool, int, int]:
        max_epochs, runs = length
        return any(way == "default" for way, _ in runs), len(runs), max_epochs

    return [run for lengths in by_pair.values() for run in max(lengths.items(), key=merit)[1].values()]


def epoch_table(results: Sequence[Results]) -> pandas.DataFrame:
    """One row for each epoch of each run: its condition, the NFE of a mean gradient step, losses and accuracies.

    What was not measured in an epoch is NaN.
    """
    rows = []
    for result in results:
        measured = {entry.epoch: entry.val_metrics for entry in result.history}
        num_batches = num_batches_of(result)
        for epoch in result.epochs:
            row = {name: result.config[name] for name in (*TOLERANCES, "seed")} | {"norm": way_of(result.config)}
            row |= {"epoch": epoch.epoch, "train loss": epoch.loss}
            row |= {f"{way}_nfe": epoch[f"{way}_nfe"] / num_batches for way in ("forward", "backward")}
            if epoch.epoch in measured:
                row["validation loss"] = measured[epoch.epoch].loss
            if "accuracy" in epoch:
                row["train accuracy"] = epoch.accuracy
                if epoch.epoch in measured:
                    row["validation accuracy"] = measured[epoch.epoch].accuracy
            rows.append(row)
    return pandas.DataFrame(rows)


@styled
def backward_nfe(results: Sequence[Results]) -> Figure:
    """Backward NFE of a mean gradient step against the epoch: a panel for each pair of tolerances, a line a norm.

    Lines are means over the seeds, bands go from the least to the most.
    """
    table = epoch_table(results)
    looks = looks_of(table["norm"])
    panels = sorted(table.groupby(TOLERANCES), key=lambda panel: panel[0], reverse=True)
    figure = Figure(figsize=(_width(len(panels)), 2.8), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, (tolerances, part) in zip(axes, panels, strict=True):
        _draw_bands(ax, part, "backward_nfe", looks)
        _draw_forward(ax, part)
        ax.set(title=_title(tolerances, part), xlabel="epoch", ylim=(0, None))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].set_ylabel("backward NFE per gradient step")
    legend_above(figure, axes)
    return figure


@styled
def learning(results: Sequence[Results]) -> Figure:
    """Loss, and accuracy if there is one, against the epoch: a column for each pair of tolerances, a line a norm.

    Lines are means over the seeds on the validation data, bands go from the least to the most. Thin lines without
    markers are means of the training steps.
    """
    table = epoch_table(results)
    looks = looks_of(table["norm"])
    quantities = [name for name in ("accuracy", "loss") if f"validation {name}" in table]
    panels = sorted(table.groupby(TOLERANCES), key=lambda panel: panel[0], reverse=True)
    size = (_width(len(panels)), 0.6 + 2.1 * len(quantities))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(quantities), len(panels), squeeze=False, sharex="col", sharey="row")
    for row, quantity in zip(axes, quantities, strict=True):
        for ax, (tolerances, part) in zip(row, panels, strict=True):
            _draw_bands(ax, part, f"validation {quantity}", looks)
            for norm, look in looks.items():
                training = part[part["norm"] == norm].groupby("epoch")[f"train {quantity}"].mean()
                if training.empty:
                    continue
                ax.plot(training.index, training, color=look.color, linestyle=look.linestyle, linewidth=0.6)
            if ax in axes[0]:
                ax.set_title(_title(tolerances, part))
            if ax in axes[-1]:
                ax.set_xlabel("epoch")
                ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        if quantity == "loss":
            # A log-likelihood is a logarithm already, and of either sign.
            if results[0].test_metrics.keys().isdisjoint({"nll", "bits_per_dim"}):
                row[0].set_yscale("log")
        else:
            row[0].set_ylim(0, 1)
            row[0].yaxis.set_major_formatter(PercentFormatter(1.0))
        row[0].set_ylabel(quantity)
    axes[0, 0].plot([], color=GREY, marker="o", label="validation")
    axes[0, 0].plot([], color=GREY, linewidth=0.6, label="training")
    legend_above(figure, axes[0])
    return figure


@styled
def nfe_by_tolerance(results: Sequence[Results]) -> Figure:
    """Backward NFE against the tolerance, and as a multiple of the seminorm's: a line a norm, points for seeds.

    The NFE are those of a mean gradient step over the first epochs, as many as every run has. Of several absolute
    tolerances at one relative one that of most runs is drawn, and among equals the largest.
    """
    table = _of_one_atol(epoch_table(results))
    if table["rtol"].nunique() < 2:
        raise NothingToDraw(
            f"The runs of {results[0].experiment} have one pair of tolerances: make some with others, "
            "by `python tables.py run cpu` or `--rtol` and `--atol`."
        )
    num_epochs = table.groupby([*TOLERANCES, "norm", "seed"])["epoch"].max().min()
    table = table[table["epoch"] <= num_epochs]
    means = table.groupby(["norm", "rtol", "seed"])["backward_nfe"].mean()
    figure = Figure(figsize=(WIDTH, 2.8), layout="constrained")
    axes = figure.subplots(1, 2)
    for norm, look in looks_of(table["norm"]).items():
        seeds = means[norm].reset_index()
        line = means[norm].groupby("rtol").mean()
        style = dict(color=look.color, marker=look.marker, linestyle=look.linestyle, linewidth=look.linewidth)
        axes[0].plot(line.index, line, label=norm, **style)
        axes[0].scatter(seeds["rtol"], seeds["backward_nfe"], s=5, color=look.color, alpha=0.5, linewidths=0)
        if "seminorm" in means:
            ratio = line / means["seminorm"].groupby("rtol").mean()
            axes[1].plot(ratio.index, ratio, **style)
    count_axis(axes[0].yaxis)
    axes[0].set(ylabel=f"backward NFE per gradient step\n(epochs 1 to {num_epochs})")
    axes[1].set(ylabel="times the seminorm's", ylim=(0, None))
    for ax in axes:
        tolerance_axis(ax, table["rtol"])
    legend_above(figure, [axes[0]])
    return figure


def _of_one_atol(table: pandas.DataFrame) -> pandas.DataFrame:
    num_runs = table.drop_duplicates([*TOLERANCES, "norm", "seed"]).groupby(TOLERANCES).size()
    chosen = {}
    for (rtol, atol), number in num_runs.items():
        chosen[rtol] = max(chosen.get(rtol, (0, 0.0)), (number, atol))
    return table[table["atol"] == table["rtol"].map({rtol: atol for rtol, (_, atol) in chosen.items()})]


def _draw_bands(ax, table: pandas.DataFrame, quantity: str, looks: Mapping[str, Look]) -> None:
    """A line for each norm: the mean over the seeds, in a band from the least to the most."""
    for norm, look in looks.items():
        runs = table[table["norm"] == norm].dropna(subset=quantity)
        if runs.empty:
            continue
        by_epoch = runs.groupby("epoch")[quantity].agg(["mean", "min", "max"])
        ax.fill_between(by_epoch.index, by_epoch["min"], by_epoch["max"], color=look.color, alpha=0.2, linewidth=0)
        ax.plot(
            by_epoch.index, by_epoch["mean"], color=look.color, linestyle=look.linestyle, linewidth=look.linewidth,
            marker=look.marker, markevery=max(1, len(by_epoch) // 8), label=norm,
        )  # fmt: skip


def _draw_forward(ax, table: pandas.DataFrame) -> None:
    """The forward solve, the same for all norms; but not where it does not weigh integrals."""
    is_unweighed = table["norm"] == UNWEIGHED
    dotted = dict(linewidth=0.9, linestyle=(0, (1, 1.5)))
    for rows, color, which in (
        (table[~is_unweighed], GREY, "all norms"),
        (table[is_unweighed], LOOKS[UNWEIGHED].color, "unweighed"),
    ):
        if len(rows):
            forward = rows.groupby("epoch")["forward_nfe"].mean()
            ax.plot(forward.index, forward, color=color, label=f"forward ({which})", **dotted)


def num_batches_of(result: Results) -> int:
    """How many batches an epoch of a completed run has."""
    return math.ceil(result.train_metrics.dataset_size / result.config["batch_size"])


def _title(tolerances: tuple[float, float], table: pandas.DataFrame) -> str:
    numbers = sorted(set(table.groupby("norm")["seed"].nunique()))
    seeds = f"{numbers[0]} to {numbers[-1]} seeds" if len(numbers) > 1 else f"{numbers[0]} seed{'s'[: numbers[0] - 1]}"
    return f"{tolerance_label(*tolerances)} ({seeds})"


def _width(num_panels: int) -> float:
    return WIDTH if num_panels > 1 else 0.7 * WIDTH
