"""Attempted steps that torch.compile makes one function of, for a field that goes through autograd: `compile=True`.

What it saves is autograd's and the dispatcher's work for every small operation. Only evaluations on their own, at the
start and after a jump, still go through autograd.
"""

import functools
import types
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .field import AutogradField
from .methods.runge_kutta import RungeKutta
from .norms import Block, block_norm
from .solver import Solver
from .systems import ForwardSystem, SeminormSystem

Table = tuple[tuple[tuple[float, ...], ...], tuple[float, ...], tuple[int, ...]]
"""Of a method: its stage weights, its error weights, and the stages that have a weight in its step."""


class CompiledForwardSystem(ForwardSystem):
    """The state alone, with whole attempts."""

    def __init__(self, vector_field: AutogradField, shape: torch.Size, *, method: RungeKutta):
        super().__init__(vector_field, shape)
        self.compiled = _compiled(_attempt_forward, method, shape, _structure(vector_field.func))

    def attempt(self, *of_step) -> tuple[Tensor, Tensor, Tensor]:
        """The slopes of the stages after the first (stages - 1, size), the end (size), and the error ratio."""
        return self.compiled(self.field.func, self.shape, *of_step)


class CompiledSeminormSystem(SeminormSystem):
    """(z, a_z) with whole attempts, each with its parameters' part, so that the graph of a stage serves both.

    The weights of a step are known before its error is, so no more than the weighted mean leaves the attempt. A
    rejected attempt has computed it in vain.
    """

    def __init__(self, vector_field: AutogradField, shape: torch.Size, integrals: Tensor, method: RungeKutta):
        super().__init__(vector_field, shape, integrals, method)
        self.first_product = torch.zeros_like(integrals)
        """The parameters' slope at the first stage."""
        func = vector_field.func
        trained = [parameter for parameter in func.parameters() if parameter.requires_grad]
        numbers = {id(parameter): number for number, parameter in enumerate(trained)}
        self.places = tuple(
            (f"{path}.{name}" if path else name, numbers[id(parameter)])
            for path, module in func.named_modules()
            for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
            if parameter.requires_grad
        )
        """Where `func` has which of the parameters: a tied one in several places, each named once."""
        self.compiled = _compiled(_attempt_backward, method, shape, _structure(func))

    def evaluate(self, stage: int, t: float) -> None:
        super().evaluate(stage, t)
        if stage == 0:
            self.first_product.zero_()
            self.field.add_parameter_product(0, 1.0, self.first_product)

    def attempt(self, *of_step) -> tuple[Tensor, Tensor, Tensor]:
        """As that of `CompiledForwardSystem`."""
        differentiated = (self.places, self.field.parameters, self.first_product)
        slopes, end, ratio, self.last_product, self.rate = self.compiled(
            self.field.func, self.shape, *of_step, *differentiated
        )
        return slopes, end, ratio

    def reuse_stage(self, stage: int) -> None:
        self.first_product.copy_(self.last_product)

    def _average(self, weights: Sequence[float]) -> None:
        """The attempt has done it, with these weights."""


class CompiledSolver(Solver):
    """A `Solver` of a system with whole attempts, each of which evaluates the last stage too, whoever needs it."""

    attempts_last_stage = True
    backward: tuple[RungeKutta, Sequence[Block]] | None = None
    """For a forward solve: the method and the norm of the backward solve, if there will be one."""

    def begin(self, times: Sequence[float], state: Tensor, **options) -> None:
        """As that of `Solver`. A forward solve compiles the attempts of both directions before its first step.

        Raises:
            ValueError: if they cannot be compiled.
        """
        super().begin(times, state, **options)
        if self.system.direction == "forward":
            _prepare(self)

    def _error_ratio(self) -> Tensor:
        # The step that reaches the end counts only as far as the end.
        weights = self.weights_at(self.t_end) if self.has_passed(self.t_end) else self.method.step_weights
        numbers = self.start.new_tensor([*self.stage_times, *weights, self.t1 - self.t0, self.rtol, self.atol])
        slopes, end, ratio = self.system.attempt(
            _table(self.method), self.norm.blocks, self.start, self.slopes[0], numbers
        )
        self.slopes[1:].copy_(slopes)
        self.end.copy_(end)
        return ratio


def _prepare(solver: CompiledSolver) -> None:
    """Compile the attempts that a solve will make."""
    system, start, slope = solver.system, solver.start, solver.slopes[0]
    func = system.field.func

    def numbers(method: RungeKutta) -> Tensor:
        return start.new_full((2 * method.num_stages + 2,), solver.t0)

    # What comes out is not used.
    of_step = _table(solver.method), solver.norm.blocks, start, slope, numbers(solver.method)
    system.compiled.prepare(func, lambda: system.attempt(*of_step))
    if solver.backward is not None:
        method, blocks = solver.backward
        integrals = start.new_zeros(sum(system.field.parameter_sizes) + 1)
        backward = CompiledSeminormSystem(system.field, system.shape, integrals, method)
        zeros = torch.zeros_like(start)
        of_step_back = _table(method), blocks, torch.cat([start, zeros]), torch.cat([slope, zeros]), numbers(method)
        backward.compiled.prepare(func, lambda: backward.attempt(*of_step_back))


