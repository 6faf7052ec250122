"""Views of a flat gradient, kept as long as it is in use: to make them costs as much as a small kernel."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import Tensor

Views = TypeVar("Views")

MOST_KEPT = 16
"""As many gradients as a backward solve adds to at most: one for each of dopri8's stages, and their sum."""


def views_of(gradient: Tensor, kept: dict[int, Views], make: Callable[[], Views]) -> Views:
    """The views in `kept`, by the address of `gradient`, or what `make` returns; views of older gradients are dropped.

    A graph that is gone through again and again has other gradients each time, which their views would keep alive.
    """
    key = gradient.data_ptr()
    if key not in kept:
        if len(kept) == MOST_KEPT:
            del kept[next(iter(kept))]
        kept[key] = make()
    return kept[key]


def unflattened(gradient: Tensor, like: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """A flat gradient as tensors of the shapes of `like`, one behind the other."""
    pieces = gradient.split([tensor.numel() for tensor in like])
    return tuple(piece.view_as(tensor) for piece, tensor in zip(pieces, like, strict=True))
