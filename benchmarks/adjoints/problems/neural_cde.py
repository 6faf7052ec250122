"""A small neural CDE: dz/dt = g(z) dX/dt, for paths that are linear between knots at whole times.

The hidden layer is smooth, so that the reference is exact: the ReLU twin shows what kinks do.
"""

import numpy as np

from ..contract import Problem

BATCH, CHANNELS, HIDDEN, WIDTH, KNOTS = 16, 5, 16, 32, 25


def _field(arrays, t, y, given):
    response = arrays.softplus(arrays.linear(y, given["weight_1"], given["bias_1"]))
    matrix = arrays.tanh(arrays.linear(response, given["weight_2"], given["bias_2"]))
    slope = arrays.piece(given["slopes"], t)
    return (matrix.reshape(*y.shape, CHANNELS) @ slope[..., None])[..., 0]


def _problem() -> Problem:
    numbers = np.random.default_rng(0)
    walks = numbers.normal(size=(KNOTS - 1, BATCH, CHANNELS - 1)) / 2
    slopes = np.concatenate([np.ones((KNOTS - 1, BATCH, 1)), walks], axis=-1)
    return Problem(
        name="neural-cde",
        title=f"Neural CDE, {KNOTS} knots, batch {BATCH}, synthetic paths",
        field=_field,
        parameters={
            "weight_1": numbers.normal(size=(WIDTH, HIDDEN)) / HIDDEN**0.5,
            "bias_1": numbers.uniform(-1, 1, size=WIDTH),
            "weight_2": numbers.normal(size=(HIDDEN * CHANNELS, WIDTH)) / WIDTH**0.5,
            "bias_2": numbers.uniform(-1, 1, size=HIDDEN * CHANNELS) / 4,
        },
        constants={"slopes": slopes},
        y0=numbers.normal(size=(BATCH, HIDDEN)),
        times=np.array([0.0, KNOTS - 1]),
        jumps=tuple(np.arange(1.0, KNOTS - 1)),
        traits=("network", "kinks"),
    )


PROBLEMS = [_problem()]
