"""Whether it pays to leave a flow's log-determinant out of the solver's norms, measured; `diagnostics.py` saves it."""

import copy
from collections.abc import Callable, Sequence
from typing import Any, get_args

from torch import Tensor, nn

from flows.continuous import ContinuousFlow, Integrals

from .gradients import doubled, gradient_of, relative_error


def integral_errors(
    model: nn.Module,
    batches: Sequence[tuple[Tensor, ...]],
    loss_function: Callable[[Tensor, Tensor], Tensor],
    *,
    tolerances: Sequence[tuple[float, float]],
    reference: tuple[float, float],
) -> list[dict[str, Any]]:
    """Error and cost of the seminorm's gradient for each `Integrals`: one row for each batch and pair of tolerances.

    `error` is that of the gradient, as in `gradient_errors`; `likelihood_error` is the mean of the absolute errors of
    the samples' losses. The reference is float64 at the tolerances `reference`, all of the state in the norm.
    """
    exact_model = copy.deepcopy(model).double()
    set_integrals(exact_model, "none")
    rows = []
    for number, batch in enumerate(batches):
        rtol, atol = reference
        exact, exact_losses, _ = _step(exact_model, doubled(batch), loss_function, rtol=rtol, atol=atol)
        for rtol, atol in tolerances:
            for way in get_args(Integrals):
                set_integrals(model, way)
                gradient, losses, counted = _step(model, batch, loss_function, rtol=rtol, atol=atol)
                rows.append(
                    {
                        "batch": number,
                        "rtol": rtol,
                        "atol": atol,
                        "integrals": way,
                        "forward_nfe": counted.forward.nfe,
                        "backward_nfe": counted.backward.nfe,
                        "error": relative_error(gradient, exact),
                        "likelihood_error": (losses - exact_losses).abs().mean().item(),
                    }
                )
    return rows


def set_integrals(model: nn.Module, integrals: Integrals) -> None:
    """How all flows of the model solve for their log-determinants from now on; other models have none."""
    for module in model.modules():
        if isinstance(module, ContinuousFlow):
            module.integrals = integrals


def _step(model: nn.Module, batch: tuple[Tensor, ...], loss_function: Callable, **tolerances) -> tuple:
    """The gradient (flat, float64), the losses of the samples, and what the solve did."""
    losses = []

    def keep(prediction: Tensor, target: Tensor) -> Tensor:
        losses.append(prediction.detach().double())
        return loss_function(prediction, target)

    gradient, counted = gradient_of(model, batch, keep, adjoint="seminorm", **tolerances)
    return gradient, losses[0], counted
