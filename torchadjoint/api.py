"""Solves of ordinary differential equations with a choice of gradient: `solve`, and torchdiffeq's two functions."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .adjoints import Backsolve
from .captured import capture
from .casting import uncast
from .methods import RungeKutta
from .passes import DifferentiableSolve, Plan, Standstill
from .posing import Tolerance, of_its_arguments, untraced
from .problem import Problem, State
from .statistics import SolveStatistics
from .stepping import OPTIONS, refuse_option


@dataclass
class Solution:
    """What a solve returns."""

    y: State
    """The state at each output time: the shape of `y0` with the times in front, or a tuple of such tensors."""
    statistics: SolveStatistics
    """What the solve did; the backward part is filled by `.backward()`."""


@of_its_arguments
def solve(problem: Problem) -> Solution:
    """Solve dy/dt = func(t, y), differentiable with respect to y0, t and parameters.

    Keywords that torchdiffeq has too mean the same here; those of its `options` stand beside the others. Its callbacks
    are called too: methods of func named `callback_step`, `callback_accept_step` and `callback_reject_step` get the
    time, the state and the size of each step, before it is attempted and after it was accepted or rejected. With
    `_adjoint` behind the name they belong to the backward solve, whose state is the pair of y and its adjoint.

    Args:
        func: called with `t`, a tensor without dimensions, and `y`, of the shape of `y0`, which later stages overwrite;
            returns dy/dt of that shape. If it has a method `fused_field(y0)`, that `Field` is evaluated in its place
            where y0 and all parameters of func are what is differentiated.
        y0: the initial state, of dtype float32 or float64: a tensor of any shape, or a tuple of tensors.
        t: the output times, of shape (times,), strictly increasing or decreasing. The first is y0's.
        rtol: relative tolerance: a number, or a tensor that broadcasts to the state, or one of these for each of its
            tensors. The same for `atol`.
        atol: absolute tolerance.
        method: how to step: a name of `METHODS`, or a `RungeKutta` of your own.
        adjoint: how to differentiate: a name of `ADJOINTS`, such a way with options of its own, as in
            `Backsolve("default", warm_start=True)` and `Discrete(linearised="solve")`, or one of your own.
        adjoint_rtol: relative tolerance of the backward solve, a number; `rtol` if not given.
        adjoint_atol: absolute tolerance of the backward solve, a number; `atol` if not given.
        adjoint_method: how to step backward; `method` if not given.
        adjoint_options: the options of the backward solve, in a dict; if not given, those of the forward solve, as far
            as the method has them. Its norm is the adjoint's.
        adjoint_params: the tensors to differentiate with respect to, of which none may be computed from another, nor
            retain its gradient if it is no leaf; `func.parameters()` if not given. Then a warning names what else func
            holds that requires a gradient, as it gets none.
        integrals: how many tensors at the end of a tuple y0 are integrals: func never reads them. Then their adjoints
            are constant, and the backward solve leaves both out of its state and so of its norm. (There func is given
            NaN for them: one that computes with them after all ends in a SolverError.) `norm`, `grid_constructor` and
            `compile` do not go with it.
        weigh_integrals: whether the forward solve's norm weighs the integrals. If not, their error is what the steps
            that suit the rest leave.
        observer: is called with an `Attempt` before and after every attempted step, forward and backward.
        compile: whether torch.compile makes one function of each direction's steps, at the first use for a field and a
            shape, in seconds to minutes. It compiles `func` even if that has a `fused_field`. The adjoint must be
            `seminorm` or `discrete`, and func an nn.Module that torch.compile can take as a whole. What func reads
            besides its arguments is looked at once a solve. Every compiled attempt evaluates its last stage, and one of
            the seminorm computes its parameters' part, even if it is rejected. "solve" compiles the loop over
            the steps too, forward and backward, so that Python is back once in up to 128 attempts. That needs the
            adjoint `discrete`, unless nothing is differentiated, a method with error control, torch 2.14, and neither
            `step_t` nor an observer nor callbacks.
        options: `jump_t`, times at which func is discontinuous in t: every one between the first and the last time, or
            at the last one, is the end of a step in both directions. `norm`, `max_num_steps`, and those of the method
            that `Stepping` describes: with error control `first_step`, `step_t`, `min_step`, `max_step`, `safety`,
            `ifactor`, `dfactor`; for fixed steps `step_size`, `grid_constructor`, `interp`, `perturb`.

    Raises:
        ValueError: if an argument is not as described.
        SolverError: if a solve, forward or backward, cannot go on.
    """
    statistics = SolveStatistics()
    with uncast(problem.y0.device.type):  # a field may compute something as it is made
        differentiation = problem.adjoint.differentiate(problem, statistics)
    inputs = (problem.y0, problem.t, *problem.parameters)
    is_differentiated = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    if len(problem.times) == 1:
        solution = Standstill.apply(*inputs)
    else:
        plan = Plan(problem, differentiation, is_differentiated, statistics)
        solution = DifferentiableSolve.apply(plan, *inputs)
        if plan.without_gradient:
            warnings.warn(
                f"func holds {' and '.join(map(repr, plan.without_gradient))}, which need a gradient but are no "
                "parameters, so the solve gives them none: name them in adjoint_params, behind those of "
                "func.parameters(), or detach them",
                stacklevel=4,
            )
    return Solution(problem.split(solution) if problem.is_tuple else solution, statistics)


@untraced
def odeint(
    func: Callable[..., Any],
    y0: State,
    t: Tensor,
    *,
    rtol: Tolerance = 1e-7,
    atol: Tolerance = 1e-9,
    method: str | RungeKutta | None = None,
    options: Mapping[str, Any] | None = None,
    event_fn: None = None,
) -> State:
    """In place of `torchdiffeq.odeint`: the `y` of `solve`, whose gradient is that of the steps taken (`discrete`).

    Arguments are those of `solve`, with torchdiffeq's `options` in a dict. A `func` that is no nn.Module may read
    tensors that require a gradient, as with torchdiffeq: they are found in the graph of one evaluation, which costs it
    once more, and those of the backward pass check that there are no others. So may an nn.Module that has some as
    buffers or attributes, also in lists, tuples, dicts and functions, besides its parameters; any other module
    without `fused_field` is checked by the graphs of the first evaluation and of the last step. What a tensor is
    computed from that `func` holds so (or closes over, or has as a default) is differentiated once, behind the solve,
    unless `func` reads that too.

    Raises:
        ValueError: if an argument is not as described, or not supported: `event_fn`, methods other than `METHODS`.
        SolverError: if the solve cannot go on.
    """
    _refuse_events(event_fn)
    func, parameters = capture(func, y0, t)
    given = _given(method, options)
    return solve(func, y0, t, rtol=rtol, atol=atol, adjoint="discrete", adjoint_params=parameters, **given).y


def odeint_adjoint(
    func: Callable[..., Any],
    y0: State,
    t: Tensor,
    *,
    rtol: Tolerance = 1e-7,
    atol: Tolerance = 1e-9,
    method: str | RungeKutta | None = None,
    options: Mapping[str, Any] | None = None,
    event_fn: None = None,
    adjoint_rtol: float | None = None,
    adjoint_atol: float | None = None,
    adjoint_method: str | RungeKutta | None = None,
    adjoint_options: Mapping[str, Any] | None = None,
    adjoint_params: Sequence[Tensor] | None = None,
) -> State:
    """In place of `torchdiffeq.odeint_adjoint`: the `y` of `solve`, with the gradient by a solve backwards in time.

    Arguments are those of `solve`, with torchdiffeq's `options` and `adjoint_options` in dicts. The latter may name the
    norm of the backward solve: a name that `Backsolve` takes, or torchdiffeq's function of a tuple. **Where no norm is
    named it is the seminorm**, where torchdiffeq takes the root mean square of each parameter's adjoint too
    (`per-tensor`). The name "seminorm" leaves out the adjoint of t, which torchdiffeq's of that name weighs.

    Raises:
        ValueError: if an argument is not as described, or not supported: `event_fn`, methods other than `METHODS`.
        SolverError: if a solve, forward or backward, cannot go on.
    """
    _refuse_events(event_fn)
    given = _given(method, options)
    if adjoint_options is None and options and adjoint_method not in (None, method):
        raise ValueError("options and another adjoint_method are given: give adjoint_options too, if only {}")
    norm = "seminorm"
    if isinstance(adjoint_options, Mapping):
        adjoint_options = dict(adjoint_options)
        norm = adjoint_options.pop("norm", norm)
    return solve(
        func,
        y0,
        t,
        rtol=rtol,
        atol=atol,
        adjoint=Backsolve(norm),
        adjoint_rtol=adjoint_rtol,
        adjoint_atol=adjoint_atol,
        adjoint_method=adjoint_method,
        adjoint_options=adjoint_options,
        adjoint_params=adjoint_params,
        **given,
    ).y


def _given(method: str | RungeKutta | None, options: Mapping[str, Any] | None) -> dict[str, Any]:
    """torchdiffeq's method and options as keywords of `solve`."""
    if options is None:
        options = {}
    if not isinstance(options, Mapping):
        raise ValueError(f"options is a {type(options).__name__}, but must be a dict of options")
    for option in options:
        if option not in OPTIONS:  # such as another keyword of `solve`
            refuse_option(option)
    return {"method": "dopri5" if method is None else method, **options}


def _refuse_events(event_fn: None) -> None:
    if event_fn is not None:
        raise ValueError("event_fn is given, but there are no events here: use torchdiffeq's odeint or odeint_event")
