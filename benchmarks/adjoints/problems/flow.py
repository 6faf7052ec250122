"""A continuous normalising flow of points in the plane, with its log-determinant by the exact divergence.

The state is (x, l) with dl/dt = div v, and v is a concatsquash network as in FFJORD, of layers
(W x + b) sigmoid(w t + c) + s t.
As everywhere in the benchmark the loss is squares, here of where the points go and of the log-determinants.
"""

import itertools

import numpy as np

from ..contract import Problem

BATCH, WIDTHS = 32, (2, 32, 32, 2)


def _field(arrays, t, y, given):
    x, time = y[..., :2], t[..., None]
    zero = 0 * x[..., 0]
    along = [arrays.stack([zero + 1, zero], -1), arrays.stack([zero, zero + 1], -1)]
    for layer in range(1, len(WIDTHS)):
        if layer > 1:
            x = arrays.tanh(x)
            along = [tangent * (1 - x * x) for tangent in along]
        weight = given[f"weight_{layer}"]
        gate = arrays.sigmoid(time * given[f"gate_weight_{layer}"] + given[f"gate_bias_{layer}"])
        x = arrays.linear(x, weight, given[f"bias_{layer}"]) * gate + given[f"shift_{layer}"] * time
        along = [(tangent @ weight.T) * gate for tangent in along]
    return arrays.concatenate([x, (along[0][..., 0] + along[1][..., 1])[..., None]], -1)


def _problem() -> Problem:
    numbers = np.random.default_rng(0)
    parameters = {}
    for layer, (before, after) in enumerate(itertools.pairwise(WIDTHS), start=1):
        parameters[f"weight_{layer}"] = numbers.normal(size=(after, before)) * 2 / before**0.5
        for name in ("bias", "gate_weight", "gate_bias", "shift"):
            parameters[f"{name}_{layer}"] = numbers.uniform(-1, 1, size=after)
    return Problem(
        name="flow",
        title=f"Flow {'-'.join(map(str, WIDTHS))} with its log-determinant, batch {BATCH}",
        field=_field,
        parameters=parameters,
        y0=np.column_stack([numbers.normal(size=(BATCH, 2)), np.zeros(BATCH)]),
        times=np.array([0.0, 1.0]),
        traits=("network",),
    )


PROBLEMS = [_problem()]
