"""Densities learnt by flows: of points and of images. `flow.py` trains them."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .continuous import ContinuousFlow, Integrals, JoinedStatistics, Solve
from .images import Multiscale, bits_per_dim, dequantise, levels_of, logit

SMALL_DIMENSION = 4
"""Up to so many numbers a sample, the divergence is exact unless settings say otherwise; beyond, it is estimated."""
LARGEST_DIMENSION = 64
"""More numbers than these have no exact divergence here: it costs a product with the Jacobian for each."""


def log_normal(*noise: Tensor) -> Tensor:
    """The log density (batch) of the standard normal distribution of all numbers of these tensors (batch, ...)."""
    return sum((-0.5 * (part**2 + math.log(2 * math.pi))).flatten(1).sum(dim=1) for part in noise)


class Draws(nn.Module):
    """Random tensors for a model: for every batch of a training others, for a measurement always the same.

    The number of the training's batch is a buffer, so that it is in every checkpoint.

    Args:
        stream: the random stream of a name.
    """

    def __init__(self, stream: Callable[[str], torch.Generator]):
        super().__init__()
        self.stream = stream
        self.register_buffer("number", torch.zeros((), dtype=torch.int64))

    def next(self) -> None:
        """A new batch begins."""
        if self.training:
            self.number += 1

    def uniform(self, name: str, like: Tensor) -> Tensor:
        """Numbers from [0, 1) of the shape of `like`, in the default dtype."""
        return torch.rand(like.shape, generator=self._stream(name)).to(like.device)

    def signs(self, name: str, like: Tensor) -> Tensor:
        """1 and -1 with equal chances (Rademacher's), as `like`."""
        return (2.0 * torch.randint(2, like.shape, generator=self._stream(name)) - 1).to(like)

    def _stream(self, name: str) -> torch.Generator:
        return self.stream(f"{name} of {f'batch {self.number.item()}' if self.training else 'a measurement'}")


class _Density(nn.Module):
    """What densities have in common: how the divergence of their flows is taken."""

    def __init__(self, num_dims: int, *, divergence: str, stream: Callable[[str], torch.Generator], solve: Solve):
        super().__init__()
        if divergence == "automatic":
            divergence = "exact" if num_dims <= SMALL_DIMENSION else "estimated"
        if divergence == "exact" and num_dims > LARGEST_DIMENSION:
            raise ValueError(
                f"divergence is 'exact', but the samples have {num_dims:,} numbers, and more than {LARGEST_DIMENSION} "
                "are too many for that: take 'estimated'"
            )
        self.num_dims = num_dims
        self.is_estimated = divergence == "estimated"
        self.draws = Draws(stream)
        self.solve = solve

    def probe(self, x: Tensor, flow: int = 0) -> Tensor | None:
        """The probe for a flow, given by its number, of the points x; see `FlowField`."""
        return self.draws.signs(f"probe {flow}", x) if self.is_estimated else None


class PointDensity(_Density):
    """A density of points, from one flow.

    Args:
        flow: from data to noise.
        num_dims: how many numbers a point has.
        options: those of `_Density`: divergence, stream, solve.
    """

    def __init__(self, flow: ContinuousFlow, num_dims: int, **options):
        super().__init__(num_dims, **options)
        self.flow = flow

    def forward(self, x: Tensor) -> tuple[Tensor, JoinedStatistics]:
        """The negative log-likelihood of each point (batch, dims), in nats (batch), and what the solve did."""
        self.draws.next()
        noise, log_determinant, statistics = self.flow(x, self.probe(x), self.solve)
        return -(log_normal(noise) + log_determinant), statistics

    def sample(self, number: int, stream: torch.Generator) -> Tensor:
        """Points drawn from the density (number, dims)."""
        noise = torch.randn(number, self.num_dims, generator=stream).to(next(self.parameters()))
        return self.flow.inverse(noise, self.solve)


class ImageDensity(_Density):
    """A density of images of whole grey levels.

    Args:
        shape: channels, height, width.
        num_levels: how many grey levels there are.
        width, integrals: see `Multiscale`.
        options: those of `_Density`: divergence, stream, solve.
    """

    def __init__(
        self, shape: tuple[int, int, int], num_levels: int, *, width: int, integrals: Integrals = "none", **options
    ):
        super().__init__(math.prod(shape), **options)
        self.shape = shape
        self.num_levels = num_levels
        self.flows = Multiscale(shape, width, integrals)

    def forward(self, levels: Tensor) -> tuple[Tensor, JoinedStatistics]:
        """The negative log-likelihood of each image (batch, *shape), in bits per dimension (batch), and the solves'
        statistics."""
        self.draws.next()
        dtype = next(self.parameters()).dtype
        x = dequantise(levels, self.draws.uniform("dequantisation", levels), self.num_levels).to(dtype)
        y, log_density = logit(x)
        flows = iter(range(sum(map(len, self.flows.scales))))
        noise, log_determinant, statistics = self.flows(y, lambda x: self.probe(x, next(flows)), self.solve)
        log_density = log_density + log_determinant + log_normal(*noise)
        return bits_per_dim(log_density, self.num_dims, self.num_levels), statistics

    def sample(self, number: int, stream: torch.Generator) -> Tensor:
        """Images drawn from the density (number, *shape), of whole grey levels."""
        like = next(self.parameters())
        shapes = self.flows.noise_shapes(self.shape)
        noise = [torch.randn(number, *shape, generator=stream).to(like) for shape in shapes]
        return levels_of(self.flows.inverse(noise, self.solve), self.num_levels)
