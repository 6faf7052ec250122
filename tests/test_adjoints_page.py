"""What the page of the benchmark says follows from its results."""

import dataclasses
import re

import pytest
from test_adjoints_benchmark import PROBLEM

from benchmarks.adjoints import costs, diagrams, page, results
from benchmarks.adjoints.decisions import decide
from benchmarks.adjoints.fronts import Cell, Failures, Point, cells, curve, failures, front, seconds_for, standings
from benchmarks.adjoints.results import Measurement, Results, Session
from reproduction import page as report


def made_up(problem, contestant, *rows, agreement=1e-12):
    """Results from (rtol, error, seconds); an error of None is a failure."""
    measurements = []
    for rtol, error, seconds in rows:
        found = (
            dict(failure="no end")
            if error is None
            else dict(error=error, first_seconds=1.0, seconds=[1.5 * seconds, seconds, seconds])
        )
        measurements.append(Measurement(rtol=rtol, atol=rtol / 100, session=0, **found))
    known = dict(dtype="float64", agreement=agreement, reference="two ways", measurements=measurements)
    return Results(problem=problem, contestant=contestant, **known)


def test_the_time_for_an_error_is_interpolated_in_logarithms():
    points = [Point(1e-2, 1e-1, 1.0), Point(1e-4, 1e-3, 4.0), Point(1e-6, 1e-5, 8.0)]
    assert seconds_for(points, 1e-2) == pytest.approx(2.0)
    assert seconds_for(points, 1.0) == 1.0
    assert seconds_for(points, 1e-5) == 8.0
    assert seconds_for(points, 1e-6) is None


def test_an_error_is_no_smaller_than_the_reference_can_tell():
    assert [point.error for point in curve(made_up("p", "w", (1e-2, 1e-9, 1.0), agreement=1e-6))] == pytest.approx(
        [1e-5]
    )
    assert curve(made_up("p", "w", (1e-2, None, 1.0))) == []


def test_the_front_has_what_nothing_beats():
    curves = {
        "a": [Point(1e-2, 1e-2, 1.0), Point(1e-4, 1e-4, 3.0)],
        "b": [Point(1e-2, 1e-3, 2.0), Point(1e-4, 1e-4, 4.0)],
    }
    assert [(name, point.seconds) for name, point in front(curves)] == [("a", 1.0), ("b", 2.0), ("a", 3.0)]


ROWS = ((1e-2, 1e-2, 0.1), (1e-4, 1e-4, 0.2), (1e-6, 1e-6, 0.3))


SLOWER = tuple((rtol, error, 1.6 * seconds) for rtol, error, seconds in ROWS)


FASTER = tuple((rtol, error, 0.5 * seconds) for rtol, error, seconds in ROWS)


FAILED = tuple((rtol, 5.0, seconds) for rtol, _, seconds in ROWS)


MADE_UP = [
    made_up("calm", "ours, discrete", *SLOWER),
    made_up("calm", "ours, seminorm", *ROWS),
    made_up("wild", "ours, discrete", *ROWS),
    made_up("wild", "ours, seminorm", *FAILED),
    made_up("wilder", "ours, discrete", *ROWS),
    made_up("wilder", "ours, seminorm", *SLOWER),
    *(made_up(problem, "diffrax, recursive checkpoints", *FASTER) for problem in ("calm", "wild", "wilder")),
]


KINDS = {
    "calm": dataclasses.replace(PROBLEM, name="calm", traits=("equation",)),
    "wild": dataclasses.replace(PROBLEM, name="wild", traits=("network",)),
    "wilder": dataclasses.replace(PROBLEM, name="wilder", traits=("network",)),
}


WAYS = ("ours, discrete", "ours, seminorm", "diffrax, recursive checkpoints")


def test_standings_count_what_is_close():
    [best, other] = standings(cells(MADE_UP), WAYS[:2])
    assert (best.way, best.num_cells, best.num_reached, best.num_close) == ("ours, discrete", 9, 9, 6)
    assert best.typical == pytest.approx(1.6 ** (1 / 3))
    assert (other.way, other.num_reached, other.num_close) == ("ours, seminorm", 6, 3)


def test_a_way_is_judged_where_it_was_measured():
    [standing] = standings(cells([*MADE_UP, made_up("calm", "ours, default", *ROWS[:2])]), ["ours, default"])
    assert (standing.num_cells, standing.num_reached, standing.reached) == (3, 2, "2 of 3")


