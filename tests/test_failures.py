"""Whatever goes wrong with numbers, memory or the disk ends a training in one sentence and costs nothing learnt."""

import contextlib
import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import numpy
import pytest
import torch
from problems import solve
from test_checkpoint import ENVIRONMENT, checkpoints, learnt
from test_training import NUM_BATCHES, Line, make_config, make_data, run
from torch import nn

from common import command_line
from common.errors import Interrupted, TrainingFailed
from common.randomness import seeded
from common.results import load
from torchadjoint import SolverError


class Failing(Line):
    """Calls `fail` with the prediction of the 2nd batch of the 3rd epoch."""

    def __init__(self, fail):
        super().__init__()
        self.fail = fail

    def forward(self, x):
        prediction, statistics = super().forward(x)
        if self.training and self.num_training_batches == 2 * NUM_BATCHES + 2:
            prediction = self.fail(prediction)
        return prediction, statistics


def fail_to_solve(prediction):
    raise SolverError("underflow in dt")


def run_out_of_memory(prediction):
    raise torch.OutOfMemoryError("CUDA out of memory")


def fail_at_cuda(message):
    def fail(prediction):
        raise RuntimeError(f"CUDA error: {message}")

    return fail


def with_gradient(prediction, factor):
    prediction.register_hook(lambda gradient: gradient * factor)
    return prediction


