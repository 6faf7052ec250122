"""Bogacki and Shampine's method of order 3 (2) (1989): three evaluations a step, for loose tolerances."""

from .runge_kutta import RungeKutta

# Its dense output is the cubic through both ends. That of torchdiffeq is of order 1 only.
BOSH3 = RungeKutta(
    name="bosh3",
    order=3,
    nodes=(0.0, 1 / 2, 3 / 4, 1.0),
    stage_weights=((), (1 / 2,), (0.0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)),
    error_weights=(2 / 9 - 7 / 24, 1 / 3 - 1 / 4, 4 / 9 - 1 / 3, -1 / 8),
)
