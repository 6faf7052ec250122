"""The functions of arrays in which the problems write their fields: one text of a field serves PyTorch and JAX."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional


@dataclass(frozen=True)
class Arrays:
    """Functions of one library's arrays. Operators and indices need none: both libraries share them."""

    tanh: Callable[[Any], Any]
    relu: Callable[[Any], Any]
    softplus: Callable[[Any], Any]
    sigmoid: Callable[[Any], Any]
    stack: Callable[..., Any]
    """Of a list of arrays, and the new axis."""
    concatenate: Callable[..., Any]
    """Of a list of arrays, and the axis."""
    roll: Callable[..., Any]
    """Of an array, by how far, and along which axis."""
    linear: Callable[[Any, Any, Any], Any]
    """x weight^T + bias, as one kernel where the library has one."""
    piece: Callable[[Any, Any], Any]
    """Of an array (intervals, batch, ...) and a time: the entry (batch, ...) of the interval [0, 1), [1, 2) ... that it
    lies in. Of times (batch,), as PyTorch has them where samples step alone: each sample's own."""


def _piece(values: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    intervals = t.floor().clamp(0, len(values) - 1).long()
    if t.ndim:
        return values[intervals, torch.arange(len(intervals))]
    # An index that is a tensor would be read by Python, which torch.compile cannot do in the middle of a solve.
    return values.index_select(0, intervals.reshape(1)).squeeze(0)


TORCH = Arrays(
    tanh=torch.tanh,
    relu=torch.relu,
    softplus=functional.softplus,
    sigmoid=torch.sigmoid,
    stack=torch.stack,
    concatenate=torch.cat,
    roll=torch.roll,
    linear=functional.linear,
    piece=_piece,
)


def of_jax() -> Arrays:
    """Those of JAX, which this imports."""
    import jax
    import jax.numpy as jnp

    return Arrays(
        tanh=jnp.tanh,
        relu=jax.nn.relu,
        softplus=jax.nn.softplus,
        sigmoid=jax.nn.sigmoid,
        stack=jnp.stack,
        concatenate=jnp.concatenate,
        roll=jnp.roll,
        linear=lambda x, weight, bias: x @ weight.T + bias,
        piece=lambda values, t: values[jnp.clip(jnp.floor(t), 0, len(values) - 1).astype(int)],
    )