@pytest.mark.parametrize("slow", [made_up("calm", "w", *ROWS[:1], (1e-4, 1e-4, 2.5)), made_up("calm", "w", *ROWS[:2])])
def test_a_cell_that_a_slow_way_does_not_reach_is_cut(slow):
    if slow.measurements[-1].median < 2:
        slow.measurements.append(Measurement(rtol=1e-6, atol=1e-8, session=0, failure="TooLong: given up after 300 s"))
    [standing] = standings(cells([*MADE_UP, slow]), ["w"])
    assert (standing.num_reached, standing.num_stopped, standing.reached) == (2, 1, "2 of 3 (1 cut)")


def test_decisions_follow_from_the_results():
    first, second, *others = decide(cells(MADE_UP), WAYS, KINDS, failures(MADE_UP), memory={"ours, discrete": 4.4})
    assert first == (
        "**The fastest in PyTorch is most often `ours, discrete`**: it is within 1.4 times of the fastest in PyTorch "
        "in 6 of 9 cells. It reaches the error in 9 of 9, and needs up to 4 MiB."
    )
    assert second == (
        "**The surest in PyTorch is `ours, discrete`**: it reaches the error in 9 of 9. There it takes 1.17 "
        "times the time of the fastest in PyTorch (geometric mean), and up to 4 MiB. `ours, seminorm` reaches 6 of 9, "
        "and takes 1.26 times, up to unknown memory."
    )
    told = "\n".join(others)
    assert (
        "For scientific models (n = 1 problem, 3 cells): `ours, seminorm` reaches the error in 3 of 3, within 1.4 "
        "times of the fastest in PyTorch in 3; `ours, discrete` reaches the error in 3 of 3, within 1.4 times of the "
        "fastest in PyTorch in 0."
    ) in told
    assert "For neural networks of up to 10,000 parameters (n = 2 problems, 6 cells): `ours, discrete` reaches" in told
    assert "all that were tried fail and `discrete` does not on 1 of 3 problems (wild)" in told
    assert "`discrete` fails and some backward solve does not, is seen on 0 of 3 problems" in told
    assert (
        "in ours**: `ours, discrete` reaches the error in 9 of 9 cells, the best backward solve in 6. Where both do, "
        "the first takes 1.11 times the time of the second (median; 0.62 to 1.60). It is faster by more than 1.4 times "
        "in 3 of 6, and slower by as much in 3."
    ) in told
    assert "the best way in PyTorch takes 2.0 times the time of the best in JAX" in told


def test_what_was_not_measured_everywhere_is_not_ranked():
    some = "ours, per-tensor"
    partial = [*MADE_UP, made_up(MADE_UP[0].problem, some, *FASTER)]
    without = decide(cells(MADE_UP), WAYS, KINDS, [], memory={})
    assert decide(cells(partial), [*WAYS, some], KINDS, [], memory={}) == without
    made = page.make_page(
        [
            made_up("linear", page.DISCRETE, *ROWS),
            made_up("linear", some, *FASTER),
            made_up("damped", page.DISCRETE, *ROWS),
        ]
    )
    assert f"and so neither ranked nor counted above: {some}.\n" in made


def counted(contestant, fixed, slope, evaluations=(100, 200, 300, 400)):
    """Results whose steps take `fixed` seconds and `slope` more for each evaluation."""
    found = made_up(
        "calm", contestant, *((10.0**-n, 1e-3, fixed + slope * nfe) for n, nfe in enumerate(evaluations, 2))
    )
    for measurement, nfe in zip(found.measurements, evaluations, strict=True):
        measurement.forward_nfe, measurement.backward_nfe = nfe // 2, nfe // 2
    return found


def test_what_a_step_takes_besides_its_evaluations():
    own, peer = costs.lines({costs.OWN: counted(costs.OWN, 0.004, 1e-5), costs.PEER: counted(costs.PEER, 0.001, 4e-6)})
    assert (own.fixed, own.slope, own.miss) == pytest.approx((0.004, 1e-5, 0), abs=1e-12)
    assert (peer.fixed, peer.slope, peer.miss) == pytest.approx((0.001, 4e-6, 0), abs=1e-12)


def test_a_line_misses_what_is_not_on_it():
    line = costs.line_through([100, 200, 400, 800], [1.0, 2.0, 4.0, 16.0])
    assert 0.1 < line.miss < 0.5


