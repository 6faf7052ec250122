"""What a backward solve costs over the scale of the loss: `python -m reproduction.law`, measured for `collapse.py`.

A mean loss, a sum, a weight before the loss and the batch scale the adjoint by a factor that no norm of the solution
sees. Here the same gradient is taken over many such factors, absolute tolerances, batches and widths, by each norm that
weighs the parameters and by the one that does not.
"""

import copy
import importlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from common import command_line, provenance, randomness
from torchadjoint import Attempt
from torchadjoint.norms import rms_norm

from .diagnostics import SETTINGS, batch_of, path_of, save_record, test_set, trained_model, trained_run
from .gradients import gradient_of

MODELS = ("speech_commands", "acrobot", "neural_ode")
NORMS = ("default", "per-tensor", "seminorm")
LOSS_SCALES = (1e-4, 1e-2, 1.0, 1e2, 1e4)
NUM_TRAINING_STEPS = 300
"""Of the small neural ODE, which no run trains."""


@dataclass(frozen=True)
class Case:
    """A model with some weights, and how many samples its gradient is of."""

    weights: Literal["untrained", "trained"]
    width: int
    """Of the hidden layers of the field; the widest ones where they differ."""
    batch_size: int


@dataclass(frozen=True)
class Grid:
    """Where a model's gradients are taken: in every case, at every absolute tolerance and `LOSS_SCALES`."""

    rtol: float
    atols: tuple[float, ...]
    cases: tuple[Case, ...]


GRIDS = {
    "speech_commands": Grid(
        1e-3,
        (1e-8, 1e-6, 1e-4),
        (
            Case("untrained", 40, 16),
            Case("untrained", 10, 16),
            Case("untrained", 160, 16),
            Case("trained", 40, 16),
            Case("trained", 40, 64),
        ),
    ),
    "acrobot": Grid(
        1e-4,
        (1e-6, 1e-4, 1e-2),
        (
            Case("untrained", 400, 16),
            Case("untrained", 100, 16),
            Case("trained", 400, 16),
            Case("trained", 400, 64),
        ),
    ),
    "neural_ode": Grid(
        1e-5,
        (1e-9, 1e-7, 1e-5),
        tuple(
            Case(weights, *sizes)
            for weights in ("untrained", "trained")
            for sizes in ((64, 16), (64, 256), (16, 16), (256, 16))
        ),
    ),
}


@dataclass(frozen=True)
class Subject:
    """A model to measure, whatever its weights and width."""

    build: Callable[[Case], nn.Module]
    batch: Callable[[int], tuple[Tensor, ...]]
    """A batch of this many samples."""
    loss_function: Callable[[Tensor, Tensor], Tensor]
    source: dict[str, Any]
    """What the file says of where the weights come from: `run` and `config`."""


def experiment_subject(experiment: str, weights_dir: str, data_root: str | None) -> Subject:
    """The model of an experiment, trained as the run of `weights_dir` that `trained_run` chooses.

    Raises:
        FileNotFoundError: if there is none with its weights.
    """
    module = importlib.import_module(experiment)
    path, results = trained_run(weights_dir, experiment)
    settings = results.config | dict(device="cpu", solver="dopri5", save=False, resume=False)
    if data_root is not None and experiment == "speech_commands":
        settings["data_root"] = data_root
    config = module.Config(**settings)
    data = test_set(experiment, config, results.provenance["split"])

    def build(case: Case) -> nn.Module:
        if case.weights == "trained":
            return trained_model(experiment, config, path.with_suffix(".pt"))
        if experiment == "speech_commands":
            return module.build(replace(config, hidden_hidden_channels=case.width))
        return narrowed(module.build(config), case.width)

    source = {"run": path.relative_to(weights_dir).as_posix(), "config": results.config}
    return Subject(build, lambda batch_size: batch_of(data, batch_size, 0), SETTINGS[experiment].loss_function, source)


def narrowed(model: nn.Module, width: int) -> nn.Module:
    """The Symplectic ODE-Net with all hidden layers of this width, or as published if it is that of the widest."""
    field = model.vector_field
    if width == field.factor.layers[0].out_features:
        return model
    with randomness.seeded(0, "weights"):
        for name in ("factor", "potential", "control"):
            network = getattr(field, name)
            layers = network.layers
            hidden = [width] * (len(layers) - 1)
            setattr(field, name, type(network)(layers[0].in_features, *hidden, layers[-1].out_features))
    return model


def neural_ode_subject() -> Subject:
    """The small network of the benchmark, trained for some steps on the same points that turn about the origin."""
    from benchmarks.problems import NeuralODE, turning_points

    def build(case: Case) -> nn.Module:
        with randomness.seeded(0, "weights"):
            model = NeuralODE(case.width)
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(NUM_TRAINING_STEPS if case.weights == "trained" else 0):
            gradient_of(model, turning_points(64), functional.mse_loss, adjoint="discrete", rtol=1e-4, atol=1e-6)
            optimiser.step()
        return model

    return Subject(build, turning_points, functional.mse_loss, {"run": None, "config": {}})


