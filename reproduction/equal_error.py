"""What every way to differentiate costs and how exact it is, over tolerances: `python -m reproduction.equal_error`.

At equal tolerances a cheaper gradient may just be a coarser one. `fair_saving.py` reads off these curves what a way
saves at the same error.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from common import command_line, provenance
from flows.continuous import Integrals
from torchadjoint import Backsolve, arguments

from .experiments import EXPERIMENTS
from .fair_saving import COMPARED_AT, name_of
from .gradients import cost_and_error, exact_gradient
from .integral_errors import set_integrals
from .measurements import check_weights, path_of, read_record, save_record
from .trained import Places, batch_of, trained_seeds

MEASUREMENT = "equal_error"


@dataclass(frozen=True)
class Way:
    """A way to differentiate, and the relative tolerances at which it is measured."""

    adjoint: str
    method: str
    rtols: tuple[float, ...]
    warm_start: bool = False
    integrals: Integrals = "none"
    """Of flows alone."""

    def settings(self) -> dict[str, Any]:
        """What a row says of it."""
        settings = {"adjoint": self.adjoint, "warm_start": self.warm_start, "method": self.method}
        return settings | ({"integrals": self.integrals} if self.integrals != "none" else {})


@dataclass(frozen=True)
class Measured:
    """What is measured of an experiment. The first way is the curve that the others are compared with."""

    ways: tuple[Way, ...]
    batch_size: int
    num_batches: int
    atol_over_rtol: float
    reference: tuple[float, float]
    """rtol and atol, in float64, of what counts as exact: two decades tighter than the tightest of the ways."""
    judge: tuple[float, float]
    """The same of what says how exact that is."""


_SPEECH_COMMANDS, _ACROBOT, _FLOW = (COMPARED_AT[name] for name in ("speech_commands", "acrobot", "flow"))
MEASURED = {
    # The field has kinks, so that most of the time goes into the reference.
    "speech_commands": Measured(
        (
            Way("default", "dopri5", (1e-2, 3e-3, 1e-3, 3e-4, 1e-4)),
            Way("per-tensor", "dopri5", (1e-3,)),
            Way("seminorm", "dopri5", _SPEECH_COMMANDS),
            Way("discrete", "dopri5", _SPEECH_COMMANDS),
            Way("default", "bosh3", (1e-2, 1e-3)),
            Way("seminorm", "bosh3", _SPEECH_COMMANDS),
            Way("discrete", "bosh3", _SPEECH_COMMANDS),
        ),
        batch_size=16,
        num_batches=8,
        atol_over_rtol=1e-3,
        reference=(1e-6, 1e-9),
        judge=(1e-8, 1e-11),
    ),
    "acrobot": Measured(
        (
            # From where nothing gets cheaper to where nothing else is as exact.
            Way("default", "dopri5", (1e-1, *_ACROBOT, 1e-5)),
            Way("default", "bosh3", _ACROBOT),
            *(
                Way(adjoint, method, _ACROBOT, warm_start)
                for method in ("dopri5", "bosh3")
                for adjoint, warm_start in (
                    ("per-tensor", False),
                    ("seminorm", False),
                    ("seminorm", True),
                    ("as-published", False),
                    ("discrete", False),
                )
            ),
        ),
        batch_size=32,
        num_batches=8,
        atol_over_rtol=1.0,
        reference=(1e-7, 1e-7),
        judge=(1e-7, 1e-7),
    ),
    "flow": Measured(
        (
            Way("default", "dopri5", (1e-2, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 1e-6)),
            *(Way(adjoint, "dopri5", _FLOW) for adjoint in ("per-tensor", "seminorm", "discrete")),
            Way("seminorm", "dopri5", _FLOW, integrals="unweighed"),
            *(Way(adjoint, "bosh3", _FLOW) for adjoint in ("default", "seminorm", "discrete")),
        ),
        batch_size=100,
        num_batches=8,
        atol_over_rtol=1.0,
        reference=(1e-8, 1e-8),
        judge=(1e-8, 1e-8),
    ),
}


def measure_batch(measured: Measured, model: nn.Module, batch: tuple[Tensor, ...], loss_function) -> Iterator[dict]:
    """A row for every way and tolerance: evaluations, CPU seconds of the gradient, its relative error."""
    set_integrals(model, "none")
    exact, reference_error = exact_gradient(model, batch, loss_function, measured.reference, measured.judge)
    for way in measured.ways:
        adjoint = Backsolve(way.adjoint, warm_start=True) if way.warm_start else way.adjoint
        set_integrals(model, way.integrals)
        for rtol in way.rtols:
            tolerances = {"rtol": rtol, "atol": rtol * measured.atol_over_rtol}
            found = cost_and_error(model, batch, loss_function, exact, adjoint=adjoint, method=way.method, **tolerances)
            yield {**way.settings(), **tolerances, **found, "reference_error": reference_error}


@dataclass(frozen=True)
class Options(Places):
    """Measures the error of the gradient against its cost, on the CPU, for every seed that has its weights.

    What was measured before is kept, batch by batch, so that it may be stopped and started again.
    """

    experiments: tuple[Literal[tuple(MEASURED)], ...] = tuple(MEASURED)
    """Which experiments."""
    limit: int | None = None
    """How many batches to measure at most, of all seeds together; a later call measures the others."""

    def __post_init__(self):
        super().__post_init__()
        if self.limit is not None:
            arguments.whole_number("limit", self.limit)


def main(options: Options) -> None:
    """Measures the experiments asked for."""
    for experiment in options.experiments:
        measure(experiment, options)


def measure(experiment: str, options: Options) -> None:
    """What the file of this experiment lacks, the first batch of every seed first."""
    weights_dir = options.place_of_weights
    measured, path = MEASURED[experiment], path_of(options.results_dir, MEASUREMENT, experiment)
    runs = {run.config.seed: run for run in trained_seeds(weights_dir, experiment, data_root=options.data_root)}
    saved = read_record(path) or {"rows": []}
    check_weights(path, saved, experiment, next(iter(runs.values())).results.config)
    if saved["rows"] and not _is_of(saved, measured):
        print(f"{path} was measured with other ways, batches or another reference, and is made anew.", flush=True)
        saved = {"rows": []}
    known = {(row["seed"], row["batch"]) for row in saved["rows"]}
    wanted = [(number, seed) for number in range(measured.num_batches) for seed in runs]
    missing = [(number, seed) for number, seed in wanted if (seed, number) not in known]
    for number, seed in missing[: options.limit]:
        run = runs[seed]
        batch = batch_of(run.test_set(), measured.batch_size, number)
        rows = measure_batch(measured, run.model(), batch, EXPERIMENTS[experiment].gradients.loss_function)
        made_on = provenance.describe(torch.device("cpu"))
        then = saved.get("provenance", made_on)
        saved = {
            "run": run.path.parent.relative_to(weights_dir).as_posix(),
            "config": {name: value for name, value in run.results.config.items() if name != "seed"},
            "provenance": made_on
            | {name: provenance.joined(then[name], made_on[name]) for name in ("device_name", "commit")},
            "batch_size": measured.batch_size,
            "reference": measured.reference,
            "judge": measured.judge,
            "rows": [*saved["rows"], *({"seed": seed, "batch": number, **row} for row in rows)],
        }
        save_record(path, saved)
        print(f"{experiment}: batch {number} of seed {seed} in {path}", flush=True)


def _is_of(saved: Mapping[str, Any], measured: Measured) -> bool:
    """Whether a file was measured as this is."""
    ways = {(name_of(row), row["rtol"], row["atol"]) for row in saved["rows"]}
    wanted = {
        (name_of(way.settings()), rtol, rtol * measured.atol_over_rtol) for way in measured.ways for rtol in way.rtols
    }
    exact = [tuple(saved.get(name, ())) for name in ("reference", "judge")]
    return ways == wanted and [*exact, saved["batch_size"]] == [measured.reference, measured.judge, measured.batch_size]


if __name__ == "__main__":
    command_line.run(Options, main)
