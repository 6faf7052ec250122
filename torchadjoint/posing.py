"""From arguments to a `Problem`: the one list of a solve's arguments, which every door shares."""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import arguments
from .adjoints import find_adjoint
from .casting import cast_as_now
from .compiled_loops import IS_TORCH_NEW_ENOUGH, OLDEST_TORCH
from .field import checked_derivative
from .held import held_by
from .methods import RungeKutta, find_method
from .observer import Observer
from .problem import Adjoint, Problem, State
from .stepping import OF_ERROR_CONTROL, OF_FIXED_STEPS, make_stepping

Answer = TypeVar("Answer")
Tolerance = float | Tensor | Sequence[float | Tensor]


def pose(
    func: Callable[..., Any],
    y0: State,
    t: Tensor,
    *,
    rtol: Tolerance = 1e-7,
    atol: Tolerance = 1e-9,
    method: str | RungeKutta = "dopri5",
    adjoint: str | Adjoint = "seminorm",
    adjoint_rtol: float | None = None,
    adjoint_atol: float | None = None,
    adjoint_method: str | RungeKutta | None = None,
    adjoint_options: Mapping[str, Any] | None = None,
    adjoint_params: Sequence[Tensor] | None = None,
    integrals: int = 0,
    weigh_integrals: bool = True,
    observer: Observer | None = None,
    compile: bool | Literal["solve"] = False,
    **options: Any,
) -> Problem:
    """The problem that these arguments pose; `torchadjoint.solve` describes them.

    Raises:
        ValueError: if an argument is not as described there.
        NotImplementedError: for tensors inside a transform of torch.func, or of forward-mode differentiation.
    """
    adjoint = find_adjoint(adjoint)
    if not callable(func):
        arguments.refuse("func", func, "a function of t and y")
    if adjoint_params is None and not isinstance(func, nn.Module):
        raise ValueError("func is no nn.Module, so its parameters are not known: name them by adjoint_params=(...)")
    shapes = arguments.state_shapes(y0)
    asked, asked_y0, is_tuple = func, y0, isinstance(y0, tuple)
    if is_tuple:
        func, y0 = _TupleFunction(func, shapes), torch.cat([component.reshape(-1) for component in y0])
    parameters = arguments.parameters(adjoint_params, func, y0.device)
    own = [*func.parameters()] if isinstance(func, nn.Module) else []
    is_replica = any(True for _ in arguments.of_replicas(func))
    # Up to here, a step beyond a time and sums of a few errors over their tolerance are still finite.
    largest = torch.finfo(y0.dtype).max / 100
    arguments.refuse_transforms([y0, t, *parameters])
    if forward_ad._current_level >= 0:
        arguments.refuse_transforms(it.value for it in held_by(func))
    func = cast_as_now(func, y0.device.type)
    times = arguments.output_times(t, largest)

    method = find_method("method", method)
    adjoint_method = method if adjoint_method is None else find_method("adjoint_method", adjoint_method)
    backward_options = adjoint_options
    if backward_options is None:
        backward_options = options
        if adjoint_method.is_adaptive != method.is_adaptive:
            kinds = {*OF_ERROR_CONTROL, *OF_FIXED_STEPS}
            backward_options = {name: value for name, value in options.items() if name not in kinds}
    elif not isinstance(backward_options, Mapping):
        arguments.refuse("adjoint_options", adjoint_options, "a dict of options")
    elif "norm" in backward_options:
        raise ValueError("adjoint_options names a norm: name it by adjoint=Backsolve(norm)")
    if getattr(adjoint, "warm_start", False) and (adjoint_options or {}).get("first_step") is not None:
        raise ValueError(
            "warm_start is True, and adjoint_options have a first_step: a warm start takes the forward solve's last "
            "one, so leave out one of them"
        )
    like = {"largest": largest, "like": asked_y0}
    compile = arguments.flag("compile", compile, "solve")
    if compile and is_replica:
        raise ValueError(f"compile={compile!r} cannot differentiate a replica of nn.DataParallel: leave compile away")
    if compile and adjoint_params is not None:
        raise ValueError(f"compile={compile!r} needs no adjoint_params: it differentiates all parameters of func")
    integrals = arguments.whole_number("integrals", integrals, minimum=0)
    _check_integrals(
        integrals,
        weigh_integrals,
        shapes=shapes if is_tuple else [],
        given=[*options.items(), *backward_options.items(), ("compile", compile or None)],
    )
    if observer is not None and not callable(observer):
        arguments.refuse("observer", observer, "a function of an Attempt")
    # What jumps is func, so both directions know of it, whichever was told.
    jumps = [
        time
        for given in (options, backward_options)
        for time in arguments.jump_times(given.get("jump_t"), largest, times=times, dtypes=(t.dtype, y0.dtype))
    ]
    forward = make_stepping(method, rtol=rtol, atol=atol, options=options, prefix="", **like)
    if compile and not (forward.norm is None and isinstance(forward.rtol, float) and isinstance(forward.atol, float)):
        raise ValueError(f"compile={compile!r} needs tolerances that are numbers, and no norm of one's own")
    problem = Problem(
        asked=asked,
        func=func,
        y0=y0,
        t=t.to(y0.device),
        times=times,
        jumps=sorted(set(jumps)),
        shapes=shapes,
        is_tuple=is_tuple,
        parameters=parameters,
        are_all_parameters=not is_replica and [*map(id, parameters)] == [*map(id, own)],
        adjoint=adjoint,
        forward=forward,
        backward=make_stepping(
            adjoint_method,
            rtol=rtol if adjoint_rtol is None else adjoint_rtol,
            atol=atol if adjoint_atol is None else adjoint_atol,
            options=backward_options,
            prefix="adjoint_",
            **like,
        ),
        num_integrals=integrals,
        weigh_integrals=weigh_integrals,
        observe=observer,
        compile=compile,
    )
    if compile == "solve":
        _check_loop(problem)
    return problem


