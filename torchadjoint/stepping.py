"""How one direction of a solve steps: its method, its tolerances and every option of either, checked once."""

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import arguments
from .methods import RungeKutta

DEFAULT_MAX_NUM_STEPS = 100_000
OF_ERROR_CONTROL = ("first_step", "step_t", "min_step", "max_step", "safety", "ifactor", "dfactor")
"""Options of methods with error control alone."""
OF_FIXED_STEPS = ("step_size", "grid_constructor", "interp", "perturb")
"""Options of methods of fixed steps alone."""
SHARED = ("jump_t", "norm", "max_num_steps", "dtype")
"""Options of every method. `dtype` is torchdiffeq's: times are Python floats here, so any dtype will do."""


@dataclass(frozen=True)
class Stepping:
    """What `make_stepping` makes of its arguments. Numbers are those of the solve's own t, sizes of steps positive."""

    method: RungeKutta
    rtol: float | Tensor
    """Relative tolerance: a number, or a flat tensor with one for each entry of the state."""
    atol: float | Tensor
    """Absolute tolerance, likewise."""
    max_num_steps: int = DEFAULT_MAX_NUM_STEPS
    """How many steps may be attempted from one start of a solve on."""
    norm: Callable[[Any], Tensor] | None = None
    """Of the forward solve: how large an error is, from the error over the tolerance in the form of the state. By
    default the largest root mean square over the tensors of the state."""
    first_step: float | None = None
    """Size of the first step; guessed if not given, at the price of one evaluation."""
    step_t: tuple[float, ...] = ()
    """Times that end a step, in ascending order, though nothing jumps there."""
    min_step: float = 0.0
    """A step of this size or a smaller one is accepted, however large its error, if that is finite."""
    max_step: float = math.inf
    # torchdiffeq's constants, so that the steps can be compared one by one.
    safety: float = 0.9
    """The part of the step that the error would allow that is taken."""
    ifactor: float = 10.0
    """By how much a step may grow."""
    dfactor: float = 0.2
    """By how much a step may shrink."""
    step_size: float | None = None
    """Size of fixed steps; by default a step goes from one output time to the next."""
    grid_constructor: Callable[[Any, Any, Tensor], Tensor] | None = None
    """Where fixed steps end, from the first to the last time (steps + 1,), given func, the state at the first time, and
    the output times (times,)."""
    interp: str = "linear"
    """Between fixed steps: `linear`, or the `cubic` through both ends and their slopes."""
    perturb: bool = False
    """Whether fixed steps evaluate func just inside their ends. Others always do so at the end."""


OPTIONS = (*OF_ERROR_CONTROL, *OF_FIXED_STEPS, *SHARED)
assert {*OPTIONS} - {"jump_t", "dtype"} == {field.name for field in fields(Stepping)} - {"method", "rtol", "atol"}


def make_stepping(
    method: RungeKutta, *, rtol: Any, atol: Any, options: Mapping[str, Any], prefix: str, largest: float, like: Any
) -> Stepping:
    """The `Stepping` of these settings.

    Args:
        method: how to step.
        rtol: relative tolerance: a number, a tensor that broadcasts to the state, or one of these for each of its
            tensors.
        atol: absolute tolerance, likewise.
        options: the options by their names; `jump_t` is left to others.
        prefix: what errors put before the names of the tolerances.
        largest: no time or size may be beyond.
        like: the state, for whose entries tolerances may differ.

    Raises:
        ValueError: if an option is unknown, not one of this method, or not as `Stepping` describes it.
    """
    others = OF_FIXED_STEPS if method.is_adaptive else OF_ERROR_CONTROL
    for option in options:
        if option not in OPTIONS:
            refuse_option(option)
        if option in others and options[option] is not None:
            kind = "chooses its steps by their error" if method.is_adaptive else "takes fixed steps"
            raise ValueError(f"{option} is given, but the method {method.name!r} {kind}: leave it away")
    checks = dict(
        max_num_steps=arguments.whole_number,
        first_step=lambda name, value: arguments.number(name, _plain(value), maximum=largest),
        step_t=lambda name, value: tuple(arguments.step_times(name, value, largest)),
        min_step=lambda name, value: arguments.number(name, _plain(value), minimum=0, maximum=largest),
        max_step=_step_limit,
        safety=lambda name, value: arguments.number(name, _plain(value)),
        ifactor=lambda name, value: arguments.number(name, _plain(value), minimum=1),
        dfactor=lambda name, value: arguments.number(name, _plain(value), maximum=1),
        step_size=lambda name, value: arguments.number(name, _plain(value), maximum=largest),
        interp=lambda name, value: arguments.choice(name, value, ("linear", "cubic")),
        perturb=arguments.flag,
        norm=_function,
        grid_constructor=_function,
        dtype=_floating,
    )
    given = {
        option: checks[option](option, value)
        for option, value in options.items()
        if option != "jump_t" and value is not None
    }
    given.pop("dtype", None)
    if {"step_size", "grid_constructor"} <= given.keys():
        raise ValueError("step_size and grid_constructor are both given, but either says where fixed steps end")
    stepping = Stepping(
        method=method,
        rtol=_tolerance(f"{prefix}rtol", rtol, largest, like),
        atol=_tolerance(f"{prefix}atol", atol, largest, like),
        **given,
    )
    if stepping.min_step > stepping.max_step:
        arguments.refuse("min_step", stepping.min_step, f"at most max_step, {stepping.max_step:g}")
    return stepping


def refuse_option(option: Any) -> NoReturn:
    """Raise ValueError: there is no such option."""
    raise ValueError(f"unknown option {arguments.shown(option)}: use one of {', '.join(map(repr, OPTIONS))}")


def _plain(value: Any) -> Any:
    """A tensor of one entry as the number in it; anything else as it is."""
    is_number = isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex()
    return value.item() if is_number else value


def _step_limit(name: str, value: Any) -> float:
    value = _plain(value)
    return value if isinstance(value, numbers.Real) and value == math.inf else arguments.number(name, value)


def _function(name: str, value: Any) -> Callable:
    if not callable(value):
        arguments.refuse(name, value, "a function")
    return value


def _floating(name: str, value: Any) -> torch.dtype:
    if not (isinstance(value, torch.dtype) and value.is_floating_point):
        arguments.refuse(name, value, "a floating-point dtype")
    return value


def _tolerance(name: str, value: Any, largest: float, like: Tensor | Sequence[Tensor]) -> float | Tensor:
    value = _plain(value)
    if not isinstance(value, Tensor | list | tuple):
        return arguments.number(name, value, maximum=largest)
    states = like if isinstance(like, tuple) else (like,)
    values = value if isinstance(value, list | tuple) else (value,)
    allowed = "a number above 0, a tensor of such that broadcasts to the state, or one of these for each of its tensors"
    if len(values) != len(states):
        arguments.refuse(name, value, allowed)
    pieces = []
    for tolerance, state in zip(values, states, strict=True):
        try:
            piece = torch.as_tensor(tolerance, dtype=state.dtype, device=state.device).detach().expand_as(state)
        except (TypeError, ValueError, RuntimeError):
            arguments.refuse(name, value, allowed)
        pieces.append(piece.reshape(-1))
    flat = torch.cat(pieces)
    if not ((flat > 0) & (flat <= largest)).all():
        arguments.refuse(name, value, allowed)
    return flat
