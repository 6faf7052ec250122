"""A short list of decisions that the results support, each with the number of problems behind it; `page` shows it."""

import statistics
from collections.abc import Iterable, Mapping, Sequence

from .contract import TRAITS, Problem
from .fronts import CLOSE, TARGETS, Cell, Failures, library_of, measured_everywhere, scientific, standings

JAX = ("diffrax",)
"""Libraries for which a field must be written in JAX."""
OUTSIDE = ("interpolated",)
"""What is no part of any library, so that nobody can decide for it."""
KINDS = {
    "ours": ("ours, discrete", ("ours, default", "ours, seminorm", "ours, seminorm, warm start")),
    "torchdiffeq": (
        "torchdiffeq, through the solver",
        ("torchdiffeq, adjoint", "torchdiffeq, adjoint, seminorm"),
    ),
    "diffrax": ("diffrax, recursive checkpoints", ("diffrax, backsolve", "diffrax, backsolve, seminorm")),
}
"""By library: the gradient of the steps taken, and the backward solves, by one method (dopri5)."""
NUM_OTHERS = 3
"""How many ways are named behind the first."""
STRICT = 1e-4
"""Failures are told at such an rtol and tighter ones: at looser ones a large error is no surprise."""


def in_pytorch(ways: Iterable[str]) -> list[str]:
    """Those of these ways that a PyTorch field can be solved by."""
    return [way for way in ways if library_of(way) not in (*JAX, *OUTSIDE)]


def in_jax(ways: Iterable[str]) -> list[str]:
    """Those of these ways that a field in JAX can be solved by."""
    return [way for way in ways if library_of(way) in JAX]


def decide(
    measured: Sequence[Cell],
    ways: Sequence[str],
    problems: Mapping[str, Problem],
    failed: Sequence[Failures],
    *,
    memory: Mapping[str, float],
) -> list[str]:
    """Sentences in Markdown, from the most general to the particular.

    Args:
        measured: the cells of all problems.
        ways: the names of all contestants.
        problems: those of the cells, by name.
        failed: who fails where.
        memory: the largest MiB of each way.
    """

    def mebibytes(way: str) -> str:
        return f"{memory[way]:.0f} MiB" if way in memory else "unknown memory"

    ways = measured_everywhere(measured, ways)
    candidates = in_pytorch(ways)
    ranked = standings(measured, candidates)
    if not ranked:
        return ["Nothing was measured in PyTorch, so there is nothing to decide."]
    fastest, (surest, *others) = ranked[0], sorted(ranked, key=lambda it: (-it.reach, it.typical))
    parts = {
        f"errors of at most {scientific(target)}": [it for it in measured if it.target == target] for target in TARGETS
    }
    for trait, called in TRAITS.items():
        parts[called] = [cell for cell in measured if trait in problems[cell.problem].traits]
    return [
        f"**The fastest in PyTorch is most often `{fastest.way}`**: it is within {CLOSE:g} times of the fastest in "
        f"PyTorch in {fastest.num_close} of {_counted(fastest.num_cells, 'cell')}. It reaches the error in "
        f"{fastest.reached}, and needs up to {mebibytes(fastest.way)}.",
        f"**The surest in PyTorch is `{surest.way}`**: it reaches the error in {surest.reached}. There it takes "
        f"{surest.typical:.2f} times the time of the fastest in PyTorch (geometric mean), and up to "
        f"{mebibytes(surest.way)}."
        + "".join(
            f" `{it.way}` reaches {it.reached}, and takes {it.typical:.2f} times, up to {mebibytes(it.way)}."
            for it in others[:NUM_OTHERS]
        ),
        *(_for_part(called, part, candidates, surest.way) for called, part in parts.items() if part),
        *_on_kinds(measured),
        _on_failures(failed),
        *_on_frameworks(measured, ways),
    ]