def _check_loop(problem: Problem) -> None:
    """Refuses what a compiled loop over steps cannot do."""
    if not IS_TORCH_NEW_ENOUGH:
        raise ValueError(
            f"compile='solve' needs torch {OLDEST_TORCH} or newer, but this is {torch.__version__}: take compile=True"
        )
    method = problem.forward.method
    if not method.is_adaptive:
        reason = f"method is {method.name!r}, which takes fixed steps"
    elif problem.forward.step_t:
        reason = "step_t is given"
    elif problem.observer("forward", problem.split) is not None:
        reason = "an observer is given, or func has callbacks"
    else:
        return
    raise ValueError(f"{reason}, but compile='solve' leaves single steps to nobody: take compile=True")


def _check_integrals(
    integrals: int, weigh_integrals: bool, *, shapes: list[torch.Size], given: Iterable[tuple[str, Any]]
) -> None:
    """Refuses what the declaration of integrals cannot be, and what else is `given` that does not go with it."""
    if not arguments.flag("weigh_integrals", weigh_integrals) and not integrals:
        raise ValueError("weigh_integrals is False, but there are no integrals: say how many tensors of y0 are some")
    if not integrals:
        return
    if integrals >= len(shapes):
        raise ValueError(
            f"integrals is {integrals}, but y0 is {f'a tuple of {len(shapes)} tensors' if shapes else 'no tuple'}: at "
            "least one in front of them must be no integral"
        )
    others = [name for name, value in given if name in ("norm", "grid_constructor", "compile") and value is not None]
    if others:
        raise ValueError(f"integrals and {others[0]} are given, which do not go together: leave out one of them")


def untraced(function: Callable[..., Answer]) -> Callable[..., Answer]:
    """`function`, which branches on values: within a model that torch.compile compiles it runs as it is."""
    as_it_is = torch._disable_dynamo(function)

    @functools.wraps(function)
    def called(*arguments: Any, **options: Any) -> Answer:
        # Not always `as_it_is`: its first call imports the compiler, which takes a second.
        return (as_it_is if torch.compiler.is_compiling() else function)(*arguments, **options)

    return called


def of_its_arguments(function: Callable[[Problem], Answer]) -> Callable[..., Answer]:
    """`function` of a problem as one of the arguments of `pose`, so that these are listed once; `untraced`."""

    # Python's errors about the number of arguments name this function, so it has those of `pose` that have no keyword.
    @untraced
    @functools.wraps(function)
    def posed(func: Callable[..., Any], y0: State, t: Tensor, **options: Any) -> Answer:
        return function(pose(func, y0, t, **options))

    returned = inspect.signature(function).return_annotation
    posed.__signature__ = inspect.signature(pose).replace(return_annotation=returned)
    return posed


class _TupleFunction(nn.Module):
    """A function of a tuple of tensors as one of a flat vector."""

    def __init__(self, func: Callable[..., Any], shapes: list[torch.Size]):
        super().__init__()
        self.func = func
        self.shapes = shapes

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        pieces = y.split([shape.numel() for shape in self.shapes])
        pieces = tuple(piece.view(shape) for piece, shape in zip(pieces, self.shapes, strict=True))
        derivatives = self.func(t, pieces)
        if not isinstance(derivatives, (tuple, list)) or len(derivatives) != len(pieces):
            raise ValueError(
                f"the vector field returned {arguments.shown(derivatives)} for a state of {len(pieces)} tensors: "
                "it must return a tuple of as many"
            )
        derivatives = map(checked_derivative, derivatives, pieces)
        return torch.cat([derivative.reshape(-1) for derivative in derivatives])
