"""Figures of the measurements in results/diagnostics: exactness of gradients, what drives the steps, acrobot's control.

Each takes what `read` returns and gives a matplotlib figure, which `style.render` turns into bytes. `figures.py` writes
them to files, a report may put them on its page.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .experiments import EXPERIMENTS
from .measurements import path_of, read_record
from .style import (
    BLOCK_LABELS,
    BLOCK_LOOKS,
    GREY,
    LOOKS,
    WIDTH,
    NothingToDraw,
    count_axis,
    gif,
    legend_above,
    power,
    styled,
    tolerance_axis,
    tolerance_label,
)

LEAST_OVER_REFERENCE = 99.0
"""By how much a tolerance must exceed the reference's: two decades, but for rounding."""
TIME_STEP = 0.05
"""Seconds from one row of the motion to the next."""
FRAMES = range(0, 181, 20)
STEPS_PER_IMAGE = 2
"""Steps of the motion from one image of the animation to the next."""
TORQUE_BOUND = 15.0
"""Newton metres: what the environment clips torques to."""
JOINT_COLORS = ("#56B4E9", "#E69F00")

Records = Mapping[str, Mapping[str, Any]]
"""A measurement, by experiment."""


def read(
    results_dir: str, measurement: str, names: Iterable[str] = EXPERIMENTS, command: str = "reproduction.diagnostics"
) -> Records:
    """The measurement of every experiment, or whatever else `names` are, that has it; `command` is what makes it.

    Raises:
        NothingToDraw: if none has, or a file is damaged.
    """
    selection = f" --measurements {measurement}" if command == "reproduction.diagnostics" else ""
    remedy = f"`python -m {command} --results-dir {results_dir}{selection}`"
    paths = {name: path_of(results_dir, measurement, name) for name in names}
    records = read_all(paths, HOLDS.get(measurement, "rows"), remedy)
    if not records:
        where = Path(results_dir, "diagnostics")
        raise NothingToDraw(f"There is no {measurement}-*.json in {where}: make it by {remedy}.")
    return records


HOLDS = {"step_errors": "steps", "control": "motion", "law": "cases", "law_predictions": "settings"}
"""What a file of a measurement must have, where that is not `rows`."""


def read_all(paths: Mapping[str, Path], holds: str, remedy: str) -> dict[str, dict[str, Any]]:
    """What these files hold, as far as they are there; `holds` must be in each, and `remedy` makes one.

    Raises:
        NothingToDraw: if a file is damaged.
    """
    records = {}
    for name, path in paths.items():
        try:
            record = read_record(path)
        except ValueError as error:
            raise NothingToDraw(f"{error}, by {remedy}.") from error
        if record is None:
            continue
        if not isinstance(record, dict) or holds not in record:
            raise NothingToDraw(f"{path} has no {holds!r}: move it away, and measure it again by {remedy}.")
        records[name] = record
    return records


@styled
def gradient_errors(records: Records) -> Figure:
    """Error of the gradient against its cost, and backward NFE against the tolerance; a column for each experiment.

    A line is a norm, its points are the tolerances: medians over the batches, with bars from the least to the most.
    Errors are drawn at tolerances at least two decades from the reference's.
    """
    figure, axes = _columns(records, height=5.2, num_rows=2)
    for (error_axes, nfe_axes), (experiment, record) in zip(axes.T, records.items(), strict=True):
        table = pandas.DataFrame(record["rows"])
        table["nfe"] = table["forward_nfe"] + table["backward_nfe"]
        for norm, look in LOOKS.items():
            by_tolerance = table[table["adjoint"] == norm].groupby("rtol")[["nfe", "backward_nfe", "error"]]
            if not len(by_tolerance):
                continue
            middle = by_tolerance.median()
            below, above = middle - by_tolerance.min(), by_tolerance.max() - middle
            style = dict(color=look.color, linestyle=look.linestyle, marker=look.marker, linewidth=look.linewidth)
            bars = dict(label=norm, elinewidth=0.7, **style)
            known = middle.index >= LEAST_OVER_REFERENCE * record["reference"][0]
            ends = [below["error"][known], above["error"][known]]
            error_axes.errorbar(middle["nfe"][known], middle["error"][known], yerr=ends, **bars)
            nfe_axes.plot(middle.index, middle["backward_nfe"], **style)
        error_axes.set(title=EXPERIMENTS[experiment].short_title, yscale="log", xlabel="NFE, forward and backward")
        count_axis(error_axes.xaxis)
        count_axis(nfe_axes.yaxis)
        tolerance_axis(nfe_axes, table["rtol"])
    axes[0, 0].set_ylabel("relative error of the gradient")
    axes[1, 0].set_ylabel("backward NFE")
    legend_above(figure, axes[0])
    return figure


