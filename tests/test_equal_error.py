"""What is saved at the same error of the gradient, on curves whose answer is known."""

import dataclasses
import itertools
import json
import math
from types import SimpleNamespace

import numpy
import pytest
import torch
from problems import Model, Network, random, squares
from records import saved_run

import flow
from common import provenance
from reproduction import equal_error, gradients, law_figures
from reproduction.equal_error import MEASURED, Measured, Way, measure_batch
from reproduction.fair_saving import COMPARED_AT, compare, cost_at, name_of
from reproduction.gradients import gradient_of
from reproduction.measurements import path_of
from reproduction.summary import half_width
from reproduction.trained import TrainedRun
from torchadjoint import Backsolve


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


def fair(rows, way, cost="nfe"):
    [found] = [found for found in compare(rows, cost) if (found.way, found.rtol) == (way, 1e-2)]
    return found


def test_the_cost_at_an_error_is_read_off_between_the_points():
    curve = [(2.0, 0.0), (3.0, -2.0), (4.0, -4.0)]
    assert cost_at(-1.0, curve) == pytest.approx(2.5)
    assert cost_at(-3.0, curve) == pytest.approx(3.5)
    # Beyond the ends it goes on level.
    assert cost_at(1.0, curve) == 2
    assert cost_at(-5.0, curve) == 4
    # A point that costs more and is no better is not on the curve.
    assert cost_at(-3.0, [*curve, (3.2, -0.5)]) == pytest.approx(3.5)


def test_a_way_that_is_but_coarser_saves_nothing_at_equal_error():
    """It takes a tenth of the evaluations, and has the error of `default` there."""
    rows = []
    for batch, scale in enumerate((1.0, 2.0, 3.0)):
        rows += default_curve(scale, batch=batch)
        rows.append(row("seminorm", 1e-2, 1000, scale * 1e-2, batch=batch))
    found = fair(rows, "seminorm")
    assert found.error.middle == pytest.approx(100)
    ratio = found.at_equal_error
    assert (ratio.middle, ratio.low, ratio.high) == pytest.approx((1, 1, 1))
    assert ratio.num_batches == 3
    assert fair(rows, "seminorm", "cpu_seconds").at_equal_error.middle == pytest.approx(1)


def test_default_is_what_it_is_compared_with_however_its_errors_scatter():
    rows = default_curve(batch=0)
    for point, error in zip(default_curve(batch=1), (1e-3, 1e-1, 1e-4), strict=True):
        rows.append(point | {"error": error})
    ratio = fair(rows, "default").at_equal_error
    assert (ratio.middle, ratio.num_batches) == (pytest.approx(1), 2)


def test_what_is_beyond_the_curve_has_a_bound_alone():
    rows = [*default_curve(), row("discrete", 1e-2, 50, 1e-9), row("seminorm", 1e-2, 50, 10.0)]
    exact, coarse = (fair(rows, adjoint).at_equal_error for adjoint in ("discrete", "seminorm"))
    assert (exact.middle, exact.low) == (pytest.approx(0.005), -math.inf)
    assert (coarse.middle, coarse.high) == (pytest.approx(0.5), math.inf)
    level = fair([*rows, row("default", 10.0, 100, 5.0)], "seminorm").at_equal_error
    assert (level.middle, math.isnan(level.high)) == (pytest.approx(0.5), True)
    assert math.isnan(exact.high)
    assert math.isnan(coarse.low)


def test_the_figure_names_bounds():
    rows = [*default_curve(), row("discrete", 1e-2, 50, 1e-9), row("seminorm", 1e-2, 50, 10.0)]
    for each in rows:
        each["cpu_seconds"] = 1.0
    by_nfe, by_seconds, ratios = law_figures.equal_error({"speech_commands": {"rows": rows}}).axes
    assert list(by_nfe.get_lines()[0].get_xdata()) == pytest.approx([100, 1000, 10000])
    assert {*by_seconds.get_lines()[0].get_xdata()} == {1.0}
    places = [line.get_xdata()[0] for line in ratios.get_lines() if line.get_marker() not in ("None", None)]
    assert places == pytest.approx([0.005, 0.5]), "of the evaluations"
    assert [label.get_text() for label in ratios.get_yticklabels()] == ["discrete", "seminorm"]
    arrows = [(arrow.xyann[1], arrow.xy[0] / arrow.xyann[0]) for arrow in ratios.texts]
    assert arrows == [(0, pytest.approx(0.85)), (1, pytest.approx(1 / 0.85))], "to where the bound leaves it open"


