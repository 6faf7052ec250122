"""Gradient steps of the experiments and of a neural ODE, written for diffrax with the weights of the PyTorch models.

One straightforward version each, jitted: the state is a batch, one step size serves all of it, as in the other solvers.
"""

import functools
from collections.abc import Callable

import diffrax
import jax
import jax.numpy as jnp
from torch import Tensor, nn

Step = Callable[[], tuple[int, float]]

ADJOINTS = ("diffrax, backsolve with the seminorm", "diffrax, recursive checkpoints")


def _weights(model: nn.Module) -> dict[str, jax.Array]:
    return {name: jnp.asarray(tensor.detach().numpy()) for name, tensor in model.named_parameters()}


def _adjoint(name: str, controller: Callable[..., diffrax.AbstractStepSizeController]) -> diffrax.AbstractAdjoint:
    if name == ADJOINTS[0]:
        return diffrax.BacksolveAdjoint(stepsize_controller=controller(norm=diffrax.adjoint_rms_seminorm))
    return diffrax.RecursiveCheckpointAdjoint()


def _step(loss: Callable, weights: dict[str, jax.Array]) -> Step:
    gradient_step = jax.jit(jax.value_and_grad(loss, has_aux=True))

    def step() -> tuple[int, float]:
        (value, num_steps), _ = jax.block_until_ready(gradient_step(weights))
        return int(num_steps), float(value)

    return step


def _trajectory(
    field: Callable, y0: jax.Array, weights: dict[str, jax.Array], *, times: jax.Array, adjoint: str, **tolerances
) -> diffrax.Solution:
    """The solution at `times`, of which the first is that of `y0`."""

    def controller(**norm):
        return diffrax.PIDController(**tolerances, **norm)

    return diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        diffrax.Dopri5(),
        times[0],
        times[-1],
        None,
        y0,
        args=weights,
        saveat=diffrax.SaveAt(ts=times),
        stepsize_controller=controller(),
        adjoint=_adjoint(adjoint, controller),
    )


def neural_cde_step(model: nn.Module, x: Tensor, labels: Tensor, *, adjoint: str, rtol: float, atol: float) -> Step:
    """A function that takes one gradient step's work and returns the number of forward steps and the loss."""
    x, labels = jnp.asarray(x.numpy()), jnp.asarray(labels.numpy())
    slopes = jnp.moveaxis(jnp.diff(x, axis=1), 1, 0)
    num_layers, last = len(model.vector_field.hidden), float(len(slopes))

    def controller(**norm):
        pid = diffrax.PIDController(rtol=rtol, atol=atol, **norm)
        return diffrax.ClipStepSizeController(pid, jump_ts=jnp.arange(1.0, last))

    def field(t, z, weights):
        hidden = z
        for layer in range(num_layers):
            name = f"vector_field.hidden.{layer}"
            hidden = jax.nn.relu(hidden @ weights[f"{name}.weight"].T + weights[f"{name}.bias"])
        outputs = jnp.tanh(hidden @ weights["vector_field.last.weight"].T + weights["vector_field.last.bias"])
        interval = jnp.clip(jnp.floor(t).astype(jnp.int32), 0, len(slopes) - 1)
        return jnp.einsum("bhc,bc->bh", outputs.reshape(*z.shape, -1), slopes[interval])

    def loss(weights):
        z0 = x[:, 0] @ weights["initial.weight"].T + weights["initial.bias"]
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            diffrax.Dopri5(),
            0.0,
            last,
            None,
            z0,
            args=weights,
            stepsize_controller=controller(),
            adjoint=_adjoint(adjoint, controller),
        )
        logits = solution.ys[-1] @ weights["readout.weight"].T + weights["readout.bias"]
        losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)
        return losses.mean(), solution.stats["num_steps"]

    return _step(loss, _weights(model))


