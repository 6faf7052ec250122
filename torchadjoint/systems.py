"""What the solver integrates in the two directions of a solve: the adjoints choose among these and `compiled`'s."""

import functools
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .field import Field
from .methods.runge_kutta import RungeKutta
from .replay import Replay


class ForwardSystem:
    """The state alone."""

    direction = "forward"

    def __init__(self, vector_field: Field, shape: torch.Size):
        self.field = vector_field
        self.shape = shape
        self.size = self.num_coupled = shape.numel()
        self.parts = {"y": (0, self.size)}
        self.is_static = vector_field.is_static
        self.enter = vector_field.enter

    def bind(self, states: Sequence[Tensor], slopes: Sequence[Tensor]) -> None:
        self.buffers = [
            (state.view(self.shape), slope.view(self.shape)) for state, slope in zip(states, slopes, strict=True)
        ]

    def evaluate(self, stage: int, t: float) -> None:
        self.field.evaluate(t, *self.buffers[stage])

    def reuse_stage(self, stage: int) -> None:
        """An evaluation leaves nothing behind but the slope."""


class AdjointSystem:
    """The state and its adjoint (z, a_z), and behind them, so that a norm can weigh them, (a_theta, a_t)."""

    direction = "backward"
    carries_integrals = True

    def __init__(self, vector_field: Field, shape: torch.Size, integrals: Tensor):
        self.field = vector_field
        self.shape = shape
        self.integrals = integrals
        """(a_theta, a_t) at the end of the last segment, flat."""
        self.num_coupled = 2 * shape.numel()
        ends = [0, shape.numel(), self.num_coupled]
        if self.carries_integrals:
            ends += [self.num_coupled + integrals.numel() - 1, self.num_coupled + integrals.numel()]
        self.parts = dict(zip(("z", "a_z", "a_theta", "a_t"), pairwise(ends), strict=False))
        self.size = ends[-1]
        self.is_static = vector_field.is_static
        self.enter = vector_field.enter

    def bind(self, states: Sequence[Tensor], slopes: Sequence[Tensor]) -> None:
        half = self.shape.numel()
        self.buffers = [
            (
                state[:half].view(self.shape),
                state[half:].view(self.shape),
                slope[:half].view(self.shape),
                slope[half : 2 * half].view(self.shape),
                slope[2 * half :],
            )
            for state, slope in zip(states, slopes, strict=True)
        ]

    def evaluate(self, stage: int, t: float) -> None:
        z, adjoint, z_slope, adjoint_slope, integral_slopes = self.buffers[stage]
        self.field.linearise(stage, t, z, z_slope)
        self.field.pullback(stage, adjoint, adjoint_slope)
        adjoint_slope.neg_()
        if self.carries_integrals:
            integral_slopes.zero_()
            self.field.add_parameter_product(stage, -1.0, integral_slopes)

    def reuse_stage(self, stage: int) -> None:
        self.field.reuse_slot(stage)

    def add_step(self, dt: float, weights: Sequence[float]) -> None:
        """Account for an accepted step of size `dt`, given the weights of its stages."""


class SeminormSystem(AdjointSystem):
    """(z, a_z); what belongs to parameters and time is summed over the accepted steps."""

    carries_integrals = False

    def __init__(self, vector_field: Field, shape: torch.Size, integrals: Tensor, method: RungeKutta):
        super().__init__(vector_field, shape, integrals)
        self.method = method
        self.rate = torch.zeros_like(integrals)
        """The weighted mean of the parameters' slopes in a step."""

    @functools.cached_property
    def _whole_steps(self) -> Replay:
        return Replay(device=self.integrals.device, is_static=self.is_static)

    def add_step(self, dt: float, weights: Sequence[float]) -> None:
        if weights is self.method.step_weights:
            self._whole_steps(lambda: self._average(weights))
        else:
            self._average(weights)
        self.integrals.add_(self.rate, alpha=-dt)

    def _average(self, weights: Sequence[float]) -> None:
        self.rate.zero_()
        for slot, weight in enumerate(weights):
            if weight:
                self.field.add_parameter_product(slot, weight, self.rate)
