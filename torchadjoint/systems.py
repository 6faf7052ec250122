"""What the solver integrates in the two passes of a solve: `passes` chooses among these and those of `compiled`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .field import Field
from .methods.runge_kutta import RungeKutta
from .replay import Replay


class ForwardSystem:
    """The state alone.

    With `keeps_last_step` the field is linearised where a step reaches the end, for the backward pass to begin there.
    """

    def __init__(self, vector_field: Field, shape: torch.Size, *, keeps_last_step: bool):
        self.field = vector_field
        self.keeps_last_step = keeps_last_step
        self.shape = shape
        self.size = self.num_coupled = shape.numel()
        self.is_static = vector_field.is_static
        self.enter = vector_field.enter

    def bind(self, states: Sequence[Tensor], slopes: Sequence[Tensor]) -> None:
        self.buffers = [
            (state.view(self.shape), slope.view(self.shape)) for state, slope in zip(states, slopes, strict=True)
        ]

    def evaluate(self, stage: int, t: float, *, is_last_step: bool) -> None:
        if self.keeps_last_step and is_last_step:
            self.field.linearise(stage, t, *self.buffers[stage])
        else:
            self.field.evaluate(t, *self.buffers[stage])

    def reuse_stage(self, stage: int) -> None:
        """An evaluation leaves nothing behind but the slope."""


class AdjointSystem:
    """The state and its adjoint (z, a_z), and with `carries_integrals` (a_theta, a_t) behind them."""

    keeps_last_step = False

    def __init__(self, vector_field: Field, shape: torch.Size, *, carries_integrals: bool):
        self.field = vector_field
        self.shape = shape
        self.carries_integrals = carries_integrals
        self.num_coupled = 2 * shape.numel()
        self.size = self.num_coupled + carries_integrals * (sum(vector_field.parameter_sizes) + 1)
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

    def evaluate(self, stage: int, t: float, *, is_last_step: bool) -> None:
        z, adjoint, z_slope, adjoint_slope, integral_slopes = self.buffers[stage]
        self.field.linearise(stage, t, z, z_slope)
        self.field.pullback(stage, adjoint, adjoint_slope)
        adjoint_slope.neg_()
        if self.carries_integrals:
            integral_slopes.zero_()
            self.field.add_parameter_product(stage, -1.0, integral_slopes)

    def reuse_stage(self, stage: int) -> None:
        self.field.reuse_slot(stage)


class SeminormSystem(AdjointSystem):
    """(z, a_z); what belongs to parameters and time is summed over the accepted steps into `integrals`."""

    def __init__(self, vector_field: Field, method: RungeKutta, shape: torch.Size, integrals: Tensor):
        super().__init__(vector_field, shape, carries_integrals=False)
        self.method = method
        self.integrals = integrals
        self.rate = torch.zeros_like(integrals)
        """The weighted mean of the parameters' slopes in a step."""
        self._whole_steps = Replay(device=integrals.device, is_static=vector_field.is_static)

    def add_step(self, dt: float, weights: Sequence[float]) -> None:
        """Add the integral over the last step, of size `dt`, given the weights of its stages."""
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
