"""A problem as a PyTorch module, and a gradient step of anything that solves a module; contestants may use it."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .arrays import TORCH
from .contract import MAX_STEPS, Field, Gradient, Problem, Step, loss

Counts = Callable[[], tuple[int | None, int | None]]
"""Tells the evaluations forward and backward so far."""
Solve = Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Counts]]
"""Of a module, y0 and the times: the solution (times, batch, channels), and its counts."""


class TorchField(nn.Module):
    """The field of a problem, with its parameters, and its constants as buffers."""

    def __init__(self, function: Field, parameters: Mapping[str, Tensor], constants: Mapping[str, Tensor]):
        super().__init__()
        self.function = function
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value))
        for name, value in constants.items():
            self.register_buffer(name, value)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        # The dictionaries of the module itself: to look up each parameter costs as much as a small kernel.
        return self.function(TORCH, t, y, {**self._parameters, **self._buffers})


class CountingField(TorchField):
    """The same, which counts its evaluations, for libraries that do not."""

    num_evaluations = 0

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.__dict__["num_evaluations"] += 1  # past nn.Module, which would look at it closely
        return self.function(TORCH, t, y, {**self._parameters, **self._buffers})


def tensor_of(value: np.ndarray, dtype: str) -> Tensor:
    """A tensor with these numbers, in the dtype of this name."""
    return torch.tensor(value, dtype=getattr(torch, dtype))


def make_field(problem: Problem, dtype: str, kind: type[TorchField] = TorchField) -> TorchField:
    """The problem's field as a module of the class `kind`."""
    given = (problem.parameters, problem.constants)
    return kind(problem.field, *({name: tensor_of(value, dtype) for name, value in some.items()} for some in given))


def prepare_step(problem: Problem, solve: Solve, dtype: str, *, kind: type[TorchField] = TorchField) -> Step:
    """A gradient step by `solve`, which takes a module of the class `kind`."""
    y0, times = (tensor_of(value, dtype) for value in (problem.y0, problem.times))
    func = make_field(problem, dtype, kind)
    inputs = [*func.parameters()]

    def step() -> Gradient:
        start = y0.clone().requires_grad_()
        y, counts = solve(func, start, times)
        # The field need not use all parameters: a constant added to a potential changes nothing.
        by_y0, *by_parameters = torch.autograd.grad(loss(y), [start, *inputs], materialize_grads=True)
        return Gradient(by_y0, dict(zip(problem.parameters, by_parameters, strict=True)), *counts())

    return step


def options_of(problem: Problem, **others: Any) -> dict[str, Any]:
    """Options of a solve by ours or torchdiffeq: how many steps it may take, the jumps if there are any, and others."""
    return {
        "max_num_steps": MAX_STEPS,
        **others,
        **({"jump_t": torch.tensor(problem.jumps, dtype=torch.float64)} if problem.jumps else {}),
    }
