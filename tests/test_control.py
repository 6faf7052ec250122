"""The control that swings the acrobot up by what a Symplectic ODE-Net has learnt of it."""

import itertools

import numpy as np
import pytest
import torch
from problems import random

import acrobot
from datasets.acrobot import FullyActuatedAcrobot
from reproduction import control


@pytest.fixture(scope="module")
def vector_field():
    return acrobot.build(acrobot.Config("cpu", "seminorm")).vector_field


def test_the_control_is_what_the_formula_says(vector_field):
    angles, velocities = random(5, 2, dtype=torch.float32), random(5, 2, seed=1, dtype=torch.float32)
    leaf = angles.clone().requires_grad_()
    inputs = torch.cat([leaf.cos(), leaf.sin()], dim=-1)
    vector_field.potential(inputs.unsqueeze(0)).sum().backward()
    matrices = vector_field.control(inputs.unsqueeze(0)).view(5, 2, 2)
    expected = (matrices.inverse() @ (2 * leaf.grad - velocities).unsqueeze(-1)).squeeze(-1)
    torques = control.energy_shaping(vector_field, angles, velocities)
    torch.testing.assert_close(torques, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("torque", ["published", "consistent"])
def test_the_control_acts_on_the_true_dynamics_from_rest(vector_field, torque):
    rows = control.swing_up(vector_field, torque=torque, num_steps=40)
    assert rows.shape == (41, 6)
    assert np.isfinite(rows).all()
    assert np.abs(rows[:, 4:]).max() <= 15
    assert np.abs(rows[:, 4:]).max() > 0
    assert (rows[0, :4] == 0).all()
    environment = FullyActuatedAcrobot(torque=torque)
    for before, after in itertools.pairwise(rows):
        environment.state = before[:4]
        environment.step(before[4:])
        assert environment.state == pytest.approx(after[:4], abs=1e-6)
    states = torch.tensor(rows[:, :4], dtype=torch.float32)
    torques = control.energy_shaping(vector_field, states[:, :2], states[:, 2:]).clamp(-15, 15)
    assert rows[:, 4:] == pytest.approx(torques.detach().numpy(), rel=1e-3, abs=1e-3)
