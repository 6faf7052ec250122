"""The problems of the benchmark, and who contests them: ours in each way, torchdiffeq and diffrax.

`gradient_step` times them.

torchdiffeq is called as it is, with norms of its own, and is told of the jumps of the Neural CDE. It forgets all that
are left once a step happens to end on one: its evaluations would show that.
"""

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torchdiffeq
from torch import Tensor, nn
from torch.nn import functional

import acrobot
import flow
import speech_commands
from benchmarks import published_field
from common import randomness
from datasets import acrobot as acrobot_data
from datasets import flow as flow_data
from datasets import speech_commands as speech_commands_data
from torchadjoint import Backsolve, Discrete, Solution, solve
from torchadjoint.statistics import SolveStatistics

NUM_TRAINING_STEPS = 30

NUM_LARGE_ROUNDS = 1
"""How often the contestants on a batch of `LARGE_BATCH` samples or more take turns: torchdiffeq needs minutes there."""
LARGE_BATCH = 1024

TIMES = torch.linspace(0, 10, 10)
"""Where the solution of the `NeuralODE` is wanted."""


@dataclass
class Contestant:
    """One way to take a gradient step."""

    name: str
    step: Callable[[], object]
    count: Callable[[], tuple[int, int] | str]
    """The same step, which returns the number of evaluations forward and backward, or what else is known of them."""


@dataclass
class Problem:
    """Contestants on the same batch and weights, the first being what the others are compared with."""

    title: str
    contestants: list[Contestant]
    products: list[tuple[int, nn.Linear]]
    """The matrix products of one evaluation of the field: how many rows go through which layer."""
    num_rounds: int


class _Counting(nn.Module):
    """A field that counts its evaluations, the forward ones until `is_backward` is set."""

    def __init__(self, func: nn.Module):
        super().__init__()
        self.func = func
        self.statistics = SolveStatistics()
        self.is_backward = False

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        counted = self.statistics.backward if self.is_backward else self.statistics.forward
        counted.evaluation_times.append(t.item())
        return self.func(t, y)


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

    def __init__(self, width: int = 64):
        super().__init__()
        layers = [nn.Linear(16, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 16)]
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


def _solve_stock(
    func: nn.Module,
    y0: Tensor,
    t: Tensor,
    *,
    jump_t: Tensor | None = None,
    norm: str | None = None,
    is_published: bool = False,
    is_counted: bool = False,
    **tolerances,
) -> Solution:
    """torchdiffeq's own adjoint, with its default norm or that of its name `norm`; nothing is counted unless asked."""
    func = published_field.PublishedField(func) if is_published else func
    func = _Counting(func) if is_counted else func
    options = {} if jump_t is None else {"jump_t": jump_t}
    adjoint_options = options if norm is None else {**options, "norm": norm}
    y = torchdiffeq.odeint_adjoint(
        func, y0, t, method="dopri5", options=options, adjoint_options=adjoint_options, **tolerances
    )
    if not is_counted:
        return Solution(y, SolveStatistics())
    func.is_backward = True
    return Solution(y, func.statistics)


def _step(model: nn.Module, batch: tuple[Tensor, ...], loss_function, solver) -> tuple[int, int]:
    model.solve = solver
    model.zero_grad()
    prediction, counted = model(batch[0])
    loss_function(prediction, batch[-1]).backward()
    return counted.forward.nfe, counted.backward.nfe


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


