"""Figures of the law behind the saving and of what is saved at equal error, by `law.py` and `equal_error.py`.

Each takes what `diagnostic_figures.read` returns and gives a matplotlib figure, as those of that module do.
"""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from .collapse import CHOSEN, QUANTITIES, Curve, measured_savings, of_z_alone, points, spreads
from .diagnostic_figures import Records
from .experiments import EXPERIMENTS
from .fair_saving import Fair, compare, name_of
from .style import GREY, LOOKS, WIDTH, Look, legend_above, power, ratio_axis, styled

TITLES = {name: card.short_title for name, card in EXPERIMENTS.items()} | {"neural_ode": "network of 16 channels"}
DRAWN = ("default", "seminorm")
"""The norms of the figure of the law; `per-tensor` lies above `default`."""
HOLLOW = ", bosh3"
"""What the name of a way ends with if its markers are hollow."""


@styled
def law(records: Records, predictions: Records) -> Figure:
    """Backward NFE over those of z alone, against the loss scale and against what it depends on; and the saving.

    A column for each model. Above a line is one case at one absolute tolerance. In the middle the same points lie
    against the adjoint's size over atol, with the curve that predictions are made by. Below is what the seminorm saves,
    with the further settings: predicted before they were measured (rings), and measured (dots).
    """
    figure = Figure(figsize=(WIDTH, 6.6), layout="constrained")
    axes = figure.subplots(3, len(records), squeeze=False)
    for (raw, collapsed, shares), (model, record) in zip(axes.T, records.items(), strict=True):
        cases = record["cases"]
        for norm in DRAWN:
            _draw_lines(raw, cases, norm)
            _draw_points(collapsed, cases, norm)
        spread = {norm: spreads(cases, norm) for norm in DRAWN}
        raw.set(title=f"{TITLES[model]}\nrtol {power(record['rtol'])}", xscale="log", xlabel="factor on the loss")
        texts = [
            f"{norm}: {spread[norm]['nothing']:.0%} to {spread[norm][CHOSEN[norm]]:.0%}".replace("%", " %")
            for norm in DRAWN
        ]
        collapsed.set(title="\n".join(["spread: constant, curve", *texts]), xscale="log")
        collapsed.set_xlabel(r"RMS of $a_\theta$ or $a_z$ / atol")
        _draw_savings(shares, cases, predictions.get(model, {}).get("settings", ()))
    axes[0, 0].set_ylabel("backward NFE /\nthose of $z$ alone")
    axes[1, 0].set_ylabel("backward NFE /\nthose of $z$ alone")
    axes[2, 0].set_ylabel("saved by the seminorm")
    figure.align_ylabels(axes[:, 0])
    legend_above(figure, [*axes[0, :1], *axes[2]])
    return figure


def _draw_lines(ax: Axes, cases: Sequence[Mapping[str, Any]], norm: str) -> None:
    look = LOOKS[norm]
    for case in cases:
        table = pandas.DataFrame([row for row in case["rows"] if row["norm"] == norm])
        for atol, rows in table.groupby("atol"):
            nfe = rows["backward_nfe"] / of_z_alone(case, atol)
            ax.plot(rows["loss_scale"], nfe, color=look.color, linestyle=look.linestyle, linewidth=0.7, label=norm)


def _draw_points(ax: Axes, cases: Sequence[Mapping[str, Any]], norm: str) -> None:
    look = LOOKS[norm]
    quantity, nfe = points(cases, norm, CHOSEN[norm])
    ax.plot(quantity, nfe, color=look.color, marker=look.marker, markersize=2.2, linestyle="")
    where = np.geomspace(quantity.min(), quantity.max(), 200)
    ax.plot(where, Curve(quantity, nfe)(where), color=look.color, linestyle=look.linestyle, linewidth=1.0)


def _draw_savings(ax: Axes, cases: Sequence[Mapping[str, Any]], settings: Sequence[Mapping[str, Any]]) -> None:
    quantity = QUANTITIES[CHOSEN["default"]]
    of_grid = [
        (quantity(case, {"loss_scale": loss_scale, "atol": atol}), share)
        for case in cases
        for (loss_scale, atol), share in measured_savings(case).items()
    ]
    ax.plot(*zip(*of_grid, strict=True), color=GREY, marker="x", markersize=2.5, linestyle="", label="grid")
    for setting in settings:
        where = quantity(setting, setting)
        if "measured_saving" in setting:
            ends = [setting["predicted_saving"], setting["measured_saving"]]
            ax.plot([where, where], ends, color="black", linewidth=0.7)
            ax.plot(where, ends[1], color="black", marker="o", linestyle="", label="further, measured")
        own = dict(color="black", marker="o", markerfacecolor="white", linestyle="", label="further, predicted")
        ax.plot(where, setting["predicted_saving"], **own)
    ax.set(xscale="log", xlabel=r"RMS of $a_\theta$ / atol")
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))


