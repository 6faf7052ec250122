"""What a field hears of each step of its solve, through methods of the names that torchdiffeq gave them."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

STEP, ACCEPT, REJECT = NAMES = ("callback_step", "callback_accept_step", "callback_reject_step")
"""Called before a step is attempted, and after it was accepted or rejected."""
ADJOINT = "_adjoint"
"""What the names of the backward solve's callbacks end in."""

Listener = Callable[[str, float, Tensor, float], None]
"""Takes one of `NAMES`, the time at which a step starts, the flat state there, and the size of the step."""


def listener(func: Any, suffix: str, unflatten: Callable[[Tensor], Any]) -> Listener | None:
    """What calls the methods of `func` whose names end in `suffix`; None if it has none.

    They get the time and the size of the step as tensors without dimensions, and between them what `unflatten` makes of
    the state.
    """
    methods = {name: getattr(func, name + suffix, None) for name in NAMES}
    if not any(methods.values()):
        return None

    def tell(name: str, t0: float, state: Tensor, dt: float) -> None:
        if methods[name] is not None:
            methods[name](state.new_tensor(t0), unflatten(state.clone()), state.new_tensor(dt))

    return tell
