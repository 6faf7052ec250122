"""The training loop that both experiments share: they give it a model, its loss and the data, and get the results."""

import copy
import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from datasets.batches import Batches, DataSplit

from . import provenance
from .config import TrainingConfig
from .errors import SolverError, TrainingFailed
from .results import ClassifierEpoch, Epoch, HistoryEntry, Metrics, Results, epoch_of, make_directory, metrics_of, save
from .statistics import SolveStatistics

MAX_TIMES = 256
"""How many times of each kind the metrics of a pass keep at most."""
IMPROVEMENT = 1.0001
"""The factor by which the train loss must fall to end a plateau."""


def train(
    config: TrainingConfig,
    *,
    experiment: str,
    model: nn.Module,
    data: DataSplit,
    loss_function: Callable[[Tensor, Tensor], Tensor],
    num_correct: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Results:
    """Trains a model, restores its best state by train loss, measures that, and saves and returns what happened.

    Args:
        config: the settings.
        experiment: the experiment's name, for the results.
        model: maps the first tensor of a batch to a prediction and the statistics of its solve. It is moved to the
            device that `config` names.
        data: the batches, already on that device. Their last tensor is the target: the input itself if there is but
            one tensor.
        loss_function: the mean loss of a prediction, given its target.
        num_correct: how many samples of a prediction are right, given its target. Without it there is no accuracy.

    Raises:
        ValueError: if there is no place to save the results; before training begins.
        TrainingFailed: if a loss is not finite, a solve fails, or the device's memory is too small. The results until
            then are saved all the same (as they are when the user interrupts) and are the error's `results`.
    """
    directory = make_directory(config.results_dir, experiment, config.condition) if config.save else None
    device = torch.device(config.device)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    results = Results(
        baseline_memory=torch.cuda.memory_allocated(device) if on_gpu else None,
        start_time=time.time(),
        model=model.to(device),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        train_dataloader=data.train,
        val_dataloader=data.val,
        test_dataloader=data.test,
        experiment=experiment,
        config=asdict(config),
        provenance={**provenance.describe(device), "split": data.digest},
    )
    trainer = _Trainer(config, results, loss_function, num_correct)
    try:
        trainer.learn()
        trainer.measure_all()
        results.status = "completed"
    except TrainingFailed as error:
        results.status, results.failure, error.results = "failed", str(error), results
        raise
    except KeyboardInterrupt:
        results.status = "interrupted"
        raise
    finally:
        results.timespan = time.time() - results.start_time
        if on_gpu:
            results.memory_usage = torch.cuda.max_memory_allocated(device) - results.baseline_memory
        if config.save and results.status != "running":
            print(f"Saved {save(results, directory)}")
    return results


class _Trainer:
    """Fills the results of one run."""

    def __init__(self, config: TrainingConfig, results: Results, loss_function: Callable, num_correct: Callable | None):
        self.config = config
        self.results = results
        self.model = results.model
        self.loss_function = loss_function
        self.num_correct = num_correct
        self.epoch = 0

    def learn(self) -> None:
        """Trains until the last epoch or the end of patience; leaves the model in the best state that was measured."""
        config, results = self.config, self.results
        optimiser = torch.optim.AdamW(
            self.model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimiser, patience=config.scheduler_patience)
        best_loss, best_state = math.inf, None
        plateau_loss, plateau_start = math.inf, 0
        batches = results.train_dataloader
        try:
            with tqdm(total=config.max_epochs * len(batches), unit="batch", disable=None) as bar:
                for self.epoch in range(1, config.max_epochs + 1):
                    learning_rate = optimiser.param_groups[0]["lr"]
                    metrics = self._pass("training", batches, backward=True, optimiser=optimiser, bar=bar)
                    results.epochs.append(_epoch(metrics, self.epoch, learning_rate))
                    if self.epoch % config.metric_interval and self.epoch < config.max_epochs:
                        continue
                    if config.published_metrics:
                        metrics = self._measure("train")
                    entry = HistoryEntry(epoch=self.epoch, train_metrics=metrics, val_metrics=self._measure("val"))
                    results.history.append(entry)
                    scheduler.step(metrics.loss)
                    if metrics.loss < best_loss:
                        best_loss, best_state = metrics.loss, copy.deepcopy(self.model.state_dict())
                    if metrics.loss * IMPROVEMENT < plateau_loss:
                        plateau_loss, plateau_start = metrics.loss, self.epoch
                    elif self.epoch - plateau_start > config.plateau_epochs:
                        break
        finally:
            if best_state is not None:
                self.model.load_state_dict(best_state)

    def measure_all(self) -> None:
        """Measures the model as it is on the three parts of the data."""
        self.results.train_metrics = self._measure("train")
        self.results.val_metrics = self._measure("val")
        self.results.test_metrics = self._measure("test", backward=True)

    def _measure(self, part: str, *, backward: bool = False) -> Metrics:
        batches = self.results[f"{part}_dataloader"]
        # In order: drawing an order for this would change the order of the training to come.
        batches = Batches(batches.tensors, batches.batch_size)
        return self._pass(f"measuring {part}", batches, backward=backward or self.config.published_metrics)

    def _pass(self, doing: str, batches: Batches, *, backward: bool, optimiser=None, bar=None) -> Metrics:
        """Goes over `batches` once: forward, then `backward` if so, then a step of `optimiser` if there is one."""
        totals, num_samples, first_statistics = Counter(), 0, None
        self.model.train(optimiser is not None)
        timestamp, started = time.time(), self._clock()
        for number, batch in enumerate(batches, 1):
            try:
                sums, statistics = self._solve(batch, backward)
            except (SolverError, FloatingPointError, torch.OutOfMemoryError) as error:
                raise TrainingFailed(
                    f"training failed in epoch {self.epoch} ({doing}), batch {number} of {len(batches)}, "
                    f"at rtol {self.config.rtol} and atol {self.config.atol}: {error}"
                ) from error
            if optimiser is not None:
                optimiser.step()
            self.model.zero_grad()
            totals.update(sums | _counts(statistics))
            num_samples += len(batch[0])
            means = {name: totals[name] / num_samples for name in sums}
            first_statistics = first_statistics or statistics
            if bar is not None:
                nfe = {"forward_nfe": statistics.forward.nfe, "backward_nfe": statistics.backward.nfe}
                bar.set_postfix({"epoch": self.epoch, **means, **nfe}, refresh=False)
                bar.update()
        passed = {"dataset_size": num_samples, "timestamp": timestamp, "timespan": self._clock() - started}
        return metrics_of({**totals, **means, **passed, **_times(first_statistics)})

    def _solve(self, batch: tuple[Tensor, ...], backward: bool) -> tuple[dict[str, float], SolveStatistics]:
        """The sums over a batch of what `_pass` takes means of, and the statistics of its solve."""
        with torch.set_grad_enabled(backward):
            prediction, statistics = self.model(batch[0])
            loss = self.loss_function(prediction, batch[-1])
        # The only wait for the device, besides the solver's own.
        sums = {"loss": loss.item() * len(batch[0])}
        if not math.isfinite(sums["loss"]):
            raise FloatingPointError(f"the loss is {loss.item()}; try a smaller learning rate or smaller tolerances")
        if self.num_correct is not None:
            sums["accuracy"] = self.num_correct(prediction, batch[-1]).item()
        if backward:
            loss.backward()
        return sums, statistics

    def _clock(self) -> float:
        """Seconds, read when the device has done all that it was asked to."""
        if self.config.device != "cpu":
            torch.cuda.synchronize(self.config.device)
        return time.perf_counter()


def _epoch(metrics: Metrics, epoch: int, learning_rate: float) -> Epoch:
    kept = {name: value for name, value in metrics.items() if name in ClassifierEpoch.__dataclass_fields__}
    return epoch_of({**kept, "epoch": epoch, "seconds": metrics.timespan, "learning_rate": learning_rate})


def _counts(statistics: SolveStatistics) -> dict[str, int]:
    forward, backward = statistics.forward, statistics.backward
    return {
        "forward_nfe": forward.nfe,
        "backward_nfe": backward.nfe,
        "forward_accepted": forward.num_accepted,
        "forward_rejected": forward.num_rejected,
        "backward_accepted": backward.num_accepted,
        "backward_rejected": backward.num_rejected,
    }


def _times(statistics: SolveStatistics) -> dict[str, list[float]]:
    forward, backward = statistics.forward, statistics.backward
    times = {
        "forward_ts": forward.evaluation_times,
        "backward_ts": backward.evaluation_times,
        "forward_accept_ts": forward.accept_times,
        "forward_reject_ts": forward.reject_times,
        "backward_accept_ts": backward.accept_times,
        "backward_reject_ts": backward.reject_times,
    }
    return {name: _thinned(values) for name, values in times.items()}


def _thinned(times: list[float]) -> list[float]:
    stride = max(1, math.ceil(len(times) / MAX_TIMES))
    return [float(f"{t:.6g}") for t in times[::stride]]
