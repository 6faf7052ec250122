"""What an observer is told of the steps of a solve: solvers call it, callbacks and measurements are such."""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from .norms import rms_norm


class Attempt:
    """An attempted step. An observer is called with it before, when its outcome is None, and after.

    `state` and `errors` are made when they are asked for, so they can be read during the call only.
    """

    __slots__ = ("_error", "_parts", "_start", "direction", "dt", "error_ratio", "is_accepted", "t0", "t1")

    def __init__(
        self,
        direction: str,
        t0: float,
        t1: float,
        *,
        dt: float,
        start: Tensor,
        error: Tensor | None = None,
        parts: Mapping[str, tuple[int, int]] | None = None,
        error_ratio: float | None = None,
        is_accepted: bool | None = None,
    ):
        self.direction = direction
        """`forward` or `backward`."""
        self.t0, self.t1 = t0, t1
        """Where it starts and ends, in the units of the solve's t."""
        self.dt = dt
        """Its size, above 0."""
        self.error_ratio = error_ratio
        """Its error over the tolerance, by the solve's norm: above 1 a step is rejected. 0 of a fixed step."""
        self.is_accepted = is_accepted
        self._start, self._error, self._parts = start, error, parts or {}

    @property
    def state(self) -> Tensor:
        """The flat state at `t0`: y; backward y, its adjoint, and what else the adjoint's norm needs."""
        return self._start.clone()

    @property
    def errors(self) -> dict[str, float]:
        """Root mean square of the error over the tolerance, for each part of the state.

        The parts are y; backward z, a_z, and with a norm that weighs them a_theta, the adjoint of all parameters, and
        a_t, that of time. Empty before the attempt, and of a fixed step.
        """
        if self._error is None:
            return {}
        return {
            name: rms_norm(self._error[start:stop]).item()
            for name, (start, stop) in self._parts.items()
            if stop > start
        }


class Observer(Protocol):
    """Whatever can be called with an `Attempt`: what `solve` takes for its argument `observer`."""

    def __call__(self, attempt: Attempt) -> None:
        """Look at the attempt; it is about to be made if its outcome is None."""
