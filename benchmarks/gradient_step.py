"""How long one gradient step takes, in each way and with each peer, side by side: `make bench`.

Every contestant does the same work, forward and backward, on the same batch and the same briefly trained weights. They
take turns in each round, on one core unless told otherwise, and process CPU time is compared within the round, so that
a machine's moods touch all of them alike. The table gives medians over the rounds, and the range of each ratio. One
more step of each tells how much memory it takes, on Linux. "First step" is what the very first took by the clock,
compilation included.
"""

import ctypes
import functools
import importlib.metadata
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas
import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

import acrobot
import speech_commands
from benchmarks import published_field, with_diffrax
from common import arguments, command_line, provenance, randomness
from common.adjoint import Solution, solve
from common.statistics import SolveStatistics
from datasets import acrobot as acrobot_data
from datasets import speech_commands as speech_commands_data

NUM_TRAINING_STEPS = 30

TIMES = torch.linspace(0, 10, 5)
"""Where the solution of the `NeuralODE` is wanted."""


@dataclass
class Contestant:
    """One way to take a gradient step; `step` returns what to print of its evaluations."""

    name: str
    step: Callable[[], str]


class _Unfused(nn.Module):
    """A module without its field written for the solver."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.module(t, y)


class _Traceable(nn.Module):
    """The Neural CDE's field, with a look-up of dX/dt that torch.compile can take; torchcde's it cannot."""

    def __init__(self, field: speech_commands.ControlledField):
        super().__init__()
        self.vector_field = field.vector_field
        self.register_buffer("inner_knots", field.path.grid_points[1:-1])
        self.register_buffer("slopes", field.slopes())

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        slope = self.slopes.index_select(0, torch.bucketize(t, self.inner_knots).reshape(1)).squeeze(0)
        return (self.vector_field(z) @ slope.unsqueeze(-1)).squeeze(-1)


class NeuralODE(nn.Module):
    """A model as anyone has one: a network of the state, whose solution is wanted at some times.

    It solves by its attribute `solve`, which each contestant sets.
    """

    def __init__(self):
        super().__init__()
        layers = [nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 16)]
        self.vector_field = _Network(nn.Sequential(*layers))

    def forward(self, y0: Tensor) -> tuple[Tensor, SolveStatistics]:
        solution = self.solve(self.vector_field, y0, TIMES)
        return solution.y, solution.statistics


class _Network(nn.Module):
    def __init__(self, layers: nn.Sequential):
        super().__init__()
        self.layers = layers

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.layers(y)


def _solve_traceable(func: nn.Module, *inputs, **options) -> Solution:
    return solve(_Traceable(func), *inputs, **options)


def _solve_unfused(func: nn.Module, *inputs, **options) -> Solution:
    return solve(_Unfused(func), *inputs, **options)


def _solve_published(func: nn.Module, *inputs, **options) -> Solution:
    return solve(published_field.PublishedField(func), *inputs, **options)


def _step(model: nn.Module, batch: tuple[Tensor, ...], loss_function, solver) -> str:
    model.solve = solver
    model.zero_grad()
    prediction, counted = model(batch[0])
    loss_function(prediction, batch[-1]).backward()
    return f"{counted.forward.nfe} + {counted.backward.nfe}"


def _diffrax_step(step: Callable) -> str:
    num_steps, _ = step()
    return f"{num_steps} steps"


def _train_briefly(model: nn.Module, batches, loss_function, **options) -> None:
    model.solve = functools.partial(solve, adjoint="discrete", **options)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    num_steps = 0
    while num_steps < NUM_TRAINING_STEPS:
        for batch in batches:
            loss_function(model(batch[0])[0], batch[-1]).backward()
            optimiser.step()
            optimiser.zero_grad()
            num_steps += 1
            if num_steps == NUM_TRAINING_STEPS:
                break


def neural_cde(batch_size: int, data_root: str) -> list[Contestant]:
    """The contestants on one batch of Speech Commands, the first being what the others are compared with."""
    tolerances = dict(rtol=1e-3, atol=1e-6)
    order = randomness.stream(0, "batch order")
    data = speech_commands_data.load(
        data_root=data_root, split="published", batch_size=batch_size, device="cpu", generator=order
    )
    with randomness.seeded(0, "weights"):
        config = speech_commands.Config("cpu", "seminorm")
        model = speech_commands.build(config)
    _train_briefly(model, data.train, functional.cross_entropy, **tolerances)
    batch = tuple(tensor[:batch_size].clone() for tensor in data.train.tensors)
    step = functools.partial(_step, model, batch, functional.cross_entropy)
    ways = {
        "torchdiffeq, its default norm": (solve, dict(adjoint="per-tensor", solver="torchdiffeq")),
        "torchdiffeq, seminorm": (solve, dict(adjoint="seminorm", solver="torchdiffeq")),
        "ours, seminorm, autograd's field": (_solve_unfused, dict(adjoint="seminorm")),
        "ours, seminorm, autograd's field, compiled": (_solve_traceable, dict(adjoint="seminorm", compile=True)),
        "ours, seminorm": (solve, dict(adjoint="seminorm")),
        "ours, discrete": (solve, dict(adjoint="discrete")),
        "ours, default": (solve, dict(adjoint="default")),
        "ours, per-tensor": (solve, dict(adjoint="per-tensor")),
    }
    with_peer = functools.partial(with_diffrax.neural_cde_step, model, *batch, **tolerances)
    return _contestants(step, ways, tolerances, with_peer)


def symplectic_ode_net(batch_size: int) -> list[Contestant]:
    """The contestants on one batch of acrobot's windows, the first being what the others are compared with."""
    tolerances = dict(rtol=1e-4, atol=1e-4)
    data = acrobot_data.load(batch_size=batch_size, device="cpu", generator=randomness.stream(0, "batch order"))
    with randomness.seeded(0, "weights"):
        model = acrobot.build(acrobot.Config("cpu", "seminorm"))
    _train_briefly(model, data.train, functional.mse_loss, **tolerances)
    batch = next(iter(data.train))
    step = functools.partial(_step, model, batch, functional.mse_loss)
    ways = {
        "torchdiffeq, its default norm, published field": (
            _solve_published,
            dict(adjoint="per-tensor", solver="torchdiffeq"),
        ),
        "torchdiffeq, seminorm, published field": (_solve_published, dict(adjoint="seminorm", solver="torchdiffeq")),
        "torchdiffeq, seminorm, our field": (solve, dict(adjoint="seminorm", solver="torchdiffeq")),
        "ours, seminorm, autograd's field": (_solve_unfused, dict(adjoint="seminorm")),
        "ours, seminorm": (solve, dict(adjoint="seminorm")),
        "ours, seminorm, warm start": (solve, dict(adjoint="seminorm", warm_start=True)),
        "ours, discrete": (solve, dict(adjoint="discrete")),
        "ours, default": (solve, dict(adjoint="default")),
        "ours, as-published": (solve, dict(adjoint="as-published")),
    }
    with_peer = functools.partial(with_diffrax.symplectic_step, model, batch[0], acrobot_data.TIMES, **tolerances)
    return _contestants(step, ways, tolerances, with_peer)


