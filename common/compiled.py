"""Attempted steps that torch.compile makes one function of, for a field that goes through autograd: `compile=True`.

What it saves is autograd's and the dispatcher's work for every small operation. Only evaluations on their own, at the
start and after a jump, still go through autograd.
"""

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .dopri5 import ERROR_WEIGHTS, NUM_STAGES, STAGE_WEIGHTS, STEP_WEIGHTS
from .field import AutogradField
from .norms import Block, block_norm
from .solver import Solver
from .systems import ForwardSystem, SeminormSystem

NUM_TIMES = NUM_STAGES - 1


class CompiledForwardSystem(ForwardSystem):
    """The state alone, with whole attempts."""

    def attempt(self, *of_step) -> tuple[Tensor, Tensor, Tensor]:
        """The slopes of the stages after the first (stages - 1, size), the end (size), and the error ratio."""
        return _call(_attempt_forward, self.field.func, self.shape, *of_step)


class CompiledSeminormSystem(SeminormSystem):
    """(z, a_z) with whole attempts, each with its parameters' part, so that the graph of a stage serves both.

    The weights of a step are known before its error is, so no more than the weighted mean leaves the attempt. A
    rejected attempt has computed it in vain.
    """

    def __init__(self, vector_field: AutogradField, shape: torch.Size, integrals: Tensor):
        super().__init__(vector_field, shape, integrals)
        self.first_product = torch.zeros_like(integrals)
        """The parameters' slope at the first stage."""
        self.names = tuple(name for name, parameter in vector_field.func.named_parameters() if parameter.requires_grad)

    def evaluate(self, stage: int, t: float, *, is_last_step: bool) -> None:
        super().evaluate(stage, t, is_last_step=is_last_step)
        if stage == 0:
            self.first_product.zero_()
            self.field.add_parameter_product(0, 1.0, self.first_product)

    def attempt(self, *of_step) -> tuple[Tensor, Tensor, Tensor]:
        """As that of `CompiledForwardSystem`."""
        differentiated = (self.names, self.field.parameters, self.first_product)
        slopes, end, ratio, self.last_product, self.rate = _call(
            _attempt_backward, self.field.func, self.shape, *of_step, *differentiated
        )
        return slopes, end, ratio

    def reuse_last_stage(self) -> None:
        self.first_product.copy_(self.last_product)

    def _average(self, weights: Sequence[float]) -> None:
        """The attempt has done it, with these weights."""


class CompiledSolver(Solver):
    """A `Solver` of a system with whole attempts."""

    def _error_ratio(self, *, is_last_step: bool = False) -> Tensor:
        # The step that reaches the end counts only as far as the end.
        weights = self.weights_at(self.t_end) if self.has_passed(self.t_end) else STEP_WEIGHTS
        numbers = self.start.new_tensor([*self.stage_times, *weights, self.t1 - self.t0, self.rtol, self.atol])
        slopes, end, ratio = self.system.attempt(tuple(self.blocks), self.start, self.slopes[0], numbers)
        self.slopes[1:].copy_(slopes)
        self.end.copy_(end)
        return ratio


def _call(function: Callable, func: nn.Module, shape: torch.Size, *arguments: Any) -> tuple[Tensor, ...]:
    """What the compiled function returns.

    Raises:
        ValueError: if it cannot be compiled, or would be compiled over and over again.
    """
    try:
        return _compiled(function, type(func), shape)(func, shape, *arguments)
    except torch._dynamo.exc.FailOnRecompileLimitHit as error:
        reason, cause = "it changes so often that it would be compiled again and again", error
    except torch._dynamo.exc.TorchDynamoException as error:
        reason, cause = " ".join(str(error).split("\n\n")[0].split()), error
    raise ValueError(
        f"func, a {type(func).__name__}, cannot be compiled as a whole ({reason}): leave compile=True away"
    ) from cause


@functools.cache
def _compiled(function: Callable, kind: type, shape: torch.Size) -> Callable:
    # torch keeps only a few compiled forms of one code object, so each class of field and shape gets a copy of its own.
    copy = types.FunctionType(function.__code__.replace(), function.__globals__)
    # Not at the import of this module: it takes seconds.
    return torch.compile(copy, fullgraph=True, dynamic=False, options={"cpp_wrapper": True})


def _attempt(
    slope_at: Callable[[Tensor, Tensor], Tensor],
    blocks: Sequence[Block],
    start: Tensor,
    first_slope: Tensor,
    numbers: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The slopes, the end and the error ratio of a step, whose `numbers` are those of `CompiledSolver`."""
    dt, rtol, atol = numbers[-3:].unbind()
    slopes = [first_slope]

    def combined(weights: Sequence[float]) -> Tensor:
        return dt * sum(weight * slope for weight, slope in zip(weights, slopes, strict=True) if weight)

    for stage_weights, t in zip(STAGE_WEIGHTS[1:], numbers[:NUM_TIMES].unbind(), strict=True):
        end = start + combined(stage_weights)
        slopes.append(slope_at(t, end))
    scale = atol + rtol * torch.maximum(start.abs(), end.abs())
    return torch.stack(slopes[1:]), end, block_norm(combined(ERROR_WEIGHTS) / scale, blocks)


def _attempt_forward(func: nn.Module, shape: torch.Size, *of_step) -> tuple[Tensor, ...]:
    return _attempt(lambda t, y: func(t, y.view(shape)).reshape(-1), *of_step)


def _attempt_backward(
    func: nn.Module,
    shape: torch.Size,
    blocks: Sequence[Block],
    start: Tensor,
    first_slope: Tensor,
    numbers: Tensor,
    names: Sequence[str],
    parameters: Sequence[Tensor],
    first_product: Tensor,
) -> tuple[Tensor, ...]:
    """The same, and the parameters' slopes at the last stage and in the mean, (parameters + 1), the last for t."""
    products = [first_product]

    def derivative(parameters: Sequence[Tensor], t: Tensor, z: Tensor) -> Tensor:
        return torch.func.functional_call(func, dict(zip(names, parameters, strict=True)), (t, z))

    def slope_at(t: Tensor, state: Tensor) -> Tensor:
        z, adjoint = state.view(2, *shape).unbind()
        slope, pullback = torch.func.vjp(derivative, parameters, t, z)
        by_parameters, by_t, by_z = pullback(adjoint)
        products.append(torch.cat([product.reshape(-1) for product in (*by_parameters, by_t)]))
        return torch.cat([slope.reshape(-1), -by_z.reshape(-1)])

    attempted = _attempt(slope_at, blocks, start, first_slope, numbers)
    weights = numbers[NUM_TIMES : NUM_TIMES + NUM_STAGES].unbind()
    # Stage 1 weighs nothing, neither in the step nor in its dense output.
    rate = sum(weights[stage] * products[stage] for stage in range(NUM_STAGES) if stage != 1)
    return *attempted, products[-1], rate