@styled
def equal_error(records: Records) -> Figure:
    """Error of the gradient against evaluations and CPU seconds, and the cost of each way at equal error.

    A row for each experiment. To the left, a line is a way and its points are tolerances: geometric means over batches
    and weights; filled with dopri5, hollow with bosh3. To the right, the evaluations over those that `default` with
    dopri5 needs for the same error, with 95 % intervals: left of the line a way saves. A way's tolerances lie one below
    the other, the loosest on top; an arrow points where a bound leaves it open.
    """
    figure = Figure(figsize=(WIDTH, 3.2 * len(records)), layout="constrained")
    axes = figure.subplots(len(records), 3, squeeze=False, gridspec_kw={"width_ratios": (1.0, 1.0, 1.1)})
    for (by_nfe, by_seconds, ratios), (experiment, record) in zip(axes, records.items(), strict=True):
        table = pandas.DataFrame(record["rows"])
        table["nfe"] = table["forward_nfe"] + table["backward_nfe"]
        table["way"] = [name_of(row) for row in record["rows"]]
        means = np.exp(
            np.log(table.set_index(["way", "rtol"])[["nfe", "cpu_seconds", "error"]])
            .groupby(level=[0, 1], sort=False)
            .mean()
        )
        for way, line in means.groupby(level=0, sort=False):
            look, fill, name = _look_of(way)
            style = dict(color=look.color, linestyle=look.linestyle, marker=look.marker, linewidth=0.9, **fill)
            by_nfe.plot(line["nfe"], line["error"], label=None if fill else name, **style)
            by_seconds.plot(line["cpu_seconds"], line["error"], **style)
        by_nfe.set(xlabel="NFE, forward and backward", ylabel="relative error of the gradient")
        by_nfe.set_title(TITLES[experiment], loc="left")
        by_seconds.set_xlabel("CPU seconds of a gradient")
        for axis in (by_nfe.xaxis, by_seconds.xaxis, by_nfe.yaxis, by_seconds.yaxis):
            ratio_axis(axis)
        _draw_ratios(ratios, compare(record["rows"], "nfe"))
    legend_above(figure, axes[:, 0])
    return figure


def _look_of(way: str) -> tuple[Look, dict[str, str], str]:
    """How a way is drawn, markers of bosh3 hollow, and its name but for that."""
    name = way.removesuffix(HOLLOW)
    return LOOKS[name], {} if name == way else {"markerfacecolor": "white"}, name


def _draw_ratios(ax: Axes, found: Sequence[Fair]) -> None:
    ways = list(dict.fromkeys(fair.way for fair in found if fair.way != "default"))
    for row, way in enumerate(ways):
        look, fill, _ = _look_of(way)
        of_way = sorted((fair for fair in found if fair.way == way), key=lambda fair: -fair.rtol)
        for place, fair in zip(row + np.linspace(-0.3, 0.3, len(of_way) + 2)[1:-1], of_way, strict=True):
            ratio = fair.at_equal_error
            ends = [end for end in (ratio.low, ratio.middle, ratio.high) if np.isfinite(end)]
            ax.plot(ends, [place] * len(ends), color=look.color, linewidth=0.9)
            ax.plot(ratio.middle, place, color=look.color, marker=look.marker, markersize=3.0, linestyle="", **fill)
            for end, share in ((ratio.low, 0.85), (ratio.high, 1 / 0.85)):
                if np.isinf(end):
                    arrow = dict(arrowstyle="->", color=look.color, linewidth=0.9, shrinkA=0, shrinkB=0)
                    ax.annotate("", (share * ratio.middle, place), (ratio.middle, place), arrowprops=arrow)
    ax.axvline(1.0, color=GREY, linewidth=0.8)
    ax.set_xlabel("NFE over default's, same error")
    ratio_axis(ax.xaxis)
    ax.set_yticks(range(len(ways)), [textwrap.fill(way, 18) for way in ways], fontsize=6)
    ax.invert_yaxis()
