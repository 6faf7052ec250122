"""Nothing of a run is lost, whatever ends it; and a long one does not grow."""

import contextlib
import gc
import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_training import Config, Line, constant_loss, make_config, make_data, run, squared_error, without_clock

from common import checkpoint, measuring, training
from common.checkpoint import Checkpoint
from common.errors import Interrupted, TrainingFailed
from common.provenance import describe
from common.randomness import seeded
from common.results import load, make_directory
from torchadjoint import SolverError

TESTS = Path(__file__).parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}", "OMP_NUM_THREADS": "1"}


class Eventful(Line):
    """Calls `event` in training batch number `when`, and draws from the global generator in each."""

    def __init__(self, event=None, when=8):
        super().__init__()
        self.event = event
        self.when = when

    def forward(self, x):
        prediction, statistics = super().forward(x)
        if self.training:
            prediction = prediction + 1e-3 * torch.randn(())
            if self.event is not None and self.num_training_batches == self.when:
                self.event()
        return prediction, statistics


def model_of(event=None, when=8):
    torch.manual_seed(1)
    with seeded(0, "weights"):
        return Eventful(event, when)


def send(number):
    return lambda: os.kill(os.getpid(), number)


def learnt(results_dir):
    """History and epochs of the one complete run in a folder, without times."""
    runs = [load(path) for path in Path(results_dir).rglob("*.json")]
    [results] = [results for results in runs if results.status == "completed"]
    for entry in results.history:
        for metrics in (entry.train_metrics, entry.val_metrics):
            metrics.timestamp = metrics.timespan = 0
    return results.history, [replace(epoch, seconds=0, cpu_seconds=0) for epoch in results.epochs]


def checkpoints(folder):
    return [path for path in Path(folder).rglob("*.checkpoint*") if path.suffix != ".lock"]


@pytest.fixture
def whole(tmp_path):
    run(make_config(tmp_path / "whole"), model=model_of())
    return learnt(tmp_path / "whole")


def test_a_resumed_run_keeps_the_best_state_from_before(tmp_path):
    calls = itertools.count()

    def growing_loss(prediction, labels):
        return squared_error(prediction, labels) + next(calls)

    config = make_config(tmp_path / "resumed", metric_interval=1)
    with pytest.raises(Interrupted):
        run(config, model=model_of(send(signal.SIGINT)), loss_function=growing_loss)
    results = run(replace(config, resume=True), model=model_of(), loss_function=growing_loss)
    best = run(make_config(tmp_path / "best", max_epochs=1), model=model_of())
    assert torch.equal(results.model.linear.weight, best.model.linear.weight)


def test_the_seconds_of_a_resumed_epoch_go_on(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now, process_time=lambda: 2 * clock.now, time=time.time)
    monkeypatch.setattr(training, "time", clock)

    class Slow(Eventful):
        def forward(self, x):
            clock.now += self.training
            return super().forward(x)

    with pytest.raises(Interrupted):
        run(make_config(tmp_path), model=Slow(send(signal.SIGINT), 8))
    clock.now += 1000
    results = run(make_config(tmp_path, resume=True), model=Slow())
    assert [(epoch.seconds, epoch.cpu_seconds) for epoch in results.epochs] == [(3, 6)] * 5


def test_a_run_that_goes_on_elsewhere_names_both_devices_and_commits(tmp_path, monkeypatch):
    config = make_config(tmp_path)
    for device_name, commit, when in (("one", "a", 1), ("one", "a", 2), ("other", "b", 2), ("other", "b", None)):
        made_on = describe(torch.device("cpu")) | {"device_name": device_name, "commit": commit}
        monkeypatch.setattr(training, "describe", lambda device, made_on=made_on: made_on)
        model = model_of(send(signal.SIGINT) if when else None, when)
        with pytest.raises(Interrupted) if when else contextlib.nullcontext():
            run(replace(config, resume=True), model=model)
    [results] = [load(path) for path in tmp_path.rglob("*.json") if load(path).status == "completed"]
    assert (results.provenance.device_name, results.provenance.commit) == ("one, then other", "a, then b")