def neural_cde(batch_size: int, data_root: str, num_rounds: int) -> Problem:
    """One batch of Speech Commands, which repeats its recordings if they are fewer."""
    tolerances = dict(rtol=1e-3, atol=1e-6)
    order = randomness.stream(0, "batch order")
    data = speech_commands_data.load(
        data_root=data_root, split="published", batch_size=min(batch_size, 128), device="cpu", generator=order
    )
    with randomness.seeded(0, "weights"):
        config = speech_commands.Config("cpu", "seminorm")
        model = speech_commands.build(config)
    _train_briefly(model, data.train, functional.cross_entropy, **tolerances)
    num_recordings = min(batch_size, data.train.dataset_size)
    chosen = torch.arange(batch_size) % num_recordings
    batch = tuple(tensor[chosen] for tensor in data.train.tensors)
    step = functools.partial(_step, model, batch, functional.cross_entropy)
    ways = {
        "torchdiffeq, its default norm": (_solve_stock, {}),
        "torchdiffeq, seminorm": (_solve_stock, dict(norm="seminorm")),
        "ours, seminorm, autograd's field": (_solve_unfused, dict(adjoint="seminorm")),
        "ours, seminorm, autograd's field, compiled": (_solve_traceable, dict(adjoint="seminorm", compile=True)),
        "ours, seminorm": (solve, dict(adjoint="seminorm")),
        "ours, discrete": (solve, dict(adjoint="discrete")),
        "ours, discrete, one stage at a time": (solve, dict(adjoint=Discrete(linearised="stage"))),
        "ours, discrete, all stages kept": (solve, dict(adjoint=Discrete(linearised="solve"))),
        "ours, default": (solve, dict(adjoint="default")),
        "ours, per-tensor": (solve, dict(adjoint="per-tensor")),
    }
    repeated = "" if num_recordings == batch_size else f" ({num_recordings} recordings, repeated)"
    layers = [*model.vector_field.hidden, model.vector_field.last]
    return Problem(
        f"Neural CDE, batch {batch_size}{repeated}",
        _contestants(step, ways, tolerances, "neural_cde_step", model, *batch),
        [(batch_size, layer) for layer in layers],
        min(num_rounds, NUM_LARGE_ROUNDS) if batch_size >= LARGE_BATCH else num_rounds,
    )


def symplectic_ode_net(num_rounds: int) -> Problem:
    """One batch of acrobot's windows; torchdiffeq has the published code's field, unless said otherwise."""
    tolerances = dict(rtol=1e-4, atol=1e-4)
    data = acrobot_data.load(batch_size=256, device="cpu", generator=randomness.stream(0, "batch order"))
    with randomness.seeded(0, "weights"):
        model = acrobot.build(acrobot.Config("cpu", "seminorm"))
    _train_briefly(model, data.train, functional.mse_loss, **tolerances)
    batch = next(iter(data.train))
    step = functools.partial(_step, model, batch, functional.mse_loss)
    ways = {
        "torchdiffeq, its default norm": (_solve_stock, dict(is_published=True)),
        "torchdiffeq, seminorm": (_solve_stock, dict(is_published=True, norm="seminorm")),
        "torchdiffeq, seminorm, our field": (_solve_stock, dict(norm="seminorm")),
        "ours, seminorm, autograd's field": (_solve_unfused, dict(adjoint="seminorm")),
        "ours, seminorm": (solve, dict(adjoint="seminorm")),
        "ours, seminorm, warm start": (solve, dict(adjoint=Backsolve(warm_start=True))),
        "ours, discrete": (solve, dict(adjoint="discrete")),
        "ours, discrete, one stage at a time": (solve, dict(adjoint=Discrete(linearised="stage"))),
        "ours, discrete, all stages kept": (solve, dict(adjoint=Discrete(linearised="solve"))),
        "ours, default": (solve, dict(adjoint="default")),
        "ours, as-published": (solve, dict(adjoint="as-published")),
    }
    field = model.vector_field
    # The inverse mass and the potential with their derivative along dq/dt, the control without.
    rows = {field.factor: 2 * 256, field.potential: 2 * 256, field.control: 256}
    return Problem(
        "Symplectic ODE-Net, batch 256",
        _contestants(step, ways, tolerances, "symplectic_step", model, batch[0], acrobot_data.TIMES),
        [(num_rows, layer) for network, num_rows in rows.items() for layer in network.layers],
        num_rounds,
    )


def turning_points(num_points: int) -> tuple[Tensor, Tensor]:
    """Points (num_points, 16) that turn about the origin, and where they are at `TIMES` (times, num_points, 16)."""
    numbers = randomness.stream(0, "points")
    spin = torch.randn(16, 16, generator=numbers) / 16
    y0 = torch.randn(num_points, 16, generator=numbers)
    return y0, torch.stack([y0 @ torch.linalg.matrix_exp((spin - spin.T) * t) for t in TIMES])


