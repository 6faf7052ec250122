"""Where in a solve's time finished runs evaluate, accept and reject: one more figure like those of `run_figures.py`."""

import statistics
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from common.results import Results

from .experiments import EXPERIMENTS
from .run_figures import num_batches_of
from .runs import way_of
from .style import LOOKS, WIDTH, NothingToDraw, legend_above, styled, tolerance_label

KINDS = {
    "backward_ts": "evaluations",
    "backward_accept_ts": "accepted steps",
    "backward_reject_ts": "rejected steps",
}
COUNTS = {
    "backward_ts": "backward_nfe",
    "backward_accept_ts": "backward_accepted",
    "backward_reject_ts": "backward_rejected",
}


def time_histogram(results: Sequence[Results], kind: str) -> np.ndarray:
    """How many backward times of a kind of `KINDS` a mean gradient step has in each bin, (num_bins,).

    Times are those of the first batch of every measured epoch of training, where the files have at most 256 of each.
    They give the shape; the sum is `mean_count`. Where no first batch had any the shape is not known, and all are 0.
    """
    axis = EXPERIMENTS[results[0].experiment].time_axis
    limits = (axis.start, axis.end)
    shape = np.zeros(axis.num_bins)
    for result in results:
        num_batches = num_batches_of(result)
        for entry in result.history:
            times, count = entry.train_metrics[kind], entry.train_metrics[COUNTS[kind]] / num_batches
            if times:
                counted, _ = np.histogram(np.clip(times, *limits), axis.num_bins, limits)
                shape += counted * (count / len(times))
    return shape * (mean_count(results, kind) / shape.sum()) if shape.any() else shape


def mean_count(results: Sequence[Results], kind: str) -> float:
    """How many of a kind of `KINDS` a gradient step has on average, over all batches of the measured epochs."""
    return statistics.mean(
        entry.train_metrics[COUNTS[kind]] / num_batches_of(result) for result in results for entry in result.history
    )


@styled
def solver_times(results: Sequence[Results]) -> Figure:
    """Where in time the backward solve evaluates, accepts and rejects, `default` beside `seminorm`.

    A row for each pair of tolerances, a column for each kind of `KINDS`; see `time_histogram`. The numbers above are
    those of `mean_count`.
    """
    axis = EXPERIMENTS[results[0].experiment].time_axis
    by_tolerances: dict[tuple, dict[str, list[Results]]] = {}
    for result in results:
        norms = by_tolerances.setdefault((result.config["rtol"], result.config["atol"]), {})
        norms.setdefault(way_of(result.config), []).append(result)
    rows = [(pair, by_norm) for pair, by_norm in by_tolerances.items() if {"default", "seminorm"} <= set(by_norm)]
    if not rows:
        raise NothingToDraw(
            f"There is no pair of completed runs of {results[0].experiment} with the norms default and seminorm at the "
            "same tolerances: make the one that is missing."
        )
    rows.sort(key=lambda row: row[0], reverse=True)
    figure = Figure(figsize=(WIDTH, 0.6 + 1.9 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(KINDS), squeeze=False, sharex=True)
    edges = np.linspace(axis.start, axis.end, axis.num_bins + 1)
    per_unit = axis.unit / (edges[1] - edges[0])
    for row, (tolerances, by_norm) in zip(axes, rows, strict=True):
        for ax, (kind, name) in zip(row, KINDS.items(), strict=True):
            totals = []
            for norm in ("default", "seminorm"):
                histogram = time_histogram(by_norm[norm], kind)
                total = mean_count(by_norm[norm], kind)
                totals.append(f"{norm} {total:,.0f}" if total == 0 or total >= 10 else f"{norm} {total:.1f}")
                look = LOOKS[norm]
                if norm == "default":
                    ax.stairs(histogram * per_unit, edges, color=look.color, fill=True, alpha=0.15)
                style = dict(color=look.color, linestyle=look.linestyle, linewidth=1.2)
                ax.stairs(histogram * per_unit, edges, baseline=None, label=norm, **style)
            ax.set_title(f"{name}\n{', '.join(totals)}")
            ax.set(xlim=(axis.start, axis.end), ylim=(0, None if ax.dataLim.ymax > 0 else 1))
        row[0].set_ylabel(f"{tolerance_label(*tolerances)}\nper {axis.unit_name}")
    for ax in axes[-1]:
        ax.set_xlabel(axis.label)
    legend_above(figure, axes[0, :1])
    return figure
