"""Equations of few states: populations, an oscillator that turns stiff, chaos, and drugs in a body."""

import numpy as np

from ..contract import Problem


def _lotka_volterra(arrays, t, y, parameters):
    """Prey and predator, (batch, 2), with the rates of birth, being eaten, death and eating."""
    birth, eaten, death, eating = parameters["rates"]
    prey, predator = y[..., 0], y[..., 1]
    met = prey * predator
    return arrays.stack([birth * prey - eaten * met, eating * met - death * predator], -1)


def _van_der_pol(arrays, t, y, parameters):
    """The oscillator (position, velocity): the larger mu, the stiffer."""
    x, v = y[..., 0], y[..., 1]
    return arrays.stack([v, parameters["mu"] * (1 - x * x) * v - x], -1)


def _lorenz(arrays, t, y, parameters):
    sigma, rho, beta = parameters["rates"]
    x, v, z = y[..., 0], y[..., 1], y[..., 2]
    return arrays.stack([sigma * (v - x), x * (rho - z) - v, x * v - beta * z], -1)


DOSE_INTERVAL, INFUSION_TIME, NUM_DOSES = 6.0, 1.0, 4


def _pkpd(arrays, t, y, parameters):
    """A drug in blood and tissue and its effect, (batch, 3): an infusion of an hour every six hours."""
    elimination, outward, inward, potency, turnover = parameters["rates"]
    blood, tissue, effect = y[..., 0], y[..., 1], y[..., 2]
    infusion = 5.0 * (t % DOSE_INTERVAL < INFUSION_TIME)
    exchange = outward * blood - inward * tissue
    inhibited = 1 / (1 + potency * blood)
    return arrays.stack(
        [infusion - elimination * blood - exchange, exchange, turnover * (inhibited - effect)],
        -1,
    )


def _doses() -> tuple[float, ...]:
    """Where the infusion begins and ends, but for its begin at 0."""
    begins = DOSE_INTERVAL * np.arange(NUM_DOSES)
    return tuple(sorted([*begins[1:], *(begins + INFUSION_TIME)]))


PROBLEMS = [
    Problem(
        name="lotka-volterra",
        title="Lotka-Volterra, 21 times",
        field=_lotka_volterra,
        parameters={"rates": np.array([1.5, 1.0, 3.0, 1.0])},
        y0=np.array([[1.0, 1.0]]),
        times=np.linspace(0, 10, 21),
        traits=("equation",),
        is_small=True,
    ),
    *(
        Problem(
            name=f"van-der-pol-{mu}",
            title=f"Van der Pol, mu = {mu}",
            field=_van_der_pol,
            parameters={"mu": np.array(float(mu))},
            y0=np.array([[2.0, 0.0]]),
            times=np.linspace(0, horizon, 6),
            traits=("equation", "unstable backward") if mu > 1 else ("equation",),
        )
        for mu, horizon in ((1, 10), (10, 10), (100, 2))
    ),
    *(
        Problem(
            name=f"lorenz-{horizon}",
            title=f"Lorenz, horizon {horizon}",
            field=_lorenz,
            parameters={"rates": np.array([10.0, 28.0, 8 / 3])},
            y0=np.array([[1.0, 1.0, 1.0]]),
            times=np.linspace(0, horizon, 3),
            # Volumes shrink by exp(13.7 t), so they grow so fast backward.
            traits=("equation", "unstable backward") if horizon > 1 else ("equation",),
        )
        for horizon in (1, 5, 20)
    ),
    Problem(
        name="pkpd",
        title="Drug and effect, 4 doses",
        field=_pkpd,
        parameters={"rates": np.array([0.3, 0.5, 0.2, 0.8, 0.25])},
        y0=np.array([[0.0, 0.0, 1.0]]),
        times=np.linspace(0, 24, 9),
        jumps=_doses(),
        traits=("equation", "kinks"),
    ),
]