def _for_part(called: str, part: Sequence[Cell], candidates: Sequence[str], usual: str) -> str:
    """What is the fastest in some of the cells, and how the usual does there."""
    ranked = standings(part, candidates)
    number = len({cell.problem for cell in part})
    begin = f"For {called} (n = {_counted(number, 'problem')}, {_counted(len(part), 'cell')})"
    if not ranked:
        return f"{begin} no way in PyTorch reaches the error."
    shown = [ranked[0], *(it for it in ranked[1:] if it.way == usual)]
    told = "; ".join(
        f"`{it.way}` reaches the error in {it.reached}, within {CLOSE:g} times of the fastest in PyTorch in "
        f"{it.num_close}"
        for it in shown
    )
    return f"{begin}: {told}."


def _on_kinds(measured: Sequence[Cell]) -> Iterable[str]:
    """The gradient of the steps taken beside backward solves, in each library."""
    for library, (discrete, backsolves) in KINDS.items():
        seconds = [
            (
                cell.seconds.get(discrete),
                min((cell.seconds[way] for way in backsolves if way in cell.seconds), default=None),
            )
            for cell in measured
            if discrete in cell.measured and not cell.measured.isdisjoint(backsolves)
        ]
        own, others = (sum(it[kind] is not None for it in seconds) for kind in (0, 1))
        ratios = [own / other for own, other in seconds if own is not None and other is not None]
        if ratios:
            yield (
                f"**Steps or backward solve, in {library}**: `{discrete}` reaches the error in {own} of "
                f"{_counted(len(seconds), 'cell')}, the best backward solve in {others}. Where both do, the first "
                f"takes {statistics.median(ratios):.2f} times the time of the second (median; {min(ratios):.2f} to "
                f"{max(ratios):.2f}). It is faster by more than {CLOSE:g} times in "
                f"{sum(ratio < 1 / CLOSE for ratio in ratios)} of {len(ratios)}, and slower by as much in "
                f"{sum(ratio > CLOSE for ratio in ratios)}."
            )


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"


def _on_failures(failed: Sequence[Failures]) -> str:
    strict = [it for it in failed if it.rtol <= STRICT * 1.001]
    problems = {it.problem for it in strict}
    all_fail = {it.problem for it in strict if all(it.backsolves.values()) and not it.discrete}
    some_fail = {it.problem for it in strict if any(it.backsolves.values()) and not it.discrete} - all_fail
    reverse = {it.problem for it in strict if it.discrete and not all(it.backsolves.values())}

    def listed(names: set[str]) -> str:
        told = f" ({', '.join(sorted(names))})" if names else ""
        return f"{len(names)} of {_counted(len(problems), 'problem')}{told}"

    return (
        "**Trust no backward solve of a state that cannot be solved backwards.** At some rtol of "
        f"{scientific(STRICT)} or tighter all that were tried fail and `discrete` does not on {listed(all_fail)}; some "
        f"of them on {listed(some_fail)}. The reverse, that `discrete` fails and some backward solve does not, is seen "
        f"on {listed(reverse)}."
    )


def _on_frameworks(measured: Sequence[Cell], ways: Sequence[str]) -> list[str]:
    ratios = []
    for cell in measured:
        reached = [
            [cell.seconds[way] for way in group if way in cell.seconds] for group in (in_pytorch(ways), in_jax(ways))
        ]
        if all(reached):
            ratios.append(min(reached[0]) / min(reached[1]))
    if not ratios:
        return []
    num_behind = sum(ratio > CLOSE for ratio in ratios)
    return [
        f"**If the framework is free to choose**: the best way in PyTorch takes {statistics.median(ratios):.1f} times "
        f"the time of the best in JAX (median; {min(ratios):.2g} to {max(ratios):.2g}), and more than {CLOSE:g} times "
        f"in {num_behind} of {len(ratios)} cells. JAX compiles all of a gradient step; `compile='solve'` compiles "
        "the loops over steps, and leaves Python, the guards of torch's compiler and autograd around them."
    ]