def neural_ode(batch_size: int) -> list[Contestant]:
    """The contestants on a batch of points that turn about the origin, the first being what they are compared with."""
    tolerances = dict(rtol=1e-5, atol=1e-7)
    with randomness.seeded(0, "weights"):
        model = NeuralODE()
    numbers = randomness.stream(0, "points")
    spin = torch.randn(16, 16, generator=numbers) / 16
    y0 = torch.randn(batch_size, 16, generator=numbers)
    batch = y0, torch.stack([y0 @ torch.linalg.matrix_exp((spin - spin.T) * t) for t in TIMES])
    _train_briefly(model, [batch], functional.mse_loss, **tolerances)
    step = functools.partial(_step, model, batch, functional.mse_loss)
    ways = {
        "torchdiffeq, its default norm": (solve, dict(adjoint="per-tensor", solver="torchdiffeq")),
        "torchdiffeq, seminorm": (solve, dict(adjoint="seminorm", solver="torchdiffeq")),
        "ours, seminorm": (solve, dict(adjoint="seminorm")),
        "ours, seminorm, compiled": (solve, dict(adjoint="seminorm", compile=True)),
        "ours, seminorm, compiled, warm start": (solve, dict(adjoint="seminorm", compile=True, warm_start=True)),
        "ours, discrete": (solve, dict(adjoint="discrete")),
    }
    with_peer = functools.partial(with_diffrax.neural_ode_step, model, *batch, TIMES, **tolerances)
    return _contestants(step, ways, tolerances, with_peer)


