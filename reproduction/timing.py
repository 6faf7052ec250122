"""A rough guess at how long runs take that no completed run tells of: one gradient step, timed here and scaled.

`tables.py` makes it before a sweep and for a plan.
"""

import importlib
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from common.results import Results
from datasets.batches import DataSplit

from .runs import Run, way_of

MAX_CPU_SAMPLES = 128
"""Samples of a timed batch on a CPU at most: what larger ones take is in proportion to their samples."""
NORM = "seminorm"
"""How the timed step differentiates, whatever the run's own norm."""


@dataclass(frozen=True)
class Sample:
    """What a guess takes of a run's data: how many samples a training has, and some of them, on the CPU."""

    num_training: int
    inputs: Tensor

    @classmethod
    def of(cls, data: DataSplit) -> "Sample":
        # A copy, so that the rest need not stay in memory.
        return cls(data.train.dataset_size, data.train.tensors[0][: data.train.batch_size].clone())


def rough_seconds(
    runs: Sequence[Run], samples: Mapping[tuple, Sample], results: Iterable[Results], device: str
) -> list[float | None]:
    """About how long each run takes, in seconds, measurements included; None if no step can be timed here.

    One step is timed for each experiment, group and batch size, with the seminorm, the experiment's own tolerances and
    the initial weights. How many evaluations a step of another norm or at other tolerances takes is what completed
    `results` of the same experiment tell; without such, as many. `samples` are by `Run.data_key`.
    """
    evaluations = evaluations_of_a_step(results)
    timed = {}
    seconds = []
    for run in runs:
        sample, key = samples[run.data_key], (run.data_key, run.group, run.config.batch_size)
        if key not in timed:
            timed[key] = _timed_step(run, sample, device)
        if timed[key] is None:
            seconds.append(None)
            continue
        step_seconds, num_evaluations = timed[key]
        of_run = evaluations.get(_way(run.experiment, asdict(run.config)), num_evaluations)
        num_steps = math.ceil(sample.num_training / run.config.batch_size)
        # One epoch more for the measurements.
        seconds.append((run.config.max_epochs + 1) * num_steps * step_seconds * of_run / num_evaluations)
    return seconds


def evaluations_of_a_step(results: Iterable[Results]) -> dict[tuple, float]:
    """Forward and backward NFE of a mean gradient step, of each kind of run that completed results have."""
    found = {}
    for result in results:
        if result.status == "completed":
            num_batches = math.ceil(result.train_metrics.dataset_size / result.config["batch_size"])
            evaluations = sum(epoch.forward_nfe + epoch.backward_nfe for epoch in result.epochs)
            found.setdefault(_way(result.experiment, result.config), []).append(
                evaluations / num_batches / len(result.epochs)
            )
    return {way: sum(numbers) / len(numbers) for way, numbers in found.items()}


def _way(experiment: str, config: Mapping) -> tuple:
    # A step on images takes more evaluations than one on points, and more in a wider network.
    return (experiment, config["rtol"], config["atol"], way_of(config), config.get("data"), config.get("width"))


def _timed_step(run: Run, sample: Sample, device: str) -> tuple[float, int] | None:
    """Seconds and evaluations of one gradient step of the run's batch size; None if it fails."""
    batch_size = run.config.batch_size
    num_samples = batch_size if device.startswith("cuda") else min(batch_size, MAX_CPU_SAMPLES)
    own = type(run.config)("cpu", NORM)
    config = replace(run.config, norm=NORM, warm_start=False, rtol=own.rtol, atol=own.atol)
    try:
        inputs = sample.inputs[torch.arange(num_samples) % len(sample.inputs)].to(device)
        model = importlib.import_module(run.experiment).build(config).to(device)
        started = time.perf_counter()
        prediction, statistics = model(inputs)
        # Any loss will do; this one takes no target.
        prediction.square().mean().backward()
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - started
    except RuntimeError:
        # A training that fails likewise says why, and it alone fails.
        return None
    finally:
        torch.cuda.empty_cache()  # which workers on the same GPU would lack; it does nothing without one
    return seconds * batch_size / num_samples, statistics.forward.nfe + statistics.backward.nfe
