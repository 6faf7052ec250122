"""A Symplectic ODE-Net that learns the acrobot: `results = main(device, norm)`, or `python acrobot.py --help`."""

if __name__ == "__main__":
    from common import command_line

    command_line.guard_imports()

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from common import command_line, randomness
from common.config import TrainingConfig, document
from common.results import Results
from common.training import train
from datasets import acrobot as dataset
from fields.symplectic import SymplecticField
from fields.symplectic_dynamics import SymplecticDynamics, angle_rows
from torchadjoint import Solution
from torchadjoint.statistics import SolveStatistics

NUM_REPEATS = 5


@dataclass(frozen=True)
class Config(TrainingConfig):
    """The settings of a run; the defaults are the paper's."""

    rtol: float = 1e-4
    """Relative tolerance of the forward and the backward solve."""
    atol: float = 1e-4
    """Absolute tolerance of the forward and the backward solve."""
    max_epochs: int = field(default=50, kw_only=True)
    """Number of epochs, unless the train loss stops falling before."""
    batch_size: int = field(default=256, kw_only=True)
    """Samples in a batch."""
    learning_rate: float = field(default=1e-3, kw_only=True)
    """AdamW's learning rate at the start."""
    num_trajectories: int = field(default=dataset.NUM_TRAJECTORIES, kw_only=True)
    """Trajectories for each of the nine pairs of torques."""
    torque: Literal["published", "consistent"] = field(default="published", kw_only=True)
    """How the first torque acts: as in the published data, or as a torque on the first joint."""


class SoftplusNetwork(nn.Module):
    """Linear layers of these widths with softplus between them, on values and on derivatives of values."""

    def __init__(self, *widths: int):
        super().__init__()
        self.layers = nn.ModuleList(map(nn.Linear, widths[:-1], widths[1:]))

    def forward(self, rows: Tensor) -> Tensor:
        """The network at rows[0] (batch, width), and its derivatives along rows[1:], all (rows, batch, width)."""
        for layer in self.layers[:-1]:
            value = layer(rows[0])
            slopes = rows[1:] @ layer.weight.T * value.sigmoid()
            rows = torch.cat([functional.softplus(value).unsqueeze(0), slopes])
        last = self.layers[-1]
        return torch.cat([last(rows[:1]), rows[1:] @ last.weight.T])


class SymplecticVectorField(nn.Module):
    """The time derivative of (cos q, sin q, dq, u), (batch, 8), from learnt inverse mass, potential and control."""

    def __init__(self):
        super().__init__()
        self.factor = SoftplusNetwork(4, 400, 400, 400, 3)
        self.potential = SoftplusNetwork(4, 300, 300, 1)
        self.control = SoftplusNetwork(4, 300, 300, 4)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        rows = y[:, :4] @ angle_rows(y)
        control = self.control(rows[:1])[0].T.unflatten(0, (2, 2))
        forces = (control * y[:, 6:].T).sum(dim=1) - self.potential(rows)[1:, :, 0]
        return SymplecticDynamics(y.T, self.factor(rows).permute(2, 0, 1), forces).derivative.T

    def fused_field(self, y0: Tensor) -> SymplecticField:
        """The same, written for the solver."""
        return SymplecticField(self.factor.layers, self.potential.layers, self.control.layers, y0)


class SymplecticODENet(nn.Module):
    """First points of windows to whole windows.

    Args:
        solve: `torchadjoint.solve` with its tolerances and adjoint.
    """

    def __init__(self, *, solve: Callable[..., Solution]):
        super().__init__()
        self.vector_field = SymplecticVectorField()
        self.solve = solve

    def forward(self, window: Tensor) -> tuple[Tensor, SolveStatistics]:
        """The predicted window (batch, 8 times, 8 channels), from the first point of `window` alone."""
        solution = self.solve(self.vector_field, window[:, 0], dataset.TIMES)
        return solution.y.transpose(0, 1), solution.statistics


def build(config: Config) -> SymplecticODENet:
    """The model of these settings, with its initial weights."""
    with randomness.seeded(config.seed, "weights"):
        return SymplecticODENet(solve=config.solve)


def run(config: Config) -> Results:
    """One run with these settings."""
    data = dataset.load(
        batch_size=config.batch_size,
        device=config.device,
        generator=randomness.stream(config.seed, "batch order"),
        num_trajectories=config.num_trajectories,
        torque=config.torque,
    )
    return train(config, experiment="acrobot", model=build(config), data=data, loss_function=functional.mse_loss)


def main(*args, **kwargs) -> Results:
    """One run."""
    return run(Config(*args, **kwargs))


document(main, Config)


def full(device: int | str | torch.device, norm: bool | str, **settings) -> list[Results]:
    """The paper's runs of one norm: seeds 0 to 4; `settings` as for `main`.

    All are trained, also those that are there: `python tables.py run paper` trains what is missing.
    """
    return [main(device, norm, seed=seed, **settings) for seed in range(NUM_REPEATS)]


if __name__ == "__main__":
    command_line.run(Config, run)
