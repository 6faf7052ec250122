"""A problem as a PyTorch module, and a gradient step of anything that solves a module; contestants may use it."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .arrays import TORCH
from .contract import Field, Gradient, Problem, Step, loss

Counts = Callable[[], tuple[int | None, int | None]]
"""Tells the evaluations forward and backward so far."""
Solve = Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Counts]]
"""Of a module, y0 and the times: the solution (times, batch, channels), and its counts."""


class TorchField(nn.Module):
    """The field of a problem, with its parameters."""

    def __init__(self, function: Field, parameters: Mapping[str, Tensor]):
        super().__init__()
        self.function = function
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        # The dictionary of the module itself: to look up each parameter costs as much as a small kernel.
        return self.function(TORCH, t, y, self._parameters)


class CountingField(TorchField):
    """The same, which counts its evaluations, for libraries that do not."""

    num_evaluations = 0

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.__dict__["num_evaluations"] += 1  # past nn.Module, which would look at it closely
        return self.function(TORCH, t, y, self._parameters)


def tensors_of(problem: Problem, dtype: str) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
    """Parameters, y0, times and targets in a dtype."""
    kind = {"float32": torch.float32, "float64": torch.float64}[dtype]
    parameters = {name: torch.tensor(value, dtype=kind) for name, value in problem.parameters.items()}
    return parameters, *(torch.tensor(value, dtype=kind) for value in (problem.y0, problem.times, problem.targets))


def prepare_step(problem: Problem, solve: Solve, dtype: str, *, kind: type[TorchField] = TorchField) -> Step:
    """A gradient step by `solve`, which takes a module of the class `kind`."""
    parameters, y0, times, targets = tensors_of(problem, dtype)
    func = kind(problem.field, parameters)
    inputs = [*func.parameters()]

    def step() -> Gradient:
        start = y0.clone().requires_grad_()
        y, counts = solve(func, start, times)
        by_y0, *by_parameters = torch.autograd.grad(loss(y, targets), [start, *inputs])
        return Gradient(by_y0, dict(zip(problem.parameters, by_parameters, strict=True)), *counts())

    return step


def options_of(problem: Problem, **others: Any) -> dict[str, Any]:
    """Options of a solve by ours or torchdiffeq: the jumps, if there are any, and others."""
    return {**others, **({"jump_t": torch.tensor(problem.jumps, dtype=torch.float64)} if problem.jumps else {})}
