"""What a run takes is guessed from one gradient step."""

import time

import pytest
import torch
from records import acrobot, result

import acrobot as experiment
from reproduction import timing
from reproduction.timing import Sample, evaluations_of_a_step, rough_seconds

NAMES = ("default", "seminorm", "discrete")


def small(norm, **settings):
    return acrobot(norm, **{"batch_size": 64, "max_epochs": 9, **settings})


@pytest.fixture
def sample():
    return Sample(num_training=1_000, inputs=torch.linspace(-1, 1, 5 * 64).view(5, 8, 8))


def test_a_step_is_scaled_by_steps_epochs_and_evaluations(monkeypatch, sample):
    """1,000 samples in batches of 64 are 16 steps; 9 epochs and 1 for the measurements, 2 s each, of 10 evaluations."""
    timed = []

    def timed_step(run, sample, device):
        timed.append(run)
        return 2.0, 10

    monkeypatch.setattr(timing, "_timed_step", timed_step)
    # Two epochs of 20 batches each, as a file of another batch size and with a forward evaluation an epoch.
    known = result(acrobot("default", batch_size=64), 40 * 29 + 38)
    assert evaluations_of_a_step([known, result(acrobot("default"), 1, status="failed")]).popitem()[1] == 30
    runs = [small(norm) for norm in NAMES]
    assert rough_seconds(runs, {runs[0].data_key: sample}, [known], "cpu") == [960.0, 320.0, 320.0]
    assert len(timed) == 1


def test_a_large_batch_on_a_cpu_is_timed_in_part(monkeypatch, sample):
    seen, clock = [], iter(range(100))
    build = experiment.build

    def build_observed(config):
        model = build(config)
        model.register_forward_pre_hook(lambda module, inputs: seen.append((config.norm, config.rtol, len(inputs[0]))))
        return model

    monkeypatch.setattr(experiment, "build", build_observed)
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    for batch_size, seconds in ((64, 1.0), (256, 2.0)):
        run = small("default", batch_size=batch_size, rtol=1e-2, atol=1e-2)
        assert timing._timed_step(run, sample, "cpu")[0] == seconds
    # At the experiment's own tolerances, of which the evaluations are known.
    assert seen == [("seminorm", 1e-4, 64), ("seminorm", 1e-4, 128)]


def test_a_step_that_fails_is_no_guess(monkeypatch, sample):
    def fail(config):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(experiment.SymplecticODENet, "forward", lambda self, inputs: fail(inputs))
    run = small("default")
    assert rough_seconds([run], {run.data_key: sample}, [], "cpu") == [None]
