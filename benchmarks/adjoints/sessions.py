"""Goes through problems, tolerances and contestants, and keeps each measurement as soon as it is made."""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from common import provenance
from torchadjoint import arguments

from . import names, results
from .contract import Problem
from .measuring import is_too_long, measure
from .names import Contestant
from .references import Reference, refer
from .results import Results, Session

SMALL_TOLERANCES = (1e-2, 1e-4, 1e-6, 1e-8)
"""Those of the small half; the whole has what lies between and 1e-9 too."""
PEERS = ("torchode", "diffrax", "jax")
"""Packages whose versions are kept besides those of `provenance`."""

LACKING = ("NotImplementedError", "ImportError", "ModuleNotFoundError")
"""How a failure begins that tells of what is installed, not of the way."""


def run(
    problems: tuple[str, ...] = (names.SMALL,),
    contestants: tuple[str, ...] = (names.SMALL,),
    tolerances: tuple[float, ...] = SMALL_TOLERANCES,
    dtype: Literal["float64", "float32"] = "float64",
    output: Path = Path("results/adjoints"),
) -> None:
    """Measures gradients by every way: error, evaluations, CPU seconds on one core, and memory.

    What is in the folder already is not measured again, so the same command goes on where it was stopped. Delete a file
    to have it measured anew. Most of a first run's time goes into compiling. The environment's TORCHINDUCTOR_CACHE_DIR
    and JAX_COMPILATION_CACHE_DIR name folders that keep what is compiled; first steps are shorter then.

    Args:
        problems: names of problems, "small" for the small half, or "all"; "lorenz*" stands for all that begin so.
        contestants: names of contestants, likewise, such as "small" or "ours*".
        tolerances: relative tolerances; the absolute ones are a hundredth of them.
        dtype: what is solved in.
        output: folder of the results files.
    """
    chosen_problems = names.choose("problem", problems, names.find_problems())
    chosen = names.choose("contestant", contestants, names.find_contestants())
    tolerances = sorted({arguments.number("tolerances", rtol, maximum=1) for rtol in tolerances}, reverse=True)
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    for contestant in chosen:
        if contestant.lacking:
            print(f"{contestant.name} is left out: {', '.join(contestant.lacking)} is not installed")
    chosen = [contestant for contestant in chosen if not contestant.lacking]
    if not chosen:
        raise ValueError("none of the contestants asked for is installed: `pip install -r requirements-bench.txt`")
    for problem in chosen_problems:
        measure_problem(problem, chosen, tolerances, dtype, output)


def measure_problem(
    problem: Problem,
    contestants: Sequence[Contestant],
    tolerances: Sequence[float],
    dtype: str,
    output: Path,
    *,
    reference_of: Callable[[Problem], Reference] = refer,
) -> None:
    """Measures what the folder lacks of one problem."""

    def kept_of(contestant: Contestant) -> Results | None:
        return results.load(results.path_of(output, problem.name, contestant.name, dtype))

    def missing(rtol: float) -> list[Contestant]:
        return [contestant for contestant in contestants if _is_missing(kept_of(contestant), rtol)]

    if not any(map(missing, tolerances)):
        print(f"{problem.name}: all is there")
        return
    reference = reference_of(problem)
    print(f"{problem.name}: two ways agree to {reference.agreement:.0e} on the reference")
    described, started = provenance.describe(torch.device("cpu")), time.time()
    described["packages"] |= {name: provenance.version(name) for name in PEERS}
    for rtol in tqdm(tolerances, desc=problem.name, unit="tolerance", disable=None):
        chosen = missing(rtol)
        found = measure(problem, reference, chosen, rtol=rtol, dtype=dtype)
        for contestant, measurement in zip(chosen, found, strict=True):
            if measurement.failure.startswith(LACKING):
                tqdm.write(f"{contestant.name} is left out: {measurement.failure.partition(': ')[2]}")
                continue
            kept = kept_of(contestant) or Results(
                problem=problem.name,
                contestant=contestant.name,
                dtype=dtype,
                agreement=reference.agreement,
                reference=reference.ways,
            )
            if not (kept.sessions and kept.sessions[-1].started == started):
                kept.sessions.append(Session(**described, started=started))
            measurement.session = len(kept.sessions) - 1
            kept.measurements.append(measurement)
            results.save(output, kept)


def _is_missing(kept: Results | None, rtol: float) -> bool:
    """Whether a tolerance is to be measured: not if a larger one was too slow."""
    if kept is None:
        return True
    return kept.at(rtol) is None and not any(is_too_long(it) for it in kept.measurements if it.rtol > rtol)
