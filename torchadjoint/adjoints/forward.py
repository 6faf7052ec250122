"""What the ways to differentiate share: the field and the solver of the forward solve."""

from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..compiled import CompiledField, CompiledForwardSystem, CompiledSolver
from ..compiled_solve import LoopSolver, LoopSystem
from ..field import AutogradField, Field, TupleField
from ..norms import BlockNorm, Norm, consecutive_blocks
from ..problem import Problem
from ..solver import Solver
from ..statistics import SolveStatistics
from ..systems import ForwardSystem


def make_field(problem: Problem, *, time_gradient: bool) -> Field:
    """The vector field of a problem: its module's own `fused_field` if that will do, else one through autograd.

    Args:
        problem: what is solved.
        time_gradient: whether the products with the parameters must have one more entry, that with df/dt. A fused field
            has none, as it is taken where t needs no gradient.
    """
    may_be_fused = problem.are_all_parameters and not problem.compile and not problem.t.requires_grad
    if may_be_fused and hasattr(problem.asked, "fused_field") and not _has_computed_tensors(problem.asked):
        field = problem.asked.fused_field(problem.split(problem.y0) if problem.is_tuple else problem.y0)
        sizes = [parameter.numel() for parameter in problem.parameters]
        if list(field.parameter_sizes) != sizes:
            raise ValueError(
                f"fused_field has parameter_sizes {tuple(field.parameter_sizes)}, but its module has parameters of "
                f"{tuple(sizes)} entries, in this order"
            )
        return TupleField(field, problem.shapes) if problem.is_tuple else field
    kind = CompiledField if problem.compile else AutogradField
    return kind(problem.func, problem.parameters, problem.y0.shape, time_gradient=time_gradient)


def _has_computed_tensors(func: Any) -> bool:
    """Whether parts of a module compute their tensors from parameters, as a fused field may not know.

    Parametrizations do, and by a hook before each forward so do pruning and the older norms of weights.
    """
    parts = func.modules() if isinstance(func, nn.Module) else ()
    return any(parametrize.is_parametrized(part) or part._forward_pre_hooks for part in parts)


def state_norm(problem: Problem) -> Norm:
    """How the forward solve measures an error."""
    norm = problem.forward.norm
    if norm is None:
        return BlockNorm(tuple(consecutive_blocks(problem.sizes if problem.weigh_integrals else problem.coupled_sizes)))
    return lambda flat: torch.as_tensor(norm(problem.split(flat)), dtype=flat.dtype, device=flat.device).abs()


def forward_solver(
    problem: Problem,
    statistics: SolveStatistics,
    system: ForwardSystem,
    *,
    kind: type[Solver] = Solver,
) -> Solver:
    """A solver of the forward solve of `problem`, of the class `kind`, for a system that has its state.

    Raises:
        ValueError: if the problem is to be compiled, and that kind of solver does not.
    """
    if problem.compile and not issubclass(kind, CompiledSolver):
        raise ValueError(
            f"compile={problem.compile!r} goes with adjoint='seminorm' and 'discrete', not with "
            f"{problem.adjoint.name!r}: leave compile away"
        )
    return kind(
        system,
        problem.forward,
        state_norm(problem),
        jumps=problem.jumps,
        like=problem.y0,
        statistics=statistics.forward,
        make_grid=problem.make_grid(problem.forward),
        observer=problem.observer("forward", problem.split),
    )


def plain_solver(problem: Problem, statistics: SolveStatistics, field: Field) -> Solver:
    """A solver of the forward solve that leaves nothing for the gradient."""
    if problem.compile == "solve":
        return loop_solver(problem, statistics, field)
    if problem.compile:
        return forward_solver(problem, statistics, compiled_system(problem, field), kind=CompiledSolver)
    return forward_solver(problem, statistics, ForwardSystem(field, problem.y0.shape))


def compiled_system(problem: Problem, field: CompiledField) -> CompiledForwardSystem:
    """The state of a forward solve with compiled attempts."""
    return CompiledForwardSystem(field, problem.forward.method, state_norm(problem).blocks)


def loop_solver(problem: Problem, statistics: SolveStatistics, field: CompiledField) -> LoopSolver:
    """As `plain_solver`, with a compiled loop over steps."""
    system = LoopSystem(field, problem.forward.method, state_norm(problem).blocks)
    return forward_solver(problem, statistics, system, kind=LoopSolver)
