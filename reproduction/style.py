"""How every figure looks, and how it becomes a file or part of a page; the figure modules and the report use it.

The colours are Okabe and Ito's, told apart by colour-blind readers. In the figures of this package a norm has its own
colour, line and marker; what is no norm may have that colour where no norm is drawn. Nothing here touches matplotlib's
global state.
"""

import io
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter
from PIL import Image

WIDTH = 7.0
"""Inches of a figure that spans a page's text."""
LEGEND_COLUMN = 1.4
"""Inches that an entry of a legend takes; one of more than `LONG_LABEL` characters 1.7 times as many."""
LONG_LABEL = 25
GREY = "#666666"

styled = matplotlib.rc_context(
    {
        "font.family": "DejaVu Sans",  # comes with matplotlib, so that figures are the same everywhere
        "font.size": 8,
        "axes.titlesize": 8,
        "axes.labelsize": 8,
        "legend.fontsize": 8,
        "xtick.labelsize": 7,
        "ytick.labelsize": 7,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.6,
        "xtick.major.width": 0.6,
        "ytick.major.width": 0.6,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": "#e6e6e6",
        "grid.linewidth": 0.5,
        "lines.linewidth": 1.4,
        "lines.markersize": 3.5,
        "legend.frameon": False,
        "legend.handlelength": 3.0,
        "mathtext.fontset": "dejavusans",
    }
)
"""Decorates functions that draw."""


class NothingToDraw(ValueError):
    """A figure lacks what it is made from; the message says which run or measurement to make."""


@dataclass(frozen=True)
class Look:
    """How something is drawn in all figures."""

    color: str
    linestyle: str | tuple = "-"
    marker: str = "o"
    linewidth: float = 1.4


UNWEIGHED = "seminorm, integrals unweighed"
LOOKS = {
    "default": Look("#0072B2", "-", "o", 2.0),
    "per-tensor": Look("#009E73", (0, (6, 1.5, 1.5, 1.5)), "^"),
    "as-published": Look("#CC79A7", (0, (1, 1)), "D", 1.8),
    "seminorm": Look("#D55E00", (0, (4, 2)), "s"),
    "seminorm, warm start": Look("#D55E00", (0, (1, 2)), "P"),
    "seminorm, integrals backward": Look("#7B3F9E", (0, (3, 1)), "X"),
    UNWEIGHED: Look("#7B3F9E", (0, (5, 1, 1, 1)), "*"),
    "discrete": Look("#000000", (0, (8, 2)), "v", 1.0),
    "discrete, bosh3": Look("#E69F00", (0, (2, 1, 1, 1)), "p"),
}
"""By how a run differentiates, in the order of legends. The first is the widest: others may lie exactly on it."""
OTHER_COLORS = ("#8C8C8C", "#A6761D", "#4D7A8C", "#B3B300")
"""Of ways without a look of their own, in turn."""


def looks_of(ways: Iterable[str]) -> dict[str, Look]:
    """How these are drawn, in the order of legends; those that have no look of their own come last."""
    present = set(ways)
    others = sorted(present - LOOKS.keys())
    return {way: look for way, look in LOOKS.items() if way in present} | {
        way: Look(color, (0, (3, 1, 1, 1)), "d") for way, color in zip(others, itertools.cycle(OTHER_COLORS))
    }


BLOCK_LOOKS = {
    "z": Look("#56B4E9", marker="o"),
    "a_z": Look("#555555", marker="x"),
    "a_theta": Look("#E69F00", marker="s"),
    "a_t": Look("#F0E442", marker="^"),
}
BLOCK_LABELS = {"z": "$z$", "a_z": "$a_z$", "a_theta": r"$a_\theta$", "a_t": "$a_t$"}


def power(value: float) -> str:
    """A number for a label, powers of ten as such."""
    mantissa, exponent = f"{value:.3e}".split("e")
    if float(mantissa) == 1.0:
        return f"$10^{{{int(exponent)}}}$"
    return f"{value:g}"


def count_axis(axis: Axis) -> None:
    """Makes a logarithmic axis of counts: its ticks at 1, 2 and 5 times powers of ten, written out."""
    _logarithmic(axis, (1, 2, 5), "{x:,.0f}")


def ratio_axis(axis: Axis) -> None:
    """Makes a logarithmic axis of numbers that lie close together: the ticks are the closer the shorter it is."""
    low, high = axis.get_data_interval()
    wanted = [(3, (1, 1.5, 2, 3, 5, 7)), (10, (1, 2, 5)), (100, (1, 3)), (np.inf, (1,))]
    _logarithmic(axis, next(subs for most, subs in wanted if high <= most * low), "{x:,g}")


def _logarithmic(axis: Axis, subs: Sequence[float], shown: str) -> None:
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(StrMethodFormatter(shown))


def tolerance_axis(axes: Axes, rtols: Iterable[float]) -> None:
    """Makes the x axis one of relative tolerances, with a tick at each; smaller ones lie to the right."""
    axes.set(xscale="log", xlabel="relative tolerance")
    axes.set_xticks(sorted(set(rtols)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.invert_xaxis()


def tolerance_label(rtol: float, atol: float) -> str:
    """A pair of tolerances for a title."""
    return f"rtol {power(rtol)}, atol {power(atol)}"


def legend_above(figure: Figure, axes: Sequence[Axes]) -> None:
    """One legend above all panels, of each label in `axes` once, in the order of `LOOKS` and then of drawing."""
    found = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    order = [*(name for name in LOOKS if name in found), *(name for name in found if name not in LOOKS)]
    column = LEGEND_COLUMN * (1.7 if max(map(len, order)) > LONG_LABEL else 1)
    ncols = min(len(order), int(figure.get_figwidth() / column))
    figure.legend([found[label] for label in order], order, loc="outside upper center", ncols=ncols)


@matplotlib.rc_context({"pdf.fonttype": 42, "svg.hashsalt": "seminorm", "svg.fonttype": "path"})
def render(figure: Figure, kind: str) -> bytes:
    """The figure as a `png`, `pdf` (vectors, with its fonts) or `svg` file; the same bytes for the same figure."""
    buffer = io.BytesIO()
    # Dates and versions would make the bytes differ from one day to the next.
    metadata = {"png": {"Software": None}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}[kind]
    figure.savefig(buffer, format=kind, dpi=200, metadata=metadata)
    return buffer.getvalue()


def gif(figure: Figure, draw: Callable[[int], None], milliseconds: Mapping[int, int]) -> bytes:
    """A GIF file that plays forever: what `draw` puts on the empty figure for each of these numbers, for so long."""
    canvas = FigureCanvasAgg(figure)
    frames = []
    for number in milliseconds:
        figure.clear()
        draw(number)
        canvas.draw()
        frames.append(Image.fromarray(np.array(canvas.buffer_rgba())[..., :3]).quantize(32))
    buffer = io.BytesIO()
    durations = list(milliseconds.values())
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)
    return buffer.getvalue()