@pytest.mark.parametrize("evaluations", [(100, 110, 120, 190), (100, 200, 400)])
def test_too_few_evaluations_tell_nothing(evaluations):
    of_problem = {way: counted(way, 0.004, 1e-5, evaluations) for way in (costs.OWN, costs.PEER)}
    assert costs.lines(of_problem) is None
    assert costs.lines({}) is None


def test_decisions_turn_round_with_the_results():
    turned = {"ours, discrete": "ours, seminorm", "ours, seminorm": "ours, discrete"}
    other = [dataclasses.replace(it, contestant=turned.get(it.contestant, it.contestant)) for it in MADE_UP]
    first, *others = decide(cells(other), WAYS, KINDS, failures(other), memory={})
    assert "most often `ours, seminorm`" in first
    assert "`discrete` fails and some backward solve does not, is seen on 1 of 3 problems (wild)" in "\n".join(others)


def test_the_fastest_and_the_surest_are_named():
    fast = [made_up("calm", "ours, seminorm", *ROWS), made_up("wild", "ours, seminorm", *ROWS[:2])]
    sure = [made_up(problem, "ours, discrete", *SLOWER) for problem in ("calm", "wild")]
    first, second, *_ = decide(cells(fast + sure), WAYS, KINDS, [], memory={})
    assert "most often `ours, seminorm`**" in first
    assert "in 5 of 6 cells. It reaches the error in 5 of 6, and" in first
    assert "surest in PyTorch is `ours, discrete`**: it reaches the error in 6 of 6." in second


def test_nothing_measured_is_nothing_decided():
    assert decide([], WAYS, KINDS, [], memory={}) == ["Nothing was measured in PyTorch, so there is nothing to decide."]
    cell = Cell("calm", 1e-2, {"ours, discrete": 2.0, "ours, seminorm": 1.0}, frozenset())
    assert cell.ratios(["ours, discrete", "absent"]) == {"ours, discrete": 1.0}
    assert failures([made_up("calm", "ours, discrete", *ROWS)]) == []
    assert failures(MADE_UP)[0] == Failures("calm", 1e-6, {"ours, seminorm": False}, discrete=False)


def test_what_was_not_tried_is_not_counted_as_failed():
    given_up = made_up("wild", "ours, default", (1e-2, None, 0.0))
    slow = made_up("wild", "ours, seminorm", (1e-2, 1e-2, 9.0))
    found = failures([made_up("wild", "ours, discrete", *ROWS), given_up, slow])
    assert [(it.rtol, it.backsolves) for it in found] == [
        (1e-2, {"ours, default": True, "ours, seminorm": False}),
    ]


def test_the_report_has_the_decisions_if_there_are_results(tmp_path):
    assert report._adjoints(tmp_path) is None
    for contestant, rows in (("ours, discrete", ROWS), ("ours, seminorm", SLOWER)):
        results.save(tmp_path, made_up("linear", contestant, *rows))
    section = report._adjoints(tmp_path)
    assert (section["num_problems"], section["num_ways"]) == (1, 2)
    assert section["decisions"][0].startswith(
        "<strong>The fastest in PyTorch is most often <code>ours, discrete</code>"
    )


def test_the_page_shows_every_problem_that_was_measured(tmp_path):
    results.save(tmp_path, made_up("linear", "ours, discrete", *ROWS))
    results.save(tmp_path, made_up("damped", "ours, discrete", *ROWS))
    results.save(tmp_path, made_up("damped", "ours, seminorm", *FAILED[:2], (1e-6, None, 0.0)))
    measured = results.load_all(tmp_path)
    gathered = page.Gathered(measured)
    made = page.make_page(measured)
    assert "In float32" not in made
    for title in ("Linear system of 8, turning", "Linear system of 8, damped by rates up to 40"):
        assert f"### {title}\n" in made
    assert "No gradient at rtol: ours, seminorm at 1e-6." in made
    assert "Not measured: ours, seminorm." in made
    assert re.search(r"\| ours, discrete +\| +1e-4 \| +1.0e-4 \| +200 \|", made)
    figure = diagrams.work_precision(gathered.problems["damped"], gathered.curves("damped"), 1e-7)
    [axes] = figure.axes
    assert [line.get_label() for line in axes.lines] == ["ours, seminorm", "ours, discrete"]
    assert axes.xaxis_inverted()


