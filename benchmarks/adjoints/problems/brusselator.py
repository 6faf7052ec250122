"""The Brusselator on a grid: two chemicals that react and diffuse, with rates of their own in every cell."""

import numpy as np

from ..contract import Problem

SIZE = 8


def _laplacian(arrays, x):
    """Of (..., SIZE, SIZE), on a square whose edges meet."""
    around = sum(arrays.roll(x, shift, axis) for shift in (-1, 1) for axis in (-2, -1))
    return (around - 4 * x) * SIZE**2


def _field(arrays, t, y, parameters):
    grid = y.reshape(*y.shape[:-1], 2, SIZE, SIZE)
    u, v = grid[..., 0, :, :], grid[..., 1, :, :]
    feed, decay, diffusion = parameters["feed"], parameters["decay"], parameters["diffusion"]
    reaction = u * u * v
    u_rate = feed + reaction - (decay + 1) * u + diffusion[0] * _laplacian(arrays, u)
    v_rate = decay * u - reaction + diffusion[1] * _laplacian(arrays, v)
    return arrays.stack([u_rate, v_rate], -3).reshape(y.shape)


def _problem() -> Problem:
    numbers = np.random.default_rng(0)
    feed = 1 + 0.1 * numbers.uniform(-1, 1, size=(SIZE, SIZE))
    decay = 3 + 0.3 * numbers.uniform(-1, 1, size=(SIZE, SIZE))
    start = np.stack([feed, decay / feed]) + 0.2 * numbers.uniform(-1, 1, size=(2, SIZE, SIZE))
    return Problem(
        name="brusselator",
        title=f"Brusselator {SIZE} x {SIZE}, {2 * SIZE**2 + 2} parameters",
        field=_field,
        parameters={"feed": feed, "decay": decay, "diffusion": np.array([0.01, 0.02])},
        y0=start.reshape(1, -1),
        times=np.linspace(0, 8, 5),
        # The finest waves diffuse away at the rate 0.02 * 8 * 8^2.
        traits=("equation", "unstable backward"),
    )


PROBLEMS = [_problem()]