def neural_ode(num_rounds: int) -> Problem:
    """A batch of points that turn about the origin."""
    tolerances = dict(rtol=1e-5, atol=1e-7)
    with randomness.seeded(0, "weights"):
        model = NeuralODE()
    batch = turning_points(64)
    _train_briefly(model, [batch], functional.mse_loss, **tolerances)
    step = functools.partial(_step, model, batch, functional.mse_loss)
    ways = {
        "torchdiffeq, its default norm": (_solve_stock, {}),
        "torchdiffeq, seminorm": (_solve_stock, dict(norm="seminorm")),
        "ours, seminorm": (solve, dict(adjoint="seminorm")),
        "ours, seminorm, warm start": (solve, dict(adjoint=Backsolve(warm_start=True))),
        "ours, seminorm, compiled": (solve, dict(adjoint="seminorm", compile=True)),
        "ours, seminorm, compiled, warm start": (solve, dict(adjoint=Backsolve(warm_start=True), compile=True)),
        "ours, discrete": (solve, dict(adjoint="discrete")),
        "ours, discrete, compiled": (solve, dict(adjoint="discrete", compile=True)),
        "ours, discrete, compiled solve": (solve, dict(adjoint="discrete", compile="solve")),
    }
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    return Problem(
        f"Network 16-64-64-16, batch 64, {len(TIMES)} output times",
        _contestants(step, ways, tolerances, "neural_ode_step", model, *batch, TIMES),
        [(64, layer) for layer in layers],
        num_rounds,
    )


def continuous_flow(num_rounds: int) -> Problem:
    """One batch of the checkerboard, whose density a flow learns by its exact divergence."""
    tolerances = dict(rtol=1e-5, atol=1e-5)
    order = randomness.stream(0, "batch order")
    data = flow_data.load(data="checkerboard", batch_size=100, device="cpu", generator=order)
    model = flow.build(flow.Config("cpu", "seminorm", data="checkerboard"))
    _train_briefly(model, data.train, flow.mean_loss, **tolerances)
    batch = next(iter(data.train))
    step = functools.partial(_step, model, batch, flow.mean_loss)
    unweighed = dict(adjoint="seminorm", integrals=1, weigh_integrals=False)
    ways = {
        "torchdiffeq, its default norm": (_solve_stock, {}),
        "torchdiffeq, seminorm": (_solve_stock, dict(norm="seminorm")),
        "ours, seminorm, autograd's field": (_solve_unfused, dict(adjoint="seminorm")),
        "ours, seminorm": (solve, dict(adjoint="seminorm")),
        "ours, seminorm, integrals unweighed": (solve, unweighed),
        "ours, seminorm, warm start": (solve, dict(adjoint=Backsolve(warm_start=True))),
        "ours, seminorm, compiled": (solve, dict(adjoint="seminorm", compile=True)),
        "ours, seminorm, compiled, warm start": (solve, dict(adjoint=Backsolve(warm_start=True), compile=True)),
        "ours, discrete": (solve, dict(adjoint="discrete")),
        "ours, discrete, one stage at a time": (solve, dict(adjoint=Discrete(linearised="stage"))),
        "ours, discrete, all stages kept": (solve, dict(adjoint=Discrete(linearised="solve"))),
        "ours, discrete, compiled": (solve, dict(adjoint="discrete", compile=True)),
        "ours, default": (solve, dict(adjoint="default")),
        "ours, per-tensor": (solve, dict(adjoint="per-tensor")),
    }
    # The value and its derivatives along both axes.
    layers = [nn.Linear(*reversed(weight.shape)) for weight in model.flow.network.weights]
    return Problem(
        "Continuous flow, checkerboard, batch 100",
        _contestants(step, ways, tolerances, "flow_step", model, *batch),
        [(3 * 100, layer) for layer in layers],
        num_rounds,
    )


def _contestants(step: Callable, ways: dict, tolerances: dict, peer: str, *of_peer) -> list[Contestant]:
    """Ours and torchdiffeq's by `step`; diffrax's by the function `peer` of `with_diffrax`, if diffrax is installed."""
    found = []
    for name, (function, options) in ways.items():
        solver = functools.partial(function, **tolerances, **options)
        counting = functools.partial(solver, is_counted=True) if function is _solve_stock else solver
        found.append(Contestant(name, functools.partial(step, solver), functools.partial(step, counting)))
    if is_installed("diffrax"):
        from benchmarks import with_diffrax

        for adjoint in with_diffrax.ADJOINTS:
            diffrax_step = getattr(with_diffrax, peer)(*of_peer, adjoint=adjoint, **tolerances)
            count = functools.partial(_count_diffrax, diffrax_step)
            found.append(Contestant(adjoint, diffrax_step, count))
    return found


def _count_diffrax(step: Callable[[], tuple[int, float]]) -> str:
    num_steps, _ = step()
    return f"{num_steps} steps"


def is_installed(package: str) -> bool:
    """Whether it can be imported."""
    return importlib.util.find_spec(package) is not None