def test_what_was_measured_in_float32_stands_beside_float64():
    slower = made_up("linear", "ours, discrete", *SLOWER)
    single = [
        dataclasses.replace(made_up("linear", contestant, *rows), dtype="float32")
        for contestant, rows in (
            ("ours, discrete", FASTER[:2]),
            ("interpolated", FASTER),
            ("diffrax, direct", ROWS[:1]),
            ("ours, seminorm", FASTER),
        )
    ]
    double = [slower, made_up("linear", "diffrax, direct", *ROWS[1:]), made_up("linear", "ours, default", *FASTER)]
    made = page.make_page([*double, *single])
    cells = [[cell.strip() for cell in line.split("|")[2:-1]] for line in _section(made, "In float32") if "|" in line]
    assert cells == [
        ["error", "PyTorch, float32", "PyTorch, float64", "JAX, float32", "JAX, float64"],
        cells[1],
        ["1e-2", "50", "160", "100", "200"],
        ["1e-4", "100", "320", "", "200"],
        ["1e-6", "", "480", "", "300"],
    ]
    assert {it.dtype for it in page.Gathered([*double, *single]).all} == {"float64"}


def _section(text, title):
    return text.partition(f"## {title}\n")[2].partition("\n## ")[0].splitlines()


def test_each_problem_names_its_machine_where_there_are_two():
    session = Session(
        device_name="one", num_threads=1, platform="", python="3", packages={}, commit="c" * 40, started=0.0
    )
    measured = [
        dataclasses.replace(made_up(problem, "ours, discrete", *ROWS), sessions=[replaced])
        for problem, replaced in (("linear", session), ("damped", dataclasses.replace(session, device_name="two")))
    ]
    made = page.make_page(measured)
    assert "on one core of one or two;" in made
    assert re.search(r"`linear`: .* On one\.", made)
    assert re.search(r"`damped`: .* On two\.", made)
    assert " On one." not in page.make_page(measured[:1])


def test_ways_that_were_measured_at_another_time_are_named():
    session = Session(
        device_name="one", num_threads=1, platform="", python="3", packages={}, commit="c" * 40, started=0.0
    )
    measured = [
        dataclasses.replace(made_up("linear", way, *ROWS), sessions=[dataclasses.replace(session, started=started)])
        for way, started in zip(WAYS, (1.0, 1.0, 2.0), strict=True)
    ]
    assert f"Measured at another time than most: {WAYS[2]}." in page.make_page(measured)
    assert "Not all ways were measured at one time at `linear`. Where ways of two" in page.make_page(measured)
    assert "another time" not in page.make_page(measured[:2])
    assert "at one time" not in page.make_page(measured[:2])


def test_another_time_of_float32_is_told():
    session = Session(
        device_name="one", num_threads=1, platform="", python="3", packages={}, commit="c" * 40, started=0.0
    )
    double, single = (
        dataclasses.replace(made_up("linear", WAYS[0], *ROWS), dtype=dtype, sessions=[session])
        for dtype in ("float64", "float32")
    )
    assert "another time" not in page.make_page([double, single])
    single.sessions = [dataclasses.replace(session, started=1.0, commit="d" * 40)]
    assert "Float32 was measured at another time (commit dddddddd)" in page.make_page([double, single])


def test_the_verdict_on_the_interpolated_adjoint_follows_from_the_results():
    measured = [made_up("linear", "interpolated", *FASTER), made_up("damped", "interpolated", *FASTER[:2])]
    for problem in ("linear", "damped"):
        measured += [made_up(problem, page.DISCRETE, *ROWS), made_up(problem, page.WARM, *FAILED)]
    found = page._interpolated(page.Gathered(measured))
    assert (found["num_cells"], found["num_faster"], found["num_slower"]) == (6, 5, 1)
    assert found["better"] == ["Linear system of 8, turning: 0.50 to 0.50"]


@pytest.mark.skipif(not any(results.COMMITTED.glob("*.json")), reason="no results of the benchmark are committed")
def test_the_page_is_what_the_results_make():
    measured = results.load_all(results.COMMITTED)
    gathered = page.Gathered(measured)
    for of_problem in gathered.results.values():
        assert len({session.device_name for it in of_problem.values() for session in it.sessions}) == 1
    assert page.make_page(measured) == page.PAGE.read_text(encoding="utf-8"), "run python -m benchmarks.adjoints.page"
    for name in gathered.problems:
        assert (page.FIGURES / f"adjoints-{name}.png").exists()
