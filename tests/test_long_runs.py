"""2,000 training steps of each experiment: memory stays where it was after the first few hundred."""

import gc
import os
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import acrobot
import speech_commands
from common import measuring
from common.results import Metrics, load_all
from datasets.batches import Batches, DataSplit

NUM_EPOCHS, NUM_BATCHES = 40, 50
WARM_UP = 400
GPU = pytest.param("cuda", marks=pytest.mark.gpu)


def resident_bytes():
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def used_bytes(device):
    """Bytes of the process in main memory and of its tensors on a GPU."""
    return resident_bytes() + (torch.cuda.memory_allocated() if device == "cuda" else 0)


def few(*shape, device):
    """Training data of some batches of one sample, and a single sample to measure on."""
    generator = torch.Generator().manual_seed(0)

    def part(num_samples):
        x = torch.rand(num_samples, *shape, generator=generator)
        if shape[-1] == 21:
            x[..., 0] = torch.arange(float(shape[0]))
            return Batches((x.to(device), torch.arange(num_samples).remainder(10).to(device)), 1)
        return Batches((x.to(device),), 1)

    return DataSplit(part(NUM_BATCHES), part(1), part(1), digest="")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("experiment", [acrobot, speech_commands])
def test_2000_steps_do_not_grow(experiment, device, tmp_path, monkeypatch):
    network, add, used = acrobot.SoftplusNetwork, measuring.Pass.add, []

    def measured_add(*arguments):
        add(*arguments)
        used.append(used_bytes(device) if len(used) % 100 == 0 else None)

    monkeypatch.setattr(measuring.Pass, "add", measured_add)
    monkeypatch.setattr(
        acrobot, "SoftplusNetwork", lambda *widths: network(widths[0], *[5] * (len(widths) - 2), widths[-1])
    )
    shape = (8, 8) if experiment is acrobot else (8, 21)
    small = {} if experiment is acrobot else dict(hidden_channels=4, hidden_hidden_channels=4, num_hidden_layers=1)
    monkeypatch.setattr(experiment.dataset, "load", lambda **settings: few(*shape, device=device))
    settings = dict(max_epochs=NUM_EPOCHS, metric_interval=1, results_dir=tmp_path, **small)
    results = experiment.main(device, "default", **settings)
    assert len(results.epochs) * NUM_BATCHES == 2_000
    sizes = [size for size in used[WARM_UP:] if size is not None]
    # The history of the 32 measured epochs since is some 0.3 MB; with every evaluation's time it would be above 3 MB.
    assert max(sizes) - sizes[0] < 1.5e6
    [saved] = load_all(tmp_path).values()
    series = [
        metrics[field.name]
        for entry in saved.history
        for metrics in (entry.train_metrics, entry.val_metrics)
        for field in fields(Metrics)
        if field.name.endswith("_ts")
    ]
    assert 0 < max(map(len, series)) <= measuring.MAX_TIMES
