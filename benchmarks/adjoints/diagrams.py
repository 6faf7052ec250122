"""Work-precision diagrams: the error of the gradient against the CPU seconds of a step, a curve for each way."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from reproduction.style import GREY, styled

from .contract import Problem
from .fronts import Point, library_of
from .references import TRUSTED

COLORS = {
    "interpolated": "#009E73",
    "warm start": "#E69F00",
    "seminorm": "#D55E00",
    "default": "#0072B2",
    "per-tensor": "#56B4E9",
    "adjoint": "#56B4E9",
    "backsolve": "#0072B2",
    "all stages kept": "#CC79A7",
    "one stage": "#8C6BB1",
    "direct": "#999999",
}
"""By the first of these words in a way's name; that of the steps' own gradient is black."""
MARKERS = {"ours": "o", "torchdiffeq": "s", "diffrax": "^", "torchode": "D", "interpolated": "P"}
LINES = {"tsit5": (0, (4, 2)), "dopri8": (0, (1, 1.2)), "bosh3": (0, (6, 1.5, 1, 1.5))}
"""By the method in a way's name; dopri5 is drawn through."""
LEAST, MOST = 1e-12, 10.0
"""Errors outside are not drawn."""


def color_of(way: str) -> str:
    """How a way differentiates, as a colour."""
    return next((color for word, color in COLORS.items() if word in way), "#000000")


@styled
def work_precision(problem: Problem, curves: Mapping[str, Sequence[Point]], agreement: float) -> Figure:
    """The diagram of one problem."""
    figure = Figure(figsize=(7.0, 3.9), layout="constrained")
    axes = figure.subplots()
    for way, points in curves.items():
        drawn = [point for point in points if LEAST < point.error < MOST]
        if drawn:
            axes.plot(
                [point.error for point in drawn],
                [point.seconds for point in drawn],
                color=color_of(way),
                linestyle=next((line for method, line in LINES.items() if method in way), "-"),
                marker=MARKERS.get(library_of(way), "x"),
                markerfacecolor="white" if "compiled" in way else color_of(way),
                linewidth=1.1,
                label=way,
            )
    axes.set(
        xscale="log", yscale="log", xlabel="relative error of the gradient", ylabel="CPU seconds of a gradient step"
    )
    axes.set_title(problem.title)
    axes.invert_xaxis()
    exact, inexact = sorted(axes.get_xlim())
    if exact < TRUSTED * agreement:
        axes.axvspan(exact, TRUSTED * agreement, color=GREY, alpha=0.15, linewidth=0)
        axes.set_xlim(inexact, exact)
    figure.legend(loc="outside right center", fontsize=6.5, handlelength=4.0)
    return figure
