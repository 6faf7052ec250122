"""Steps that torch.compile makes one function of, for a field that goes through autograd: `compile=True`.

What it saves is autograd's and the dispatcher's work for every small operation. `compiled_steps` has the functions,
`compiling` what makes kernels of them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .compiled_steps import (
    attempt_backward,
    attempt_forward,
    num_numbers,
    reverse_step,
    slope_backward,
    slope_forward,
    table_of,
)
from .compiling import Bound, compiled, structure
from .field import AutogradField
from .methods.runge_kutta import RungeKutta
from .norms import Block
from .solver import Solver
from .systems import ForwardSystem, SeminormSystem


class CompiledField(AutogradField):
    """A field through autograd, with functions of its module that are compiled as a whole."""

    def __init__(self, func: nn.Module, parameters: tuple[Tensor, ...], shape: torch.Size, *, time_gradient: bool):
        super().__init__(func, parameters, shape, time_gradient=time_gradient)
        named = [
            (f"{path}.{name}" if path else name, tensor)
            for path, module in func.named_modules()
            for own in (module._parameters, module._buffers)
            for name, tensor in own.items()
            if tensor is not None
        ]
        each = {id(tensor): tensor for tensor in (*parameters, *(tensor for _, tensor in named))}
        numbers = {key: number for number, key in enumerate(each)}
        self.tensors = tuple(each.values())
        """The parameters and what else the module has, each once."""
        self.structure = structure(func, [(name, tensor, numbers[id(tensor)]) for name, tensor in named])
        self.all_places = tuple((name, numbers[id(tensor)]) for name, tensor in named)
        self.places = tuple((name, number) for name, number in self.all_places if number < len(parameters))

    def slope(self) -> Bound:
        """The slope (size) at a time and a state (size)."""
        return self._bound(slope_forward, ())

    def attempt(self, method: RungeKutta, blocks: Sequence[Block]) -> Bound:
        """An attempted step, whose error is measured over `blocks`: see `compiled_steps`."""
        return self._bound(attempt_forward, (table_of(method), tuple(blocks)))

    def slope_back(self) -> Bound:
        """As `slope`, of the state and its adjoint, and the product with the parameters (parameters + 1)."""
        return self._bound(slope_backward, (self.places,), self.parameters)

    def attempt_back(self, method: RungeKutta, blocks: Sequence[Block]) -> Bound:
        """As `attempt`, of the state and its adjoint, with the products with the parameters."""
        return self._bound(attempt_backward, (table_of(method), tuple(blocks), self.places), self.parameters)

    def reversal(self, method: RungeKutta) -> Bound:
        """What `reverse_step` returns, given the tensors of a step."""
        return self._bound(reverse_step, (table_of(method), self.places), self.parameters, ())

    def loop(self, function: Callable, fixed: tuple) -> Bound:
        """A function of `compiled_loops`, which is given all tensors of the module, these parameters first."""
        return self._bound(function, (*fixed, self.all_places), self.tensors)

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
        self.num_numbers = num_numbers(method)

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
        """The slopes of all stages (stages, size), the end (size), and the error ratio."""
        return self.attempts(*of_step)


class CompiledSeminormSystem(SeminormSystem):
    """(z, a_z) with compiled evaluations, each with its parameters' part, so that the graph of a stage serves both.

    The weights of a step are known before its error is, so no more than the weighted mean leaves the attempt. A
    rejected attempt has computed it in vain.
    """

    def __init__(self, vector_field: CompiledField, integrals: Tensor, method: RungeKutta, blocks: Sequence[Block]):
        super().__init__(vector_field, vector_field.shape, integrals, method)
        self.slope, self.attempts = vector_field.slope_back(), vector_field.attempt_back(method, blocks)
        self.num_numbers = num_numbers(method)

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

    def add_step(self, dt: float, weights: Sequence[float]) -> None:
        """As that of `SeminormSystem`; the attempt has averaged, with these weights."""
        self.integrals.add_(self.rate, alpha=-dt)


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
        # torch warns when it looks at a tensor that a graph has made.
        state = state.detach()
        if self.system.direction == "forward":
            self.system.prepare(times[0], state)
        if self.prepare_backward is not None:
            self.prepare_backward(times[0], state)
        # The user may change y0 before the way back, which a recorded step starts from.
        super().begin(times, state.clone(), **options)

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


def _number(like: Tensor, number: float) -> Tensor:
    return like.new_full((), number)
