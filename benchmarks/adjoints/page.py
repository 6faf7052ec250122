"""Writes `docs/which_adjoint.md` and its diagrams from the committed results: `python -m benchmarks.adjoints.page`.

Here is what the page says; how is in `page.md.jinja`.
"""

import math
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import pandas
import tyro

from common import command_line, files
from common.provenance import short_commit
from reproduction.style import render

from . import costs, diagrams, measuring, references
from .contract import MAX_STEPS
from .decisions import decide, in_jax, in_pytorch
from .fronts import (
    CLOSE,
    DISCRETE,
    TARGETS,
    WRONG,
    Failures,
    cells,
    curve,
    failures,
    front,
    measured_everywhere,
    scientific,
    seconds_for,
    standings,
)
from .names import find_contestants, find_problems
from .results import COMMITTED, Measurement, Results, load_all

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "which_adjoint.md"
FIGURES = ROOT / "reference" / "figures"
INTERPOLATED, WARM = "interpolated", "ours, seminorm, warm start"
"""The interpolated adjoint, and what it is compared with beside `DISCRETE`."""
VERSIONS = ("torch", "torchdiffeq", "torchode", "diffrax", "jax")


class Gathered:
    """The results in one dtype by problem and contestant, in the order in which these are listed."""

    def __init__(self, all_results: Iterable[Results], dtype: str = "float64"):
        self.dtype = dtype
        by_problem: dict[str, dict[str, Results]] = {}
        for results in all_results:
            if results.dtype != dtype:
                continue
            by_problem.setdefault(results.problem, {})[results.contestant] = results
        known = [*find_contestants()]
        self.problems = {name: problem for name, problem in find_problems().items() if name in by_problem}
        self.results = {
            name: {way: by_problem[name][way] for way in known if way in by_problem[name]} for name in self.problems
        }
        self.all = [results for of_problem in self.results.values() for results in of_problem.values()]
        self.ways = [way for way in known if any(it.contestant == way and curve(it) for it in self.all)]
        self.cells = cells(self.all)
        self.ranked = measured_everywhere(self.cells, self.ways)
        self.failures = failures(self.all)
        memory = {way: [it.mebibytes for it in self.measurements(way) if it.mebibytes is not None] for way in self.ways}
        self.memory = {way: max(found) for way, found in memory.items() if found}

    def curves(self, problem: str) -> dict[str, list]:
        """The curve of each way at a problem."""
        return {way: curve(results) for way, results in self.results.get(problem, {}).items()}

    def agreement(self, problem: str) -> float:
        """How far the two ways agree on the reference."""
        return max(results.agreement for results in self.results[problem].values())

    def spread(self) -> float:
        """The largest time of a step over the smallest, among its rounds: the median over all measurements, or NaN."""
        rounds = [it.seconds for results in self.all for it in results.measurements if len(it.seconds) > 1]
        return statistics.median([max(seconds) / min(seconds) for seconds in rounds] or [math.nan])

    def decisions(self) -> list[str]:
        """What they say to take."""
        return decide(self.cells, self.ways, self.problems, self.failures, memory=self.memory)

    def measurements(self, way: str) -> list[Measurement]:
        """Those of a way that came to an end."""
        return [
            it for results in self.all if results.contestant == way for it in results.measurements if not it.failure
        ]


def write() -> None:
    """Writes the page and the diagrams of the committed results."""
    all_results = load_all(COMMITTED)
    gathered = Gathered(all_results)
    for name, problem in gathered.problems.items():
        figure = diagrams.work_precision(problem, gathered.curves(name), gathered.agreement(name))
        files.replace(FIGURES / f"adjoints-{name}.png", render(figure, "png"))
    files.replace(PAGE, make_page(all_results).encode())
    print(f"Wrote {PAGE} and {len(gathered.problems)} figures")


def make_page(all_results: Sequence[Results]) -> str:
    """The page, in Markdown."""
    gathered = Gathered(all_results)
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    return environment.get_template("page.md.jinja").render(
        **_made_on(gathered),
        num_measurements=sum(len(results.measurements) for results in gathered.all),
        ways=gathered.ways,
        targets=[scientific(target) for target in TARGETS],
        decisions=gathered.decisions(),
        unranked=[way for way in gathered.ways if way not in gathered.ranked],
        standings=_standings(gathered),
        costs=_costs(gathered),
        failures=_failures(gathered),
        interpolated=_interpolated(gathered),
        float32=_in_float32(Gathered(all_results, "float32"), gathered),
        float32_commits=_commits_apart(Gathered(all_results, "float32"), gathered),
        problems=[_problem(gathered, name) for name in gathered.problems],
        close=f"{CLOSE:g}",
        spread=f"{gathered.spread():.2f}",
        wrong=f"{WRONG:.0%}".replace("%", " %"),
        trusted=references.TRUSTED,
        least=scientific(diagrams.LEAST),
        most=f"{diagrams.MOST:g}",
        atol=f"{measuring.ATOL:.0%}".replace("%", " %"),
        max_steps=f"{MAX_STEPS:,}",
        num_rounds=measuring.NUM_ROUNDS,
        long=f"{measuring.LONG:g}",
        too_long=f"{measuring.TOO_LONG:g}",
        vain=f"{measuring.VAIN:g}",
        limit=f"{measuring.LIMIT:g}",
    )


