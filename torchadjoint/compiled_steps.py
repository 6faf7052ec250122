"""The functions that `compile=True` compiles: a slope, an attempted step, or a step's reversal, as a whole.

Each is called with the module, the shape of the state, what else stays in a solve, and the tensors of one step.
"""

# torch 2.6 cannot compile a function in which the type of an argument is made.
from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .field import checked_derivative
from .methods.runge_kutta import RungeKutta
from .norms import Block, block_norm

Table = tuple[tuple[tuple[float, ...], ...], tuple[float, ...], tuple[int, ...]]
"""Of a method: its stage weights, its error weights, and the stages that have a weight in its step."""
Places = tuple[tuple[str, int], ...]
"""Where a module has which of its trained parameters: a tied one in several places, each named once."""


def table_of(method: RungeKutta) -> Table:
    """Its table."""
    return method.stage_weights, method.error_weights, method.weighing_stages


def num_numbers(method: RungeKutta) -> int:
    """How many `numbers` an attempt gets: times of the later stages, weights of all, dt, rtol and atol."""
    return 2 * method.num_stages + 2


def derivative(func: Callable[[Tensor, Tensor], Tensor], t: Tensor, y: Tensor) -> Tensor:
    return checked_derivative(func(t, y), y).to(y.dtype)


def derivative_of(func: nn.Module, places: Places, parameters: Sequence[Tensor], t: Tensor, z: Tensor) -> Tensor:
    """The derivative as a function of the parameters too, and of whatever else `places` counts."""
    named = {name: parameters[number] for name, number in places}
    return derivative(lambda t, z: torch.func.functional_call(func, named, (t, z), tie_weights=False), t, z)


def slope_forward(func: nn.Module, shape: torch.Size, t: Tensor, state: Tensor) -> tuple[Tensor]:
    """The slope (size) at a time and a state (size)."""
    return (derivative(func, t, state.view(shape)).reshape(-1).clone(),)


def slope_backward(
    func: nn.Module, shape: torch.Size, places: Places, parameters: Sequence[Tensor], t: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The slope of the state and its adjoint (2 * size), and the parameters' (parameters + 1), the last for t."""
    z, adjoint = state.view(2, *shape).unbind()
    slope, pullback = torch.func.vjp(
        lambda parameters, t, z: derivative_of(func, places, parameters, t, z), parameters, t, z
    )
    by_parameters, by_t, by_z = pullback(adjoint)
    product = torch.cat([product.reshape(-1) for product in (*by_parameters, by_t)])
    return torch.cat([slope.reshape(-1), -by_z.reshape(-1)]), product


def attempt(
    slope_at: Callable[[Tensor, Tensor], Tensor],
    table: Table,
    blocks: Sequence[Block],
    start: Tensor,
    first_slope: Tensor,
    numbers: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The slopes of all stages, the end and the error ratio of a step, whose `numbers` are those of `num_numbers`."""
    stage_weights, error_weights, _ = table
    dt, rtol, atol = numbers[-3:].unbind()
    slopes = [first_slope]

    def combined(weights: Sequence[float]) -> Tensor:
        return dt * sum(weight * slope for weight, slope in zip(weights, slopes, strict=True) if weight)

    times = numbers[: len(stage_weights) - 1].unbind()
    for weights, t in zip(stage_weights[1:], times, strict=True):
        end = start + combined(weights)
        slopes.append(slope_at(t, end))
    if not error_weights:
        return torch.stack(slopes), end, torch.zeros_like(dt)
    scale = atol + rtol * torch.maximum(start.abs(), end.abs())
    return torch.stack(slopes), end, block_norm(combined(error_weights) / scale, blocks)


def attempt_forward(
    func: nn.Module, shape: torch.Size, table: Table, blocks: Sequence[Block], *of_step: Tensor
) -> tuple[Tensor, ...]:
    """An attempted step of the state: see `attempt`."""
    return attempt(lambda t, y: derivative(func, t, y.view(shape)).reshape(-1), table, blocks, *of_step)


def attempt_backward(
    func: nn.Module,
    shape: torch.Size,
    table: Table,
    blocks: Sequence[Block],
    places: Places,
    parameters: Sequence[Tensor],
    start: Tensor,
    first_slope: Tensor,
    numbers: Tensor,
    first_product: Tensor,
) -> tuple[Tensor, ...]:
    """That of the state and its adjoint, and the parameters' slopes at the last stage and in the mean.

    These are of shape (parameters + 1), the last for t.
    """
    products = [first_product]

    def slope_at(t: Tensor, state: Tensor) -> Tensor:
        slope, product = slope_backward(func, shape, places, parameters, t, state)
        products.append(product)
        return slope

    attempted = attempt(slope_at, table, blocks, start, first_slope, numbers)
    _, _, weighing_stages = table
    weights = numbers[len(products) - 1 : -3].unbind()
    rate = sum(weights[stage] * products[stage] for stage in weighing_stages)
    return *attempted, products[-1], rate


def reverse_step(
    func: nn.Module,
    shape: torch.Size,
    table: Table,
    places: Places,
    parameters: Sequence[Tensor],
    others: Sequence[Tensor],
    start: Tensor,
    slope_gradients: Tensor,
    numbers: Tensor,
) -> tuple[Tensor, Tensor]:
    """The gradients of a step's start (size) and of the parameters (parameters), through its slopes but the last.

    Args:
        func: the field.
        shape: that of its state.
        table: the method.
        places: where it has which parameters.
        parameters: what they are.
        others: tensors of the field that are not differentiated, which `places` counts behind the parameters.
        start: where the step starts (size).
        slope_gradients: the gradients of these slopes (stages - 1, size).
        numbers: the times of these stages, and dt (stages).
    """
    stage_weights, _, _ = table
    *times, dt = numbers.unbind()

    def slopes_of(parameters: Sequence[Tensor], start: Tensor) -> Tensor:
        slopes = []
        for weights, t in zip(stage_weights[:-1], times, strict=True):
            weighted = [weight * slope for weight, slope in zip(weights, slopes, strict=True) if weight]
            state = start + dt * sum(weighted) if weighted else start
            slopes.append(derivative_of(func, places, (*parameters, *others), t, state.view(shape)).reshape(-1))
        return torch.stack(slopes)

    _, pullback = torch.func.vjp(slopes_of, parameters, start)
    by_parameters, by_start = pullback(slope_gradients)
    return by_start, torch.cat([start.new_zeros(0), *(product.reshape(-1) for product in by_parameters)])
