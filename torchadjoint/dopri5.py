"""Dormand and Prince's method of order 5 (4): its numbers, and the step-size rules, in plain floats. Solvers use it.

Coefficients: Dormand and Prince (1980), with the error estimate and the midpoint of Shampine (1986). Step-size control
and first step: Hairer, Norsett and Wanner, "Solving Ordinary Differential Equations I", section II.4, with
torchdiffeq's constants, so that the steps can be compared one by one.
"""

NUM_STAGES = 7
ORDER = 5

NODES = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
"""c: stage i is evaluated at t0 + c_i dt."""

STAGE_WEIGHTS = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
"""a: the state at stage i is y0 + dt sum_j a_ij k_j. The last row is the step itself."""

STAGE_MATRIX = tuple((*row, *(0.0,) * (NUM_STAGES - len(row))) for row in STAGE_WEIGHTS)
"""The same, filled up with zeros to a square."""

STEP_WEIGHTS = (*STAGE_WEIGHTS[-1], 0.0)
"""b: y1 = y0 + dt sum_i b_i k_i."""

ERROR_WEIGHTS = (
    35 / 384 - 1951 / 21600,
    0.0,
    500 / 1113 - 22642 / 50085,
    125 / 192 - 451 / 720,
    -2187 / 6784 + 12231 / 42400,
    11 / 84 - 649 / 6300,
    -1 / 60,
)
"""The estimated error of the step is dt sum_i e_i k_i."""

MIDPOINT_WEIGHTS = (
    6025192743 / 30085553152 / 2,
    0.0,
    51252292925 / 65400821598 / 2,
    -2691868925 / 45128329728 / 2,
    187940372067 / 1594534317056 / 2,
    -1776094331 / 19743644256 / 2,
    11237099 / 235043384 / 2,
)
"""y(t0 + dt/2) = y0 + dt sum_i m_i k_i."""

SAFETY, LARGEST_GROWTH, LARGEST_SHRINKAGE = 0.9, 10.0, 0.2


def interpolation_weights(fraction: float) -> tuple[float, ...]:
    """Weights w_i of the dense output: y(t0 + fraction dt) = y0 + dt sum_i w_i k_i, for a fraction in [0, 1].

    The quartic that meets y0, y1 and the midpoint in value and k_1, k_7 in slope, collected by stage. At fraction 1
    they are `STEP_WEIGHTS`.
    """
    x = fraction
    first = x + x**2 * (-4 + x * (5 - 2 * x))
    last = x**2 * (1 + x * (-3 + 2 * x))
    step = x**2 * (-5 + x * (14 - 8 * x))
    middle = x**2 * (16 + x * (-32 + 16 * x))
    weights = [step * b + middle * m for b, m in zip(STEP_WEIGHTS, MIDPOINT_WEIGHTS, strict=True)]
    weights[0] += first
    weights[-1] += last
    return tuple(weights)


def next_step_size(dt: float, error_ratio: float) -> float:
    """The size to try after a step of size `dt` whose error was `error_ratio` times the tolerance.

    A ratio that is not finite (the trial left the numbers that the dtype can hold) shrinks the step as far as allowed.
    """
    if error_ratio == 0:
        return dt * LARGEST_GROWTH
    if not error_ratio < float("inf"):
        return dt * LARGEST_SHRINKAGE
    smallest = 1.0 if error_ratio < 1 else LARGEST_SHRINKAGE
    return dt * min(LARGEST_GROWTH, max(SAFETY / error_ratio ** (1 / ORDER), smallest))


def trial_step_size(state_norm: float, slope_norm: float) -> float:
    """Size of the Euler step that helps guess the first step, from the norms of y0 and its slope over the tolerance."""
    if state_norm < 1e-5 or slope_norm < 1e-5:
        return 1e-6
    return 0.01 * state_norm / slope_norm


def first_step_size(trial: float, slope_norm: float, change_norm: float) -> float:
    """Size of the first step, from that Euler step and the norm of the change of f along it, over the tolerance."""
    curvature = change_norm / trial
    if slope_norm <= 1e-15 and curvature <= 1e-15:
        guess = max(1e-6, trial * 1e-3)
    else:
        guess = (0.01 / max(slope_norm, curvature)) ** (1 / ORDER)
    return min(100 * trial, guess)
