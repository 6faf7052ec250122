"""Steps that torch.compile makes one function of, for a field that goes through autograd: `compile=True`.

What it saves is autograd's and the dispatcher's work for every small operation. `compiling` has what makes the kernels.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .compiling import Bound, compiled, structure
from .field import AutogradField, checked_derivative
from .methods.runge_kutta import RungeKutta
from .norms import Block, block_norm
from .solver import Solver
from .systems import ForwardSystem, SeminormSystem

Table = tuple[tuple[tuple[float, ...], ...], tuple[float, ...], tuple[int, ...]]
"""Of a method: its stage weights, its error weights, and the stages that have a weight in its step."""
Places = tuple[tuple[str, int], ...]
"""Where a module has which of its trained parameters: a tied one in several places, each named once."""


class CompiledField(AutogradField):
    """A field through autograd, with functions of its module that are compiled as a whole."""

    def __init__(self, func: nn.Module, parameters: tuple[Tensor, ...], shape: torch.Size, *, time_gradient: bool):
        super().__init__(func, parameters, shape, time_gradient=time_gradient)
        self.structure = structure(func)
        self.places = _places(func)

    def slope(self) -> Bound:
        """The slope (size) at a time and a state (size)."""
        return self._bound(_slope_forward, ())

    def attempt(self, method: RungeKutta, blocks: Sequence[Block]) -> Bound:
        """An attempted step, whose error is measured over `blocks`: see `_attempt`."""
        return self._bound(_attempt_forward, (_table(method), tuple(blocks)))

    def slope_back(self) -> Bound:
        """As `slope`, of the state and its adjoint, and the product with the parameters (parameters + 1)."""
        return self._bound(_slope_backward, (self.places,), self.parameters)

    def attempt_back(self, method: RungeKutta, blocks: Sequence[Block]) -> Bound:
        """As `attempt`, of the state and its adjoint, with the products with the parameters."""
        return self._bound(_attempt_backward, (_table(method), tuple(blocks), self.places), self.parameters)

    def check(self, t: float, state: Tensor) -> None:
        """Evaluate it once as it is: what is wrong with it is said better than by a compiler. ValueError if so."""
        out = torch.empty_like(state).view(self.shape)
        self.evaluate(t, state.view(self.shape), out)

    def _bound(self, function: Callable, fixed: tuple, *of_this_module: Any) -> Bound:
        made = compiled(function, fixed, self.shape, self.structure)
        return Bound(made, self.func, (self.shape, *fixed, *of_this_module))


class CompiledForwardSystem(ForwardSystem):
    """The state alone, with compiled evaluations and attempts."""

    def __init__(self, vector_field: CompiledField, method: RungeKutta, blocks: Sequence[Block]):
        super().__init__(vector_field, vector_field.shape)
        self.slope, self.attempts = vector_field.slope(), vector_field.attempt(method, blocks)
        self.num_numbers = _num_numbers(method)

    def prepare(self, t: float, state: Tensor) -> None:
        """Compile what was not compiled before. ValueError if that cannot be done."""
        if self.slope.is_prepared and self.attempts.is_prepared:
            return
        self.field.check(t, state)
        self.slope.prepare(_number(state, t), state)
        self.attempts.prepare(state, torch.zeros_like(state), state.new_full((self.num_numbers,), t))

    def slope_at(self, t: float, state: Tensor) -> Tensor:
        """The slope (size) at a state (size)."""
        return self.slope(_number(state, t), state)[0]

    def first_slope_at(self, t: float, state: Tensor) -> Tensor:
        """The same at the start of the coming attempts."""
        return self.slope_at(t, state)

    def attempt(self, *of_step: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The slopes of all stages (stages, size), the end (size), and the error ratio: see `_attempt`."""
        return self.attempts(*of_step)


