"""The same solves by stock torchdiffeq, counted by its callbacks: `solver="torchdiffeq"`, which tests compare with."""

from collections.abc import Sequence

import torch
import torchdiffeq
from torch import Tensor, nn

from .errors import SolverError
from .field import checked_derivative
from .norms import Adjoint, block_norm, consecutive_blocks, norm_blocks
from .statistics import SolveStatistics


class _Counted(nn.Module):
    """A function that counts its evaluations, and torchdiffeq's steps by the callbacks that it looks for.

    Where torchdiffeq would raise AssertionError, in either direction, the callback before the step raises SolverError.
    """

    def __init__(self, func: nn.Module, statistics: SolveStatistics, t: Tensor, *, max_num_steps: int):
        super().__init__()
        self.func = func
        self.statistics = statistics
        self.times = t.tolist()
        self.max_num_steps = max_num_steps
        self.sign = 1.0 if t[0] < t[-1] else -1.0
        """-1 for a solve towards smaller times: torchdiffeq negates t, and in the adjoint's callbacks leaves it so."""
        self.evaluation_times = statistics.forward.evaluation_times
        self.num_attempts = 0
        self.last_attempt = None

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.evaluation_times.append(t.item())
        derivative = checked_derivative(self.func(t, y), y)
        if torch.is_grad_enabled() and not derivative.requires_grad:
            # torchdiffeq cannot differentiate what depends on nothing.
            derivative = derivative.detach().requires_grad_()
        return derivative

    def callback_step(self, t0: Tensor, y0: Tensor, dt: Tensor) -> None:
        self._check_step(t0.item(), t0, y0, dt)

    def callback_step_adjoint(self, t0: Tensor, y0: Tensor, dt: Tensor) -> None:
        self._check_step(self.sign * t0.item(), t0, y0, dt)

    def _check_step(self, time: float, t0: Tensor, y0: Tensor, dt: Tensor) -> None:
        if time in self.times and time != self.last_attempt:
            self.num_attempts = 0  # The backward solve starts anew at every output time.
        self.num_attempts, self.last_attempt = self.num_attempts + 1, time
        if not all(tensor.isfinite().all() for tensor in (y0 if isinstance(y0, tuple) else (y0,))):
            what = "the state is not finite"
        elif not t0 + dt > t0:
            what = "the step became too small"
        elif self.num_attempts > self.max_num_steps:
            what = f"more than {self.max_num_steps} steps were attempted"
        else:
            return
        raise SolverError(f"{what} at t = {time:.9g} in torchdiffeq: try larger tolerances or float64")

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
    first_step: float | None,
    max_num_steps: int,
) -> Tensor:
    """The states at the times `t` (times, *shape of y0); arguments as `adjoint.solve` has checked them.

    `tolerances` are rtol, atol, adjoint_rtol, adjoint_atol. `discrete` is `torchdiffeq.odeint`, differentiated through.
    """
    rtol, atol, adjoint_rtol, adjoint_atol = tolerances
    counted = _Counted(func, statistics, t, max_num_steps=max_num_steps)
    jump_t = torch.tensor(jumps, dtype=torch.float64, device=y0.device)
    # Solving towards smaller times torchdiffeq negates t; it does so to `options`, but not to `adjoint_options`.
    adjoint_jump_t = counted.sign * jump_t
    forward_blocks = consecutive_blocks(state_sizes)
    options = dict(first_step=first_step, jump_t=jump_t, norm=lambda y: block_norm(y.reshape(-1), forward_blocks))
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
        adjoint_options=dict(jump_t=adjoint_jump_t, norm=norm),
        adjoint_params=parameters,
    )
    # From here on whatever evaluates is the backward solve.
    counted.evaluation_times = statistics.backward.evaluation_times
    return solution
