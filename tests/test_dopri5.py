import math
from itertools import pairwise

import numpy
import pytest
from scipy.integrate import RK45

from torchadjoint import METHODS
from torchadjoint.methods.runge_kutta import trial_step_size

DOPRI5 = METHODS["dopri5"]
NODES, NUM_STAGES, STAGE_WEIGHTS, STEP_WEIGHTS = (
    DOPRI5.nodes,
    DOPRI5.num_stages,
    DOPRI5.stage_weights,
    DOPRI5.step_weights,
)
ERROR_WEIGHTS, MIDPOINT_WEIGHTS = DOPRI5.error_weights, DOPRI5.midpoint_weights
first_step_size, interpolation_weights, next_step_size = (
    DOPRI5.first_step_size,
    DOPRI5.interpolation_weights,
    DOPRI5.next_step_size,
)


def moment(weights, power):
    """sum_i w_i c_i^power, which for weights exact to that power is an integral of t^power."""
    return sum(weight * node**power for weight, node in zip(weights, NODES, strict=True))


def test_the_tableau_is_that_of_dormand_and_prince():
    assert numpy.allclose(NODES[:-1], RK45.C, rtol=1e-15)
    for row, expected in zip(STAGE_WEIGHTS[1:-1], RK45.A[1:], strict=True):
        assert numpy.allclose(row, expected[: len(row)], rtol=1e-14)
    assert numpy.allclose(STAGE_WEIGHTS[-1], RK45.B, rtol=1e-14)
    # Shampine's estimate has two thirds of the length of Dormand and Prince's own.
    assert numpy.allclose(ERROR_WEIGHTS, -2 / 3 * RK45.E, rtol=1e-10)


def test_every_stage_is_consistent():
    assert [len(row) for row in STAGE_WEIGHTS] == list(range(NUM_STAGES))
    for row, node in zip(STAGE_WEIGHTS, NODES, strict=True):
        assert sum(row) == pytest.approx(node, abs=1e-14)
        if len(row) > 1:
            inner = sum(weight * node for weight, node in zip(row, NODES, strict=False))
            assert inner == pytest.approx(node**2 / 2, abs=1e-14)


def test_the_last_stage_is_the_next_steps_first():
    assert (*STAGE_WEIGHTS[-1], 0.0) == STEP_WEIGHTS
    assert NODES[-1] == 1.0


@pytest.mark.parametrize("power", range(5))
def test_the_step_integrates_polynomials(power):
    assert moment(STEP_WEIGHTS, power) == pytest.approx(1 / (power + 1), abs=1e-14)


def test_the_error_estimate_vanishes_up_to_order_four():
    for power in range(4):
        assert moment(ERROR_WEIGHTS, power) == pytest.approx(0.0, abs=1e-14)
    assert abs(moment(ERROR_WEIGHTS, 4)) > 1e-4


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.37, 0.5, 0.9, 1.0])
def test_the_dense_output_integrates_polynomials(fraction):
    for power in range(4):
        expected = fraction ** (power + 1) / (power + 1)
        assert moment(interpolation_weights(fraction), power) == pytest.approx(expected, abs=1e-14)


def test_the_dense_output_meets_the_step_at_its_ends_and_in_its_middle():
    assert interpolation_weights(0.0) == pytest.approx([0.0] * NUM_STAGES, abs=1e-15)
    assert interpolation_weights(1.0) == pytest.approx(STEP_WEIGHTS, abs=1e-14)
    assert interpolation_weights(0.5) == pytest.approx(MIDPOINT_WEIGHTS, abs=1e-14)


def test_the_dense_output_has_the_slopes_of_the_step_at_its_ends():
    small = 1e-6
    start = numpy.array(interpolation_weights(small)) / small
    end = (numpy.array(STEP_WEIGHTS) - interpolation_weights(1 - small)) / small
    assert start == pytest.approx([1, 0, 0, 0, 0, 0, 0], abs=1e-4)
    assert end == pytest.approx([0, 0, 0, 0, 0, 0, 1], abs=1e-4)


def take_step(t, y, dt, weights=STEP_WEIGHTS):
    """One step of dy/dt = y cos t in plain floats, to whatever the weights lead."""
    slopes = []
    for row, node in zip(STAGE_WEIGHTS, NODES, strict=True):
        state = y + dt * sum(weight * slope for weight, slope in zip(row, slopes, strict=True))
        slopes.append(math.cos(t + node * dt) * state)
    return y + dt * sum(weight * slope for weight, slope in zip(weights, slopes, strict=True))


def test_the_solution_converges_with_order_five():
    errors = []
    for num_steps in (20, 40, 80):
        t, y, dt = 0.0, 1.0, 3 / num_steps
        for _ in range(num_steps):
            t, y = t + dt, take_step(t, y, dt)
        errors.append(abs(y - math.exp(math.sin(3))))
    orders = [math.log2(before / after) for before, after in pairwise(errors)]
    assert orders == pytest.approx([5, 5], abs=0.4)


@pytest.mark.parametrize("fraction", [0.3, 0.5, 0.8])
def test_the_error_of_the_dense_output_in_one_step_is_of_order_five(fraction):
    weights = interpolation_weights(fraction)
    errors = [
        abs(take_step(0.5, 1.0, dt, weights) - math.exp(math.sin(0.5 + fraction * dt) - math.sin(0.5)))
        for dt in (0.2, 0.1)
    ]
    assert math.log2(errors[0] / errors[1]) > 4.6


@pytest.mark.parametrize(
    ("error_ratio", "factor"),
    [
        (0.0, 10.0),
        (1e-10, 10.0),
        (0.9**5 / 32, 2.0),
        (0.9**5, 1.0),
        (0.99, 1.0),  # 0.9 / 0.99^(1/5) = 0.902, but an accepted step never shrinks the next
        (1.0, 0.9),
        (0.9**5 * 32, 0.5),
        (1e9, 0.2),
        (math.inf, 0.2),
        (math.nan, 0.2),
    ],
)
def test_next_step_size(error_ratio, factor):
    found = next_step_size(0.3, error_ratio, safety=0.9, ifactor=10.0, dfactor=0.2)
    assert found == pytest.approx(0.3 * factor, rel=1e-12)


@pytest.mark.parametrize(
    ("state_norm", "slope_norm", "expected"),
    [(2.0, 4.0, 0.005), (9e-6, 4.0, 1e-6), (2.0, 9e-6, 1e-6), (2e-5, 4e-5, 0.005)],
)
def test_trial_step_size(state_norm, slope_norm, expected):
    assert trial_step_size(state_norm, slope_norm) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("trial", "slope_norm", "change_norm", "expected"),
    [
        (1e-3, 0.01 / 0.05**5, 0.0, 0.05),  # the slope decides
        (1e-3, 0.0, 1e-3 * 0.01 / 0.05**5, 0.05),  # the curvature decides
        (1e-4, 0.01 / 0.05**5, 0.0, 0.01),  # at most a hundred trial steps
        (1e-2, 0.0, 0.0, 1e-5),  # nothing moves
        (1e-6, 0.0, 0.0, 1e-6),
    ],
)
def test_first_step_size(trial, slope_norm, change_norm, expected):
    assert first_step_size(trial, slope_norm, change_norm) == pytest.approx(expected, rel=1e-12)
