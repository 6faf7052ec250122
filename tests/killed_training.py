"""Trains, is killed 20 times and resumed each time: `python killed_training.py EXPERIMENT FOLDER`, run by tests.

It forks, so that only one process has to import everything: FOLDER/whole is trained at one go, FOLDER/killed is not.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import torch._dynamo  # as optimisers do when the first is made

from common import training

NUM_KILLS = 20


def toy(folder, resume):
    from test_training import Line, make_config, run

    class Slow(Line):
        def forward(self, x):
            time.sleep(0.004)
            return super().forward(x)

    torch.manual_seed(0)
    run(make_config(folder, max_epochs=30, metric_interval=3, resume=resume), model=Slow())


def acrobot(folder, resume):
    import acrobot

    acrobot.main("cpu", True, num_trajectories=7, max_epochs=6, metric_interval=2, results_dir=folder, resume=resume)


def speech_commands(folder, resume):
    import speech_commands

    sizes = dict(hidden_channels=6, hidden_hidden_channels=5, num_hidden_layers=1, batch_size=25)
    settings = dict(data_root="synthetic", max_epochs=6, metric_interval=2, results_dir=folder, resume=resume)
    speech_commands.main("cpu", True, 1e-2, 1e-3, **sizes, **settings)


def start(train, folder, resume):
    process = os.fork()
    if process == 0:
        try:
            train(folder, resume)
            os._exit(0)
        finally:
            os._exit(1)
    return process


def main(train, folder):
    torch.set_num_threads(1)
    training.CHECKPOINT_SECONDS = 0.0
    started = time.monotonic()
    _, status = os.waitpid(start(train, folder / "whole", resume=False), 0)
    assert status == 0
    duration = time.monotonic() - started
    delays = random.Random(5)
    for _ in range(NUM_KILLS):
        process = start(train, folder / "killed", resume=True)
        time.sleep(delays.uniform(0, 0.07 * duration))
        os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        assert os.WIFSIGNALED(status), "it ended before it was killed"
    _, status = os.waitpid(start(train, folder / "killed", resume=True), 0)
    assert status == 0


if __name__ == "__main__":
    main(globals()[sys.argv[1]], Path(sys.argv[2]))
