"""What a backward solve costs over the scale of the loss: `python -m reproduction.law`, measured for `collapse.py`.

A mean or a sum, a weight before the loss and the size of the batch all multiply the adjoint by a factor. Here one
gradient is taken over many such factors, absolute tolerances, batches and widths, by the norms that weigh the
parameters and by the one that does not. There are three steps: the grid, predictions from it for further settings, and
a check of these.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor, nn

from common import command_line, provenance
from torchadjoint import Attempt
from torchadjoint.norms import rms_norm

from .collapse import CHOSEN, predicted_saving, saving
from .gradients import exact_gradient, gradient_of, relative_error
from .law_subjects import FURTHER, GRIDS, MODELS, Case, Grid, LossFunction, Subject, subject_of
from .measurements import check_weights, path_of, read_record, save_record
from .trained import Places

NORMS = ("default", "per-tensor", "seminorm")
LOSS_SCALES = (1e-4, 1e-2, 1.0, 1e2, 1e4)


def adjoint_sizes(
    model: nn.Module, batch: tuple[Tensor, ...], loss_function: LossFunction, **options
) -> dict[str, float]:
    """The largest root mean square of a_z along one backward solve by `default`, and that of a_theta at its end.

    a_theta begins with zeros and is the gradient in the end. `options` are those of `solve`.
    """
    sizes_of_a_z, half = [], 0

    def observe(attempt: Attempt) -> None:
        nonlocal half
        if attempt.is_accepted is not None:
            return
        if attempt.direction == "forward":
            half = attempt.state.numel()
        else:
            sizes_of_a_z.append(rms_norm(attempt.state[half : 2 * half]).item())

    gradient_of(model, batch, loss_function, **options, adjoint="default", observer=observe)
    gradient = torch.cat([parameter.grad.flatten() for parameter in model.vector_field.parameters()])
    return {"a_z_rms_largest": max(sizes_of_a_z), "a_theta_rms_last": rms_norm(gradient).item()}


def measure_case(subject: Subject, grid: Grid, case: Case, settings: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """One case, at these pairs of a factor on the loss and an absolute tolerance: a row for each of them and norm.

    An error is that of the gradient of all parameters, relatively, against the seminorm in float64 at tolerances two
    decades tighter than the tightest of the grid. This serves all rows, as the gradient of a scaled loss is the scaled
    gradient. `reference_error` is the distance of `discrete` from it there.
    """
    model, batch = subject.build(case), subject.batch(case.batch_size)
    reference = grid.rtol / 100, min(grid.atols) / 100
    exact, reference_error = exact_gradient(model, batch, subject.loss_function, reference)
    measured = measure_settings(model, batch, subject.loss_function, grid.rtol, settings)
    return {
        **describe_case(subject, grid, case, model),
        "reference": reference,
        "reference_error": reference_error,
        "rows": [{**row, "error": relative_error(gradient / row["loss_scale"], exact)} for row, gradient in measured],
    }


def measure_settings(
    model: nn.Module,
    batch: tuple[Tensor, ...],
    loss_function: LossFunction,
    rtol: float,
    settings: Sequence[tuple[float, float]],
) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """What each norm costs at each of the settings, and the gradient of the scaled loss."""
    for (loss_scale, atol), norm in itertools.product(settings, NORMS):
        tolerances = {"rtol": rtol, "atol": atol}
        gradient, counted = gradient_of(model, batch, scaled(loss_function, loss_scale), adjoint=norm, **tolerances)
        row = {"loss_scale": loss_scale, "atol": atol, "norm": norm}
        yield {**row, "forward_nfe": counted.forward.nfe, "backward_nfe": counted.backward.nfe}, gradient


def scaled(loss_function: LossFunction, factor: float) -> LossFunction:
    """`factor` times the loss."""
    return lambda prediction, target: factor * loss_function(prediction, target)


def describe_case(subject: Subject, grid: Grid, case: Case, model: nn.Module) -> dict[str, Any]:
    """The case, and the sizes of its adjoint with the loss as it is, by the middle one of the absolute tolerances."""
    middle = {"rtol": grid.rtol, "atol": sorted(grid.atols)[len(grid.atols) // 2]}
    return {
        **asdict(case),
        "num_parameters": sum(parameter.numel() for parameter in model.vector_field.parameters()),
        "sizes": adjoint_sizes(model, subject.batch(case.batch_size), subject.loss_function, **middle),
    }


@dataclass(frozen=True, kw_only=True)
class Options(Places):
    """Measures the cost of the backward solve over the scale of the loss, on the CPU in minutes for each model.

    What was measured before is kept, case by case, so that it may be stopped and started again.
    """

    step: tyro.conf.Positional[Literal["grid", "predict", "check"]]
    """Grid: the measurements. Predict: from these, what the seminorm saves at further settings. Check: measure that."""
    models: tuple[Literal[MODELS], ...] = MODELS
    """Which models."""


def main(options: Options) -> None:
    """Makes the step for the models asked for."""
    for name in options.models:
        subject = subject_of(name, options.place_of_weights, options.data_root)
        step = {"grid": measure_grid, "predict": predict, "check": check}[options.step]
        step(name, subject, GRIDS[name], options.results_dir)


def measure_grid(name: str, subject: Subject, grid: Grid, results_dir: str) -> None:
    """Every case that the file lacks."""
    settings = [(loss_scale, atol) for atol in grid.atols for loss_scale in LOSS_SCALES]
    path = path_of(results_dir, "law", name)
    cases = _saved(name, path, subject).get("cases", [])
    known = [{field: case[field] for field in asdict(grid.cases[0])} for case in cases]
    for case in grid.cases:
        if asdict(case) not in known:
            cases.append(measure_case(subject, grid, case, settings))
            _save(path, subject, rtol=grid.rtol, cases=cases)


def predict(name: str, subject: Subject, grid: Grid, results_dir: str) -> None:
    """What the seminorm saves at the further settings that the file lacks: only the adjoint's sizes are looked at."""
    grid_path = path_of(results_dir, "law", name)
    cases = _saved(name, grid_path, subject).get("cases", [])
    _check_number(grid_path, "cases", len(cases), len(grid.cases), f"grid --models {name}")
    path = path_of(results_dir, "law_predictions", name)
    settings = _saved(name, path, subject).get("settings", [])
    chosen = {norm: CHOSEN[norm] for norm in ("default", "seminorm")}
    for case, loss_scale, atol in FURTHER[name][len(settings) :]:
        described = describe_case(subject, grid, case, subject.build(case))
        row = {"loss_scale": loss_scale, "atol": atol}
        predicted = {"predicted_saving": predicted_saving(cases, described, row), "predicted_from": chosen}
        settings.append({**described, **row, **predicted})
        _save(path, subject, rtol=grid.rtol, settings=settings)


