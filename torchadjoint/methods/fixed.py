"""Methods without error control, which take steps of given sizes."""

from .runge_kutta import RungeKutta

EULER = RungeKutta(name="euler", order=1, nodes=(0.0, 1.0), stage_weights=((), (1.0,)))
MIDPOINT = RungeKutta(name="midpoint", order=2, nodes=(0.0, 1 / 2, 1.0), stage_weights=((), (1 / 2,), (0.0, 1.0)))
HEUN2 = RungeKutta(name="heun2", order=2, nodes=(0.0, 1.0, 1.0), stage_weights=((), (1.0,), (1 / 2, 1 / 2)))
HEUN3 = RungeKutta(
    name="heun3",
    order=3,
    nodes=(0.0, 1 / 3, 2 / 3, 1.0),
    stage_weights=((), (1 / 3,), (0.0, 2 / 3), (1 / 4, 0.0, 3 / 4)),
)
RK4 = RungeKutta(  # Kutta's 3/8 rule, as in torchdiffeq
    name="rk4",
    order=4,
    nodes=(0.0, 1 / 3, 2 / 3, 1.0, 1.0),
    stage_weights=((), (1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0), (1 / 8, 3 / 8, 3 / 8, 1 / 8)),
)
