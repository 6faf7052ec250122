"""What a trained flow has learnt, as numbers for pictures: samples, a toy's density, and how the flow moves points.

`diagnostics.py` saves it.
"""

from typing import Any

import torch
from torch import Tensor

from common import randomness
from flows.densities import ImageDensity, PointDensity

NUM_POINTS = 1000
"""Points of the data and samples of the model."""
NUM_MOVING = 400
"""Of these the points that the frames show."""
NUM_FRAMES = 21
NUM_IMAGES = 48
REACH = 4.5
"""The density is on a square grid from -REACH to REACH."""
GRID_SIZE = 81


@torch.no_grad()
def measure_points(model: PointDensity, data: Tensor) -> dict[str, Any]:
    """Of a flow of points in the plane, given data that it has not seen.

    `density` is a list of rows, from the lowest; `paths` has where some samples are from noise to data, at `times`.
    """
    flow, stream = model.flow, randomness.stream(0, "samples")
    side = torch.linspace(-REACH, REACH, GRID_SIZE)
    y, x = torch.meshgrid(side, side, indexing="ij")
    losses, _ = model(torch.stack([x.flatten(), y.flatten()], dim=1))
    times = torch.linspace(flow.end_time, 0.0, NUM_FRAMES).tolist()
    noise = torch.randn(NUM_POINTS, 2, generator=stream)
    paths = flow.paths(noise, times, model.solve)
    return {
        "reach": REACH,
        "density": _rounded((-losses).exp().view(GRID_SIZE, GRID_SIZE)),
        "data": _rounded(data[:NUM_POINTS]),
        "samples": _rounded(paths[-1]),
        "times": [round(time, 6) for time in times],
        "paths": _rounded(paths[:, :NUM_MOVING]),
    }


@torch.no_grad()
def measure_images(model: ImageDensity, data: Tensor) -> dict[str, Any]:
    """Of a flow of images, given some that it has not seen: grey levels (number, channels, height, width)."""
    samples = model.sample(NUM_IMAGES, randomness.stream(0, "samples"))
    return {"num_levels": model.num_levels, "data": data[:NUM_IMAGES].tolist(), "samples": samples.tolist()}


def _rounded(values: Tensor) -> list:
    # To 1e-4, which no eye can see; as float64 it is written so.
    return (values.double() * 1e4).round().div(1e4).tolist()
