"""Pictures of what flows have learnt, from the measurement `samples`: densities and samples of toys, images, frames."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .diagnostic_figures import read_all
from .experiments import FLOW
from .measurements import path_of
from .style import GREY, WIDTH, NothingToDraw, gif, styled

MILLISECONDS_PER_FRAME = 120
PAUSE = 1500
"""Milliseconds that the last frame stays."""

Records = Mapping[str, Mapping[str, Any]]
"""The measurement, by group."""


def read(results_dir: str, *, of_images: bool) -> Records:
    """The measurement of each group that has it, of toys or of images.

    Raises:
        NothingToDraw: if none has, or a file is damaged.
    """
    options = f"--results-dir {results_dir} --experiments flow --measurements samples"
    remedy = f"`python -m reproduction.diagnostics {options}`"
    paths = {group: path_of(results_dir, "samples", FLOW.name, group) for group in FLOW.measured_groups}
    found = read_all(paths, "samples", remedy)
    records = {group: record for group, record in found.items() if ("num_levels" in record) == of_images}
    if not records:
        what, where = "images" if of_images else "toys", Path(results_dir, "diagnostics")
        raise NothingToDraw(f"There are no samples of {what} in {where}: make them by {remedy}.")
    return records


@styled
def densities(records: Records) -> Figure:
    """Data, the density that was learnt and samples from it, a row for each toy."""
    figure, cells = _grid(records, ("data", "density", "samples"), row_height=2.25)
    for record, row in cells:
        reach = record["reach"]
        for name, ax in row.items():
            if name == "density":
                ax.imshow(record[name], origin="lower", extent=(-reach, reach, -reach, reach), cmap="viridis", vmin=0)
            else:
                ax.plot(*np.array(record[name]).T, ".", color="#0072B2", markersize=1.6)
            ax.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", xticks=[], yticks=[])
            ax.grid(False)
            for spine in ax.spines.values():
                spine.set(visible=True, color=GREY)
    return figure


@styled
def images(records: Records) -> Figure:
    """Images of the test set on the left, samples on the right; a row for each model."""
    figure, cells = _grid(records, ("data", "samples"), row_height=2.6)
    for record, row in cells:
        for name, ax in row.items():
            ax.imshow(_mosaic(np.array(record[name])) / (record["num_levels"] - 1), cmap="gray", vmin=0, vmax=1)
            ax.set(xticks=[], yticks=[])
            ax.grid(False)
    return figure


def _grid(
    records: Records, names: Sequence[str], *, row_height: float
) -> tuple[Figure, list[tuple[Mapping[str, Any], dict[str, Axes]]]]:
    """A figure with a row for each record and a column for each name; the records with their axes by name."""
    figure = Figure(figsize=(WIDTH, 0.4 + row_height * len(records)), layout="constrained")
    axes = figure.subplots(len(records), len(names), squeeze=False)
    for ax, name in zip(axes[0], names, strict=True):
        ax.set_title(name)
    for row, group in zip(axes, records, strict=True):
        row[0].set_ylabel(group)
    rows = [dict(zip(names, row, strict=True)) for row in axes]
    return figure, list(zip(records.values(), rows, strict=True))


def _mosaic(stack: np.ndarray) -> np.ndarray:
    """Images (number, channels, height, width) side by side in rows of 8, with a white line between them."""
    number, channels, height, width = stack.shape
    columns = min(8, number)
    lines = -(-number // columns)
    whole = np.full((lines * (height + 1) - 1, columns * (width + 1) - 1, channels), stack.max())
    for index, image in enumerate(stack):
        top, left = (index // columns) * (height + 1), (index % columns) * (width + 1)
        whole[top : top + height, left : left + width] = image.transpose(1, 2, 0)
    return whole[..., 0] if channels == 1 else whole


@styled
def animation(records: Records) -> bytes:
    """Noise that becomes samples of each toy: the bytes of a GIF file that plays forever."""
    paths = {group: np.array(record["paths"]) for group, record in records.items()}
    times = next(iter(records.values()))["times"]
    figure = Figure(figsize=(2.3 * len(records), 2.6), dpi=90, layout="constrained")

    def draw(number: int) -> None:
        axes = figure.subplots(1, len(records), squeeze=False)[0]
        for ax, (group, record) in zip(axes, records.items(), strict=True):
            reach, title = record["reach"], f"{group}\nt = {times[number]:.3f}"
            ax.plot(*paths[group][number].T, ".", color="#0072B2", markersize=2)
            ax.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", title=title)
            ax.set_axis_off()

    last = len(times) - 1
    return gif(figure, draw, dict.fromkeys(range(last), MILLISECONDS_PER_FRAME) | {last: PAUSE})
