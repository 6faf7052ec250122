"""A Runge-Kutta method as a table of numbers, and the step-size rules, in plain floats. Solvers use it.

Step-size control and first step: Hairer, Norsett and Wanner, "Solving Ordinary Differential Equations I", section II.4.
"""

import functools
import math
from dataclasses import dataclass

CONSISTENCY = 1e-6
"""How far sums in a table may be off: published tables are rounded."""


@dataclass(frozen=True)
class RungeKutta:
    """A method that steps from y0 to y1 = y0 + dt sum_i b_i k_i, where k_i = f(t0 + c_i dt, y0 + dt sum_j a_ij k_j).

    Its last stage is f(t1, y1), the first of the next step: the row of the step, b, is the last row of a. A method is
    FSAL (first same as last) if its error estimate uses that stage. For any other it is one more row of the table, and
    is evaluated only where the next step or the dense output needs it.

    Raises:
        ValueError: if the table is none of such a method.
    """

    name: str
    order: int
    """That of the step: its local error is of order + 1."""
    nodes: tuple[float, ...]
    """c, one for each stage: from 0 to 1."""
    stage_weights: tuple[tuple[float, ...], ...]
    """a: row i has the weights of the i stages before stage i. The last row is the step itself."""
    error_weights: tuple[float, ...] = ()
    """The estimated error of the step is dt sum_i e_i k_i. A method without any takes fixed steps."""
    midpoint_weights: tuple[float, ...] = ()
    """y(t0 + dt/2) = y0 + dt sum_i m_i k_i; by default that of the cubic through both ends and their slopes."""

    def __post_init__(self):
        # Lists would do, but for what is compiled, which is found by the table.
        for name in ("nodes", "error_weights", "midpoint_weights"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "stage_weights", tuple(map(tuple, self.stage_weights)))
        number = len(self.nodes)
        if [len(row) for row in self.stage_weights] != list(range(number)):
            self._refuse(f"its rows of stage weights must have 0, 1, ..., {number - 1} entries, one row for each node")
        if self.order < 1 or number < 2 or (self.nodes[0], self.nodes[-1]) != (0.0, 1.0):
            self._refuse("its order must be at least 1, its nodes two or more, the first 0 and the last 1")
        if not self.midpoint_weights:
            first, *others = (weight / 2 for weight in self.stage_weights[-1])
            object.__setattr__(self, "midpoint_weights", (first + 1 / 8, *others, -1 / 8))
        if len(self.midpoint_weights) != number or len(self.error_weights) not in (0, number):
            self._refuse(f"it must have {number} error weights and midpoint weights, as it has nodes")
        sums = [
            *zip(self.stage_weights, self.nodes, strict=True),
            (self.error_weights, 0.0),
            (self.midpoint_weights, 0.5),
        ]
        for weights, expected in sums:
            if not abs(math.fsum(weights) - expected) < CONSISTENCY:
                self._refuse(f"the weights {weights} must add up to {expected}")

    def _refuse(self, reason: str) -> None:
        raise ValueError(f"the method {self.name!r} cannot be used: {reason}")

    @property
    def num_stages(self) -> int:
        """How many stages a step has, the next step's first among them."""
        return len(self.nodes)

    @property
    def is_adaptive(self) -> bool:
        """Whether it estimates the error of its steps, by which their size is chosen."""
        return bool(self.error_weights)

    @property
    def is_fsal(self) -> bool:
        """Whether an attempt needs the stage that is the next step's first, for its error estimate."""
        return self.is_adaptive and self.error_weights[-1] != 0

    @functools.cached_property
    def step_weights(self) -> tuple[float, ...]:
        """b."""
        return (*self.stage_weights[-1], 0.0)

    @functools.cached_property
    def stage_matrix(self) -> tuple[tuple[float, ...], ...]:
        """a, filled up with zeros to a square."""
        return tuple((*row, *(0.0,) * (self.num_stages - len(row))) for row in self.stage_weights)

    @functools.cached_property
    def weighing_stages(self) -> tuple[int, ...]:
        """The stages that have a weight in the step or in its dense output."""
        ends = (0, self.num_stages - 1)
        weights = enumerate(zip(self.step_weights, self.midpoint_weights, strict=True))
        return tuple(stage for stage, pair in weights if any(pair) or stage in ends)

    @functools.cached_property
    def dense_output(self) -> tuple[tuple[float, ...], ...]:
        """The weights that `interpolation_weights` returns, as polynomials: those of fraction, ..., fraction^4."""
        rows = []
        for first, last, step, middle in ((1, 0, 0, 0), (-4, 1, -5, 16), (5, -3, 14, -32), (-2, 2, -8, 16)):
            row = [step * b + middle * m for b, m in zip(self.step_weights, self.midpoint_weights, strict=True)]
            row[0] += first
            row[-1] += last
            rows.append(tuple(row))
        return tuple(rows)

    def interpolation_weights(self, fraction: float) -> tuple[float, ...]:
        """Weights w_i of the dense output: y(t0 + fraction dt) = y0 + dt sum_i w_i k_i, for a fraction in [0, 1].

        The quartic that meets y0, y1 and the midpoint in value and the first and last stage in slope, collected by
        stage. At fraction 1 they are `step_weights`.
        """
        x = fraction
        first = x + x**2 * (-4 + x * (5 - 2 * x))
        last = x**2 * (1 + x * (-3 + 2 * x))
        step = x**2 * (-5 + x * (14 - 8 * x))
        middle = x**2 * (16 + x * (-32 + 16 * x))
        weights = [step * b + middle * m for b, m in zip(self.step_weights, self.midpoint_weights, strict=True)]
        weights[0] += first
        weights[-1] += last
        return tuple(weights)

    def next_step_size(
        self,
        dt: float,
        error_ratio: float,
        *,
        safety: float,
        ifactor: float,
        dfactor: float,
    ) -> float:
        """The size to try after a step of size `dt` whose error was `error_ratio` times the tolerance.

        It is `dt` times at most `ifactor` and at least `dfactor`, and no smaller than `dt` after an accepted step. A
        ratio that is not finite (the trial left the numbers that the dtype can hold) shrinks the step as far as
        allowed.
        """
        if error_ratio == 0:
            return dt * ifactor
        if not error_ratio < float("inf"):
            return dt * dfactor
        smallest = 1.0 if error_ratio < 1 else dfactor
        return dt * min(ifactor, max(safety / error_ratio ** (1 / self.order), smallest))

    def first_step_size(self, trial: float, slope_norm: float, change_norm: float) -> float:
        """Size of the first step, from an Euler step's and the norm of the change of f along it, over the tolerance."""
        curvature = change_norm / trial
        if max(slope_norm, curvature) <= 1e-15:  # 0 of 0 and NaN, which ends the solve at its first step
            guess = max(1e-6, trial * 1e-3)
        else:
            guess = (0.01 / max(slope_norm, curvature)) ** (1 / self.order)
        return min(100 * trial, guess)


def trial_step_size(state_norm: float, slope_norm: float) -> float:
    """Size of the Euler step that helps guess the first step, from the norms of y0 and its slope over the tolerance."""
    if state_norm < 1e-5 or slope_norm < 1e-5:
        return 1e-6
    return 0.01 * state_norm / slope_norm
