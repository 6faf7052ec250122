"""Continuous normalising flows that learn densities: `results = main(device, norm)`, or `python flow.py --help`.

The paper's third experiment, whose code was never released: the models are those of FFJORD (Grathwohl et al., 2019), in
whose code it was made.
"""

if __name__ == "__main__":
    from common import command_line

    command_line.guard_imports()

import functools
import os
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from common import command_line, randomness
from common.config import TrainingConfig, document
from common.results import Results
from common.training import train
from datasets import flow as dataset
from flows.continuous import ContinuousFlow, Integrals
from flows.densities import ImageDensity, PointDensity
from flows.networks import ConcatSquash

NUM_REPEATS = 5
TOY_WIDTH, IMAGE_WIDTH, TABLE_WIDTH = 64, 64, 20
"""Of hidden layers; a table's for each of its columns."""
TOY_END_TIME, TABLE_END_TIME = 0.5, 1.0


@dataclass(frozen=True)
class Config(TrainingConfig):
    """The settings of a run: by default FFJORD's for images, the weight decay of its toys, and the paper's epochs."""

    rtol: float = 1e-5
    """Relative tolerance of the forward and the backward solve."""
    atol: float = 1e-5
    """Absolute tolerance of the forward and the backward solve."""
    max_epochs: int = field(default=100, kw_only=True)
    """Number of epochs, unless the train loss stops falling before."""
    batch_size: int = field(default=200, kw_only=True)
    """Samples in a batch."""
    learning_rate: float = field(default=1e-3, kw_only=True)
    """AdamW's learning rate at the start."""
    weight_decay: float = field(default=1e-5, kw_only=True, metadata={"minimum": 0})
    """AdamW's weight decay."""
    data: dataset.Data = field(default="digits", kw_only=True)
    """What to learn the density of: a toy, a table or images."""
    width: int | None = field(default=None, kw_only=True, metadata={"maximum": 4096})
    """Width of the hidden layers; None for FFJORD's: 64, or of a table 20 times its columns."""
    divergence: Literal["automatic", "exact", "estimated"] = field(default="automatic", kw_only=True)
    """Estimated by one vector of random signs a solve, or exact; automatic is exact for toys alone, as in FFJORD."""
    integrals: Integrals = field(default="none", kw_only=True)
    """How the log-determinant is solved for, which stands in no right-hand side: it is an integral.

    none: as a part of the state like any other, as in the paper.
    backward: it and its adjoint are left out of the backward solve.
    unweighed: that, and the forward solve's norm does not weigh it either.
    """
    data_root: str | os.PathLike | None = field(default=None, kw_only=True, metadata={"condition": False})
    """Folder in which torchvision keeps MNIST and CIFAR-10; None for one in the cache."""

    def __post_init__(self):
        super().__post_init__()
        if self.norm == "as-published":
            raise ValueError("norm is 'as-published', which is acrobot's alone: use another, such as 'seminorm'")
        if self.integrals == "backward" and self.norm == "discrete":
            raise ValueError(
                "integrals is 'backward', but 'discrete' has no backward solve: take 'none' or 'unweighed'"
            )
        if self.integrals != "none" and self.solver == "torchdiffeq":
            raise ValueError(
                f"integrals is {self.integrals!r}, but solver='torchdiffeq' knows none: use solver='torchadjoint'"
            )

    @property
    def is_of_images(self) -> bool:
        """Whether the data are images, whose density is in bits per dimension; else it is in nats."""
        return self.data in get_args(dataset.Image)


def build(config: Config) -> PointDensity | ImageDensity:
    """The model of these settings, with its initial weights."""
    options = dict(
        divergence=config.divergence,
        stream=functools.partial(randomness.stream, config.seed),
        solve=config.solve,
    )
    with randomness.seeded(config.seed, "weights"):
        if config.is_of_images:
            shape, num_levels = dataset.SHAPES[config.data], dataset.NUM_LEVELS[config.data]
            options |= dict(width=config.width or IMAGE_WIDTH, integrals=config.integrals)
            return ImageDensity(shape, num_levels, **options)
        if config.data in get_args(dataset.Toy):
            num_dims, end_time = 2, TOY_END_TIME
            network = ConcatSquash([num_dims, *[config.width or TOY_WIDTH] * 3, num_dims], "tanh")
        else:
            num_dims, end_time = dataset.NUM_COLUMNS[config.data], TABLE_END_TIME
            width = config.width or TABLE_WIDTH * num_dims
            network = ConcatSquash([num_dims, width, width, num_dims], "softplus")
        return PointDensity(ContinuousFlow(network, end_time, config.integrals), num_dims, **options)


def mean_loss(losses: Tensor, batch: Tensor) -> Tensor:
    """The mean of what the model gives for each sample: its negative log-likelihood."""
    return losses.mean()


def run(config: Config) -> Results:
    """One run with these settings."""
    model = build(config)
    data = dataset.load(
        data=config.data,
        data_root=config.data_root,
        batch_size=config.batch_size,
        device=config.device,
        generator=randomness.stream(config.seed, "batch order"),
    )
    measure = "bits_per_dim" if config.is_of_images else "nll"
    return train(
        config,
        experiment="flow",
        model=model,
        data=data,
        loss_function=mean_loss,
        measures={measure: lambda losses, batch: losses.sum()},
    )


def main(*args, **kwargs) -> Results:
    """One run."""
    return run(Config(*args, **kwargs))


document(main, Config)


def full(device: int | str | torch.device, norm: bool | str, **settings) -> list[Results]:
    """Repeats of one norm, as many as the paper's of its other experiments: seeds 0 to 4; `settings` as for `main`.

    All are trained, also those that are there: `python tables.py run paper` trains what is missing.
    """
    return [main(device, norm, seed=seed, **settings) for seed in range(NUM_REPEATS)]


if __name__ == "__main__":
    command_line.run(Config, run)
