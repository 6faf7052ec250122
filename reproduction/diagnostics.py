"""Measurements that no run contains, made from trained weights: `python -m reproduction.diagnostics`, for `figures.py`.

Each is one strict JSON file under results/diagnostics/, with the run whose weights it used and the machine it was made
on, so that a figure can be drawn again without weights or data.
"""

import contextlib
import copy
import functools
import importlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional

from common import passes, provenance
from common.adjoint import solve
from common.config import TrainingConfig
from common.norms import rms_norm
from common.results import Results, load_all
from common.solver import Solver
from common.statistics import SolveStatistics

from .control import swing_up
from .runs import EXPERIMENTS, TOLERANCES

logger = logging.getLogger(__name__)

MEASUREMENTS = ("gradient_errors", "step_errors", "control")
BLOCK_NAMES = ("z", "a_z", "a_theta")
"""What the blocks of the norm `default` weigh. The last one, a_t, is left out: it is 0, as t needs no gradient."""
Tolerances = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Setting:
    """How the gradients of an experiment's model are measured."""

    loss_function: Callable[[Tensor, Tensor], Tensor]
    tolerances: Tolerances
    adjoints: tuple[str, ...]
    batch_size: int
    num_batches: int
    reference: tuple[float, float]
    """rtol and atol, in float64, of what counts as exact."""


SETTINGS = {
    # The field's ReLUs have kinks, and every one that a sample crosses cuts the step of its batch. That is why the
    # reference is only one decade below the smallest tolerance: it is exact to about 0.1 %, and costs 100,000 NFE.
    "speech_commands": Setting(
        loss_function=functional.cross_entropy,
        tolerances=((1e-2, 1e-5), *TOLERANCES),
        adjoints=("default", "per-tensor", "seminorm", "discrete"),
        batch_size=16,
        num_batches=3,
        reference=(1e-6, 1e-9),
    ),
    "acrobot": Setting(
        loss_function=functional.mse_loss,
        tolerances=tuple((10.0**-digits, 10.0**-digits) for digits in (2, 3, 4, 5, 6)),
        adjoints=("default", "per-tensor", "seminorm", "as-published", "discrete"),
        batch_size=64,
        num_batches=3,
        reference=(1e-9, 1e-9),
    ),
}


def gradient_of(
    model: nn.Module, batch: tuple[Tensor, ...], loss_function: Callable[[Tensor, Tensor], Tensor], **options
) -> tuple[Tensor, SolveStatistics]:
    """The gradient of all parameters, flat and in float64, and what the solve did; `options` are those of `solve`."""
    model.solve = functools.partial(solve, **options)
    model.zero_grad()
    prediction, statistics = model(batch[0])
    loss_function(prediction, batch[-1]).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).double(), statistics


def gradient_errors(
    model: nn.Module,
    batches: Sequence[tuple[Tensor, ...]],
    loss_function: Callable[[Tensor, Tensor], Tensor],
    *,
    tolerances: Tolerances,
    adjoints: Sequence[str],
    reference: tuple[float, float],
) -> list[dict[str, Any]]:
    """How wrong a gradient is, and what it cost: one row for each batch, pair of tolerances and adjoint.

    An error is the norm of the difference from the reference, over the reference's norm. The reference is the seminorm
    adjoint in float64 at the tolerances `reference`; all else is in the dtype of the model and its batches, so that at
    small tolerances float32 shows its rounding too.
    """
    exact_model = copy.deepcopy(model).double()
    rows = []
    for number, batch in enumerate(batches):
        exact_batch = tuple(tensor.double() if tensor.is_floating_point() else tensor for tensor in batch)
        rtol, atol = reference
        exact, _ = gradient_of(exact_model, exact_batch, loss_function, rtol=rtol, atol=atol, adjoint="seminorm")
        for rtol, atol in tolerances:
            for adjoint in adjoints:
                gradient, counted = gradient_of(model, batch, loss_function, rtol=rtol, atol=atol, adjoint=adjoint)
                rows.append(
                    {
                        "batch": number,
                        "adjoint": adjoint,
                        "rtol": rtol,
                        "atol": atol,
                        "forward_nfe": counted.forward.nfe,
                        "backward_nfe": counted.backward.nfe,
                        "error": ((gradient - exact).norm() / exact.norm()).item(),
                    }
                )
    return rows


