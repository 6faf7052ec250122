"""Measurements that no run contains, made from trained weights: `python -m reproduction.diagnostics`, for `figures.py`.

Each is one strict JSON file under results/diagnostics/, with the run whose weights it used and the machine it was made
on, so that a figure can be drawn again without weights or data.
"""

import functools
import importlib
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from common import command_line, provenance
from torchadjoint import METHODS

from .control import swing_up
from .experiments import EXPERIMENTS
from .flow_samples import measure_images, measure_points
from .gradients import drivers, gradient_errors, gradient_of, losses, step_errors
from .integral_errors import integral_errors, set_integrals
from .measurements import path_of, save_record
from .runs import way_of
from .trained import Places, TrainedRun, batch_of, batches_of, trained_run

Tensors = tuple[Tensor, ...]


def measure_gradient_errors(run: TrainedRun, model: nn.Module, data: Tensors) -> dict[str, Any]:
    """See `gradient_errors`; on a few small batches, as small tolerances are dear."""
    setting = run.card.gradients
    return _gradient_errors(
        run, model, data, tolerances=setting.tolerances, adjoints=setting.adjoints, reference=setting.reference
    )


def measure_methods(run: TrainedRun, model: nn.Module, data: Tensors) -> dict[str, Any]:
    """See `gradient_errors`; every method with error control, at the tolerances of the run and ten times as large."""
    rtol, atol = run.config.rtol, run.config.atol
    return _gradient_errors(
        run,
        model,
        data,
        tolerances=[(10 * rtol, 10 * atol), (rtol, atol)],
        adjoints=("default", "seminorm", "discrete"),
        reference=(rtol / 1000, atol / 1000),
        methods=_adaptive_methods(),
    )


def _gradient_errors(run: TrainedRun, model: nn.Module, data: Tensors, **options) -> dict[str, Any]:
    setting = run.card.gradients
    batches = batches_of(data, setting.batch_size, setting.num_batches)
    rows = gradient_errors(model, batches, setting.loss_function, **options)
    sizes = {"batch_size": setting.batch_size, "num_batches": setting.num_batches}
    return {**sizes, "reference": options["reference"], "rows": rows}


def _adaptive_methods() -> list[str]:
    return [name for name, method in METHODS.items() if method.is_adaptive]


def measure_losses(run: TrainedRun, model: nn.Module, data: Tensors) -> dict[str, Any]:
    """See `losses`; the whole test set by every method with error control, at the tolerances of `measure_methods`."""
    rtol, atol = run.config.rtol, run.config.atol
    tolerances = [(10 * rtol, 10 * atol), (rtol, atol)]
    rows = losses(model, data, run.card.gradients.loss_function, tolerances=tolerances, methods=_adaptive_methods())
    return {"num_samples": len(data[0]), "rows": rows}


def measure_step_errors(run: TrainedRun, model: nn.Module, data: Tensors) -> dict[str, Any]:
    """See `step_errors` and `drivers`; on a batch as large as the run's, since the mean over a batch scales a_z."""
    setting = run.card.gradients
    batch = batch_of(data, min(run.config.batch_size, len(data[0])), 0)
    observe = functools.partial(step_errors, model, batch, setting.loss_function)
    own = dict(rtol=run.config.rtol, atol=run.config.atol)
    steps = {}
    for norm in ("default", "seminorm", *({"as-published"} & set(setting.adjoints))):
        found = observe(adjoint=norm, **own)
        steps[norm] = {name: _rounded([step[name] for step in found]) for name in found[0]}
    shares = []
    for rtol, atol in setting.tolerances:
        found = observe(adjoint="default", rtol=rtol, atol=atol)
        shares.append({"rtol": rtol, "atol": atol, "num_steps": len(found), **drivers(found)})
    return {"batch_size": len(batch[0]), **own, "steps": steps, "shares": shares}


def measure_control(run: TrainedRun, model: nn.Module, data: Tensors) -> dict[str, Any]:
    """See `swing_up`; on the dynamics that the run learnt from."""
    rows = swing_up(model.vector_field, torque=run.config.torque)
    names = ("q1", "q2", "dq1", "dq2", "u0", "u1")
    return {"motion": {name: _rounded(column) for name, column in zip(names, rows.T.tolist(), strict=True)}}


