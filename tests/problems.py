"""What the tests of the solver and its adjoints share: fields with exact solutions, paths, and comparisons."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import torchadjoint
from common import torchdiffeq_reference
from torchadjoint import Adjoint, Backsolve, Discrete, Solution
from torchadjoint.problem import State
from torchadjoint.statistics import SolveStatistics

F64 = torch.float64
BACKWARD_SOLVES = ("default", "seminorm", "per-tensor", "as-published")
ADJOINTS = (*BACKWARD_SOLVES, "discrete")
NOT_AS_PUBLISHED = ("default", "seminorm", "per-tensor", "discrete")  # which needs many parameters
INCREASING = torch.linspace(0, 3, 5, dtype=F64)
T = torch.tensor([0.0, 1.0, 2.0], dtype=F64)
"""Output times."""
SOLVERS = {"torchadjoint": torchadjoint.solve, "torchdiffeq": torchdiffeq_reference.solve}


def solve(func: nn.Module, y0: State, t: Tensor, *, solver: str = "torchadjoint", **options) -> Solution:
    """Solve by ours or by the reference."""
    return SOLVERS[solver](func, y0, t, **options)


def way(name: str, *, warm_start: bool = False) -> Adjoint:
    """The adjoint of this name, with a warm start if it has one."""
    return Discrete() if name == "discrete" else Backsolve(name, warm_start=warm_start)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    """Normal random numbers that depend on nothing but the arguments."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


class Plain(nn.Module):
    """Hides that a field has a version of its own for the solver."""

    def __init__(self, func):
        super().__init__()
        self.func = func

    def forward(self, t, y):
        return self.func(t, y)


KINKS = (0.5, 1.7, 2.0)


class Kinked(nn.Module):
    """A network of y whose speed has jumps in t, with a parameter that is used twice and one that is never used."""

    def __init__(self):
        super().__init__()
        self.network = Network()
        self.rates = nn.Parameter(random(len(KINKS) + 1, seed=3))
        self.unused = nn.Parameter(torch.ones(2, dtype=F64))
        self.frozen = nn.Parameter(torch.ones((), dtype=F64), requires_grad=False)
        self.register_buffer("kinks", torch.tensor(KINKS, dtype=F64))

    def forward(self, t, y):
        rate = self.rates.index_select(0, torch.bucketize(t, self.kinks).reshape(1))
        return self.frozen * self.network(t, y) * rate + self.rates.sum() * torch.sin(t)