def interrupt(prediction):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("fail", "reason"),
    [
        (fail_to_solve, "underflow in dt"),
        (lambda prediction: prediction * float("nan"), "the loss is nan"),
        (lambda prediction: prediction * float("inf"), "the loss is inf"),
        (lambda prediction: with_gradient(prediction, float("nan")), "the norm of the gradient is nan; try a smaller"),
        (lambda prediction: with_gradient(prediction, 1e30), "the norm of the gradient is inf; try a smaller"),
        (run_out_of_memory, "there is too little memory: try a smaller batch_size (CUDA out of memory)"),
        (fail_at_cuda("out of memory"), "there is too little memory: try a smaller batch_size (CUDA error: out"),
        (fail_at_cuda("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "there is too little memory"),
        (fail_at_cuda("CUDNN_STATUS_ALLOC_FAILED"), "there is too little memory: try a smaller batch_size ("),
        (lambda prediction: torch.empty(2**50), "there is too little memory: try a smaller batch_size ("),
        (lambda prediction: numpy.empty(2**50), "there is too little memory: try a smaller batch_size ("),
    ],
)
def test_a_failure_is_explained_and_what_was_learnt_is_saved(tmp_path, capsys, fail, reason):
    sentence = f"epoch 3 (training), batch 2 of 3, at rtol 0.001 and atol 1e-06: {reason}"
    with pytest.raises(TrainingFailed, match=re.escape(sentence)) as caught:
        run(make_config(tmp_path), model=Failing(fail))
    [path] = tmp_path.rglob("*.json")
    assert str(path) in capsys.readouterr().out
    saved = load(path)
    assert saved.status == caught.value.results.status == "failed"
    assert sentence in saved.failure
    assert (len(saved.epochs), len(saved.history), saved.test_metrics) == (2, 1, None)


def test_after_a_failure_the_model_is_the_best_there_was(tmp_path):
    with seeded(0, "weights"):
        model = Failing(fail_to_solve)
    with pytest.raises(TrainingFailed):
        run(make_config(tmp_path), model=model)
    assert torch.equal(model.linear.weight, run(make_config(tmp_path, max_epochs=2)).model.linear.weight)


@pytest.mark.parametrize(
    "fail", [lambda prediction: prediction * float("nan"), lambda prediction: with_gradient(prediction, float("nan"))]
)
def test_a_bad_loss_or_gradient_never_reaches_the_weights(tmp_path, fail):
    model = Failing(fail)
    with pytest.raises(TrainingFailed):
        run(make_config(tmp_path, metric_interval=10), model=model)
    assert model.linear.weight.isfinite().all()


def test_an_interrupted_training_is_saved(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(make_config(tmp_path), model=Failing(interrupt))
    [path] = tmp_path.rglob("*.json")
    assert load(path).status == "interrupted"
    assert len(load(path).epochs) == 2


@pytest.mark.parametrize(
    ("learning_rate", "reason"),
    [
        (1e38, "AdamW cannot step (.*); try a smaller learning rate"),
        (1e30, "the norm of the weights is inf; try a smaller"),
    ],
)
def test_a_learning_rate_beyond_all_bounds(tmp_path, learning_rate, reason):
    with pytest.raises(TrainingFailed, match=rf"epoch 1 \(training\), batch 1 of 3, at rtol 0.001 .*: {reason}"):
        run(make_config(tmp_path, learning_rate=learning_rate))
    assert not checkpoints(tmp_path)


def test_too_little_memory_for_adamw_is_no_matter_of_its_learning_rate(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: torch.empty(2**50))
    with pytest.raises(TrainingFailed, match=r"batch 1 of 3, .*: there is too little memory: try a smaller batch_size"):
        run(make_config(tmp_path))


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize(("part", "where"), [("train", "epoch 1 (training)"), ("val", "epoch 2 (measuring val)")])
def test_data_that_are_not_finite(tmp_path, number, part, where):
    config = make_config(tmp_path)
    data = make_data(config)
    getattr(data, part).tensors[0][7, 1] = number
    with pytest.raises(TrainingFailed, match=re.escape(where) + ".*the data hold NaN or infinity; correct or remove"):
        run(config, data=data)


class Exploding(nn.Module):
    """dy/dt = y^2 is infinite at t = 1 / y(0)."""

    def __init__(self, solver):
        super().__init__()
        self.field = nn.Linear(1, 1)
        self.solver = solver

    def forward(self, x):
        func = Square(self.field)
        solution = solve(func, x[:, :1].abs() + 1, torch.tensor([0.0, 2.0]), rtol=1e-3, atol=1e-6, solver=self.solver)
        return solution.y[-1], solution.statistics


class Square(nn.Module):
    def __init__(self, field):
        super().__init__()
        self.field = field

    def forward(self, t, y):
        return y**2 + 0 * self.field(y)


@pytest.mark.parametrize("solver", ["torchadjoint", "torchdiffeq"])
def test_a_solution_that_explodes_is_located(tmp_path, solver):
    where = r"epoch 1 \(training\), batch 1 of 3, at rtol 0.001 and atol 1e-06: .* at t = 0\.\d+.*try larger tolerances"
    with pytest.raises(TrainingFailed, match=where):
        run(make_config(tmp_path), model=Exploding(solver), measures=None)


def fill(folder):
    with (folder / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"x" * 1000):
            pass
    assert shutil.disk_usage(folder).free == 0


class Filling(Line):
    """Fills the disk before a forward pass: in training batch 8, or else in the measurement after the last one."""

    def __init__(self, folder, *, in_training):
        super().__init__()
        self.folder = folder
        self.when = (True, 8) if in_training else (False, 15)

    def forward(self, x):
        prediction, statistics = super().forward(x)
        if (self.training, self.num_training_batches) == self.when:
            fill(self.folder)
        return prediction, statistics


@pytest.mark.parametrize(
    ("in_training", "sentence"),
    [
        (
            True,
            "the checkpoint .*seed-0.checkpoint cannot be written .No space left on device., and what it held before",
        ),
        (
            False,
            "the results cannot be written to .* .No space left on device.: make room, then do the same with resume",
        ),
    ],
)
def test_a_full_disk_costs_nothing_that_was_learnt(tmp_path, small_disk, capsys, in_training, sentence):
    run(make_config(tmp_path / "whole"), model=start(Line()))
    config = make_config(small_disk)
    with pytest.raises(SystemExit) as ended:
        command_line.call(lambda: run(config, model=start(Filling(small_disk, in_training=in_training))))
    assert ended.value.code == 1
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert re.match(sentence, last_line)
    assert {path.suffix for path in small_disk.rglob("*") if path.is_file()} == {"", ".lock", ".checkpoint"}
    (small_disk / "filler").unlink()
    model = start(Line())
    run(replace(config, resume=True), model=model)
    assert model.num_training_batches == (9 if in_training else 0)
    assert learnt(small_disk) == learnt(tmp_path / "whole")


def start(model):
    with seeded(0, "weights"):
        model.linear.reset_parameters()
    return model


class Unmeasurable(Line):
    """Fails in batch number `when` of all that it is measured on, by raising `error`."""

    def __init__(self, when, error):
        super().__init__()
        self.calls = itertools.count(1)
        self.when = when
        self.error = error

    def forward(self, x):
        if not self.training and next(self.calls) == self.when:
            if self.error is None:
                os.kill(os.getpid(), signal.SIGINT)
            else:
                raise self.error
        return super().forward(x)


MEASUREMENTS = {
    4: ("epoch 4 (measuring val)", "batch 1 of 3"),
    8: ("epoch 5 (measuring val)", "batch 2 of 3"),
    10: ("the last measurement (measuring train)", "batch 1 of 3"),
    18: ("the last measurement (measuring test)", "batch 3 of 3"),
}


@pytest.mark.parametrize("when", MEASUREMENTS)
def test_errors_and_interruptions_name_the_measurement_that_was_under_way(tmp_path, capsys, when):
    where, batch = MEASUREMENTS[when]
    with pytest.raises(TrainingFailed, match=re.escape(f"training failed in {where}, {batch}, at rtol")):
        run(make_config(tmp_path), model=Unmeasurable(when, SolverError("underflow in dt")))
    with pytest.raises(Interrupted, match=re.escape(f"interrupted in {where}; to go on from")):
        run(make_config(tmp_path), model=Unmeasurable(when, None))
    announced = "Ctrl-C: stops as soon as the batch is finished; a second one stops at once"
    assert announced in capsys.readouterr().err.splitlines()


def test_what_is_a_bug_is_no_failed_training(tmp_path):
    with pytest.raises(RuntimeError, match=r"^a bug$"):
        run(make_config(tmp_path), model=Unmeasurable(1, RuntimeError("a bug")))
    assert not list(tmp_path.rglob("*.json"))


def test_a_process_without_memory_leaves_a_sentence_and_a_record(tmp_path):
    """The batches of a model that needs 8 GiB, where 1 GiB is left."""
    program = """
import resource, sys, torch
from test_training import Line, make_config, run
from common import command_line

class Large(Line):
    def forward(self, x):
        return super().forward(x + torch.zeros(2**31)[:1])

used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, resource.RLIM_INFINITY))
command_line.call(lambda: run(make_config(sys.argv[1]), model=Large()))
"""
    command = [sys.executable, "-c", program, str(tmp_path)]
    process = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert process.returncode == 1, process.stderr
    sentence = "training failed in epoch 1 (training), batch 1 of 3, at rtol 0.001 and atol 1e-06: there is too little"
    assert process.stderr.startswith(sentence)
    assert len(process.stderr.splitlines()) == 1
    [path] = tmp_path.rglob("*.json")
    assert load(path).failure.startswith(sentence)


@pytest.mark.parametrize("closed", ["> /dev/full", "2> /dev/full", ">&- 2>&-"])
def test_a_run_whose_output_nobody_can_read_is_complete(tmp_path, closed):
    program = "import test_training as t; from common import command_line as c; "
    program += f"c.call(lambda: t.run(t.make_config({str(tmp_path)!r})))"
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(program)} {closed}"
    process = subprocess.run(command, shell=True, env=ENVIRONMENT, capture_output=True, text=True)
    assert process.returncode == 0
    assert not re.search("Errno|Error|Exception", process.stdout + process.stderr)
    assert learnt(tmp_path)
    assert not checkpoints(tmp_path)