@styled
def step_errors(records: Records) -> Figure:
    """Which part of the adjoint's state drives the steps of the norm `default`; a column for each experiment.

    Above: every attempted step's error over its tolerance, for z, a_z, a_theta and, if the field depends on time, a_t;
    the largest sets the next step, and above 1 (the line) a step is rejected. In the middle: sizes of steps, beside
    those of the seminorm. Below: the share of the attempted steps in which each is the largest, over the tolerances.
    """
    figure, axes = _columns(records, height=6.4, num_rows=3, height_ratios=(1.3, 0.8, 0.6))
    for (errors, sizes, shares), (experiment, record) in zip(axes.T, records.items(), strict=True):
        steps = {norm: pandas.DataFrame(columns) for norm, columns in record["steps"].items()}
        dots = dict(linestyle="", markersize=1.8)
        for name, look in BLOCK_LOOKS.items():
            if name not in steps["default"] or not steps["default"][name].any():
                continue  # a_t of a field that does not depend on t
            values = steps["default"][name]
            errors.plot(
                steps["default"]["t0"], values, color=look.color, marker=look.marker, label=BLOCK_LABELS[name], **dots
            )
        errors.axhline(1.0, color=GREY, linewidth=0.8)
        tolerances = tolerance_label(record["rtol"], record["atol"])
        errors.set(title=f"{EXPERIMENTS[experiment].short_title}\n{tolerances}", yscale="log")
        errors.sharex(sizes)
        errors.tick_params(labelbottom=False)
        for norm, taken in steps.items():
            look = LOOKS[norm]
            length = (taken["t0"] - taken["t1"]).abs()
            # Larger below, as the seminorm may take the very same steps.
            dots["markersize"] = 3.2 if norm == "default" else 1.6
            sizes.plot(taken["t0"], length, color=look.color, marker=look.marker, label=norm, **dots)
        sizes.set_title(", ".join(f"{norm} {len(taken)}" for norm, taken in steps.items()) + " steps")
        sizes.set(xlabel=EXPERIMENTS[experiment].time_axis.label, ylim=(0, None))
        _draw_shares(shares, record["shares"])
    axes[0, 0].set_ylabel("error over tolerance\n(norm default)")
    axes[1, 0].set_ylabel("size of the step")
    axes[2, 0].set_ylabel("relative tolerance")
    figure.align_ylabels(axes[:, 0])
    legend_above(figure, axes[:2].flatten())
    return figure


def _draw_shares(ax: Axes, shares: list[Mapping[str, float]]) -> None:
    table = pandas.DataFrame(shares)
    start = np.zeros(len(table))
    for name, look in BLOCK_LOOKS.items():
        percent = 100 * table.get(name, 0 * start)
        bars = ax.barh(range(len(table)), percent, left=start, color=look.color, height=0.8)
        labels = [f"{BLOCK_LABELS[name]} {value:.1f} %" if value > 20 else "" for value in percent]
        ax.bar_label(bars, labels, label_type="center", fontsize=6)
        start += percent
    ax.set(xlim=(0, 100), xlabel="share of the steps in which it is the largest (%)")
    ax.set_yticks(range(len(table)), [power(rtol) for rtol in table["rtol"]])
    ax.invert_yaxis()
    ax.grid(False)


@styled
def integrals(records: Records) -> Figure:
    """Errors of likelihood and gradient against NFE, for each way to solve for a flow's log-determinant.

    A line is a way, its points are the tolerances: medians over the batches, with bars from the least to the most. To
    pay, a way must lie below the others, as a looser tolerance only goes up a line to the left.
    """
    table = pandas.DataFrame(records["flow"]["rows"])
    table["nfe"] = table["forward_nfe"] + table["backward_nfe"]
    figure = Figure(figsize=(WIDTH, 2.9), layout="constrained")
    likelihood, gradient = figure.subplots(1, 2)
    for way, rows in table.groupby("integrals", sort=False):
        look = LOOKS["seminorm" if way == "none" else f"seminorm, integrals {way}"]
        by_tolerance = rows.groupby("rtol")[["forward_nfe", "nfe", "error", "likelihood_error"]]
        middle = by_tolerance.median()
        below, above = middle - by_tolerance.min(), by_tolerance.max() - middle
        style = dict(color=look.color, linestyle=look.linestyle, marker=look.marker, elinewidth=0.7)
        for ax, nfe, error in ((likelihood, "forward_nfe", "likelihood_error"), (gradient, "nfe", "error")):
            bars = dict(yerr=[below[error], above[error]], label=f"integrals: {way}", **style)
            ax.errorbar(middle[nfe], middle[error], **bars)
    likelihood.set(xlabel="NFE, forward", ylabel="error of the log-likelihood (nats)", yscale="log")
    gradient.set(xlabel="NFE, forward and backward", ylabel="relative error of the gradient", yscale="log")
    for ax in (likelihood, gradient):
        count_axis(ax.xaxis)
    legend_above(figure, [likelihood])
    return figure