def test_the_interval_is_that_of_the_mean_where_the_curve_is_straight():
    """There the ratio is a mean of logarithms, of which the jackknife gives Student's t."""
    factors = (1.0, 4.0, 8.0)
    rows = []
    for batch, factor in enumerate(factors):
        rows += default_curve(batch=batch)
        rows.append(row("discrete", 1e-2, 1000 * factor, 1e-2, batch=batch))
    found = fair(rows, "discrete").at_equal_error
    logarithms = numpy.log(factors)
    assert found.middle == pytest.approx(numpy.exp(logarithms.mean()))
    assert found.high == pytest.approx(numpy.exp(logarithms.mean() + half_width(logarithms)))
    assert found.low == pytest.approx(numpy.exp(logarithms.mean() - half_width(logarithms)))


def test_a_batch_counts_once_however_many_weights_it_was_measured_with():
    rows = [*default_curve(), *default_curve(batch=1), row("discrete", 1e-2, 1000, 1e-2)]
    few = [*rows, row("discrete", 1e-2, 4000, 1e-2, batch=1)]
    many = [
        *rows,
        *default_curve(batch=1, seed=1),
        *(row("discrete", 1e-2, nfe, 1e-2, batch=1, seed=seed) for seed, nfe in enumerate((2000, 8000))),
    ]
    found, other = fair(few, "discrete").at_equal_error, fair(many, "discrete").at_equal_error
    assert (found.middle, found.num_batches) == (other.middle, other.num_batches)


def rows_of_seeds(factors, error=1e-2):
    """Two batches that agree, with weights of as many seeds as there are factors on the cost of `discrete`."""
    return [
        each
        for batch in range(2)
        for seed, factor in enumerate(factors)
        for each in [
            *default_curve(batch=batch, seed=seed),
            row("discrete", 1e-2, 1000 * factor, error, batch=batch, seed=seed),
        ]
    ]


def test_the_interval_is_that_over_weights_where_it_is_the_wider_one():
    factors = (1.0, 4.0, 8.0)
    found = fair(rows_of_seeds(factors), "discrete").at_equal_error
    logarithms = numpy.log(factors)
    assert found.middle == pytest.approx(numpy.exp(logarithms.mean()))
    assert found.high == pytest.approx(numpy.exp(logarithms.mean() + half_width(logarithms)))
    assert found.low == pytest.approx(numpy.exp(logarithms.mean() - half_width(logarithms)))
    assert [alone.middle for alone in found.of_weights] == pytest.approx(factors)
    assert fair(rows_of_seeds(factors), "discrete").error.high == pytest.approx(100)


def test_the_interval_is_that_over_batches_where_it_is_the_wider_one():
    rows = rows_of_seeds((2.0, 2.0))
    for each in rows:
        if (each["adjoint"], each["batch"]) == ("discrete", 1):
            each |= {"backward_nfe": 7990}
    found = fair(rows, "discrete").at_equal_error
    logarithms = numpy.log((2, 8))
    assert (found.middle, found.high) == pytest.approx((4, numpy.exp(logarithms.mean() + half_width(logarithms))))


def test_a_bound_by_some_of_the_weights_leaves_both_ends_open():
    rows = rows_of_seeds((1.0, 1.0, 1.0))
    for each in rows:
        if (each["adjoint"], each["seed"]) == ("discrete", 2):
            each |= {"error": 1e-5}
    found = fair(rows, "discrete").at_equal_error
    assert found.open_ends == (True, True)
    assert [alone.open_ends for alone in found.of_weights] == [(False, False), (False, False), (True, False)]
    for each in rows:
        if each["adjoint"] == "discrete":
            each |= {"error": 1e-5}
    found = fair(rows, "discrete").at_equal_error
    assert found.open_ends == (True, False)


