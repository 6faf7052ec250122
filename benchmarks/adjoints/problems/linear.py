"""Linear systems dy/dt = (y - rest) A^T, whose solution, and so whose gradient, is exact."""

import numpy as np
import torch
from torch import Tensor

from ..contract import Problem


def _field(arrays, t, y, parameters):
    return (y - parameters["rest"]) @ parameters["matrix"].T


def _exact(times: Tensor, y0: Tensor, parameters) -> Tensor:
    rest = parameters["rest"]
    powers = torch.linalg.matrix_exp(times[:, None, None] * parameters["matrix"])
    return rest + (y0 - rest) @ powers.transpose(1, 2)


def _turning(size: int) -> np.ndarray:
    """A matrix that turns about the origin, at rates about 1, and damps a little."""
    numbers = np.random.default_rng(0).normal(size=(size, size))
    return (numbers - numbers.T) / 4 - 0.1 * np.eye(size)


def _damping(size: int, strongest: float) -> np.ndarray:
    """A matrix that damps along random directions, at rates from 1 to the strongest."""
    directions, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(size, size)))
    return -directions @ np.diag(np.geomspace(1, strongest, size)) @ directions.T


STRONGEST = 40.0

PROBLEMS = [
    Problem(
        name="linear",
        title="Linear system of 8, turning",
        field=_field,
        parameters={"matrix": _turning(8), "rest": np.zeros(8)},
        y0=np.random.default_rng(2).normal(size=(4, 8)),
        times=np.linspace(0, 5, 6),
        exact=_exact,
        traits=("equation",),
    ),
    Problem(
        name="damped",
        title=f"Linear system of 8, damped by rates up to {STRONGEST:g}",
        field=_field,
        parameters={"matrix": _damping(8, STRONGEST), "rest": np.linspace(-1, 1, 8)},
        y0=np.random.default_rng(3).normal(size=(4, 8)),
        times=np.linspace(0, 2, 3),
        exact=_exact,
        traits=("equation", "unstable backward"),
        is_small=True,
    ),
]
