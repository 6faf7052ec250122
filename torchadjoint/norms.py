"""The adjoint's named norms: how the backward solve measures its error. Solvers and experiments use them.

The backward solve carries z (the state), a_z (its adjoint), a_theta (the parameters' adjoints) and a_t (time's). The
last two stand in no right-hand side. They are integrals, so an error in them never feeds back; yet a norm that weighs
them refuses steps on their behalf. Giving them weight zero makes the norm a seminorm, and that is the whole trick.

Every named norm is a largest root mean square over blocks of the flat vector (z, a_z, a_theta, a_t). They differ in
nothing but their blocks, so one *is* a function of sizes to blocks, and all solvers measure by the same blocks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

Block = tuple[int, int]
"""Where a block starts and stops in the flat vector."""
Norm = Callable[[Tensor], Tensor]
"""Of a flat vector, a tensor without dimensions."""


@dataclass(frozen=True)
class Sizes:
    """Numbers of entries."""

    state: Sequence[int]
    """Of each tensor of the state; each is a block of its own, as in torchdiffeq."""
    parameters: Sequence[int]
    """Of each parameter with a gradient, in order."""
    solution: int
    """Of the solution at all output times; only `as-published` looks at it."""

    @property
    def num_state(self) -> int:
        """Of z and a_z."""
        return 2 * sum(self.state)

    @property
    def num_parameters(self) -> int:
        """Of a_theta."""
        return sum(self.parameters)

    @property
    def time(self) -> Block:
        """Where a_t is."""
        return (self.num_state + self.num_parameters, self.num_state + self.num_parameters + 1)


def seminorm(sizes: Sizes) -> list[Block]:
    """max(RMS(z), RMS(a_z)): the paper's trick."""
    return consecutive_blocks([*sizes.state, *sizes.state])


def default(sizes: Sizes) -> list[Block]:
    """max(RMS(z), RMS(a_z), RMS(all parameter adjoints concatenated), |a_t|): torchdiffeq 0.1, the paper's baseline."""
    parameters = [(sizes.num_state, sizes.num_state + sizes.num_parameters)] if sizes.num_parameters else []
    return [*seminorm(sizes), *parameters, sizes.time]


def per_tensor(sizes: Sizes) -> list[Block]:
    """As `default`, with the RMS of each parameter tensor apart: torchdiffeq 0.2's default, the strictest of all."""
    return [*consecutive_blocks([*sizes.state, *sizes.state, *sizes.parameters]), sizes.time]


def as_published(sizes: Sizes) -> list[Block]:
    """What the released acrobot code computes: two blocks of the size of the solution at all its output times.

    They hold z, a_z and as many parameter adjoints as still fit, which dilute the state.

    Raises:
        ValueError: if they do not lie inside the flat vector.
    """
    available = sizes.num_state + sizes.num_parameters
    if 2 * sizes.solution > available:
        raise ValueError(
            f"the norm 'as-published' weighs two blocks of {sizes.solution} entries, but the backward solve has only "
            f"{available}: take a smaller batch, fewer output times, or another norm"
        )
    return [(0, sizes.solution), (sizes.solution, 2 * sizes.solution)]


NORMS = {"default": default, "seminorm": seminorm, "per-tensor": per_tensor, "as-published": as_published}
"""By the names that `Backsolve` takes."""


@dataclass(frozen=True)
class BlockNorm:
    """The largest root mean square over blocks of a flat vector."""

    blocks: tuple[Block, ...]

    def __call__(self, flat: Tensor) -> Tensor:
        """A tensor without dimensions."""
        return block_norm(flat, self.blocks)


def consecutive_blocks(sizes: Sequence[int]) -> list[Block]:
    """A block for each size, one behind the other; with the sizes of a state's tensors, the norm of a forward solve.

    A tensor without entries has none.
    """
    return [(start, stop) for start, stop in pairwise(accumulate(sizes, initial=0)) if start < stop]


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