def test_a_run_that_goes_on_with_other_threads_names_their_numbers(tmp_path, monkeypatch):
    for number, when in ((8, 2), (1, 2), (1, 2), (8, None)):
        made_on = describe(torch.device("cpu")) | {"device_name": "one", "num_threads": number}
        monkeypatch.setattr(training, "describe", lambda device, made_on=made_on: made_on)
        model = model_of(send(signal.SIGINT) if when else None, when)
        with pytest.raises(Interrupted) if when else contextlib.nullcontext():
            run(make_config(tmp_path, resume=True), model=model)
    [results] = [load(path) for path in tmp_path.rglob("*.json") if load(path).status == "completed"]
    assert results.provenance.device_name == "one (8 threads), then one (1 threads)"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("when", [1, 3, 8, 15])
def test_a_signal_ends_the_batch_and_the_run_goes_on_to_the_same_bits(tmp_path, whole, number, when):
    config = make_config(tmp_path)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    model = model_of(send(number), when)
    with pytest.raises(Interrupted, match="resume=True") as caught:
        run(config, model=model)
    assert caught.value.signal == number
    assert model.num_training_batches == when
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    [path] = tmp_path.glob("toy/*/*.json")
    assert load(path).status == "interrupted"
    path.unlink()
    assert len(checkpoints(tmp_path)) == 1
    model = model_of()
    run(replace(config, resume=True), model=model)
    assert model.num_training_batches == 15 - when
    assert learnt(tmp_path / "toy") == whole
    assert not checkpoints(tmp_path)


def test_signals_are_left_alone_outside_the_main_thread(tmp_path):
    statuses = []
    thread = threading.Thread(target=lambda: statuses.append(run(make_config(tmp_path)).status))
    thread.start()
    thread.join()
    assert statuses == ["completed"]


def fail():
    raise SolverError("underflow in dt")


def test_a_failed_run_keeps_its_last_good_checkpoint(tmp_path, whole):
    config = make_config(tmp_path)
    with pytest.raises(TrainingFailed):
        run(config, model=model_of(fail))
    run(replace(config, resume=True), model=model_of())
    assert learnt(tmp_path / "toy") == whole


@pytest.mark.parametrize(("seconds", "left"), [(0.0, 8), (300.0, 9)])
def test_a_long_epoch_writes_checkpoints_on_its_way(tmp_path, monkeypatch, seconds, left):
    """It fails in the second of the three batches of epoch 3."""
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", seconds)
    config = make_config(tmp_path)
    with pytest.raises(TrainingFailed):
        run(config, model=model_of(fail))
    model = model_of()
    run(replace(config, resume=True), model=model)
    assert model.num_training_batches == left


@pytest.mark.parametrize("when", [8, 14, 20])
def test_the_patience_of_a_resumed_run_is_what_it_was(tmp_path, when):
    """The loss never falls: the learning rate does from the fifth epoch on, and training stops after the eighth."""

    def learning_rates(folder, event, resume=False):
        config = make_config(folder, max_epochs=20, metric_interval=1, plateau_epochs=6, resume=resume)
        results = run(config, model=model_of(event, when), loss_function=constant_loss)
        return [epoch.learning_rate for epoch in results.epochs]

    with pytest.raises(TrainingFailed):
        learning_rates(tmp_path / "failed", fail)
    expected = learning_rates(tmp_path / "whole", None)
    assert len(expected) == 8
    assert learning_rates(tmp_path / "failed", None, resume=True) == expected


def test_nothing_to_resume_is_a_beginning(tmp_path, whole):
    run(make_config(tmp_path, resume=True), model=model_of())
    assert learnt(tmp_path / "toy") == whole


def test_without_resume_a_run_starts_anew_and_says_so(tmp_path, whole, capsys):
    with pytest.raises(TrainingFailed):
        run(make_config(tmp_path), model=model_of(fail))
    run(make_config(tmp_path), model=model_of())
    assert "Starts anew" in capsys.readouterr().err
    assert learnt(tmp_path / "toy") == whole


