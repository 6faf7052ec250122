"""Neural networks of the state, of a few sizes, and twins that differ in the smoothness of their field alone.

Their weights are not trained, which would take long and differ between machines. The layers but the last are random,
and the last is fitted by least squares to a known motion, so that the field is one that a training would find.
"""

import itertools
from collections.abc import Callable

import numpy as np

from ..contract import Problem

ACTIVATIONS = {"tanh": np.tanh, "relu": lambda x: np.maximum(x, 0), "softplus": lambda x: np.logaddexp(x, 0)}
RIDGE = 1e-3
"""How much the squares of the last layer's weights count beside the mean square of the misfit."""


def _field(activation: str, power: int = 1):
    def field(arrays, t, y, parameters):
        response = y**power if power > 1 else y
        last = len(parameters) // 2
        for layer in range(1, last + 1):
            response = arrays.linear(response, parameters[f"weight_{layer}"], parameters[f"bias_{layer}"])
            if layer < last:
                response = getattr(arrays, activation)(response)
        return response

    return field


def _fitted(
    widths: tuple[int, ...],
    motion: Callable[[np.ndarray], np.ndarray],
    *,
    activation: str = "tanh",
    power: int = 1,
) -> dict[str, np.ndarray]:
    """Weights and biases by name, fitted to a motion at random points."""
    numbers = np.random.default_rng(sum(widths))
    points = numbers.normal(size=(4000, widths[0]))
    parameters, response = {}, points**power
    for layer, (before, after) in enumerate(itertools.pairwise(widths[:-1]), start=1):
        weight = numbers.normal(size=(after, before)) * 1.5 / before**0.5
        bias = numbers.uniform(-1, 1, size=after)
        parameters |= {f"weight_{layer}": weight, f"bias_{layer}": bias}
        response = ACTIVATIONS[activation](response @ weight.T + bias)
    features = np.column_stack([response, np.ones(len(points))])
    normal = features.T @ features / len(points) + RIDGE * np.eye(features.shape[1])
    last = np.linalg.solve(normal, features.T @ motion(points) / len(points))
    number = len(widths) - 1
    return parameters | {f"weight_{number}": last[:-1].T.copy(), f"bias_{number}": last[-1].copy()}


def _spiral(y: np.ndarray) -> np.ndarray:
    return y**3 @ np.array([[-0.1, -2.0], [2.0, -0.1]])


def _oscillators(y: np.ndarray) -> np.ndarray:
    """Two coupled pendulums (angles, velocities)."""
    angles, velocities = y[:, :2], y[:, 2:]
    return np.hstack([velocities, -np.sin(angles) - 0.3 * (angles - angles[:, ::-1]) - 0.05 * velocities])


def _spinning(size: int) -> Callable[[np.ndarray], np.ndarray]:
    """A turn about the origin that gets slower with the distance."""
    numbers = np.random.default_rng(5).normal(size=(size, size))
    spin = (numbers - numbers.T) / size**0.5
    return lambda y: (y @ spin) / (1 + (y**2).mean(axis=1, keepdims=True))


def _starts(batch: int, channels: int) -> np.ndarray:
    return np.random.default_rng(7).normal(size=(batch, channels))


PROBLEMS = [
    Problem(
        name="spiral",
        title="Spiral, 2-50-2, batch 20, 30 times",
        field=_field("tanh", power=3),
        parameters=_fitted((2, 50, 2), _spiral, power=3),
        y0=_starts(20, 2) / 2,
        times=np.linspace(0, 3, 30),
        traits=("network",),
    ),
    Problem(
        name="long",
        title="Network 4-32-4, batch 16, horizon 50",
        field=_field("tanh"),
        parameters=_fitted((4, 32, 4), _oscillators),
        y0=_starts(16, 4),
        times=np.linspace(0, 50, 3),
        traits=("network",),
    ),
    Problem(
        name="network",
        title="Network 16-64-64-16, batch 64, 10 times",
        field=_field("tanh"),
        parameters=_fitted((16, 64, 64, 16), _spinning(16)),
        y0=_starts(64, 16),
        times=np.linspace(0, 10, 10),
        traits=("network",),
        is_small=True,
    ),
    *(
        Problem(
            name=f"twin-{activation}",
            title=f"Network 4-32-4, {label}, batch 4",
            field=_field(activation),
            parameters=_fitted((4, 32, 4), _oscillators, activation=activation),
            y0=_starts(4, 4),
            times=np.linspace(0, 5, 3),
            traits=traits,
            is_small=activation == "relu",
        )
        for activation, label, traits in (
            ("relu", "ReLU", ("network", "kinks")),
            ("softplus", "softplus", ("network",)),
        )
    ),
]