class Tied(nn.Module):
    """A network with a weight in two places of one module, a layer in two others, and its weight in a third layer."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3, dtype=F64)
        self.first.weight = self.weight = nn.Parameter(random(3, 3))
        self.layers = nn.ModuleList([self.first, nn.Linear(3, 3, dtype=F64), self.first])
        self.layers[1].weight = self.weight

    def forward(self, t, y):
        for layer in self.layers:
            y = torch.tanh(layer(y))
        return y @ self.weight


class Linear(nn.Module):
    """dy/dt = A y, for states (..., size)."""

    def __init__(self, matrix: Tensor):
        super().__init__()
        self.matrix = nn.Parameter(matrix)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return y @ self.matrix.T

    def exact(self, y0: Tensor, t: Tensor) -> Tensor:
        """The solution (times, *shape of y0), differentiable with respect to everything."""
        return torch.stack([y0 @ torch.linalg.matrix_exp(self.matrix * (time - t[0])).T for time in t])


class Growth(nn.Module):
    """dy/dt = rate cos(frequency t) y, entry by entry, for states of any shape."""

    def __init__(self, rate: float = 1.0, frequency: float = 3.0):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(rate, dtype=F64))
        self.frequency = nn.Parameter(torch.tensor(frequency, dtype=F64))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.rate * torch.cos(self.frequency * t) * y

    def exact(self, y0: Tensor, t: Tensor) -> Tensor:
        phase = torch.sin(self.frequency * t) - torch.sin(self.frequency * t[0])
        return y0 * torch.exp(self.rate / self.frequency * phase).view(-1, *[1] * y0.dim())


class Integral(nn.Module):
    """dy/dt = sum_k theta_k t^k, whatever y: up to t^3 the method and its dense output are exact."""

    def __init__(self, degree: int = 3):
        super().__init__()
        self.theta = nn.Parameter(random(degree + 1, seed=5))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.zeros_like(y) + self.theta @ t ** torch.arange(len(self.theta))

    def exact(self, y0: Tensor, t: Tensor) -> Tensor:
        powers = torch.arange(1, len(self.theta) + 1)
        integrals = (t[:, None] ** powers - t[0] ** powers) / powers
        return y0 + (integrals @ self.theta).view(-1, *[1] * y0.dim())


class Network(nn.Module):
    """A small network of y whose speed oscillates with t unless it is `autonomous`, for states (..., size)."""

    def __init__(
        self, size: int = 3, width: int = 16, *, dtype: torch.dtype = F64, seed: int = 0, autonomous: bool = False
    ):
        super().__init__()
        self.amplitude = 0.0 if autonomous else 0.3
        self.first, self.second = nn.Linear(size, width, dtype=dtype), nn.Linear(width, size, dtype=dtype)
        with torch.no_grad():
            for index, parameter in enumerate(self.parameters()):
                parameter.copy_(random(*parameter.shape, seed=seed + index) / parameter.shape[-1] ** 0.5)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return 2 * self.second(torch.tanh(self.first(y) * (1 + self.amplitude * torch.sin(3 * t))))


class Pair(nn.Module):
    """A field of a state of two tensors, (4, 3) and (2,), which act on each other."""

    def __init__(self):
        super().__init__()
        self.network = Network()
        self.weight = nn.Parameter(random(3, 2, seed=7))

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        y, z = state
        return self.network(t, y) * (1 + 0.1 * z.sum()), torch.sin(t) * z + 0.3 * torch.tanh(y.sum(0) @ self.weight)

    @staticmethod
    def start() -> tuple[Tensor, Tensor]:
        return random(4, 3, seed=11), random(2, seed=12)


@dataclass
class Outcome:
    """A solve and the gradients of the sum of its solution times random numbers."""

    y: Tensor
    """The solution; of a tuple of tensors, all their entries in a row."""
    gradients: list[Tensor | None]
    """With respect to y0 (each of its tensors), t, and each parameter."""
    statistics: SolveStatistics

    @property
    def gradient(self) -> Tensor:
        return torch.cat([gradient.reshape(-1) for gradient in self.gradients if gradient is not None])


def differentiate(func: nn.Module, y0: State, t: Tensor, *, by=solve, **options) -> Outcome:
    """Solve by `by` and differentiate. `t` is differentiated if it requires a gradient; old gradients are forgotten."""
    starts = [tensor.detach().clone().requires_grad_() for tensor in (y0 if isinstance(y0, tuple) else [y0])]
    inputs = [*starts, t, *func.parameters()]
    for tensor in inputs:
        tensor.grad = None
    solution = by(func, tuple(starts) if isinstance(y0, tuple) else starts[0], t, **options)
    backward(solution.y)
    y = solution.y if isinstance(solution.y, Tensor) else torch.cat([piece.reshape(-1) for piece in solution.y])
    return Outcome(y.detach(), [tensor.grad for tensor in inputs], solution.statistics)


def differentiate_exactly(func: nn.Module, y0: Tensor, t: Tensor) -> Outcome:
    """The same for `func.exact`."""

    @dataclass
    class Exact:
        y: Tensor
        statistics: None = None

    return differentiate(func, y0, t, by=lambda func, y0, t: Exact(func.exact(y0, t)))


def backward(solution: State) -> None:
    """Differentiate the sum of the solution times random numbers."""
    pieces = [solution] if isinstance(solution, Tensor) else solution
    losses = [(piece * random(*piece.shape, seed=100 + i, dtype=piece.dtype)).sum() for i, piece in enumerate(pieces)]
    sum(losses).backward()


def distance(actual: Tensor, expected: Tensor) -> float:
    """The norm of the difference over the norm of what is expected."""
    assert actual.shape == expected.shape
    return ((actual - expected).norm() / expected.norm()).item()


def steps(statistics: SolveStatistics) -> list[list[float]]:
    """Where steps were accepted and rejected, forward and backward."""
    directions = (statistics.forward, statistics.backward)
    return [times for direction in directions for times in (direction.accept_times, direction.reject_times)]


def random_walks(batch: int, num_knots: int, num_channels: int, *, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    """Paths (batch, num_knots, 1 + num_channels): time 0, 1, ..., and channels that walk at random."""
    walk = random(batch, num_knots, num_channels, seed=seed).cumsum(dim=1)
    time = torch.arange(num_knots, dtype=F64).expand(batch, -1)
    return torch.cat([time.unsqueeze(-1), walk], dim=-1).to(dtype)


class Model(nn.Module):
    """A field, solved from its input to t = 2: what an experiment's model looks like. Its user sets `solve`."""

    def __init__(self, field):
        super().__init__()
        self.field = field

    def forward(self, y0):
        solution = self.solve(self.field, y0, torch.tensor([0.0, 2.0], dtype=y0.dtype))
        return solution.y[-1], solution.statistics


def squares(prediction: Tensor, target: Tensor) -> Tensor:
    """A loss that has a gradient everywhere."""
    return prediction.square().sum()