def tip_positions(motion: Mapping[str, list[float]]) -> tuple[np.ndarray, np.ndarray]:
    """Where the elbow and the tip are, two arrays (rows, 2) of metres right of and above the fixed joint."""
    first = np.array(motion["q1"])
    second = first + motion["q2"]
    elbow = np.stack([np.sin(first), -np.cos(first)], axis=-1)
    return elbow, elbow + np.stack([np.sin(second), -np.cos(second)], axis=-1)


@styled
def control_frames(records: Records) -> Figure:
    """The controlled acrobot at steps 0, 20, ..., 180, with the path of its tip since the frame before."""
    elbow, tip = tip_positions(records["acrobot"]["motion"])
    figure = Figure(figsize=(WIDTH, 3.1), layout="constrained")
    axes = figure.subplots(2, len(FRAMES) // 2).flatten()
    for ax, step in zip(axes, FRAMES, strict=True):
        _prepare_stage(ax)
        ax.plot(*tip[max(0, step - 20) : step + 1].T, color=GREY, linewidth=0.7)
        _links(ax, elbow[step], tip[step])
        ax.set_title(f"step {step} ({TIME_STEP * step:g} s)", fontsize=7)
    axes[0].annotate("height of the upright tip", (0, 1.9), ha="center", va="top", color=GREY, fontsize=5.5)
    return figure


@styled
def control_curves(records: Records) -> Figure:
    """Angles, velocities and torques of the controlled acrobot against time."""
    motion = records["acrobot"]["motion"]
    time = TIME_STEP * np.arange(len(motion["q1"]))
    figure = Figure(figsize=(0.7 * WIDTH, 4.4), layout="constrained")
    axes = figure.subplots(3, 1, sharex=True)
    labels = {
        ("q1", "q2"): ("$q_1$", "$q_2$", "angle (rad)"),
        ("dq1", "dq2"): (r"$\dot{q}_1$", r"$\dot{q}_2$", "velocity (rad/s)"),
        ("u0", "u1"): ("$u_0$", "$u_1$", "torque (N m)"),
    }
    for ax, (names, (*symbols, quantity)) in zip(axes, labels.items(), strict=True):
        for name, symbol, color, linestyle in zip(names, symbols, JOINT_COLORS, ("-", (0, (4, 1.5))), strict=True):
            ax.plot(time, motion[name], color=color, linestyle=linestyle, label=symbol)
        ax.set_ylabel(quantity)
        ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    for upright in (-np.pi, np.pi):
        if np.min(np.abs(np.array(motion["q1"]) - upright)) < 0.5:
            axes[0].axhline(upright, color=GREY, linewidth=0.8, linestyle=(0, (1, 1.5)))
            axes[0].annotate("upright", (0, upright), (4, 3), textcoords="offset points", color=GREY, fontsize=7)
    for bound in (-TORQUE_BOUND, TORQUE_BOUND):
        axes[2].axhline(bound, color=GREY, linewidth=0.8, linestyle=(0, (1, 1.5)))
    axes[-1].set_xlabel("time (seconds)")
    axes[-1].set_xlim(0, time[-1])
    figure.align_ylabels(axes)
    return figure


@styled
def control_animation(records: Records) -> bytes:
    """The controlled acrobot in motion, at its own speed: the bytes of a GIF file that plays forever."""
    elbow, tip = tip_positions(records["acrobot"]["motion"])
    figure = Figure(figsize=(2.4, 2.6), dpi=100, layout="constrained")
    steps = range(0, len(tip), STEPS_PER_IMAGE)

    def draw(step: int) -> None:
        ax = figure.subplots()
        _prepare_stage(ax)
        ax.plot(*tip[max(0, step - 20) : step + 1].T, color=GREY, linewidth=0.7)
        _links(ax, elbow[step], tip[step])
        ax.set_title(f"{TIME_STEP * step:.1f} s", fontsize=8)

    return gif(figure, draw, dict.fromkeys(steps, round(1000 * TIME_STEP * STEPS_PER_IMAGE)))


def _prepare_stage(ax: Axes) -> None:
    """Metres around the fixed joint, and a line at the height of the upright tip."""
    ax.set(xlim=(-2.2, 2.2), ylim=(-2.2, 2.1), aspect="equal")
    ax.axhline(2.0, color=GREY, linewidth=0.6, linestyle=(0, (1, 1.5)))
    ax.set_axis_off()


def _links(ax: Axes, elbow: np.ndarray, tip: np.ndarray) -> None:
    options = dict(linewidth=2.5, solid_capstyle="round")
    ax.plot([0, elbow[0]], [0, elbow[1]], color=JOINT_COLORS[0], **options)
    ax.plot([elbow[0], tip[0]], [elbow[1], tip[1]], color=JOINT_COLORS[1], **options)
    ax.plot(*zip((0, 0), elbow, strict=True), "o", color="black", markersize=3)


def _columns(records: Records, *, height: float, num_rows: int, **ratios) -> tuple[Figure, np.ndarray]:
    width = WIDTH * {1: 0.7, 2: 1.0}.get(len(records), 0.45 * len(records))
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(num_rows, len(records), squeeze=False, gridspec_kw=ratios)