def _made_on(gathered: Gathered) -> dict[str, Any]:
    """On what, with what and when."""
    sessions = [session for results in gathered.all for session in results.sessions]
    packages = {name: version for session in sessions for name, version in session.packages.items() if version}
    days = sorted({time.strftime("%Y-%m-%d", time.gmtime(session.started)) for session in sessions})
    return {
        "machines": _machines(gathered.all),
        "versions": ", ".join(f"{name} {packages[name]}" for name in VERSIONS if name in packages),
        "commits": sorted({short_commit(session.commit) for session in sessions}),
        "days": [days[0], days[-1]] if len(days) > 1 else days,
    }


def _commits_apart(single: Gathered, double: Gathered) -> list[str]:
    """The commits of the results in one dtype, if they were not measured with those in the other; else none."""
    of_single, of_double = (
        {session.started: short_commit(session.commit) for results in gathered.all for session in results.sessions}
        for gathered in (single, double)
    )
    return [] if of_single.keys() <= of_double.keys() else sorted(set(of_single.values()))


def _machines(of: Iterable[Results]) -> list[str]:
    return sorted({session.device_name for results in of for session in results.sessions})


def _table(rows: Sequence[Mapping[str, str]]) -> str:
    frame = pandas.DataFrame(rows).fillna("")
    alignment = ("left", *["right"] * (frame.shape[1] - 1))
    return frame.to_markdown(index=False, disable_numparse=True, colalign=alignment)


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.0f}" if seconds >= 1 else f"{1e3 * seconds:.3g}"


def _standings(gathered: Gathered) -> str:
    groups = [in_pytorch(gathered.ranked), in_jax(gathered.ranked)]
    of_framework = {it.way: it for group in groups for it in standings(gathered.cells, group)}
    rows = []
    for it in standings(gathered.cells, gathered.ranked):
        own = of_framework.get(it.way)
        measured = gathered.measurements(it.way)
        rows.append(
            {
                "way": it.way,
                "reaches the error": it.reached,
                f"within {CLOSE:g} of the best of its framework": f"{own.num_close}" if own else "",
                "typical time over it": f"{own.typical:.2f}" if own else "",
                f"within {CLOSE:g} of the best of all": f"{it.num_close}",
                "typical time over that": f"{it.typical:.2f}",
                "MiB, largest": f"{gathered.memory[it.way]:.1f}" if it.way in gathered.memory else "",
                "first step, s, largest": f"{max(measurement.first_seconds for measurement in measured):.1f}",
            }
        )
    return _table(rows)


def _costs(gathered: Gathered) -> dict[str, Any] | None:
    """What steps and evaluations take, by problem; None if nothing was measured that tells."""
    found = {name: costs.lines(of_problem) for name, of_problem in gathered.results.items()}
    found = {name: lines for name, lines in found.items() if lines is not None}
    if not found:
        return None
    own, peer = zip(*found.values(), strict=True)
    slopes = [mine.slope / others.slope for mine, others in found.values()]
    rows = [
        {
            "problem": gathered.problems[name].title,
            "ours, ms besides": f"{1e3 * mine.fixed:.1f}",
            "diffrax, ms besides": f"{1e3 * others.fixed:.1f}",
            "ours, microseconds an evaluation": f"{1e6 * mine.slope:.3g}",
            "diffrax, microseconds an evaluation": f"{1e6 * others.slope:.3g}",
        }
        for name, (mine, others) in found.items()
    ]
    return {
        "own": costs.OWN,
        "peer": costs.PEER,
        "own_fixed": f"{1e3 * statistics.median(line.fixed for line in own):.1f}",
        "peer_fixed": f"{1e3 * statistics.median(line.fixed for line in peer):.1f}",
        "slope": f"{statistics.median(slopes):.2f}",
        "slopes": f"{min(slopes):.2f} to {max(slopes):.2f}",
        "miss": f"{max(line.miss for line in (*own, *peer)):.0%}".replace("%", " %"),
        "range": f"{costs.RANGE:g}",
        "table": _table(rows),
    }