def _contestants(step: Callable, ways: dict, tolerances: dict, with_peer: Callable) -> list[Contestant]:
    """Ours and torchdiffeq's by `step`, and diffrax's, whose steps `with_peer` makes."""
    return [
        *(
            Contestant(name, functools.partial(step, functools.partial(function, **tolerances, **options)))
            for name, (function, options) in ways.items()
        ),
        *(
            Contestant(adjoint, functools.partial(_diffrax_step, with_peer(adjoint=adjoint)))
            for adjoint in with_diffrax.ADJOINTS
        ),
    ]


def compare(contestants: list[Contestant], num_rounds: int, clock: Callable[[], float]) -> pandas.DataFrame:
    """Seconds by `clock` of each contestant, and how many times faster than the first: median and range over rounds."""
    seconds = {contestant.name: [] for contestant in contestants}
    evaluations, first = {}, {}
    for contestant in tqdm(contestants, desc="warming up", unit="contestant", disable=None):
        started = time.perf_counter()
        evaluations[contestant.name] = contestant.step()
        first[contestant.name] = time.perf_counter() - started
    for _ in tqdm(range(num_rounds), unit="round", disable=None):
        for contestant in contestants:
            started = clock()
            contestant.step()
            seconds[contestant.name].append(clock() - started)
    mebibytes = {contestant.name: _peak_memory(contestant.step) for contestant in contestants}
    baseline = seconds[contestants[0].name]
    rows = []
    for name, taken in seconds.items():
        ratios = [base / own for base, own in zip(baseline, taken, strict=True)]
        rows.append(
            {
                "gradient step": name,
                "NFE, forward + backward": evaluations[name],
                "seconds": f"{statistics.median(taken):.3f}",
                "times faster than the first": f"{statistics.median(ratios):.2f}",
                "range": f"{min(ratios):.2f} to {max(ratios):.2f}",
                "MiB": mebibytes[name],
                "first step": f"{first[name]:.1f}",
            }
        )
    return pandas.DataFrame(rows)


def _peak_memory(step: Callable) -> str:
    """How far the process's resident memory rises during a step, in MiB; empty where the system does not tell."""
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not reset.exists():
        return ""
    # What was freed goes back to the system first, so that the step must ask for all that it needs.
    ctypes.CDLL(None).malloc_trim(0)
    reset.write_text("5")  # the peak becomes what is resident now
    before = _resident(status, "VmRSS")
    step()
    return f"{(_resident(status, 'VmHWM') - before) / 1024:.0f}"


def _resident(status: Path, name: str) -> int:
    [line] = [line for line in status.read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1])


def main(
    data_root: str = "synthetic",
    rounds: int = 5,
    problems: tuple[str, ...] = ("32", "128", "acrobot", "network"),
    cores: int = 1,
) -> None:
    """Compares gradient steps, and prints a table in Markdown for each problem.

    Args:
        data_root: the Speech Commands recordings, or "synthetic".
        rounds: how often every contestant takes its turn.
        problems: batch sizes of the Neural CDE, "acrobot" for the Symplectic ODE-Net, "network" for a neural ODE.
        cores: how many cores, with a thread on each. On one, CPU seconds are compared, else seconds by the clock.
    """
    available = sorted(os.sched_getaffinity(0))
    cores = arguments.whole_number("cores", cores, maximum=len(available))
    torch.set_num_threads(cores)
    os.sched_setaffinity(0, available[:cores])
    if cores == 1:
        # Read when jax is first used.
        os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    seconds, clock = ("CPU seconds", time.process_time) if cores == 1 else ("seconds by the clock", time.perf_counter)
    machine = provenance.describe(torch.device("cpu"))
    packages = ("torch", "torchdiffeq", "diffrax", "jax")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    print(
        f"{machine['device_name']}, {seconds} on {cores} of its cores; Python {platform.python_version()}, "
        f"{versions}; {rounds} rounds"
    )
    with tempfile.TemporaryDirectory() as empty:
        # What an earlier run has compiled is compiled again.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = empty
        for problem in problems:
            if problem == "acrobot":
                title, contestants = "Symplectic ODE-Net, batch 256", symplectic_ode_net(256)
            elif problem == "network":
                title, contestants = "Neural ODE of 16 channels, batch 64", neural_ode(64)
            else:
                title, contestants = f"Neural CDE, batch {problem}", neural_cde(int(problem), data_root)
            table = compare(contestants, rounds, clock)
            print(f"\n### {title}\n{table.to_markdown(index=False, colalign=('left', *['right'] * 6))}", flush=True)


if __name__ == "__main__":
    command_line.call(tyro.cli, main)
