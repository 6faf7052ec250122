"""The equations of a Symplectic ODE-Net for the acrobot, with networks that are smaller than the paper's and untrained.

The state is (cos q, sin q, dq, u), u being constant. With p = M dq and H = p^T M^-1 p / 2 + V: dp/dt = -dH/dq + g u and
d(dq)/dt = M^-1 dp/dt + (dM^-1/dt) p, where M^-1 = L L^T + 0.1 I, and L, V and g are networks of (cos q, sin q).
"""

import numpy as np

from ..contract import Problem

BATCH, WIDTH = 16, 64
NETWORKS = {"factor": (4, WIDTH, WIDTH, 3), "potential": (4, WIDTH, 1), "control": (4, WIDTH, 4)}


def _network(arrays, given, name, x, directions=()):
    """A softplus network at x (batch, 4), and its derivatives along directions (batch, 4)."""
    last = len(NETWORKS[name]) - 1
    for layer in range(1, last + 1):
        weight, bias = given[f"{name}_weight_{layer}"], given[f"{name}_bias_{layer}"]
        x, directions = arrays.linear(x, weight, bias), [direction @ weight.T for direction in directions]
        if layer < last:
            slope = arrays.sigmoid(x)
            x, directions = arrays.softplus(x), [direction * slope for direction in directions]
    return x, directions


def _field(arrays, t, y, given):
    (c1, c2), (s1, s2), (v1, v2), (u1, u2) = ((y[..., i], y[..., i + 1]) for i in (0, 2, 4, 6))
    zero = 0 * c1
    along = [arrays.stack([-s1, zero, c1, zero], -1), arrays.stack([zero, -s2, zero, c2], -1)]
    factor, factor_slopes = _network(arrays, given, "factor", y[..., :4], along)
    _, potential_slopes = _network(arrays, given, "potential", y[..., :4], along)
    control, _ = _network(arrays, given, "control", y[..., :4])

    l11, l22, l21 = factor[..., 0], factor[..., 1], factor[..., 2]
    m11, m21, m22 = l11 * l11 + 0.1, l11 * l21, l22 * l22 + l21 * l21 + 0.1
    determinant = m11 * m22 - m21 * m21
    p1, p2 = (m22 * v1 - m21 * v2) / determinant, (m11 * v2 - m21 * v1) / determinant
    # Entries of dM^-1/dq, for either angle.
    slopes = []
    for by_angle in factor_slopes:
        d11, d22, d21 = by_angle[..., 0], by_angle[..., 1], by_angle[..., 2]
        slopes.append((2 * l11 * d11, d11 * l21 + l11 * d21, 2 * (l22 * d22 + l21 * d21)))
    forces = [
        -(n11 * p1 * p1 + 2 * n21 * p1 * p2 + n22 * p2 * p2) / 2 - by_angle[..., 0]
        for (n11, n21, n22), by_angle in zip(slopes, potential_slopes, strict=True)
    ]
    f1 = forces[0] + control[..., 0] * u1 + control[..., 1] * u2
    f2 = forces[1] + control[..., 2] * u1 + control[..., 3] * u2
    n11, n21, n22 = (slopes[0][entry] * v1 + slopes[1][entry] * v2 for entry in range(3))
    a1 = m11 * f1 + m21 * f2 + n11 * p1 + n21 * p2
    a2 = m21 * f1 + m22 * f2 + n21 * p1 + n22 * p2
    return arrays.stack([-s1 * v1, -s2 * v2, c1 * v1, c2 * v2, a1, a2, zero, zero], -1)


def _problem() -> Problem:
    numbers = np.random.default_rng(0)
    parameters = {}
    for name, widths in NETWORKS.items():
        for layer in range(1, len(widths)):
            before, after = widths[layer - 1], widths[layer]
            parameters[f"{name}_weight_{layer}"] = numbers.normal(size=(after, before)) / before**0.5
            parameters[f"{name}_bias_{layer}"] = numbers.uniform(-1, 1, size=after) / 2
    angles = numbers.uniform(-np.pi, np.pi, size=(BATCH, 2))
    velocities, torques = numbers.normal(size=(BATCH, 2)) / 2, numbers.uniform(-1, 1, size=(BATCH, 2))
    return Problem(
        name="acrobot",
        title=f"Symplectic ODE-Net of the acrobot, width {WIDTH}, batch {BATCH}",
        field=_field,
        parameters=parameters,
        y0=np.concatenate([np.cos(angles), np.sin(angles), velocities, torques], axis=1),
        times=np.linspace(0, 1.4, 8),
        traits=("network",),
    )


PROBLEMS = [_problem()]