def test_another_run_is_not_resumed(tmp_path):
    with pytest.raises(TrainingFailed):
        run(make_config(tmp_path), model=model_of(fail))
    other = make_config(tmp_path, published_metrics=True, resume=True)
    [path] = checkpoints(tmp_path)
    folder = make_directory(tmp_path, "toy", other.condition)
    (folder / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match="published_metrics was False and is True: delete it to start"):
        run(other)
    other = replace(make_data(make_config(tmp_path)), digest="other")
    with pytest.raises(ValueError, match="digest of the data was 'abc' and is 'other'"):
        run(make_config(tmp_path, resume=True), data=other)


def test_a_setting_by_the_name_of_the_split_does_not_hide_that_the_data_are_others(tmp_path):
    @dataclass(frozen=True)
    class Splitting(Config):
        split: str = field(default="published", kw_only=True)

    config = Splitting("cpu", "seminorm", results_dir=str(tmp_path))
    with pytest.raises(TrainingFailed):
        run(config, model=model_of(fail))
    other = replace(make_data(config), digest="other")
    with pytest.raises(ValueError, match="digest of the data was 'abc' and is 'other'"):
        run(replace(config, resume=True), data=other)


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b"", lambda b: b[:99] + bytes([b[99] ^ 1]) + b[100:]])
def test_a_damaged_checkpoint_is_named(tmp_path, damage):
    with pytest.raises(TrainingFailed):
        run(make_config(tmp_path), model=model_of(fail))
    [path] = checkpoints(tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=re.escape(f"{path} is damaged: delete it")):
        run(make_config(tmp_path, resume=True))


def test_a_run_has_one_process(tmp_path):
    config = make_config(tmp_path)
    folder = Path(tmp_path, "toy", "seminorm-0-001-1e-06")
    folder.mkdir(parents=True)
    with (
        Checkpoint(folder / "seed-0.checkpoint", {}),
        pytest.raises(ValueError, match="another process is training this very run"),
    ):
        run(config)


def test_resuming_needs_something_saved(tmp_path):
    with pytest.raises(ValueError, match="leave save True"):
        make_config(tmp_path, resume=True, save=False)


def killed(experiment, folder, limit):
    command = [sys.executable, "-W", "error", str(TESTS / "killed_training.py"), experiment, str(folder)]
    process = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=limit)
    assert process.returncode == 0, process.stderr
    assert learnt(folder / "killed") == learnt(folder / "whole")


def test_twenty_kills_change_no_bit(tmp_path):
    killed("toy", tmp_path, limit=300)


@pytest.mark.slow
@pytest.mark.parametrize("experiment", ["acrobot", "speech_commands"])
def test_twenty_kills_change_no_bit_of_an_experiment(tmp_path, experiment):
    killed(experiment, tmp_path, limit=1200)


@pytest.mark.parametrize("point", ["before the weights", "before the results", "before the checkpoint is removed"])
def test_a_kill_at_the_end_leaves_one_completed_run_with_its_weights(tmp_path, whole, point):
    command = [sys.executable, str(TESTS / "killed_while_saving.py"), point, str(tmp_path / "killed")]
    process = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert len(checkpoints(tmp_path / "killed")) == 1
    assert all(path.with_suffix(".pt").exists() for path in (tmp_path / "killed").rglob("*.json"))
    run(make_config(tmp_path / "killed", resume=True), model=model_of())
    assert learnt(tmp_path / "killed") == whole
    names = {path.name for path in (tmp_path / "killed").rglob("*") if path.is_file() and path.suffix != ".lock"}
    assert names == {"0.json", "0.pt"}