class CompiledSeminormSystem(SeminormSystem):
    """(z, a_z) with compiled evaluations, each with its parameters' part, so that the graph of a stage serves both.

    The weights of a step are known before its error is, so no more than the weighted mean leaves the attempt. A
    rejected attempt has computed it in vain.
    """

    def __init__(self, vector_field: CompiledField, integrals: Tensor, method: RungeKutta, blocks: Sequence[Block]):
        super().__init__(vector_field, vector_field.shape, integrals, method)
        self.slope, self.attempts = vector_field.slope_back(), vector_field.attempt_back(method, blocks)
        self.num_numbers = _num_numbers(method)

    def prepare(self, t: float, z: Tensor) -> None:
        """As that of `CompiledForwardSystem`, given a state without its adjoint."""
        if self.slope.is_prepared and self.attempts.is_prepared:
            return
        state = torch.cat([z, torch.zeros_like(z)])
        self.slope.prepare(_number(z, t), state)
        numbers = state.new_full((self.num_numbers,), t)
        self.attempts.prepare(state, torch.zeros_like(state), numbers, torch.zeros_like(self.integrals))

    def slope_at(self, t: float, state: Tensor) -> Tensor:
        """As that of `CompiledForwardSystem`."""
        slope, _ = self.slope(_number(state, t), state)
        return slope

    def first_slope_at(self, t: float, state: Tensor) -> Tensor:
        """The same at the start of the coming attempts, which need its product with the parameters too."""
        slope, self.first_product = self.slope(_number(state, t), state)
        return slope

    def attempt(self, *of_step: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As that of `CompiledForwardSystem`."""
        slopes, end, ratio, self.last_product, self.rate = self.attempts(*of_step, self.first_product)
        return slopes, end, ratio

    def reuse_stage(self, stage: int) -> None:
        self.first_product = self.last_product

    def _average(self, weights: Sequence[float]) -> None:
        """The attempt has done it, with these weights."""


class CompiledSolver(Solver):
    """A `Solver` of a system with compiled attempts, each of which evaluates the last stage too, whoever needs it.

    Every attempt returns new tensors, so what another solver copies from buffer to buffer only gets another name here.
    """

    attempts_last_stage = True
    prepare_backward: Callable[[float, Tensor], None] | None = None
    """Of a forward solve: compiles what the way back needs, given the first time and the state there (size)."""

    def begin(self, times: Sequence[float], state: Tensor, **options) -> None:
        """As that of `Solver`. A forward solve compiles what both directions need before its first evaluation.

        Raises:
            ValueError: if it cannot be compiled.
        """
        if self.system.direction == "forward":
            self.system.prepare(times[0], state)
        if self.prepare_backward is not None:
            self.prepare_backward(times[0], state)
        super().begin(times, state, **options)

    def _make_buffers(self, like: Tensor) -> None:
        self.step_size = like.new_empty(())

    def _stand_at(self, state: Tensor) -> None:
        self.start = state

    def _find_first_slope(self, t: float) -> None:
        self.first_slope = self.system.first_slope_at(t, self.start)

    def _slope_along(self, change: float, t: float) -> Tensor:
        return self.system.slope_at(t, torch.add(self.start, self.first_slope, alpha=change))

    def _reuse_last_slope(self) -> None:
        self.first_slope = self.slopes[-1]

    def _run_attempt(self) -> Tensor:
        # The step that reaches the end counts only as far as the end.
        weights = self.weights_at(self.t_end) if self.has_passed(self.t_end) else self.method.step_weights
        numbers = self.start.new_tensor([*self.stage_times, *weights, self.t1 - self.t0, self.rtol, self.atol])
        self.slopes, self.end, ratio = self.system.attempt(self.start, self.first_slope, numbers)
        return ratio

    @property
    def error(self) -> Tensor:
        """The error of the last attempt over the tolerance (size), which only observers ask for."""
        weights = self.start.new_tensor([(self.t1 - self.t0) * weight for weight in self.method.error_weights])
        return (self.slopes.T @ weights) / (self.atol + self.rtol * torch.maximum(self.start.abs(), self.end.abs()))


def _places(func: nn.Module) -> Places:
    trained = [parameter for parameter in func.parameters() if parameter.requires_grad]
    numbers = {id(parameter): number for number, parameter in enumerate(trained)}
    return tuple(
        (f"{path}.{name}" if path else name, numbers[id(parameter)])
        for path, module in func.named_modules()
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
        if parameter.requires_grad
    )


def _table(method: RungeKutta) -> Table:
    return method.stage_weights, method.error_weights, method.weighing_stages


def _number(like: Tensor, number: float) -> Tensor:
    return like.new_full((), number)


def _num_numbers(method: RungeKutta) -> int:
    """How many `numbers` an attempt gets: times of the later stages, weights of all, dt, rtol and atol."""
    return 2 * method.num_stages + 2


def _derivative(func: Callable[[Tensor, Tensor], Tensor], t: Tensor, y: Tensor) -> Tensor:
    return checked_derivative(func(t, y), y).to(y.dtype)


def _derivative_of(func: nn.Module, places: Places, parameters: Sequence[Tensor], t: Tensor, z: Tensor) -> Tensor:
    """The derivative as a function of the parameters too."""
    named = {name: parameters[number] for name, number in places}
    return _derivative(lambda t, z: torch.func.functional_call(func, named, (t, z), tie_weights=False), t, z)


def _slope_forward(func: nn.Module, shape: torch.Size, t: Tensor, state: Tensor) -> tuple[Tensor]:
    return (_derivative(func, t, state.view(shape)).reshape(-1).clone(),)


def _slope_backward(
    func: nn.Module, shape: torch.Size, places: Places, parameters: Sequence[Tensor], t: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The slope of the state and its adjoint (2 * size), and the parameters' (parameters + 1), the last for t."""
    z, adjoint = state.view(2, *shape).unbind()
    slope, pullback = torch.func.vjp(
        lambda parameters, t, z: _derivative_of(func, places, parameters, t, z), parameters, t, z
    )
    by_parameters, by_t, by_z = pullback(adjoint)
    product = torch.cat([product.reshape(-1) for product in (*by_parameters, by_t)])
    return torch.cat([slope.reshape(-1), -by_z.reshape(-1)]), product


def _attempt(
    slope_at: Callable[[Tensor, Tensor], Tensor],
    table: Table,
    blocks: Sequence[Block],
    start: Tensor,
    first_slope: Tensor,
    numbers: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The slopes of all stages, the end and the error ratio of a step, whose `numbers` are those of `_num_numbers`."""
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


def _attempt_forward(
    func: nn.Module, shape: torch.Size, table: Table, blocks: Sequence[Block], *of_step: Tensor
) -> tuple[Tensor, ...]:
    return _attempt(lambda t, y: _derivative(func, t, y.view(shape)).reshape(-1), table, blocks, *of_step)


def _attempt_backward(
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
    """The same, and the parameters' slopes at the last stage and in the mean, (parameters + 1), the last for t."""
    products = [first_product]

    def slope_at(t: Tensor, state: Tensor) -> Tensor:
        slope, product = _slope_backward(func, shape, places, parameters, t, state)
        products.append(product)
        return slope

    attempted = _attempt(slope_at, table, blocks, start, first_slope, numbers)
    _, _, weighing_stages = table
    weights = numbers[len(products) - 1 : -3].unbind()
    rate = sum(weights[stage] * products[stage] for stage in weighing_stages)
    return *attempted, products[-1], rate
