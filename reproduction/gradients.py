"""How exact a gradient is, and what its backward solve steps by, measured on a model; `diagnostics.py` saves it.

A model maps an input to a prediction and the statistics of its solve, and solves by its attribute `solve`, which is set
here. A batch is a tuple of tensors, of which the first is the input and the last the target.
"""

import copy
import functools
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchadjoint import Attempt, solve
from torchadjoint.statistics import SolveStatistics

BLOCK_NAMES = ("z", "a_z", "a_theta", "a_t")
"""What the norm `default` weighs. Where the field does not depend on t, a_t is 0: in all experiments but the flow."""


def gradient_of(
    model: nn.Module, batch: tuple[Tensor, ...], loss_function: Callable[[Tensor, Tensor], Tensor], **options
) -> tuple[Tensor, SolveStatistics]:
    """The gradient of all parameters, flat and in float64, and what the solve did; `options` are those of `solve`."""
    model.solve = functools.partial(solve, **options)
    model.zero_grad()
    prediction, statistics = model(batch[0])
    loss_function(prediction, batch[-1]).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).double(), statistics


def exact_gradient(
    model: nn.Module,
    batch: tuple[Tensor, ...],
    loss_function: Callable[[Tensor, Tensor], Tensor],
    reference: tuple[float, float],
    judge: tuple[float, float] | None = None,
) -> tuple[Tensor, float]:
    """The gradient by the seminorm in float64 at these rtol and atol, and its distance from that of `discrete`.

    Where the field has kinks, `discrete` errs more at the same tolerances. If it is to judge the other there, it has
    tighter ones, those of `judge`.
    """
    exact_model = copy.deepcopy(model).double()
    exact, other = (
        gradient_of(exact_model, doubled(batch), loss_function, rtol=rtol, atol=atol, adjoint=adjoint)[0]
        for adjoint, (rtol, atol) in (("seminorm", reference), ("discrete", judge or reference))
    )
    return exact, relative_error(other, exact)


def doubled(batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The batch in float64; whole numbers, such as labels, stay."""
    return tuple(tensor.double() if tensor.is_floating_point() else tensor for tensor in batch)


def relative_error(gradient: Tensor, exact: Tensor) -> float:
    """The norm of the difference over that of the exact one."""
    return ((gradient - exact).norm() / exact.norm()).item()


def gradient_errors(
    model: nn.Module,
    batches: Sequence[tuple[Tensor, ...]],
    loss_function: Callable[[Tensor, Tensor], Tensor],
    *,
    tolerances: Sequence[tuple[float, float]],
    adjoints: Sequence[str],
    reference: tuple[float, float],
    methods: Sequence[str] = ("dopri5",),
) -> list[dict[str, Any]]:
    """How wrong a gradient is, and what it cost: one row for each batch, pair of tolerances, method and adjoint.

    An error is the norm of the difference from the reference, over the reference's norm. The reference is the seminorm
    adjoint in float64 at the tolerances `reference`; all else is in the dtype of the model and its batches, so that at
    small tolerances float32 shows its rounding too. `reference_error` is the error of `discrete` in float64 at the
    same tolerances: two ways that err differently agree so far.
    """
    rows = []
    for number, batch in enumerate(batches):
        exact, reference_error = exact_gradient(model, batch, loss_function, reference)
        for (rtol, atol), method, adjoint in itertools.product(tolerances, methods, adjoints):
            options = {"adjoint": adjoint, "method": method, "rtol": rtol, "atol": atol}
            found = cost_and_error(model, batch, loss_function, exact, **options)
            rows.append({"batch": number, **options, **found, "reference_error": reference_error})
    return rows


def cost_and_error(
    model: nn.Module,
    batch: tuple[Tensor, ...],
    loss_function: Callable[[Tensor, Tensor], Tensor],
    exact: Tensor,
    **options,
) -> dict[str, Any]:
    """What a gradient costs, and its relative error against the exact one; `options` are those of `solve`."""
    started = time.process_time()
    gradient, counted = gradient_of(model, batch, loss_function, **options)
    return {
        "forward_nfe": counted.forward.nfe,
        "backward_nfe": counted.backward.nfe,
        "cpu_seconds": time.process_time() - started,
        "error": relative_error(gradient, exact),
    }


def losses(
    model: nn.Module,
    data: tuple[Tensor, ...],
    loss_function: Callable[[Tensor, Tensor], Tensor],
    *,
    tolerances: Sequence[tuple[float, float]],
    methods: Sequence[str],
) -> list[dict[str, Any]]:
    """What trained weights are worth if another method solves: one row for each pair of tolerances and method.

    The loss is that of all `data` as one batch; where the targets are labels there is the accuracy too.
    """
    inputs, targets, rows = data[0], data[-1], []
    for (rtol, atol), method in itertools.product(tolerances, methods):
        options = {"method": method, "rtol": rtol, "atol": atol}
        model.solve = functools.partial(solve, **options)
        with torch.no_grad():
            prediction, counted = model(inputs)
        row = {**options, "forward_nfe": counted.forward.nfe, "loss": loss_function(prediction, targets).item()}
        if not targets.is_floating_point():
            row["accuracy"] = (prediction.argmax(dim=-1) == targets).float().mean().item()
        rows.append(row)
    return rows


def step_errors(
    model: nn.Module, batch: tuple[Tensor, ...], loss_function: Callable[[Tensor, Tensor], Tensor], **options
) -> list[dict[str, Any]]:
    """Every step that the backward solve attempted, in order: where it went from and to, and its error.

    `error_ratio` is what the solver judges by: above 1 the step was rejected. `z`, `a_z`, `a_theta` and `a_t` are what
    the parts of the state contribute; of the norm `default` the largest is the error ratio, and the seminorm has the
    first two alone. `options` are those of `solve`.
    """
    steps = []

    def observe(attempt: Attempt) -> None:
        if attempt.direction == "backward" and attempt.is_accepted is not None:
            own = {"t0": attempt.t0, "t1": attempt.t1, "error_ratio": attempt.error_ratio}
            steps.append({**own, **attempt.errors})

    gradient_of(model, batch, loss_function, **options, observer=observe)
    return steps


def drivers(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """For each block the share of the attempted steps in which its error is the largest, so that it sets the next."""
    largest = [max(BLOCK_NAMES, key=lambda name: step.get(name, 0.0)) for step in steps]
    return {name: largest.count(name) / len(steps) for name in BLOCK_NAMES}