@contextlib.contextmanager
def _observed_steps() -> Iterator[list[dict[str, Any]]]:
    """Gives a list that receives every attempted step of the solves begun within, with its error block by block."""
    steps = []

    class ObservedSolver(Solver):
        def _attempt(self, t0: float, t1: float) -> float:
            error_ratio = super()._attempt(t0, t1)
            blocks = [rms_norm(self.error[start:stop]).item() for start, stop in self.blocks]
            steps.append({"t0": t0, "t1": t1, "error_ratio": error_ratio, **dict(zip(BLOCK_NAMES, blocks))})  # noqa: B905
            return error_ratio

    passes.Solver = ObservedSolver
    try:
        yield steps
    finally:
        passes.Solver = Solver


def step_errors(
    model: nn.Module, batch: tuple[Tensor, ...], loss_function: Callable[[Tensor, Tensor], Tensor], **options
) -> list[dict[str, Any]]:
    """Every step that the backward solve attempted, in order: where it went from and to, and its error.

    `error_ratio` is what the solver judges by: above 1 the step was rejected. `z`, `a_z` and `a_theta` are what the
    blocks contribute, of which the largest is the error ratio; under the seminorm there is no `a_theta`. Only adjoints
    of at least these blocks can be looked at: `default` and `seminorm`. `options` are those of `solve`.
    """
    model.solve = functools.partial(solve, **options)
    model.zero_grad()
    prediction, _ = model(batch[0])
    loss = loss_function(prediction, batch[-1])
    with _observed_steps() as steps:
        loss.backward()
    return steps


