"""The adjoint's named norms: how the backward solve measures its error. Solvers and experiments use them.

The backward solve carries z (the state), a_z (its adjoint), a_theta (the parameters' adjoints) and a_t (time's). The
last two stand in no right-hand side. They are integrals, so an error in them never feeds back; yet a norm that weighs
them refuses steps on their behalf. Giving them weight zero makes the norm a seminorm, and that is the whole trick.

Every norm here is a largest root mean square over blocks of the flat vector (z, a_z, a_theta, a_t). The norms differ in
nothing but their blocks, so a norm *is* its list of blocks, and both solvers measure by the same list.
"""

from collections.abc import Callable, Sequence
from enum import Enum
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from .arguments import shown

Block = tuple[int, int]
"""Where a block starts and stops in the flat vector."""


class Adjoint(str, Enum):
    """A way to differentiate a solve, by its name: the norm of its backward solve, or none."""

    DEFAULT = "default"
    """max(RMS(z), RMS(a_z), RMS(all parameter adjoints concatenated), |a_t|): torchdiffeq 0.1, the paper's baseline."""
    SEMINORM = "seminorm"
    """max(RMS(z), RMS(a_z)): the paper's trick."""
    PER_TENSOR = "per-tensor"
    """As `default`, with the RMS of each parameter tensor apart: torchdiffeq 0.2's default, the strictest of all."""
    DISCRETE = "discrete"
    """No norm, as there is no backward solve: the exact gradient of the steps that the forward solve took."""
    AS_PUBLISHED = "as-published"
    """What the released acrobot code computes: two blocks of the size of the solution at all its output times, not of
    the state at one. They hold z, a_z and as many parameter adjoints as still fit, which dilute the state."""

    @classmethod
    def parse(cls, norm: "bool | str | Adjoint") -> "Adjoint":
        """The norm meant by `norm`: False is `default`, True is `seminorm`, else a name.

        Raises:
            ValueError: for anything else.
        """
        if isinstance(norm, bool):
            return cls.SEMINORM if norm else cls.DEFAULT
        try:
            return cls(norm)
        except ValueError:
            names = ", ".join(repr(member.value) for member in cls)
            raise ValueError(
                f"unknown norm {shown(norm)}: use one of {names}, or False for 'default' and True for 'seminorm'"
            ) from None


def consecutive_blocks(sizes: Sequence[int]) -> list[Block]:
    """A block for each size, one behind the other; with the sizes of a state's tensors, the norm of a forward solve."""
    return list(pairwise(accumulate(sizes, initial=0)))


def norm_blocks(
    norm: Adjoint, *, state_sizes: Sequence[int], parameter_sizes: Sequence[int], solution_size: int
) -> list[Block]:
    """The blocks of `norm` in the flat vector (z, a_z, a_theta, a_t).

    Args:
        norm: which norm.
        state_sizes: number of entries of each tensor of the state; each is a block of its own, as in torchdiffeq.
        parameter_sizes: number of entries of each parameter with a gradient, in order.
        solution_size: number of entries of the solution at all output times; only `as-published` looks at it.

    Raises:
        ValueError: if `as-published` is asked for and its two blocks do not lie inside the flat vector.
    """
    state = consecutive_blocks([*state_sizes, *state_sizes])
    num_state, num_parameters = 2 * sum(state_sizes), sum(parameter_sizes)
    time = (num_state + num_parameters, num_state + num_parameters + 1)
    if norm is Adjoint.SEMINORM:
        return state
    if norm is Adjoint.PER_TENSOR:
        return [*consecutive_blocks([*state_sizes, *state_sizes, *parameter_sizes]), time]
    if norm is Adjoint.DEFAULT:
        return [*state, (num_state, num_state + num_parameters), time] if num_parameters else [*state, time]
    if 2 * solution_size > num_state + num_parameters:
        raise ValueError(
            f"the norm 'as-published' weighs two blocks of {solution_size} entries, but the backward solve has only "
            f"{num_state + num_parameters}: take a smaller batch, fewer output times, or another norm"
        )
    return [(0, solution_size), (solution_size, 2 * solution_size)]


def rms_norm(tensor: Tensor) -> Tensor:
    """Root mean square of all entries, a tensor without dimensions."""
    return torch.linalg.vector_norm(tensor) / tensor.numel() ** 0.5


def block_norm(flat: Tensor, blocks: Sequence[Block]) -> Tensor:
    """The largest root mean square over `blocks` of a vector, a tensor without dimensions."""
    return torch.stack([rms_norm(flat[start:stop]) for start, stop in blocks]).amax()


def make_norm(y0: Tensor | Sequence[Tensor]) -> Callable[[Sequence[Tensor]], Tensor]:
    """The seminorm for torchdiffeq's own adjoint: `odeint_adjoint(..., adjoint_options=dict(norm=make_norm(y0)))`.

    This is the paper's snippet as torchdiffeq 0.2 and newer need it. There an adjoint norm receives a tuple
    (a_t, z, a_z, parameter adjoints ...), with z and a_z spread out where the state `y0` is a tuple itself.
    """
    num_tensors = 1 if isinstance(y0, Tensor) else len(y0)

    def seminorm(adjoint_state: Sequence[Tensor]) -> Tensor:
        return torch.stack([rms_norm(tensor) for tensor in adjoint_state[1 : 1 + 2 * num_tensors]]).amax()

    return seminorm