class _Compiled:
    """A function as torch.compile makes one of it, called with `func` first.

    torch makes a new form of it whenever something that it has read in `func` is another, and keeps a few of them. They
    are released with this object.
    """

    def __init__(self, function: Callable):
        # torch keeps the forms with the code, so this has a copy of its own.
        self.code = function.__code__.replace()
        # Not at the import of this module: it takes seconds.
        self.function = torch.compile(
            types.FunctionType(self.code, function.__globals__),
            fullgraph=True,
            dynamic=False,
            options={"cpp_wrapper": True},
        )
        self.owner: weakref.ref | None = None
        """Whose the oldest form is; None until the first is made."""
        weakref.finalize(self, torch._dynamo.reset_code, self.code).atexit = False

    def prepare(self, func: nn.Module, attempt: Callable[[], object]) -> None:
        """Call `attempt`, which calls this with `func`, unless that was done; twice, to see that it has settled."""
        if self.owner is None:
            attempt()
            with torch._dynamo.config.patch(error_on_recompile=True):
                attempt()
            self.owner = _owner(func)

    def __call__(self, func: nn.Module, *arguments: Any) -> tuple[Tensor, ...]:
        """What the function returns.

        Raises:
            ValueError: if it cannot be compiled, or would be compiled over and over again.
        """
        dynamo = torch._dynamo.exc
        try:
            return self.function(func, *arguments)
        except dynamo.FailOnRecompileLimitHit as error:
            if self.owner() is not _owner(func)():
                self.owner = _owner(func)
                torch._dynamo.reset_code(self.code)
                return self(func, *arguments)
            reason, cause = "it changes so often that it would be compiled again and again", error
        except dynamo.RecompileError as error:
            reason, cause = "it changes whenever it is called, so it would be compiled again and again", error
        except dynamo.TorchDynamoException as error:
            reason, cause = " ".join(str(error).split("\n\n")[0].split()), error
        raise ValueError(f"func cannot be compiled as a whole ({reason}): leave compile=True away") from cause


@functools.lru_cache(maxsize=32)
def _compiled(function: Callable, method: RungeKutta, shape: torch.Size, structure: tuple) -> _Compiled:
    """The compiled `function` for one method, all modules of one `structure` and states of one shape."""
    return _Compiled(function)


def _owner(func: nn.Module) -> weakref.ref:
    """Something that stays when `func` is wrapped anew for another solve: its first parameter, if it has one."""
    return weakref.ref(next(func.parameters(), func))


def _table(method: RungeKutta) -> Table:
    return method.stage_weights, method.error_weights, method.weighing_stages


def _structure(func: nn.Module) -> tuple:
    """In what modules must agree to share what is compiled: their classes, and all about their tensors but the values.

    Other attributes are left to torch, which compiles anew only for those that it has read.
    """
    numbers: dict[int, int] = {}
    named_tensors = (*func.named_parameters(remove_duplicate=False), *func.named_buffers(remove_duplicate=False))
    tensors = [
        (
            name,
            numbers.setdefault(id(tensor), len(numbers)),
            tensor.shape,
            tensor.stride(),
            tensor.dtype,
            tensor.device,
            tensor.requires_grad,
        )
        for name, tensor in named_tensors
    ]
    modules = [(name, type(module)) for name, module in func.named_modules(remove_duplicate=False)]
    return (*modules, *tensors)


def _attempt(
    slope_at: Callable[[Tensor, Tensor], Tensor],
    table: Table,
    blocks: Sequence[Block],
    start: Tensor,
    first_slope: Tensor,
    numbers: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The slopes, the end and the error ratio of a step, whose `numbers` are those of `CompiledSolver`."""
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
        return torch.stack(slopes[1:]), end, torch.zeros_like(dt)
    scale = atol + rtol * torch.maximum(start.abs(), end.abs())
    return torch.stack(slopes[1:]), end, block_norm(combined(error_weights) / scale, blocks)


def _attempt_forward(func: nn.Module, shape: torch.Size, *of_step) -> tuple[Tensor, ...]:
    return _attempt(lambda t, y: func(t, y.view(shape)).reshape(-1), *of_step)


def _attempt_backward(
    func: nn.Module,
    shape: torch.Size,
    table: Table,
    blocks: Sequence[Block],
    start: Tensor,
    first_slope: Tensor,
    numbers: Tensor,
    places: Sequence[tuple[str, int]],
    parameters: Sequence[Tensor],
    first_product: Tensor,
) -> tuple[Tensor, ...]:
    """The same, and the parameters' slopes at the last stage and in the mean, (parameters + 1), the last for t."""
    products = [first_product]

    def derivative(parameters: Sequence[Tensor], t: Tensor, z: Tensor) -> Tensor:
        named = {name: parameters[number] for name, number in places}
        return torch.func.functional_call(func, named, (t, z), tie_weights=False)

    def slope_at(t: Tensor, state: Tensor) -> Tensor:
        z, adjoint = state.view(2, *shape).unbind()
        slope, pullback = torch.func.vjp(derivative, parameters, t, z)
        by_parameters, by_t, by_z = pullback(adjoint)
        products.append(torch.cat([product.reshape(-1) for product in (*by_parameters, by_t)]))
        return torch.cat([slope.reshape(-1), -by_z.reshape(-1)])

    attempted = _attempt(slope_at, table, blocks, start, first_slope, numbers)
    _, _, weighing_stages = table
    weights = numbers[len(products) - 1 : -3].unbind()
    rate = sum(weights[stage] * products[stage] for stage in weighing_stages)
    return *attempted, products[-1], rate
