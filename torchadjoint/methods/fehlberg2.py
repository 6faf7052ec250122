"""Fehlberg's method of order 2 (1) (1969), stepping by the solution of order 2."""

from .runge_kutta import RungeKutta

# torchdiffeq takes the third stage, at the end of the step of order 1, for the first of the next step, and so saves one
# of three evaluations.
FEHLBERG2 = RungeKutta(
    name="fehlberg2",
    order=2,
    nodes=(0.0, 1 / 2, 1.0, 1.0),
    stage_weights=((), (1 / 2,), (1 / 256, 255 / 256), (1 / 512, 255 / 256, 1 / 512)),
    error_weights=(-1 / 512, 0.0, 1 / 512, 0.0),
)
