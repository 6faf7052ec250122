"""Bogacki and Shampine's method of order 3 (2) (1989): three evaluations a step, for loose tolerances."""

from .runge_kutta import RungeKutta

BOSH3 = RungeKutta(
    name="bosh3",
    order=3,
    nodes=(0.0, 1 / 2, 3 / 4, 1.0),
    stage_weights=((), (1 / 2,), (0.0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)),
    error_weights=(2 / 9 - 7 / 24, 1 / 3 - 1 / 4, 4 / 9 - 1 / 3, -1 / 8),
    # That of the cubic through both ends and their slopes. torchdiffeq's, (0, 1/2, 0, 0), is of order 1 only.
    midpoint_weights=(17 / 72, 1 / 6, 2 / 9, -1 / 8),
)
