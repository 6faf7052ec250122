"""An experiment of a moment, with the doors of a real one, that fails as it is told to; the sweep's tests run it."""

import os
import signal
import time
from dataclasses import dataclass
from typing import Literal

import test_training
from test_training import Line

from common.randomness import seeded
from torchadjoint import SolverError


@dataclass(frozen=True)
class Config(test_training.Config):
    end: Literal["well", "failed", "crashed", "killed", "refused"] = "well"
    """How it ends, in its eighth batch."""


class Eventful(Line):
    def __init__(self, config):
        super().__init__()
        self.end = config.end

    def forward(self, x):
        time.sleep(0.01)
        if self.training and self.num_training_batches == 7:
            if self.end == "failed":
                raise SolverError("underflow in dt")
            if self.end == "crashed":
                raise RuntimeError("a bug")
            if self.end == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)


def main(**settings):
    config = Config(**settings)
    if config.end == "refused":
        raise ValueError("end is 'refused', but must be another")
    with seeded(config.seed, "weights"):
        model = Eventful(config)
    return test_training.run(config, model=model)
