"""What a field hears of each step of its solve, through methods of the names that torchdiffeq gave them."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .observer import Attempt, Observer

NAMES = {None: "callback_step", True: "callback_accept_step", False: "callback_reject_step"}
"""By the outcome of an attempt: before it None."""
SUFFIXES = {"forward": "", "backward": "_adjoint"}
"""What the names end in, by the direction of the solve."""


def observer(func: Any, direction: str, unflatten: Callable[[Tensor], Any]) -> Observer | None:
    """What calls the methods of `func` for one direction; None if it has none.

    They get the time and the size of the step as tensors without dimensions, and between them what `unflatten` makes of
    the state.
    """
    methods = {outcome: getattr(func, name + SUFFIXES[direction], None) for outcome, name in NAMES.items()}
    if not any(methods.values()):
        return None

    def tell(attempt: Attempt) -> None:
        method = methods[attempt.is_accepted]
        if method is not None:
            state = attempt.state
            method(state.new_tensor(attempt.t0), unflatten(state), state.new_tensor(attempt.dt))

    return tell
