"""Completed runs that have their weights beside them: the model and the test data of each, for what is measured."""

import functools
import importlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common import command_line
from common.config import TrainingConfig
from common.results import Results, load_all

from .experiments import EXPERIMENTS, Experiment
from .runs import identity, load_data, whole_config

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Places(command_line.Paths):
    """The options of every program that measures trained weights."""

    results_dir: str = "results"
    """Folder of the results, where what is measured is saved in `diagnostics`."""
    weights_dir: str | None = None
    """Folder of the results files that have their weights beside them; that of the results if not given."""
    data_root: str | None = None
    """Where the Speech Commands recordings are now; where the run had them if not given."""

    @property
    def place_of_weights(self) -> str:
        """The folder that has the weights."""
        return self.weights_dir or self.results_dir


@dataclass(frozen=True)
class TrainedRun:
    """A run with its weights."""

    path: Path
    """Its results file; the weights lie beside it."""
    results: Results
    weights_dir: str
    """The folder of results that it is of."""
    data_root: str | None = None
    """Where its recordings are now; where the run had them if None."""

    @property
    def card(self) -> Experiment:
        """The card of its experiment."""
        return EXPERIMENTS[self.results.experiment]

    @functools.cached_property
    def config(self) -> TrainingConfig:
        """The settings to build its model and load its data with, on the CPU."""
        name = self.results.experiment
        settings = self.results.config | dict(device="cpu", solver="torchadjoint", save=False, resume=False)
        if self.data_root is not None and self.card.stand_in is not None:
            settings["data_root"] = self.data_root
        return importlib.import_module(name).Config(**settings)

    def model(self) -> nn.Module:
        """Its model with its weights, as in a measurement: what is drawn at random is the same every time."""
        model = importlib.import_module(self.results.experiment).build(self.config)
        weights = torch.load(self.path.with_suffix(".pt"), map_location="cpu", weights_only=True)
        model.load_state_dict(weights)
        return model.eval()

    def test_set(self) -> tuple[Tensor, ...]:
        """The tensors of its test set, on the CPU; a warning goes to the log if its split has another digest."""
        data = load_data(self.results.experiment, self.config)
        if data.digest != self.results.provenance["split"]:
            logger.warning("The data are not those that the weights were trained on: their split is another.")
        return data.test.tensors

    def source(self) -> dict[str, Any]:
        """What a file with measurements of it says of it."""
        return {"run": self.path.relative_to(self.weights_dir).as_posix(), "config": self.results.config}


def trained_run(
    weights_dir: str, experiment: str, group: str | None = None, *, data_root: str | None = None
) -> TrainedRun:
    """The run to take weights from: of the completed ones of a group that have some, the one that saw the most samples.

    Among equals it is the one with the least train loss. FileNotFoundError if there is none.
    """
    candidates = [
        (len(results.epochs) * results.train_metrics.dataset_size, -results.train_metrics.loss, path, results)
        for path, results in _with_weights(weights_dir, experiment).items()
        if group in (None, EXPERIMENTS[experiment].group(whole_config(experiment, results.config)))
    ]
    if not candidates:
        wanted = f"{experiment} on {group}" if group else experiment
        card = EXPERIMENTS[experiment]
        options = card.options_of(group or card.measured_groups[0])
        raise FileNotFoundError(
            f"No completed run of {wanted} in {weights_dir} has its weights (<run>.pt) beside it, as git keeps none: "
            f"train one for about ten minutes on a CPU by `python {experiment}.py --device cpu --norm seminorm"
            f"{options} {card.gradients.training} --results-dir {weights_dir}`."
        )
    *_, path, results = max(candidates)
    return TrainedRun(path, results, weights_dir, data_root)


def trained_seeds(weights_dir: str, experiment: str, *, data_root: str | None = None) -> list[TrainedRun]:
    """The run that `trained_run` chooses, and those that differ from it in nothing but the seed, by their paths.

    Of several runs of one seed it is the latest. FileNotFoundError if there is none.
    """
    chosen = trained_run(weights_dir, experiment, EXPERIMENTS[experiment].measured_groups[0])

    def but_for_seed(results: Results) -> str:
        return identity(experiment, results.config | {"seed": None}, results.provenance["split"])

    alike = [
        (path, results)
        for path, results in _with_weights(weights_dir, experiment).items()
        if but_for_seed(results) == but_for_seed(chosen.results)
    ]
    latest = {results.config["seed"]: path for path, results in sorted(alike, key=lambda run: run[1].start_time)}
    return [TrainedRun(path, results, weights_dir, data_root) for path, results in alike if path in latest.values()]


def _with_weights(weights_dir: str, experiment: str) -> dict[Path, Results]:
    """The completed runs of an experiment that have their weights."""
    return {
        path: results
        for path, results in load_all(weights_dir).items()
        if results.experiment == experiment and results.status == "completed" and path.with_suffix(".pt").exists()
    }


def batch_of(data: tuple[Tensor, ...], batch_size: int, number: int) -> tuple[Tensor, ...]:
    """Samples from all over the test set, as neighbours may be parts of one trajectory.

    Batches of other numbers share no sample with it. ValueError if there are too few samples for that.
    """
    stride = len(data[0]) // batch_size
    if number >= stride:
        raise ValueError(
            f"the test set has {len(data[0])} samples, too few for batch number {number + 1} of {batch_size}: "
            "take weights of a run with more data"
        )
    return tuple(tensor[number::stride][:batch_size] for tensor in data)


def batches_of(data: tuple[Tensor, ...], batch_size: int, number: int) -> list[tuple[Tensor, ...]]:
    """So many of them."""
    return [batch_of(data, batch_size, index) for index in range(number)]
