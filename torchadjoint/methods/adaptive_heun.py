"""Heun's method of order 2 with Euler's inside (1): the cheapest step with error control."""

from .runge_kutta import RungeKutta

# torchdiffeq takes the slope at the end of Euler's step, its second stage, for the first of the next step, and so saves
# one of two evaluations; the method that it then is has another stability region.
ADAPTIVE_HEUN = RungeKutta(
    name="adaptive_heun",
    order=2,
    nodes=(0.0, 1.0, 1.0),
    stage_weights=((), (1.0,), (1 / 2, 1 / 2)),
    error_weights=(-1 / 2, 1 / 2, 0.0),
)