def _failures(gathered: Gathered) -> str:
    rows = []
    for name, problem in gathered.problems.items():
        own = sorted((it for it in gathered.failures if it.problem == name), key=lambda it: -it.rtol)
        rows.append({"problem": problem.title, **{scientific(failure.rtol): _who_fails(failure) for failure in own}})
    return _table(rows)


def _who_fails(failure: Failures) -> str:
    number, total = sum(failure.backsolves.values()), len(failure.backsolves)
    return f"{number} of {total}" + (", discrete too" if failure.discrete else "")


def _interpolated(gathered: Gathered) -> dict[str, Any]:
    """How the interpolated adjoint does beside the two that it would stand between.

    It is better at a problem if it is faster than both in every cell that any of the three reaches.
    """
    rows, ratios, better = [], [], []
    for name, problem in gathered.problems.items():
        curves = gathered.curves(name)
        of_problem = []
        for target in TARGETS:
            seconds = {way: seconds_for(curves.get(way, []), target) for way in (INTERPOLATED, DISCRETE, WARM)}
            shown = {way: "" if taken is None else _milliseconds(taken) for way, taken in seconds.items()}
            rows.append({"problem": problem.title, "error": scientific(target), **shown})
            own, *others = (math.inf if taken is None else taken for taken in seconds.values())
            if min(own, *others) < math.inf:
                of_problem.append(own / min(others))
        ratios += of_problem
        if of_problem and max(of_problem) < 1 / CLOSE:
            better.append(f"{problem.title}: {min(of_problem):.2f} to {max(of_problem):.2f}")
    return {
        "table": _table(rows),
        "num_cells": len(ratios),
        "num_faster": sum(ratio < 1 / CLOSE for ratio in ratios),
        "num_slower": sum(ratio > CLOSE for ratio in ratios),
        "better": better,
    }


def _in_float32(single: Gathered, double: Gathered) -> str:
    """The time of the fastest way in float32 and in float64, by framework; empty without results in float32."""
    rows = []
    for name, problem in single.problems.items():
        # Those that were measured in both.
        ways = [way for way in single.curves(name) if way in double.curves(name)]
        for target in TARGETS:
            row = {"problem": problem.title, "error": scientific(target)}
            for framework, choose in (("PyTorch", in_pytorch), ("JAX", in_jax)):
                for gathered in (single, double):
                    curves = gathered.curves(name)
                    times = (seconds_for(curves[way], target) for way in choose(ways))
                    least = min((seconds for seconds in times if seconds is not None), default=None)
                    row[f"{framework}, {gathered.dtype}"] = "" if least is None else _milliseconds(least)
            rows.append(row)
    return _table(rows) if rows else ""


def _problem(gathered: Gathered, name: str) -> dict[str, Any]:
    """What the page shows of one problem."""
    problem, of_problem = gathered.problems[name], gathered.results[name]
    rows = []
    for way, point in front(gathered.curves(name)):
        measurement = of_problem[way].at(point.rtol)
        counts = [measurement.forward_nfe, measurement.backward_nfe]
        rows.append(
            {
                "on the front": way,
                "rtol": scientific(point.rtol),
                "error": f"{point.error:.1e}".replace("e-0", "e-"),
                "CPU ms": _milliseconds(point.seconds),
                "NFE": "" if None in counts else " + ".join(map(str, counts)),
                "MiB": "" if measurement.mebibytes is None else f"{measurement.mebibytes:.1f}",
            }
        )
    [reference] = {results.reference for results in of_problem.values()}
    return {
        "name": name,
        "title": problem.title,
        "shape": " x ".join(map(str, problem.y0.shape)),
        "num_parameters": f"{problem.num_parameters:,}",
        "num_times": len(problem.times),
        "reference": reference,
        "agreement": scientific(gathered.agreement(name)),
        "machines": _machines(of_problem.values()),
        "apart": "; ".join(_measured_apart(of_problem)),
        "absent": "; ".join(way for way in gathered.ways if way not in of_problem),
        "failed": "; ".join(_without_gradient(of_problem)),
        "front": _table(rows) if rows else "No way has an error below the limit.",
    }


def _measured_apart(of_problem: Mapping[str, Results]) -> Iterable[str]:
    """The ways that did not take turns with most others."""
    starts = {way: frozenset(session.started for session in results.sessions) for way, results in of_problem.items()}
    [(everyones, _)] = Counter(starts.values()).most_common(1)
    return [way for way, of_way in starts.items() if not of_way <= everyones]


def _without_gradient(of_problem: Mapping[str, Results]) -> Iterable[str]:
    for way, results in of_problem.items():
        failed = [scientific(measurement.rtol) for measurement in results.measurements if measurement.failure]
        if failed:
            yield f"{way} at {', '.join(failed)}"


if __name__ == "__main__":
    command_line.call(tyro.cli, write)