def symplectic_step(model: nn.Module, window: Tensor, times: Tensor, *, adjoint: str, rtol: float, atol: float) -> Step:
    """A function that takes one gradient step's work and returns the number of forward steps and the loss."""
    window, times = jnp.asarray(window.numpy()), jnp.asarray(times.numpy())

    trajectory = functools.partial(_trajectory, times=times, adjoint=adjoint, rtol=rtol, atol=atol)

    def network(weights, name, x):
        num_layers = sum(key.startswith(f"vector_field.{name}.") for key in weights) // 2
        for layer in range(num_layers):
            key = f"vector_field.{name}.layers.{layer}"
            x = x @ weights[f"{key}.weight"].T + weights[f"{key}.bias"]
            x = jax.nn.softplus(x) if layer < num_layers - 1 else x
        return x

    def inverse_mass(weights, trigonometry):
        l11, l22, l21 = jnp.moveaxis(network(weights, "factor", trigonometry), -1, 0)
        entries = jnp.stack([l11**2 + 0.1, l11 * l21, l11 * l21, l22**2 + l21**2 + 0.1], axis=-1)
        return entries.reshape(-1, 2, 2)

    def field(t, y, weights):
        trigonometry, velocities, torques = y[:, :4], y[:, 4:6], y[:, 6:]
        cosines, sines = y[:, :2], y[:, 2:4]
        rate = jnp.concatenate([-sines * velocities, cosines * velocities], axis=-1)
        # The value and its derivative along dq/dt, by forward mode; the gradient of H by reverse mode.
        mass, mass_rate = jax.jvp(lambda x: inverse_mass(weights, x), (trigonometry,), (rate,))
        (a, b), (_, d) = jnp.moveaxis(mass, 0, -1)
        momenta = jnp.stack([d * velocities[:, 0] - b * velocities[:, 1], a * velocities[:, 1] - b * velocities[:, 0]])
        momenta = (momenta / (a * d - b * b)).T

        def hamiltonian(x):
            kinetic = jnp.einsum("bi,bij,bj->b", momenta, inverse_mass(weights, x), momenta) / 2
            return (kinetic + network(weights, "potential", x)[:, 0]).sum()

        slopes = jax.grad(hamiltonian)(trigonometry)
        by_angle = -sines * slopes[:, :2] + cosines * slopes[:, 2:]
        control = network(weights, "control", trigonometry).reshape(-1, 2, 2)
        momentum_rate = -by_angle + jnp.einsum("bij,bj->bi", control, torques)
        accelerations = jnp.einsum("bij,bj->bi", mass, momentum_rate) + jnp.einsum("bij,bj->bi", mass_rate, momenta)
        return jnp.concatenate([rate, accelerations, jnp.zeros_like(torques)], axis=-1)

    def loss(weights):
        solution = trajectory(field, window[:, 0], weights)
        return jnp.mean((jnp.moveaxis(solution.ys, 0, 1) - window) ** 2), solution.stats["num_steps"]

    return _step(loss, _weights(model))


def flow_step(model: nn.Module, x: Tensor, *, adjoint: str, rtol: float, atol: float) -> Step:
    """A function that takes one gradient step's work and returns the number of forward steps and the loss."""
    x, times = jnp.asarray(x.numpy()), jnp.asarray([0.0, model.flow.end_time])
    num_layers, axes = len(model.flow.network.weights), jnp.eye(x.shape[1])

    trajectory = functools.partial(_trajectory, times=times, adjoint=adjoint, rtol=rtol, atol=atol)

    def velocity(t, x, weights):
        for layer in range(num_layers):
            weight, bias, gate_weight, gate_bias, shift = (
                weights[f"flow.network.{kind}.{layer}"]
                for kind in ("weights", "biases", "gate_weights", "gate_biases", "shifts")
            )
            x = jnp.tanh(x) if layer else x
            x = (x @ weight.T + bias) * jax.nn.sigmoid(gate_weight * t + gate_bias) + shift * t
        return x

    def field(t, state, weights):
        x, _ = state
        value, push = jax.linearize(lambda x: velocity(t, x, weights), x)
        tangents = jax.vmap(lambda axis: push(jnp.broadcast_to(axis, x.shape)))(axes)
        return value, jnp.einsum("dbd->b", tangents)

    def loss(weights):
        solution = trajectory(field, (x, jnp.zeros(len(x))), weights)
        noise, log_determinant = (part[-1] for part in solution.ys)
        log_density = jax.scipy.stats.norm.logpdf(noise).sum(axis=1) + log_determinant
        return -log_density.mean(), solution.stats["num_steps"]

    return _step(loss, _weights(model))


def neural_ode_step(
    model: nn.Module, y0: Tensor, wanted: Tensor, times: Tensor, *, adjoint: str, rtol: float, atol: float
) -> Step:
    """A function that takes one gradient step's work and returns the number of forward steps and the loss."""
    y0, wanted, times = jnp.asarray(y0.numpy()), jnp.asarray(wanted.numpy()), jnp.asarray(times.numpy())
    linear = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]

    trajectory = functools.partial(_trajectory, times=times, adjoint=adjoint, rtol=rtol, atol=atol)

    def field(t, y, weights):
        for name in linear:
            y = y @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]
            y = jnp.tanh(y) if name != linear[-1] else y
        return y

    def loss(weights):
        solution = trajectory(field, y0, weights)
        return jnp.mean((solution.ys - wanted) ** 2), solution.stats["num_steps"]

    return _step(loss, _weights(model))