def check(name: str, subject: Subject, grid: Grid, results_dir: str) -> None:
    """What it does save there, beside what was predicted."""
    path = path_of(results_dir, "law_predictions", name)
    settings = _saved(name, path, subject).get("settings", [])
    _check_number(path, "settings", len(settings), len(FURTHER[name]), f"predict --models {name}")
    for (case, loss_scale, atol), setting in zip(FURTHER[name], settings, strict=True):
        if "measured_saving" in setting:
            continue
        model, batch = subject.build(case), subject.batch(case.batch_size)
        measured = measure_settings(model, batch, subject.loss_function, grid.rtol, [(loss_scale, atol)])
        rows = [row for row, _ in measured]
        nfe = {row["norm"]: row["backward_nfe"] for row in rows}
        setting |= {"rows": rows, "measured_saving": saving(nfe["default"], nfe["seminorm"])}
        _save(path, subject, rtol=grid.rtol, settings=settings)


def _check_number(path: Path, what: str, found: int, needed: int, step: str) -> None:
    if found < needed:
        raise ValueError(
            f"{path} has {found} of {needed} {what}: measure the others first, by `python -m reproduction.law {step}`"
        )


def _saved(name: str, path: Path, subject: Subject) -> dict[str, Any]:
    """What a file holds, which must be of weights that were trained as the subject's; empty if there is none."""
    saved = read_record(path) or {}
    check_weights(path, saved, name, subject.source["config"])
    return saved


def _save(path: Path, subject: Subject, **values: Any) -> None:
    save_record(path, {**subject.source, "provenance": provenance.describe(torch.device("cpu")), **values})
    print(f"Saved {path}", flush=True)


if __name__ == "__main__":
    command_line.run(Options, main)
