"""The acrobot swung up by what a Symplectic ODE-Net has learnt of it; `diagnostics.py` saves it for the figures.

The model is used for the control alone: what the control acts on are the true dynamics, those of the data set.
"""

import numpy as np
import torch
from torch import Tensor, nn

from datasets.acrobot import FullyActuatedAcrobot, TorqueForm
from fields.symplectic import angle_rows

NUM_STEPS = 400
"""Of 0.05 s each."""


def energy_shaping(vector_field: nn.Module, angles: Tensor, velocities: Tensor) -> Tensor:
    """The torques u = g^T (g g^T)^-1 (2 dV/dq - dq), (batch, 2), from learnt potential V and control matrix g.

    The first term turns the potential upside down, so that upright becomes its minimum; the second is friction.

    Args:
        vector_field: an acrobot's `SymplecticVectorField`.
        angles: q, (batch, 2).
        velocities: dq, (batch, 2).
    """
    cosines_and_sines = torch.cat([angles.cos(), angles.sin()], dim=-1)
    rows = cosines_and_sines @ angle_rows(cosines_and_sines)
    potential_slopes = vector_field.potential(rows)[1:, :, 0].T
    control = vector_field.control(rows[:1])[0].unflatten(-1, (2, 2))
    wanted = (2 * potential_slopes - velocities).unsqueeze(-1)
    return (control.mT @ torch.linalg.solve(control @ control.mT, wanted)).squeeze(-1)


@torch.no_grad()
def swing_up(vector_field: nn.Module, *, torque: TorqueForm = "published", num_steps: int = NUM_STEPS) -> np.ndarray:
    """The controlled motion from rest, hanging down: rows (q1, q2, dq1, dq2, u0, u1), (num_steps + 1, 6).

    A row is a state, in radians and seconds, and the torques in N m that act from it to the next, already clipped to
    the environment's bounds. `torque` is that of `FullyActuatedAcrobot`.
    """
    environment = FullyActuatedAcrobot(torque=torque)
    environment.state = np.zeros(4)
    bounds = environment.action_space
    rows = []
    for _ in range(num_steps + 1):
        state = torch.tensor(environment.state, dtype=next(vector_field.parameters()).dtype).unsqueeze(0)
        wanted = energy_shaping(vector_field, state[:, :2], state[:, 2:]).squeeze(0)
        torques = np.clip(wanted.double().numpy(), bounds.low, bounds.high)
        rows.append([*environment.state, *torques])
        environment.step(torques)
    return np.array(rows)
