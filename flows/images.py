"""From grey levels to numbers with a density, and flows at several scales, as RealNVP has them: for images."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from .continuous import ContinuousFlow, Integrals, JoinedStatistics, Solve
from .networks import Convolutions

SMALLEST_SIDE = 4
"""Pixels: an image whose sides are at least so long gets a scale, and half of it is looked at again."""
FLOWS_PER_PART = 2
END_TIME = 1.0
ALPHA = 1e-6
"""How far `logit` keeps from 0 and 1; FFJORD's, for all images."""


def dequantise(levels: Tensor, noise: Tensor, num_levels: int) -> Tensor:
    """Whole grey levels (batch, ...) with `noise` from [0, 1) added, scaled to the unit cube.

    The log-determinant is -log(num_levels) for each number: that of a density of levels is left out by this and comes
    back in `bits_per_dim`.

    Raises:
        ValueError: if a level is not among 0 ... num_levels - 1, so that it would lie outside the unit cube.
    """
    least, most = (value.item() for value in torch.aminmax(levels))
    if not 0 <= least <= most < num_levels:
        raise ValueError(
            f"the images hold levels from {least:g} to {most:g}, outside the unit cube: give levels from 0 to "
            f"{num_levels - 1}"
        )
    return (levels + noise) / num_levels


def logit(x: Tensor) -> tuple[Tensor, Tensor]:
    """log(p / (1 - p)) with p = ALPHA + (1 - 2 ALPHA) x, for x (batch, ...), and its log-determinant (batch)."""
    # Near x = 1 the second is exact to rounding, where 1 - p would not be.
    log_p, log_rest = (torch.log(ALPHA + (1 - 2 * ALPHA) * part) for part in (x, 1 - x))
    slopes = math.log(1 - 2 * ALPHA) - log_p - log_rest
    return log_p - log_rest, slopes.flatten(1).sum(dim=1)


def levels_of(y: Tensor, num_levels: int) -> Tensor:
    """The grey levels whose logits these are: the way back through `logit` and `dequantise`."""
    x = (torch.sigmoid(y) - ALPHA) / (1 - 2 * ALPHA)
    return (x * num_levels).floor().clamp(0, num_levels - 1).to(torch.uint8)


def bits_per_dim(log_density: Tensor, num_dims: int, num_levels: int) -> Tensor:
    """Negative log-likelihood of grey levels in bits for each number, from the log density (nats) in the unit cube."""
    return (math.log(num_levels) - log_density / num_dims) / math.log(2)


class Multiscale(nn.Module):
    """Flows of images (batch, channels, height, width) at several scales, each flow a solve of its own (FFJORD's).

    At each scale but the last there are two flows, 2x2 pixels become channels, there are two flows more, and half of
    the channels go straight to the noise; the last scale is two flows.

    Args:
        shape: channels, height, width.
        width: channels of the hidden layers of each flow's network.
        integrals: see `ContinuousFlow`.

    Raises:
        ValueError: if the images are too small or their sides cannot be halved.
    """

    def __init__(self, shape: tuple[int, int, int], width: int, integrals: Integrals = "none"):
        super().__init__()
        channels, *sides = shape
        num_scales = 1 + int(math.log2(min(sides) / SMALLEST_SIDE)) if min(sides) >= SMALLEST_SIDE else 0
        if num_scales == 0 or any(side % 2 ** (num_scales - 1) for side in sides):
            raise ValueError(
                f"the images are of {sides[0]} x {sides[1]} pixels, but the flow's scales need sides of at least "
                f"{SMALLEST_SIDE}, divisible by {2 ** max(1, num_scales - 1)}: pad the images"
            )
        self.scales = nn.ModuleList()
        for scale in range(num_scales):
            is_last = scale == num_scales - 1
            parts = [channels] if is_last else [channels, 4 * channels]
            networks = [Convolutions(part, width) for part in parts for _ in range(FLOWS_PER_PART)]
            self.scales.append(nn.ModuleList(ContinuousFlow(network, END_TIME, integrals) for network in networks))
            channels *= 2

    def forward(
        self, x: Tensor, probe: Callable[[Tensor], Tensor | None], solve: Solve
    ) -> tuple[list[Tensor], Tensor, JoinedStatistics]:
        """The noise, a tensor for each scale; the log-determinant (batch); what the solves did.

        `probe` makes a flow's probe, given its points; see `FlowField`.
        """
        noise, log_determinant, statistics = [], x.new_zeros(len(x)), []
        for scale in self.scales:
            for number, flow in enumerate(scale):
                if number == FLOWS_PER_PART:
                    x = functional.pixel_unshuffle(x, 2)
                x, change, counted = flow(x, probe(x), solve)
                log_determinant = log_determinant + change
                statistics.append(counted)
            if len(scale) > FLOWS_PER_PART:
                out, x = x.chunk(2, dim=1)
                noise.append(out)
        return [*noise, x], log_determinant, JoinedStatistics(statistics)

    def inverse(self, noise: list[Tensor], solve: Solve) -> Tensor:
        """The images that become this noise."""
        *noise, x = noise
        for scale in reversed(self.scales):
            if len(scale) > FLOWS_PER_PART:
                x = torch.cat([noise.pop(), x], dim=1)
            for number, flow in reversed(list(enumerate(scale))):
                x = flow.inverse(x, solve)
                if number == FLOWS_PER_PART:
                    x = functional.pixel_shuffle(x, 2)
        return x

    def noise_shapes(self, shape: tuple[int, int, int]) -> list[tuple[int, int, int]]:
        """Of the noise of each scale, for images of this shape: channels, height, width."""
        channels, height, width = shape
        shapes = []
        for _ in self.scales[:-1]:
            channels, height, width = 2 * channels, height // 2, width // 2
            shapes.append((channels, height, width))
        return [*shapes, (channels, height, width)]
