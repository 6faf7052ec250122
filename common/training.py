"""The training loop that all experiments share: they give it a model, its loss and the data, and get the results."""

import contextlib
import copy
import itertools
import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from datasets.batches import Batches, DataSplit
from torchadjoint import SolverError
from torchadjoint.statistics import SolveStatistics

from .checkpoint import RESUME, Checkpoint, DelayedSignals, State
from .config import TrainingConfig
from .errors import TrainingFailed
from .measuring import Pass
from .progress import Progress, say
from .provenance import Provenance, describe
from .records import read_as
from .results import Epoch, HistoryEntry, Metrics, Results, make_directory, save

CHECKPOINT_SECONDS = 300.0
"""How long an epoch trains on at most before it writes a checkpoint; each epoch writes one at its end too."""
FREE_TO_DIFFER = ("device", "save", "results_dir", "resume")
"""The settings that do not tell runs apart."""
PARTS = ("train", "val", "test")
IMPROVEMENT = 1.0001
"""The factor by which the train loss must fall to end a plateau."""


def train(
    config: TrainingConfig,
    *,
    experiment: str,
    model: nn.Module,
    data: DataSplit,
    loss_function: Callable[[Tensor, Tensor], Tensor],
    measures: Mapping[str, Callable[[Tensor, Tensor], Tensor]] | None = None,
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
        measures: the sum over the samples of a prediction, given its target, of what the results are to hold beside the
            loss, by its name in `results.MEASURES`, such as how many are right for `accuracy`.

    Raises:
        ValueError: before training begins, if there is no place to save the results (or an OSError), if another process
            trains the same run, or if the checkpoint to resume from is damaged or another run's.
        TrainingFailed: if a loss, a gradient or the data are not finite, a solve fails, or there is too little memory
            or room on the disk. The results until then are saved all the same, if they can be (as they are when the
            user interrupts), and are the error's `results`.
        Interrupted: a KeyboardInterrupt, after SIGINT or SIGTERM: when the batch is done and the checkpoint written.
    """
    directory = make_directory(config.results_dir, experiment, config.condition) if config.save else None
    device = torch.device(config.device)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
        set_full_precision()
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
        provenance=Provenance(**describe(device), split=data.digest),
    )
    with contextlib.ExitStack() as stack:
        checkpoint = None
        if config.save:
            # Where the data lie does not matter: the checkpoint has the digest of their split.
            free = (*FREE_TO_DIFFER, "data_root")
            settings = {name: value for name, value in results.config.items() if name not in free}
            checkpoint = Checkpoint(
                directory / f"seed-{config.seed}.checkpoint", {"experiment": experiment, **settings}
            )
            stack.enter_context(checkpoint)
        signals = stack.enter_context(DelayedSignals())
        trainer = _Trainer(config, results, loss_function, measures or {}, checkpoint, signals)
        if not (config.resume and checkpoint.restore(trainer.state)) and config.save and checkpoint.path.exists():
            say(f"Starts anew; the first epoch will replace {checkpoint.path}, which resumes.", sys.stderr)
        try:
            trainer.run()
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
                _save(results, directory)
        if checkpoint is not None:
            checkpoint.delete()
        signals.check("interrupted when the run was complete and saved")
    return results


def set_full_precision() -> None:
    """Has a GPU round to float32 in all it does: TF32 has 10 bits, which a solver takes for errors of its steps."""
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")


class _Trainer:
    """Fills the results of one run."""

    def __init__(
        self,
        config: TrainingConfig,
        results: Results,
        loss_function: Callable,
        measures: Mapping[str, Callable],
        checkpoint: Checkpoint | None,
        signals: DelayedSignals,
    ):
        self.config = config
        self.results = results
        self.model = results.model
        self.loss_function = loss_function
        self.measures = measures
        self.checkpoint = checkpoint
        self.signals = signals
        optimiser = torch.optim.AdamW(
            self.model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimiser, patience=config.scheduler_patience)
        self.state = State(results, optimiser, scheduler)
        self.saved_at = time.perf_counter()

    def run(self) -> None:
        """Trains, and measures the best model, from where the state is to the end."""
        done = self._num_batches_until(self.state.epoch - 1) + self.state.training.num_batches
        at_the_end = sum(len(self.results[f"{part}_dataloader"]) for part in PARTS)
        with Progress(done, self._num_batches_until(self.config.max_epochs) + at_the_end) as self.progress:
            self._learn()
            self.progress.measuring(at_the_end)
            for part in PARTS:
                metrics = self._measure(part, "the last measurement", backward=part == "test")
                setattr(self.results, f"{part}_metrics", metrics)

    def _num_batches_until(self, epoch: int) -> int:
        """How many batches the passes up to this epoch have, its measurement included."""
        train, val = len(self.results.train_dataloader), len(self.results.val_dataloader)
        measured = sum(self._is_measured(number) for number in range(1, epoch + 1))
        return epoch * train + measured * (val + train * self.config.published_metrics)

    def _learn(self) -> None:
        """Trains until the last epoch or the end of patience; leaves the model in the best state that was measured."""
        state = self.state
        try:
            while True:
                self._learn_epoch()
                is_over = state.epoch - state.plateau_start > self.config.plateau_epochs and self._is_measured(
                    state.epoch
                )
                if is_over or state.epoch == self.config.max_epochs:
                    break
                state.epoch, state.training = state.epoch + 1, Pass()
        finally:
            if state.best_state is not None:
                self.model.load_state_dict(state.best_state)

    def _is_measured(self, epoch: int) -> bool:
        # The published code counts from 0 on, so it measures the first epoch.
        number = epoch - self.config.published_metrics
        return number % self.config.metric_interval == 0 or epoch == self.config.max_epochs

    def _learn_epoch(self) -> None:
        """What is left of an epoch, and its measurement. A checkpoint never lies within or behind the measurement."""
        state, results = self.state, self.results
        learning_rate = state.optimiser.param_groups[0]["lr"]
        if results.train_dataloader.generator is not None:
            state.order = results.train_dataloader.generator.get_state()
        where = f"epoch {state.epoch}"
        metrics = self._pass(f"{where} (training)", results.train_dataloader, state.training, backward=True, train=True)
        epoch = _epoch(metrics, state.epoch, state.training.cpu_seconds, learning_rate)
        results.epochs.append(epoch)
        num_epochs, num_batches = self.config.max_epochs, len(results.train_dataloader)
        self.progress.epoch(epoch, num_epochs=num_epochs, num_batches=num_batches)
        if not self._is_measured(state.epoch):
            return
        if self.config.published_metrics:
            metrics = self._measure("train", where)
        val_metrics = self._measure("val", where)
        results.history.append(HistoryEntry(epoch=state.epoch, train_metrics=metrics, val_metrics=val_metrics))
        # A negative log-likelihood may be below 0, where 1e-4 less than the best is 1.0001 times the best.
        state.scheduler.threshold = math.copysign(state.scheduler.threshold, state.scheduler.best)
        state.scheduler.step(metrics.loss)
        if metrics.loss < state.best_loss:
            state.best_loss, state.best_state = metrics.loss, copy.deepcopy(self.model.state_dict())
        if metrics.loss + (IMPROVEMENT - 1) * abs(metrics.loss) < state.plateau_loss:
            state.plateau_loss, state.plateau_start = metrics.loss, state.epoch

    def _measure(self, part: str, where: str, *, backward: bool = False) -> Metrics:
        """Measures the model as it is on a part of the data."""
        batches = self.results[f"{part}_dataloader"]
        # In order: drawing an order for this would change the order of the training to come.
        batches = Batches(batches.tensors, batches.batch_size)
        backward = backward or self.config.published_metrics
        return self._pass(f"{where} (measuring {part})", batches, Pass(), backward=backward)

    def _pass(self, where: str, batches: Batches, done: Pass, *, backward: bool, train: bool = False) -> Metrics:
        """Goes over what is left of `batches`: forward, then `backward` if so, and if it is to `train` a step."""
        self.model.train(train)
        started, cpu_started = self._clock() - done.timespan, time.process_time() - done.cpu_seconds
        remaining = itertools.islice(batches, done.num_batches, None)
        while True:
            batch = ()
            try:
                # Asked for also where none is left: the first draws the order of them all.
                batch = next(remaining, None)
                if batch is None:
                    break
                sums, statistics = self._solve(batch, backward)
                if train:
                    self._step()
            except (FloatingPointError, MemoryError, RuntimeError) as error:
                raise TrainingFailed(
                    f"training failed in {where}, batch {done.num_batches + 1} of {len(batches)}, "
                    f"at rtol {self.config.rtol} and atol {self.config.atol}: {_reason(error, batch)}"
                ) from error
            self.model.zero_grad()
            done.add(len(batch[0]), sums, statistics)
            nfe = {"forward_nfe": statistics.forward.nfe, "backward_nfe": statistics.backward.nfe}
            self.progress.batch(where, {**done.means(), **nfe})
            if train and self.checkpoint is not None:
                is_last = done.num_batches == len(batches)
                is_due = time.perf_counter() - self.saved_at > CHECKPOINT_SECONDS
                if is_last or is_due or self.signals.received:
                    paused, cpu_paused = self._clock(), time.process_time()
                    done.timespan, done.cpu_seconds = paused - started, cpu_paused - cpu_started
                    self.checkpoint.write(self.state.state_dict())
                    self.saved_at = time.perf_counter()
                    # To write takes no time of the training.
                    started += self.saved_at - paused
                    cpu_started += time.process_time() - cpu_paused
            self.signals.check(f"interrupted in {where}; {self._how_to_go_on()}")
        done.timespan, done.cpu_seconds = self._clock() - started, time.process_time() - cpu_started
        return done.metrics()

    def _how_to_go_on(self) -> str:
        if self.checkpoint is None:
            return "nothing was saved"
        return f"to go on from {self.checkpoint.path}, {RESUME}"

    def _solve(self, batch: tuple[Tensor, ...], backward: bool) -> tuple[dict[str, float], SolveStatistics]:
        """The sums over a batch of what `_pass` takes means of, and the statistics of its solve."""
        with torch.set_grad_enabled(backward):
            prediction, statistics = self.model(batch[0])
            loss = self.loss_function(prediction, batch[-1])
        sums = {"loss": loss.item() * len(batch[0])}
        _check_finite("loss", loss.item())
        sums |= {name: measure(prediction, batch[-1]).item() for name, measure in self.measures.items()}
        if backward:
            loss.backward()
        return sums, statistics

    @torch.no_grad()
    def _step(self) -> None:
        """Moves the weights; a FloatingPointError if that makes no sense, so that they are never saved."""
        parameters = list(self.model.parameters())
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        _check_finite("norm of the gradient", nn.utils.get_total_norm(gradients).item())
        try:
            self.state.optimiser.step()
        except RuntimeError as error:
            if _is_out_of_memory(error):
                raise
            raise FloatingPointError(f"AdamW cannot step ({error}); try a smaller learning rate") from error
        _check_finite("norm of the weights", nn.utils.get_total_norm(parameters).item())

    def _clock(self) -> float:
        """Seconds, read when the device has done all that it was asked to."""
        if self.config.device != "cpu":
            torch.cuda.synchronize(self.config.device)
        return time.perf_counter()


def _reason(error: Exception, batch: tuple[Tensor, ...]) -> str:
    """Why a batch failed, as its user needs to know it; what is a bug is raised again."""
    if _is_out_of_memory(error):
        return f"there is too little memory: try a smaller batch_size ({' '.join(str(error).split()) or 'MemoryError'})"
    if not isinstance(error, SolverError | FloatingPointError):
        raise error
    if not all(tensor.isfinite().all() for tensor in batch):
        return "the data hold NaN or infinity; correct or remove them"
    return str(error)


OUT_OF_MEMORY = ("DefaultCPUAllocator", "bad_alloc", "CUDA error: out of memory", "STATUS_ALLOC_FAILED")
"""What the messages of other errors for lack of memory hold: the last two are of CUDA and of its libraries."""


def _is_out_of_memory(error: Exception) -> bool:
    """Whether memory is what was lacking, on a GPU or the CPU, where PyTorch raises a RuntimeError like any other."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(name in str(error) for name in OUT_OF_MEMORY)


def _epoch(metrics: Metrics, epoch: int, cpu_seconds: float, learning_rate: float) -> Epoch:
    kept = {name: value for name, value in metrics.items() if name in Epoch.__dataclass_fields__}
    clocks = {"seconds": metrics.timespan, "cpu_seconds": cpu_seconds}
    return read_as(Epoch, {**kept, **clocks, "epoch": epoch, "learning_rate": learning_rate})


def _check_finite(name: str, number: float) -> None:
    if not math.isfinite(number):
        raise FloatingPointError(f"the {name} is {number}; try a smaller learning rate or smaller tolerances")


def _save(results: Results, directory: Path) -> None:
    """Saves and says where. What cannot be saved fails if it is complete; else that is said, as it fails already."""
    try:
        path = save(results, directory)
    except OSError as error:
        sentence = f"the results cannot be written to {directory} ({error.strerror}): make room, then {RESUME}"
        if results.status != "completed":
            say(sentence, sys.stderr)
            return
        results.status, results.failure = "failed", sentence
        failed = TrainingFailed(sentence)
        failed.results = results
        raise failed from error
    say(f"Saved {path}", sys.stdout)