def test_a_second_signal_stops_at_once(tmp_path, capsys):
    def twice():
        send(signal.SIGINT)()
        send(signal.SIGINT)()

    model = model_of(twice)
    with pytest.raises(KeyboardInterrupt) as caught:
        run(make_config(tmp_path), model=model)
    assert caught.type is KeyboardInterrupt, "it waited for the batch"
    assert model.num_training_batches == 8
    [path] = tmp_path.rglob("*.json")
    assert (load(path).status, len(load(path).epochs)) == ("interrupted", 2)
    assert "a second one stops at once" in capsys.readouterr().err


@pytest.mark.parametrize("echo_seconds", [10.0, -1.0])
def test_a_second_sigterm_stops_at_once_unless_it_is_an_echo_of_the_first(tmp_path, monkeypatch, echo_seconds):
    monkeypatch.setattr(checkpoint, "ECHO_SECONDS", echo_seconds)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)

    def twice():
        send(signal.SIGTERM)()
        send(signal.SIGTERM)()

    model = model_of(twice)
    try:
        with pytest.raises(KeyboardInterrupt) as caught:
            run(make_config(tmp_path), model=model)
        assert caught.type is (KeyboardInterrupt if echo_seconds < 0 else Interrupted)
        assert signal.getsignal(signal.SIGTERM) == signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_hash_seed_changes_no_bit(tmp_path):
    program = "import sys, test_training as t; t.run(t.make_config(sys.argv[1]))"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path / seed)], env={**ENVIRONMENT, "PYTHONHASHSEED": seed}
        )
        for seed in ("1", "2")
    ]
    assert [process.wait(60) for process in processes] == [0, 0]
    assert learnt(tmp_path / "1") == learnt(tmp_path / "2")


def resident_bytes():
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_a_long_run_does_not_grow(tmp_path, monkeypatch):
    """420 steps, each with 8,000 evaluation times: those of the history alone are 18 MB."""
    sizes = []

    class Long(Line):
        def forward(self, x):
            if self.training and self.num_training_batches % 60 == 0:
                sizes.append(resident_bytes())
            prediction, statistics = super().forward(x)
            statistics.forward.evaluation_times += [number / 7 for number in range(8_000 if self.training else 1)]
            return prediction, statistics

    monkeypatch.setattr(training.Checkpoint, "write", lambda self, state: None)
    results = run(make_config(tmp_path, max_epochs=140, metric_interval=2, plateau_epochs=140), model=Long())
    assert len(results.epochs) * 3 == 420
    assert sizes[-1] - sizes[1] < 8e6
    assert max(len(entry.train_metrics.forward_ts) for entry in results.history) <= measuring.MAX_TIMES


def test_the_same_seed_gives_the_same_file_alone_or_after_others(tmp_path):
    run(make_config(tmp_path / "other", seed=9))
    first, second = (without_clock(run(make_config(tmp_path / name, seed=3))) for name in ("first", "second"))
    assert first == second


def test_where_the_data_lie_does_not_matter(tmp_path, whole):
    @dataclass(frozen=True)
    class Moved(Config):
        data_root: str = field(default="there", kw_only=True, metadata={"condition": False})
        """Where the data lie."""

    config = Moved("cpu", True, results_dir=tmp_path / "resumed")
    with pytest.raises(Interrupted):
        run(config, model=model_of(send(signal.SIGINT)))
    run(replace(config, data_root="elsewhere", resume=True), model=model_of())
    assert learnt(tmp_path / "resumed") == whole


def test_a_signal_when_all_is_done_leaves_a_completed_run(tmp_path, monkeypatch, whole):
    save = training._save

    def save_and_stop(*arguments):
        save(*arguments)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(training, "_save", save_and_stop)
    with pytest.raises(Interrupted, match="complete and saved"):
        run(make_config(tmp_path / "done"), model=model_of())
    assert learnt(tmp_path / "done") == whole
    assert not checkpoints(tmp_path / "done")


def test_a_signal_that_is_ignored_stays_ignored(tmp_path, whole):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        run(make_config(tmp_path / "ignored"), model=model_of(send(signal.SIGINT)))
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert learnt(tmp_path / "ignored") == whole