def measure_integrals(run: TrainedRun, model: nn.Module, data: Tensors) -> dict[str, Any]:
    """See `integral_errors`; on the batches that the gradients' errors are measured on."""
    setting = run.card.gradients
    rows = integral_errors(
        model,
        batches_of(data, setting.batch_size, setting.num_batches),
        setting.loss_function,
        tolerances=setting.tolerances,
        reference=setting.reference,
    )
    return {"batch_size": setting.batch_size, "reference": setting.reference, "rows": rows}


def measure_growth(run: TrainedRun, model: nn.Module, data: Tensors) -> dict[str, Any]:
    """Evaluations of a gradient by every way at the initial weights and at the trained ones.

    On batches as large as the run's, or as the test set allows, and at its tolerances: one row for each batch, weights
    and way.
    """
    setting, config = run.card.gradients, run.config
    batch_size = min(config.batch_size, len(data[0]) // setting.num_batches)
    build = importlib.import_module(run.card.name).build
    ways = [dict(norm=norm) for norm in setting.adjoints] + [dict(norm="seminorm", integrals="unweighed")]
    tolerances = dict(rtol=config.rtol, atol=config.atol)
    rows = []
    for name, weights in (("initial", build(config).state_dict()), ("trained", model.state_dict())):
        for way in ways:
            own = build(replace(config, **{"integrals": "none", **way})).eval()
            own.load_state_dict(weights)
            for number, batch in enumerate(batches_of(data, batch_size, setting.num_batches)):
                _, counted = gradient_of(own, batch, setting.loss_function, adjoint=way["norm"], **tolerances)
                nfe = {"forward_nfe": counted.forward.nfe, "backward_nfe": counted.backward.nfe}
                rows.append({"weights": name, "way": way_of(way), "batch": number, **nfe})
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"batch_size": batch_size, "num_parameters": num_parameters, "rows": rows}


def measure_samples(run: TrainedRun, model: nn.Module, data: Tensors) -> dict[str, Any]:
    """See `flow_samples`."""
    return (measure_images if run.config.is_of_images else measure_points)(model, data[0])


def _rounded(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.6g}") for value in values]


MEASUREMENTS = {
    "gradient_errors": measure_gradient_errors,
    "methods": measure_methods,
    "losses": measure_losses,
    "step_errors": measure_step_errors,
    "control": measure_control,
    "integrals": measure_integrals,
    "growth": measure_growth,
    "samples": measure_samples,
}


@dataclass(frozen=True)
class Options(Places):
    """Measures what no run contains, on the CPU in minutes, and saves it in the results' folder `diagnostics`.

    It exits with 0 if all was measured, 1 if there were no weights for some of it, and 2 for what cannot be used.
    """

    experiments: tuple[Literal[tuple(EXPERIMENTS)], ...] = tuple(EXPERIMENTS)
    """Which experiments."""
    measurements: tuple[Literal[tuple(MEASUREMENTS)], ...] = tuple(MEASUREMENTS)
    """Which measurements; the control is acrobot's alone; integrals, growth and samples are of flows."""


def main(options: Options) -> None:
    """Makes every measurement asked for that there are weights for."""
    logging.basicConfig(format="%(message)s")
    lacking = []
    groups = [(name, group) for name in options.experiments for group in EXPERIMENTS[name].measured_groups]
    for experiment, group in groups:
        card = EXPERIMENTS[experiment]
        is_first = group == card.measured_groups[0]
        possible = card.measurements if is_first else card.group_measurements
        wanted = [name for name in options.measurements if name in possible]
        if not wanted:
            continue
        try:
            run = trained_run(options.place_of_weights, experiment, group, data_root=options.data_root)
        except FileNotFoundError as error:
            lacking.append(str(error))
            continue
        data = run.test_set()
        for measurement in wanted:
            # A model of its own for each, as some measurements change it. Its integrals are weighed, whatever the run
            # did, so that it is the norm that the measurement is named after.
            model = run.model()
            set_integrals(model, "none")
            values = MEASUREMENTS[measurement](run, model, data)
            target = path_of(options.results_dir, measurement, experiment, group)
            save_record(target, {**run.source(), "provenance": provenance.describe(torch.device("cpu")), **values})
            print(f"Saved {target}", flush=True)
    if lacking:
        sys.exit("\n".join(lacking))


if __name__ == "__main__":
    command_line.run(Options, main)
