"""What is saved at the same error of the gradient, on curves whose answer is known."""

import math

import pytest
from problems import Network, random
from test_diagnostics import Model, squares

from reproduction.equal_error import MEASURED, Measured, Way, measure_batch
from reproduction.fair_saving import compare, cost_at, geometric


def row(adjoint, rtol, nfe, error, *, batch=0, seed=0, method="dopri5"):
    return {
        "adjoint": adjoint,
        "warm_start": False,
        "method": method,
        "rtol": rtol,
        "forward_nfe": 10,
        "backward_nfe": nfe - 10,
        "cpu_seconds": nfe / 100,
        "error": error,
        "batch": batch,
        "seed": seed,
    }


def default_curve(scale=1.0, **which):
    """Ten times the cost for a hundredth of the error."""
    return [row("default", 10.0**-n, 100 * 10**n, scale * 100.0**-n, **which) for n in range(3)]


def test_the_cost_at_an_error_is_read_off_between_the_points():
    curve = default_curve()
    assert cost_at(1e-1, curve, "nfe") == pytest.approx(100 * 10**0.5)
    assert cost_at(1e-3, curve, "cpu_seconds") == pytest.approx(10 * 10**0.5)
    # A coarser gradient than the cheapest costs as much as that, and one that is never reached as much as the dearest.
    assert cost_at(10.0, curve, "nfe") == pytest.approx(100)
    assert cost_at(1e-5, curve, "nfe") == pytest.approx(10000)
    # A point that costs more and is no better is not on the curve.
    assert cost_at(1e-3, [*curve, row("default", 0.5, 2000, 0.5)], "nfe") == pytest.approx(1000 * 10**0.5)


def test_a_way_that_is_but_coarser_saves_nothing_at_equal_error():
    """It takes a tenth of the evaluations, and has the error of `default` there."""
    rows = []
    for batch, scale in enumerate((1.0, 2.0, 3.0)):
        rows += default_curve(scale, batch=batch)
        rows.append(row("seminorm", 1e-2, 1000, scale * 1e-2, batch=batch))
    [fair] = [fair for fair in compare(rows, "nfe") if fair.adjoint == "seminorm"]
    assert fair.at_equal_tolerance.middle == pytest.approx(0.1)
    assert fair.error.middle == pytest.approx(100)
    assert fair.at_equal_error.middle == pytest.approx(1)
    assert (fair.at_equal_error.num_batches, fair.num_beyond) == (3, 0)


def test_a_gradient_more_exact_than_any_of_the_curve_is_counted_with_its_dearest():
    rows = [
        *default_curve(),
        *default_curve(batch=1),
        row("discrete", 1e-2, 50, 1e-9),
        row("discrete", 1e-2, 50, 1e-2, batch=1),
    ]
    [fair] = [fair for fair in compare(rows, "nfe") if fair.adjoint == "discrete"]
    assert (fair.num_beyond, fair.at_equal_error.num_batches) == (1, 2)
    assert fair.at_equal_error.middle == pytest.approx((0.005 * 0.05) ** 0.5)
    [alone] = [fair for fair in compare(rows[:3] + rows[6:7], "nfe") if fair.adjoint == "discrete"]
    assert alone.at_equal_error.middle == pytest.approx(0.005)
    assert math.isnan(alone.at_equal_error.low)


def test_a_batch_counts_once_however_many_weights_it_was_measured_with():
    few, many = geometric({0: [2.0], 1: [8.0]}), geometric({0: [2.0] * 5, 1: [4.0, 16.0]})
    assert few == many
    assert few.middle == pytest.approx(4)
    # Student's t of one degree of freedom, on logarithms that are log 2 from their mean.
    assert math.log(few.high / 4) == pytest.approx(12.706 * math.log(2), rel=1e-4)


def test_every_way_is_measured_at_every_tolerance():
    measured = Measured(
        (Way("default", "dopri5", (1e-2, 1e-4)), Way("seminorm", "bosh3", (1e-3,), warm_start=True)),
        batch_size=4,
        num_batches=1,
        atol_over_rtol=0.1,
        reference=(1e-9, 1e-9),
        judge=(1e-9, 1e-9),
    )
    rows = list(measure_batch(measured, Model(Network(width=32)), (random(4, 3),), squares))
    assert [(row["adjoint"], row["method"], row["warm_start"], row["rtol"]) for row in rows] == [
        ("default", "dopri5", False, 1e-2),
        ("default", "dopri5", False, 1e-4),
        ("seminorm", "bosh3", True, 1e-3),
    ]
    assert rows[0]["error"] > 3 * rows[1]["error"] > 0
    assert all(row["atol"] == pytest.approx(row["rtol"] / 10) and row["cpu_seconds"] > 0 for row in rows)
    assert all(row["reference_error"] < rows[1]["error"] / 10 for row in rows)


@pytest.mark.parametrize("experiment", MEASURED)
def test_the_reference_is_two_decades_tighter_and_every_tolerance_has_its_default(experiment):
    measured = MEASURED[experiment]
    tightest = min(rtol for way in measured.ways for rtol in way.rtols)
    assert measured.reference[0] < 1.01e-2 * tightest
    assert measured.reference[1] < 1.01e-2 * tightest * measured.atol_over_rtol
    first = measured.ways[0]
    assert (first.adjoint, first.method) == ("default", "dopri5")
    assert all(set(way.rtols) <= set(first.rtols) for way in measured.ways)
