"""The equations of a Symplectic ODE-Net with two angles, with their product by hand. Its field and its module use them.

Every tensor has the batch last, so that each entry of the small matrices is contiguous.
"""

import torch
from torch import Tensor

DIAGONAL_SHIFT = 0.1
"""What keeps the inverse mass matrix positive definite."""


def angle_rows(like: Tensor) -> Tensor:
    """The matrices (3, 4, 4) that take (cos q1, cos q2, sin q1, sin q2) to itself and its derivatives along q1, q2."""
    rows = like.new_zeros(3, 4, 4)
    rows[0] = torch.eye(4, device=like.device)
    for angle in range(2):
        rows[1 + angle, 2 + angle, angle] = -1.0
        rows[1 + angle, angle, 2 + angle] = 1.0
    return rows


def times(factor: Tensor, x: Tensor) -> Tensor:
    """L x, (2, ...), for x (2, ...) and the entries (l11, l22, l21) of a lower triangular matrix L, (3, ...)."""
    product = factor[:2] * x
    product[1].addcmul_(factor[2], x[0])
    return product


def transposed_times(factor: Tensor, x: Tensor) -> Tensor:
    """L^T x, as `times`."""
    product = factor[:2] * x
    product[0].addcmul_(factor[2], x[1])
    return product


def outer(a: Tensor, b: Tensor) -> Tensor:
    """The cotangent a b^T of L, where a is that of L b; only the entries of L, (3, ...)."""
    return torch.cat([a * b, a[1:] * b[:1]])


class SymplecticDynamics:
    """The time `derivative` (8, batch) of the state (cos q, sin q, dq, u), u being constant, and its product by hand.

    With p = M dq and H = p^T M^-1 p / 2 + V, and since dH/dp = dq: dp/dt = -dH/dq + g u and
    d(dq)/dt = M^-1 dp/dt + (dM^-1/dt) p. With M^-1 = L L^T + 0.1 I, each derivative of p^T M^-1 p / 2 is one of L^T p
    times L^T p, p being constant, and M^-1 itself is never differentiated. Nothing changes if L changes its sign.

    Args:
        y: the state, (8, batch).
        factor: the entries (l11, l22, l21) of L, each with its derivatives along q1 and q2, (3, 3, batch).
        forces: g u - dV/dq, (2, batch).
    """

    def __init__(self, y: Tensor, factor: Tensor, forces: Tensor):
        self.y, self.factor = y, factor
        cosines, sines, velocities, torques = y.split(2)
        value = factor[:, 0]
        squares = value * value
        m11, m22, m21 = squares[0] + DIAGONAL_SHIFT, squares[1] + squares[2] + DIAGONAL_SHIFT, value[0] * value[2]
        self.mass = torch.stack([m22, m11, -m21]) / (m11 * m22 - m21 * m21)
        """Its entries (1, 1), (2, 2) and (2, 1)."""
        self.momenta = self._times_mass(velocities)
        # L^T p and its derivatives along the angles.
        self.rows = transposed_times(factor, self.momenta.unsqueeze(1))
        self.momentum_rates = forces - (self.rows[:, :1] * self.rows[:, 1:]).sum(dim=0)
        self.factor_rates = (factor[:, 1:] * velocities).sum(dim=1)
        row_rates = (self.rows[:, 1:] * velocities).sum(dim=1)
        self.inner = transposed_times(value, self.momentum_rates) + row_rates
        accelerations = times(value, self.inner) + times(self.factor_rates, self.rows[:, 0])
        accelerations = torch.add(accelerations, self.momentum_rates, alpha=DIAGONAL_SHIFT)
        self.derivative = torch.cat(
            [-sines * velocities, cosines * velocities, accelerations, torch.zeros_like(torques)]
        )

    def _times_mass(self, x: Tensor) -> Tensor:
        return self.mass[:2] * x + self.mass[2] * x.flip(0)

    def pullback(self, cotangent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The cotangents of `y`, `factor` and `forces`, for that of the derivative (8, batch)."""
        cosines, sines, velocities, torques = self.y.split(2)
        by_cosine_rates, by_sine_rates, by_accelerations, _ = cotangent.split(2)
        value, slopes = self.factor[:, 0], self.factor[:, 1:]
        row, row_slopes = self.rows[:, 0], self.rows[:, 1:]
        by_inner = transposed_times(value, by_accelerations)
        by_forces = torch.add(times(value, by_inner), by_accelerations, alpha=DIAGONAL_SHIFT)
        by_factor_rates = outer(by_accelerations, row)

        by_rows = torch.empty_like(self.rows)
        by_rows[:, 0] = transposed_times(self.factor_rates, by_accelerations) - (row_slopes * by_forces).sum(dim=1)
        by_rows[:, 1:] = by_inner.unsqueeze(1) * velocities - row.unsqueeze(1) * by_forces
        # By way of the momenta M dq.
        by_velocities = self._times_mass(times(self.factor, by_rows).sum(dim=1))

        by_factor = outer(self.momenta.unsqueeze(1), by_rows)
        by_factor[:, 1:].addcmul_(by_factor_rates.unsqueeze(1), velocities)
        by_value = by_factor[:, 0]
        by_value += outer(by_accelerations, self.inner) + outer(self.momentum_rates, by_inner)
        by_value -= outer(by_velocities, row) + outer(self.momenta, transposed_times(value, by_velocities))

        by_velocities += (row_slopes * by_inner.unsqueeze(1)).sum(dim=0)
        by_velocities += (slopes * by_factor_rates.unsqueeze(1)).sum(dim=0)
        by_velocities += cosines * by_sine_rates - sines * by_cosine_rates
        by_trigonometry = [velocities * by_sine_rates, -velocities * by_cosine_rates]
        return torch.cat([*by_trigonometry, by_velocities, torch.zeros_like(torques)]), by_factor, by_forces
