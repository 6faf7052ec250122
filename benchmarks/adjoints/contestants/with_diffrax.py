"""diffrax, jitted: its ways to differentiate, by Dopri5 unless said otherwise, and the method that it recommends.

One compilation serves all tolerances of a problem. diffrax tells its steps, not its evaluations, so it has no NFE.
"""

import contextlib
import functools
from dataclasses import dataclass

from ..arrays import of_jax
from ..contract import MAX_STEPS, Gradient, Problem, Step, loss

PACKAGES = ("diffrax", "jax")


@dataclass(frozen=True)
class Way:
    """Names of diffrax's classes."""

    adjoint: str = "RecursiveCheckpointAdjoint"
    solver: str = "Dopri5"
    is_seminorm: bool = False


WAYS = {
    "diffrax, recursive checkpoints": Way(),
    "diffrax, recursive checkpoints, tsit5": Way(solver="Tsit5"),
    "diffrax, recursive checkpoints, dopri8": Way(solver="Dopri8"),
    "diffrax, direct": Way("DirectAdjoint"),
    "diffrax, backsolve": Way("BacksolveAdjoint"),
    "diffrax, backsolve, seminorm": Way("BacksolveAdjoint", is_seminorm=True),
}
SMALL = (
    "diffrax, recursive checkpoints",
    "diffrax, recursive checkpoints, tsit5",
    "diffrax, backsolve, seminorm",
)


def prepare(problem: Problem, way: Way, *, rtol: float, atol: float, dtype: str) -> Step:
    """A jitted gradient step by `diffrax.diffeqsolve`.

    Raises:
        NotImplementedError: if the installed diffrax is too old.
    """
    import diffrax
    import jax
    import jax.numpy as jnp

    if not hasattr(diffrax, "ClipStepSizeController"):
        raise NotImplementedError(f"diffrax {diffrax.__version__} is too old: it has no ClipStepSizeController")
    precise = _precision(dtype == "float64")
    with precise():
        parameters = {name: jnp.asarray(value, dtype) for name, value in problem.parameters.items()}
        y0, times = (jnp.asarray(value, dtype) for value in (problem.y0, problem.times))
        tolerances = jnp.asarray([rtol, atol], dtype)
    differentiate = _differentiate(problem, way, dtype)

    def step() -> Gradient:
        try:
            with precise():
                gradients = differentiate((y0, parameters), times, tolerances)
                by_y0, by_parameters = jax.block_until_ready(gradients)
        except jax.errors.JaxRuntimeError as error:
            # The reason stands behind a traceback.
            reasons = [line for line in str(error).splitlines() if "Error: " in line and not line.startswith(" ")]
            raise RuntimeError(reasons[0] if reasons else str(error)) from error
        return Gradient(by_y0, by_parameters)

    return step


@functools.cache
def _differentiate(problem: Problem, way: Way, dtype: str):
    """The jitted gradient of the loss, made once for a problem, a way and a dtype."""
    import diffrax
    import jax

    arrays = of_jax()

    def slope(t, y, parameters):
        # Not in `parameters`, with respect to all of which diffrax's backward solve differentiates.
        constants = {name: jax.numpy.asarray(value, dtype) for name, value in problem.constants.items()}
        return problem.field(arrays, t, y, {**parameters, **constants})

    def objective(differentiated, times, tolerances):
        y0, parameters = differentiated

        def controller(**norm):
            pid = diffrax.PIDController(rtol=tolerances[0], atol=tolerances[1], **norm)
            if not problem.jumps:
                return pid
            return diffrax.ClipStepSizeController(pid, jump_ts=jax.numpy.asarray(problem.jumps, times.dtype))

        options = {}
        if way.is_seminorm:
            options["stepsize_controller"] = controller(norm=diffrax.adjoint_rms_seminorm)
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(slope),
            getattr(diffrax, way.solver)(),
            times[0],
            times[-1],
            None,
            y0,
            args=parameters,
            saveat=diffrax.SaveAt(ts=times),
            stepsize_controller=controller(),
            adjoint=getattr(diffrax, way.adjoint)(**options),
            max_steps=MAX_STEPS,
        )
        return loss(solution.ys)

    return jax.jit(jax.grad(objective))


def _precision(is_double: bool):
    """A context in which JAX computes in float64 or float32."""
    import jax

    enable = getattr(jax, "enable_x64", None)
    if enable is None:
        from jax.experimental import enable_x64 as enable
    return functools.partial(enable, is_double) if is_double else contextlib.nullcontext