def adjoint_sizes(
    model: nn.Module, batch: tuple[Tensor, ...], loss_function: Callable[[Tensor, Tensor], Tensor], **options
) -> dict[str, float]:
    """How large z, a_z and a_theta are in one backward solve by the norm `default`.

    `rms` is the root mean square of the entries and `max` the largest; `first` is at the start of the backward solve,
    `last` at its end, and `largest` over all of it. `options` are those of `solve`.
    """
    found: dict[str, float] = {}
    half = 0

    def note(name: str, tensor: Tensor) -> None:
        for kind, value in (("rms", rms_norm(tensor).item()), ("max", tensor.abs().max().item())):
            found.setdefault(f"{name}_{kind}_first", value)
            found[f"{name}_{kind}_largest"] = max(value, found.get(f"{name}_{kind}_largest", 0.0))
            found[f"{name}_{kind}_last"] = value

    def observe(attempt: Attempt) -> None:
        nonlocal half
        if attempt.is_accepted is not None:
            return
        if attempt.direction == "forward":
            half = attempt.state.numel()
            return
        state = attempt.state
        note("z", state[:half])
        note("a_z", state[half : 2 * half])

    gradient_of(model, batch, loss_function, **options, adjoint="default", observer=observe)
    # It begins with zeros and is the gradient in the end.
    gradient = torch.cat([parameter.grad.flatten() for parameter in model.vector_field.parameters()])
    found |= {"a_theta_rms_last": rms_norm(gradient).item(), "a_theta_max_last": gradient.abs().max().item()}
    return found


def measure_case(subject: Subject, grid: Grid, case: Case, settings: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """One case, at these pairs of a factor on the loss and an absolute tolerance: a row for each of them and norm.

    An error is that of the gradient of all parameters, relatively, against the seminorm in float64 at tolerances two
    decades tighter than the tightest of the grid. It is the same for all rows: the gradient of a scaled loss is the
    scaled gradient. `reference_error` is the distance of `discrete` from it there.
    """
    model, batch = subject.build(case), subject.batch(case.batch_size)
    exact_model = copy.deepcopy(model).double()
    exact_batch = tuple(tensor.double() if tensor.is_floating_point() else tensor for tensor in batch)
    tight = {"rtol": grid.rtol / 100, "atol": min(grid.atols) / 100}
    exact, other = (
        gradient_of(exact_model, exact_batch, subject.loss_function, **tight, adjoint=adjoint)[0]
        for adjoint in ("seminorm", "discrete")
    )
    usual = {"rtol": grid.rtol, "atol": sorted(grid.atols)[1]}
    return {
        "weights": case.weights,
        "width": case.width,
        "batch_size": case.batch_size,
        "num_parameters": sum(parameter.numel() for parameter in model.vector_field.parameters()),
        "reference": [tight["rtol"], tight["atol"]],
        "reference_error": ((other - exact).norm() / exact.norm()).item(),
        "sizes": adjoint_sizes(model, batch, subject.loss_function, **usual),
        "rows": list(_rows(model, batch, subject.loss_function, exact, rtol=grid.rtol, settings=settings)),
    }


def _rows(
    model: nn.Module,
    batch: tuple[Tensor, ...],
    loss_function: Callable[[Tensor, Tensor], Tensor],
    exact: Tensor,
    *,
    rtol: float,
    settings: Sequence[tuple[float, float]],
) -> Iterator[dict[str, Any]]:
    for (loss_scale, atol), norm in itertools.product(settings, NORMS):

        def scaled(prediction: Tensor, target: Tensor, factor: float = loss_scale) -> Tensor:
            return factor * loss_function(prediction, target)

        gradient, counted = gradient_of(model, batch, scaled, rtol=rtol, atol=atol, adjoint=norm)
        gradient /= loss_scale
        yield {
            "loss_scale": loss_scale,
            "atol": atol,
            "norm": norm,
            "forward_nfe": counted.forward.nfe,
            "backward_nfe": counted.backward.nfe,
            "error": ((gradient - exact).norm() / exact.norm()).item(),
        }


def subject_of(model: str, weights_dir: str, data_root: str | None) -> Subject:
    """The subject of one of `MODELS`."""
    return neural_ode_subject() if model == "neural_ode" else experiment_subject(model, weights_dir, data_root)


@dataclass(frozen=True)
class Options:
    """Measures the cost of the backward solve over the scale of the loss, on the CPU in minutes for each model."""

    results_dir: str = "results"
    """Folder of the results, where it is saved in `diagnostics`."""
    weights_dir: str = "results"
    """Folder of the results files that have their weights beside them."""
    data_root: str | None = None
    """Where the Speech Commands recordings are now; where the run had them if not given."""
    models: tuple[Literal[MODELS], ...] = MODELS
    """Which models."""


def main(options: Options) -> None:
    """Measures the models asked for, case by case."""
    for name in options.models:
        subject, grid = subject_of(name, options.weights_dir, options.data_root), GRIDS[name]
        settings = [(loss_scale, atol) for atol in grid.atols for loss_scale in LOSS_SCALES]
        target = Path(path_of(options.results_dir, "law", name))
        record = {**subject.source, "provenance": provenance.describe(torch.device("cpu")), "rtol": grid.rtol}
        cases = []
        for case in grid.cases:
            cases.append(measure_case(subject, grid, case, settings))
            save_record(target, {**record, "cases": cases})
            print(f"{name}: saved {case} in {target}", flush=True)


if __name__ == "__main__":
    command_line.run(Options, main)