def test_every_way_is_measured_at_every_tolerance(monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(gradients, "time", SimpleNamespace(process_time=lambda: next(ticks)))
    measured = Measured(
        (Way("default", "dopri5", (1e-2, 1e-4)), Way("seminorm", "bosh3", (1e-3,), warm_start=True)),
        batch_size=4,
        num_batches=1,
        atol_over_rtol=0.1,
        reference=(1e-9, 1e-9),
        judge=(1e-10, 1e-10),
    )
    solved = []

    def spy(*arguments, adjoint, **options):
        solved.append((adjoint, options.get("method")))
        return gradient_of(*arguments, adjoint=adjoint, **options)

    monkeypatch.setattr(gradients, "gradient_of", spy)
    model, batch = Model(Network(width=32)), (random(4, 3),)
    rows = list(measure_batch(measured, model, batch, squares))
    assert solved[2:] == [*2 * [("default", "dopri5")], (Backsolve("seminorm", warm_start=True), "bosh3")]
    assert solved[:2] == [("seminorm", None), ("discrete", None)], "the reference, and what judges it"
    _, judged = gradients.exact_gradient(model, batch, squares, measured.reference, measured.judge)
    assert {row["reference_error"] for row in rows} == {judged}
    assert [(row["adjoint"], row["method"], row["warm_start"], row["rtol"]) for row in rows] == [
        ("default", "dopri5", False, 1e-2),
        ("default", "dopri5", False, 1e-4),
        ("seminorm", "bosh3", True, 1e-3),
    ]
    assert rows[0]["error"] > 3 * rows[1]["error"] > 0
    assert all(row["atol"] == pytest.approx(row["rtol"] / 10) and row["cpu_seconds"] == 1 for row in rows)
    assert all(row["reference_error"] < rows[1]["error"] / 10 for row in rows)


def test_a_flows_integrals_are_weighed_but_where_a_way_says_otherwise(monkeypatch):
    """And never for the reference, however the model came."""
    solved = []

    def spy(model, *arguments, **options):
        solved.append(model.flow.integrals)
        return gradient_of(model, *arguments, **options)

    monkeypatch.setattr(gradients, "gradient_of", spy)
    ways = (Way("seminorm", "dopri5", (1e-2,), integrals="unweighed"), Way("default", "dopri5", (1e-2,)))
    reference = (1e-4, 1e-4)
    measured = Measured(ways, batch_size=4, num_batches=1, atol_over_rtol=1.0, reference=reference, judge=reference)
    config = flow.Config("cpu", "seminorm", data="checkerboard", width=4, integrals="unweighed")
    rows = list(measure_batch(measured, flow.build(config), (random(4, 2, dtype=torch.float32),), flow.mean_loss))
    assert solved == ["none", "none", "unweighed", "none"]
    assert [name_of(row) for row in rows] == ["seminorm, integrals unweighed", "default"]


@pytest.mark.parametrize("experiment", MEASURED)
def test_the_reference_is_two_decades_tighter_and_every_tolerance_has_its_default(experiment):
    measured = MEASURED[experiment]
    tightest = min(rtol for way in measured.ways for rtol in way.rtols)
    assert measured.reference[0] < 1.01e-2 * tightest
    assert measured.reference[1] < 1.01e-2 * tightest * measured.atol_over_rtol
    first = measured.ways[0]
    assert (first.adjoint, first.method) == ("default", "dopri5")
    assert all(set(way.rtols) <= set(first.rtols) for way in measured.ways)
    assert set(COMPARED_AT[experiment]) <= set(first.rtols)


def test_equal_error_goes_on_where_it_stopped_and_starts_anew_for_another_reference(
    tmp_path, small_networks, monkeypatch
):
    def measure(**changes):
        equal_error.main(dataclasses.replace(options, **changes))
        return json.loads(path_of(str(tmp_path), "equal_error", "acrobot").read_bytes())["rows"]

    for seed in (0, 1):
        saved_run(tmp_path, seed=seed)
    monkeypatch.setattr(TrainedRun, "test_set", lambda self: (random(40, 8, 8, dtype=torch.float32),))
    ways = (Way("default", "dopri5", (1e-2,)),)
    few = Measured(ways, batch_size=4, num_batches=2, atol_over_rtol=1.0, reference=(1e-5, 1e-5), judge=(1e-5, 1e-5))
    monkeypatch.setitem(MEASURED, "acrobot", few)
    options = equal_error.Options(str(tmp_path), str(tmp_path), experiments=("acrobot",))
    first = measure(limit=3)
    assert [(row["seed"], row["batch"]) for row in first] == [(0, 0), (1, 0), (0, 1)]
    made_on = provenance.describe(torch.device("cpu"))
    monkeypatch.setattr(provenance, "describe", lambda device: made_on | {"device_name": "another"})
    whole = measure()
    assert whole[:3] == first
    record = json.loads(path_of(str(tmp_path), "equal_error", "acrobot").read_bytes())
    assert record["provenance"]["device_name"] == f"{made_on['device_name']}, then another"
    assert len({row["error"] for row in whole}) == 4, "each is of weights and samples of its own"
    for changes in (dict(judge=(1e-6, 1e-6)), dict(atol_over_rtol=0.1)):
        monkeypatch.setitem(MEASURED, "acrobot", dataclasses.replace(few, **changes))
        assert len(measure(limit=1)) == 1
        assert len(measure()) == 4
    saved_run(tmp_path, loss=0.005, start_time=4.0, resume=True)
    measure()  # the same settings
    saved_run(tmp_path, loss=0.001, max_epochs=7, start_time=5.0)
    with pytest.raises(
        ValueError, match="was measured with the weights of acrobot/seminorm, which was trained by other"
    ):
        measure()


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_is_at_least_one(limit):
    with pytest.raises(ValueError, match="limit"):
        equal_error.Options(limit=limit)
