"""The same solves by stock torchdiffeq, counted by its callbacks: the setting `solver` picks it, and tests compare."""

import torch
import torchdiffeq
from torch import Tensor, nn

from torchadjoint import ADJOINTS, NORMS, Solution, SolverError
from torchadjoint.adjoints.forward import state_norm
from torchadjoint.field import checked_derivative
from torchadjoint.norms import Sizes, block_norm
from torchadjoint.posing import of_its_arguments
from torchadjoint.problem import Problem
from torchadjoint.statistics import SolveStatistics
from torchadjoint.stepping import OF_ERROR_CONTROL, Stepping

from .config import SAME_STEPS


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


NOT_HANDED_ON = ("method", "max_num_steps", *(name for name in OF_ERROR_CONTROL if name != "first_step"))
"""What must be as usual in both directions."""


@of_its_arguments
def solve(problem: Problem) -> Solution:
    """As `torchadjoint.solve`, by stock torchdiffeq; `discrete` is `torchdiffeq.odeint`, differentiated through.

    It forgets all later jumps once a step happens to end on one.

    Raises:
        ValueError: for what only our own solver takes: another method or limit of steps backwards, `step_t`, limits of
            the size of a step, safety factors, a warm start, compiled attempts, integrals, tensors as
            tolerances, observers, callbacks of func, and ways to differentiate that are not ours by name.
        SolverError: where torchdiffeq would raise AssertionError.
    """
    adjoint, forward, backward = problem.adjoint, problem.forward, problem.backward
    is_ours = problem.compile or problem.num_integrals or problem.observer("forward", problem.split)
    tolerances = (forward.rtol, forward.atol, backward.rtol, backward.atol)
    if adjoint not in ADJOINTS.values() or is_ours or any(isinstance(value, Tensor) for value in tolerances):
        raise ValueError(
            "solver='torchdiffeq' has no warm_start, no compile, no integrals, no tensors as tolerances, no observers, "
            "no callbacks: use solver='torchadjoint'"
        )
    if forward.method.name not in SAME_STEPS:
        raise ValueError(
            f"method is {forward.method.name!r}, but solver='torchdiffeq' has {', '.join(SAME_STEPS)} to compare with"
        )
    usual = Stepping(forward.method, forward.rtol, forward.atol, max_num_steps=forward.max_num_steps)
    for name in NOT_HANDED_ON:
        if any(getattr(stepping, name) != getattr(usual, name) for stepping in (forward, backward)):
            where = "adjoint_method" if name == "method" else name
            raise ValueError(
                f"{where} is given, or differs between the two directions, which solver='torchdiffeq' does not take "
                "here: leave it out"
            )
    statistics, y0, t = SolveStatistics(), problem.y0, problem.t
    counted = _Counted(problem.func, statistics, t, max_num_steps=forward.max_num_steps)
    jump_t = torch.tensor(problem.jumps, dtype=torch.float64, device=y0.device)
    forward_norm = state_norm(problem)
    options = dict(
        rtol=forward.rtol,
        atol=forward.atol,
        method=forward.method.name,
        options=dict(first_step=forward.first_step, jump_t=jump_t, norm=lambda y: forward_norm(y.reshape(-1))),
    )
    if adjoint.name == "discrete":
        solution = torchdiffeq.odeint(counted, y0, t, **options)
    else:
        sizes = Sizes(problem.sizes, [parameter.numel() for parameter in problem.parameters], len(t) * y0.numel())
        blocks = NORMS[adjoint.norm](sizes)

        def norm(adjoint_state: tuple[Tensor, ...]) -> Tensor:
            time_adjoint, *others = adjoint_state
            return block_norm(torch.cat([tensor.reshape(-1) for tensor in (*others, time_adjoint)]), blocks)

        solution = torchdiffeq.odeint_adjoint(
            counted,
            y0,
            t,
            **options,
            adjoint_rtol=backward.rtol,
            adjoint_atol=backward.atol,
            # Solving towards smaller times torchdiffeq negates t; it does so to `options`, but not to these.
            adjoint_options=dict(first_step=backward.first_step, jump_t=counted.sign * jump_t, norm=norm),
            adjoint_params=problem.parameters,
        )
    # From here on whatever evaluates is the backward solve, and each backward is counted alone.
    counted.evaluation_times = statistics.backward.evaluation_times
    if solution.requires_grad:
        solution.register_hook(lambda gradient: statistics.backward.clear())
    return Solution(problem.split(solution) if problem.is_tuple else solution, statistics)