def drivers(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """For each block the share of the attempted steps in which its error is the largest, so that it sets the next."""
    largest = [max(BLOCK_NAMES, key=lambda name: step.get(name, 0.0)) for step in steps]
    return {name: largest.count(name) / len(steps) for name in BLOCK_NAMES}


def trained_run(results_dir: str, experiment: str) -> tuple[Path, Results]:
    """The run to take weights from: of the completed ones that have some, the one that saw the most samples.

    Among equals it is the one with the least train loss. FileNotFoundError if there is none.
    """
    candidates = [
        (len(results.epochs) * results.train_metrics.dataset_size, -results.train_metrics.loss, path, results)
        for path, results in load_all(results_dir).items()
        if results.experiment == experiment and results.status == "completed" and path.with_suffix(".pt").exists()
    ]
    if not candidates:
        raise FileNotFoundError(
            f"No completed run of {experiment} in {results_dir} has its weights (<run>.pt) beside it: make one by "
            f"`python {experiment}.py --device cpu --norm seminorm --results-dir {results_dir}`."
        )
    return max(candidates)[2:]


def trained_model(experiment: str, config: TrainingConfig, weights: Path) -> nn.Module:
    """The model of these settings with the weights of this file."""
    model = importlib.import_module(experiment).build(config)
    model.load_state_dict(torch.load(weights, weights_only=True))
    return model


def test_set(experiment: str, config: TrainingConfig, digest: str) -> tuple[Tensor, ...]:
    """The tensors of the run's test set, on the CPU; a warning goes to the log if its split has another digest."""
    settings = dict(batch_size=config.batch_size, device="cpu", generator=None)
    names = ("data_root", "split") if experiment == "speech_commands" else ("num_trajectories", "torque")
    settings.update({name: getattr(config, name) for name in names})
    data = importlib.import_module(f"datasets.{experiment}").load(**settings)
    if data.digest != digest:
        logger.warning("The data are not those that the weights were trained on: their split is another.")
    return data.test.tensors


def measure(measurement: str, experiment: str, config: TrainingConfig, model: nn.Module, data) -> dict[str, Any]:
    """The values of a measurement, ready for JSON; `data` is the test set's tensors."""
    setting = SETTINGS[experiment]
    if measurement == "control":
        rows = swing_up(model.vector_field, torque=config.torque)
        names = ("q1", "q2", "dq1", "dq2", "u0", "u1")
        return {"motion": {name: _rounded(column) for name, column in zip(names, rows.T.tolist(), strict=True)}}
    if measurement == "gradient_errors":
        rows = gradient_errors(
            model,
            [_batch(data, setting.batch_size, number) for number in range(setting.num_batches)],
            setting.loss_function,
            tolerances=setting.tolerances,
            adjoints=setting.adjoints,
            reference=setting.reference,
        )
        return {"batch_size": setting.batch_size, "reference": setting.reference, "rows": rows}
    # The size of a batch matters: the mean over it scales a_z, so the run's own.
    batch = _batch(data, config.batch_size, 0)
    observe = functools.partial(step_errors, model, batch, setting.loss_function)
    own = dict(rtol=config.rtol, atol=config.atol)
    steps = {}
    for norm in ("default", "seminorm"):
        found = observe(adjoint=norm, **own)
        steps[norm] = {name: _rounded([step[name] for step in found]) for name in found[0]}
    shares = []
    for rtol, atol in setting.tolerances:
        found = observe(adjoint="default", rtol=rtol, atol=atol)
        shares.append({"rtol": rtol, "atol": atol, "num_steps": len(found), **drivers(found)})
    return {"batch_size": len(batch[0]), **own, "steps": steps, "shares": shares}


def _batch(data: tuple[Tensor, ...], batch_size: int, number: int) -> tuple[Tensor, ...]:
    """Samples from all over the test set, as neighbours may be parts of one trajectory."""
    stride = max(1, len(data[0]) // batch_size)
    return tuple(tensor[number::stride][:batch_size] for tensor in data)


def path_of(results_dir: str, measurement: str, experiment: str) -> Path:
    """Where a measurement is saved."""
    return Path(results_dir, "diagnostics", f"{measurement}-{experiment}.json")


def _rounded(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.6g}") for value in values]


def _save(path: Path, record: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(record, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def main(
    results_dir: str = "results",
    data_root: str | None = None,
    experiments: tuple[Literal[EXPERIMENTS], ...] = EXPERIMENTS,
    measurements: tuple[Literal[MEASUREMENTS], ...] = MEASUREMENTS,
) -> None:
    """Measures what no run contains, on the CPU in minutes, and saves it in <results_dir>/diagnostics.

    Args:
        results_dir: folder of the results files, of which one of each experiment must have its weights beside it.
        data_root: where the Speech Commands recordings are now; where the run had them if not given.
        experiments: which experiments.
        measurements: which measurements; the control is acrobot's alone.
    """
    missing = 0
    for experiment in experiments:
        try:
            path, results = trained_run(results_dir, experiment)
        except FileNotFoundError as error:
            print(error, file=sys.stderr)
            missing += 1
            continue
        settings = results.config | dict(device="cpu", solver="dopri5", save=False, resume=False)
        if data_root is not None and experiment == "speech_commands":
            settings["data_root"] = data_root
        config = importlib.import_module(experiment).Config(**settings)
        model = trained_model(experiment, config, path.with_suffix(".pt"))
        data = test_set(experiment, config, results.provenance["split"])
        for measurement in measurements:
            if measurement == "control" and experiment != "acrobot":
                continue
            source = {"run": path.relative_to(results_dir).as_posix(), "config": results.config}
            values = measure(measurement, experiment, config, model, data)
            target = path_of(results_dir, measurement, experiment)
            _save(target, {**source, "provenance": provenance.describe(torch.device("cpu")), **values})
            print(f"Saved {target}", flush=True)
    sys.exit(1 if missing else 0)


if __name__ == "__main__":
    tyro.cli(main)
