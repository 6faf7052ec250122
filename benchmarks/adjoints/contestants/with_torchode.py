"""torchode by dopri5 or tsit5: through the solver, where each sample steps alone, and its joint backward solve, where
all step together.

It has no jumps: its steps find them by rejection. `pip install torchode` brings an old torchtyping, whose plugin stops
every run of pytest, so it is not in the requirements: put it beside, as `docs/which_adjoint.md` says.
"""

from ..contract import MAX_STEPS, Problem, Step
from ..with_torch import prepare_step

PACKAGES = ("torchode",)

WAYS = {
    "torchode, through the solver": ("AutoDiffAdjoint", "Dopri5"),
    "torchode, through the solver, tsit5": ("AutoDiffAdjoint", "Tsit5"),
    "torchode, joint backsolve": ("JointBacksolveAdjoint", "Dopri5"),
}
"""The names of its classes."""
SMALL = ("torchode, through the solver",)


def prepare(problem: Problem, way: tuple[str, str], *, rtol: float, atol: float, dtype: str) -> Step:
    """A gradient step by torchode with its integral controller."""
    import torchode

    adjoint, method_name = way
    solvers = {}

    def by_torchode(func, y0, t):
        if func not in solvers:
            term = torchode.ODETerm(func)
            method = getattr(torchode, method_name)(term=term)
            controller = torchode.IntegralController(atol=atol, rtol=rtol, term=term).to(y0)
            if adjoint == "AutoDiffAdjoint":
                # The sizes of steps are no part of the gradient elsewhere either.
                options = dict(max_steps=MAX_STEPS, backprop_through_step_size_control=False)
                solvers[func] = torchode.AutoDiffAdjoint(method, controller, **options)
            else:
                solvers[func] = torchode.JointBacksolveAdjoint(term, method, controller)
        times = t.expand(len(y0), -1)
        solution = solvers[func].solve(torchode.InitialValueProblem(y0=y0, t_eval=times))
        if not (solution.status == 0).all():
            raise RuntimeError(f"torchode ended with the status {int(solution.status.max())}")

        def counts():
            backward = sum(int(stats["n_f_evals"].max()) for stats in solution.stats.get("backsolve", []))
            return int(solution.stats["n_f_evals"].max()), backward

        return solution.ys.transpose(0, 1), counts

    return prepare_step(problem, by_torchode, dtype)
