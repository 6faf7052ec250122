"""A Neural CDE that classifies spoken words: `results = main(device, norm)`, or `python speech_commands.py --help`."""

if __name__ == "__main__":
    from common import command_line

    command_line.guard_imports()

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
import torchcde
from torch import Tensor, nn
from torch.nn import functional

from common import command_line, randomness
from common.config import TrainingConfig, document
from common.results import Results
from common.training import train
from datasets import speech_commands as dataset
from fields.neural_cde import NeuralCDEField
from torchadjoint import Solution
from torchadjoint.statistics import SolveStatistics

NUM_REPEATS = 5
TOLERANCES = ((1e-3, 1e-6), (1e-4, 1e-7), (1e-5, 1e-8))
"""The paper's pairs of rtol and atol."""


@dataclass(frozen=True)
class Config(TrainingConfig):
    """The settings of a run; the defaults are the paper's."""

    rtol: float = 1e-3
    """Relative tolerance of the forward and the backward solve."""
    atol: float = 1e-6
    """Absolute tolerance of the forward and the backward solve."""
    max_epochs: int = field(default=200, kw_only=True)
    """Number of epochs, unless the train loss stops falling before."""
    batch_size: int = field(default=1024, kw_only=True)
    """Samples in a batch."""
    learning_rate: float = field(default=1.6e-3, kw_only=True)
    """AdamW's learning rate at the start."""
    hidden_channels: int = field(default=90, kw_only=True, metadata={"maximum": 4096})
    """Channels of the state z."""
    hidden_hidden_channels: int = field(default=40, kw_only=True, metadata={"maximum": 4096})
    """Width of the hidden layers of the vector field."""
    num_hidden_layers: int = field(default=4, kw_only=True, metadata={"maximum": 100})
    """Number of hidden layers of the vector field."""
    data_root: str | os.PathLike | None = field(default=None, kw_only=True, metadata={"condition": False})
    """Folder that holds speech_commands_v0.02/<word>/*.wav; "synthetic" for the built-in sample; None downloads it,
    2.4 GB, once."""
    split: Literal["published", "official"] = field(default="published", kw_only=True)
    """Published: at random, stratified by label. Official: the data set's own lists, which keep speakers apart."""

    def __post_init__(self):
        super().__post_init__()
        if self.norm == "as-published":
            raise ValueError("norm is 'as-published', which is acrobot's alone: use another, such as 'seminorm'")


class VectorField(nn.Module):
    """g: (batch, hidden_channels) -> (batch, hidden_channels, input_channels), a ReLU network that ends in tanh."""

    def __init__(
        self, input_channels: int, hidden_channels: int, *, hidden_hidden_channels: int, num_hidden_layers: int
    ):
        super().__init__()
        self.shape = (hidden_channels, input_channels)
        widths = [hidden_channels, *[hidden_hidden_channels] * num_hidden_layers]
        self.hidden = nn.ModuleList(map(nn.Linear, widths[:-1], widths[1:]))
        self.last = nn.Linear(hidden_hidden_channels, hidden_channels * input_channels)

    def forward(self, z: Tensor) -> Tensor:
        for layer in self.hidden:
            z = layer(z).relu()
        return self.last(z).tanh().unflatten(-1, self.shape)


class ControlledField(nn.Module):
    """dz/dt = g(z) dX/dt along one batch of paths, for z of shape (batch, hidden_channels)."""

    def __init__(self, vector_field: VectorField, path: torchcde.LinearInterpolation):
        super().__init__()
        self.vector_field = vector_field
        self.path = path

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return (self.vector_field(z) @ self.path.derivative(t).unsqueeze(-1)).squeeze(-1)

    def slopes(self) -> Tensor:
        """dX/dt between the knots, (knots - 1, batch, input_channels)."""
        knots = self.path.grid_points
        return self.path.derivative((knots[:-1] + knots[1:]) / 2).movedim(1, 0).contiguous()

    @property
    def fused_field(self) -> Callable[[Tensor], NeuralCDEField]:
        """The same, written for the solver; only along a path that is linear between its knots."""
        if not isinstance(self.path, torchcde.LinearInterpolation):
            raise AttributeError("fused_field")
        return self._fused_field

    def _fused_field(self, z0: Tensor) -> NeuralCDEField:
        knots = self.path.grid_points.tolist()
        return NeuralCDEField(self.vector_field.hidden, self.vector_field.last, knots, self.slopes())


class NeuralCDE(nn.Module):
    """Paths to logits: z(0) is linear in X(0), dz/dt = g(z) dX/dt, and the logits are linear in z at the end.

    Args:
        solve: `torchadjoint.solve` with its tolerances and adjoint.
    """

    def __init__(
        self,
        input_channels: int,
        hidden_channels: int,
        num_classes: int,
        *,
        hidden_hidden_channels: int,
        num_hidden_layers: int,
        solve: Callable[..., Solution],
    ):
        super().__init__()
        self.initial = nn.Linear(input_channels, hidden_channels)
        self.vector_field = VectorField(
            input_channels,
            hidden_channels,
            hidden_hidden_channels=hidden_hidden_channels,
            num_hidden_layers=num_hidden_layers,
        )
        self.readout = nn.Linear(hidden_channels, num_classes)
        self.solve = solve

    def forward(self, x: Tensor) -> tuple[Tensor, SolveStatistics]:
        """Logits (batch, num_classes) of the paths that run linearly through x (batch, times, input_channels).

        Raises:
            ValueError: if x requires a gradient.
        """
        if x.requires_grad:
            raise ValueError("x requires a gradient, but the solve is not differentiated for the path: detach x")
        path = torchcde.LinearInterpolation(torchcde.linear_interpolation_coeffs(x))
        field = ControlledField(self.vector_field, path)
        z0 = self.initial(path.evaluate(path.interval[0]))
        # X has a kink at every knot, so the field jumps there; without jump_t the solver would search for each.
        solution = self.solve(field, z0, path.interval, jump_t=path.grid_points)
        return self.readout(solution.y[-1]), solution.statistics


def build(config: Config) -> NeuralCDE:
    """The model of these settings, with its initial weights."""
    with randomness.seeded(config.seed, "weights"):
        return NeuralCDE(
            1 + dataset.MFCC["n_mfcc"],
            config.hidden_channels,
            len(dataset.WORDS),
            hidden_hidden_channels=config.hidden_hidden_channels,
            num_hidden_layers=config.num_hidden_layers,
            solve=config.solve,
        )


def run(config: Config) -> Results:
    """One run with these settings."""
    data = dataset.load(
        data_root=config.data_root,
        split=config.split,
        batch_size=config.batch_size,
        device=config.device,
        generator=randomness.stream(config.seed, "batch order"),
    )
    return train(
        config,
        experiment="speech_commands",
        model=build(config),
        data=data,
        loss_function=functional.cross_entropy,
        measures={"accuracy": lambda logits, labels: (logits.argmax(dim=-1) == labels).sum()},
    )


def main(*args, **kwargs) -> Results:
    """One run."""
    return run(Config(*args, **kwargs))


document(main, Config)


def full(device: int | str | torch.device, norm: bool | str, **settings) -> list[Results]:
    """The paper's runs of one norm: each pair of tolerances with seeds 0 to 4; `settings` as for `main`.

    All are trained, also those that are there: `python tables.py run paper` trains what is missing.
    """
    return [
        main(device, norm, rtol, atol, seed=seed, **settings)
        for rtol, atol in TOLERANCES
        for seed in range(NUM_REPEATS)
    ]


if __name__ == "__main__":
    command_line.run(Config, run)
