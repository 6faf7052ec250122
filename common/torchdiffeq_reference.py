"""The same solves by stock torchdiffeq, counted by its callbacks: `solver="torchdiffeq"`, which tests compare with."""

from collections.abc import Sequence

import torch
import torchdiffeq
from torch import Tensor, nn

from .norms import Adjoint, block_norm, consecutive_blocks, norm_blocks
from .statistics import SolveStatistics


class _Counted(nn.Module):
    """A function that counts its evaluations, and torchdiffeq's steps by the callbacks that it looks for."""

    def __init__(self, func: nn.Module, statistics: SolveStatistics, *, sign: float):
        super().__init__()
        self.func = func
        self.statistics = statistics
        self.sign = sign
        """-1 for a solve towards smaller times: torchdiffeq negates t, and in the adjoint's callbacks leaves it so."""
        self.evaluation_times = statistics.forward.evaluation_times

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.evaluation_times.append(t.item())
        return self.func(t, y)

    def callback_accept_step(self, t0: Tensor, y0: Tensor, dt: Tensor) -> None:
        self.statistics.forward.accept_times.append(t0.item())

    def callback_reject_step(self, t0: Tensor, y0: Tensor, dt: Tensor) -> None:
        self.statistics.forward.reject_times.append(t0.item())

    def callback_accept_step_adjoint(self, t0: Tensor, y0: Tensor, dt: Tensor) -> None:
        self.statistics.backward.accept_times.append(self.sign * t0.item())

    def callback_reject_step_adjoint(self, t0: Tensor, y0: Tensor, dt: Tensor) -> None:
        self.statistics.backward.reject_times.append(self.sign * t0.item())


def solve(
    func: nn.Module,
    y0: Tensor,
    t: Tensor,
    *,
    adjoint: Adjoint,
    jumps: Sequence[float],
    state_sizes: Sequence[int],
    parameters: tuple[Tensor, ...],
    statistics: SolveStatistics,
    tolerances: tuple[float, float, float, float],
    options: dict,
) -> Tensor:
    """The states at the times `t` (times, *shape of y0); arguments as `adjoint.solve` has checked them.

    `tolerances` are rtol, atol, adjoint_rtol, adjoint_atol. `discrete` is `torchdiffeq.odeint`, differentiated through.
    """
    rtol, atol, adjoint_rtol, adjoint_atol = tolerances
    sign = 1.0 if t[0] < t[-1] else -1.0
    counted = _Counted(func, statistics, sign=sign)
    jump_t = torch.tensor(jumps, dtype=torch.float64, device=y0.device)
    # Solving towards smaller times torchdiffeq negates t; it does so to `options`, but not to `adjoint_options`.
    adjoint_jump_t = sign * jump_t
    forward_blocks = consecutive_blocks(state_sizes)
    options = options | dict(jump_t=jump_t, norm=lambda y: block_norm(y.reshape(-1), forward_blocks))
    if adjoint is Adjoint.DISCRETE:
        return torchdiffeq.odeint(counted, y0, t, rtol=rtol, atol=atol, method="dopri5", options=options)

    blocks = norm_blocks(
        adjoint,
        state_sizes=state_sizes,
        parameter_sizes=[parameter.numel() for parameter in parameters],
        solution_size=len(t) * y0.numel(),
    )

    def norm(adjoint_state: tuple[Tensor, ...]) -> Tensor:
        time_adjoint, *others = adjoint_state
        return block_norm(torch.cat([tensor.reshape(-1) for tensor in (*others, time_adjoint)]), blocks)

    solution = torchdiffeq.odeint_adjoint(
        counted,
        y0,
        t,
        rtol=rtol,
        atol=atol,
        method="dopri5",
        options=options,
        adjoint_rtol=adjoint_rtol,
        adjoint_atol=adjoint_atol,
        adjoint_options=dict(jump_t=adjoint_jump_t, norm=norm, max_num_steps=options["max_num_steps"]),
        adjoint_params=parameters,
    )
    # From here on whatever evaluates is the backward solve.
    counted.evaluation_times = statistics.backward.evaluation_times
    return solution
