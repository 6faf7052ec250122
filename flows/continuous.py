"""A flow along a network's velocity, with the logarithm of how it changes volumes; models of densities are made of it.

A point moves by dx/dt = v(t, x), and the log-determinant of the flow's Jacobian grows by the divergence of v.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from fields.concatsquash import ConcatSquashField
from fields.convolutions import ConvolutionsField
from fields.directions import directions_of
from torchadjoint import Field, Solution
from torchadjoint.statistics import SolveStatistics, Statistics

from .networks import ConcatSquash, Convolutions

Solve = Callable[..., Solution]
"""`torchadjoint.solve` with its tolerances and adjoint."""
FIELDS = {ConcatSquash: ConcatSquashField, Convolutions: ConvolutionsField}
"""What is written for the solver of a flow along each kind of network."""


class FlowField(nn.Module):
    """d(x, l)/dt = (v(t, x), div v): the state is a tuple of the points (batch, ...) and l (batch).

    Args:
        network: v.
        probe: a vector for each sample, of the shape of the points, to estimate the divergence by (Hutchinson): the
            same for a whole solve, forward and backward, which so solves an ordinary differential equation. None for
            the exact divergence, at a cost in proportion to the dimension.
    """

    def __init__(self, network: nn.Module, probe: Tensor | None):
        super().__init__()
        self.network = network
        self.probe = probe

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x = state[0]
        if isinstance(self.network, ConcatSquash):
            directions = directions_of(x, self.probe)
            velocity, derivatives = self.network.along(t, x, directions)
            return velocity, (derivatives * directions).sum(dim=(0, 2))
        is_differentiated = torch.is_grad_enabled()
        # A graph keeps no tensor of inference mode, but copies of it.
        with torch.inference_mode(False), torch.enable_grad():
            t, x, probe = (tensor.clone() if _is_inference(tensor) else tensor for tensor in (t, x, self.probe))
            if not (is_differentiated and x.requires_grad):
                x = x.detach().requires_grad_()
            velocity = self.network(t, x)
            if probe is None:
                divergence = exact_divergence(velocity, x, create_graph=is_differentiated)
            else:
                divergence = estimated_divergence(velocity, x, probe, create_graph=is_differentiated)
        return velocity, divergence

    @property
    def fused_field(self) -> Callable[[tuple[Tensor, Tensor]], Field]:
        """The same, written for the solver; only the networks of this package have it, if they share no tensor."""
        if type(self.network) not in FIELDS:
            raise AttributeError("fused_field")
        tensors = [id(tensor) for _, tensor in self.network.named_parameters(remove_duplicate=False)]
        if len({*tensors}) < len(tensors):
            raise AttributeError("fused_field")
        return functools.partial(FIELDS[type(self.network)], self.network, self.probe)


def _is_inference(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.is_inference()


def exact_divergence(velocity: Tensor, x: Tensor, *, create_graph: bool) -> Tensor:
    """The trace of dv/dx of each sample (batch), by as many products as x has numbers."""
    trace = velocity.new_zeros(len(x))
    for component, direction in zip(velocity.flatten(1).unbind(1), range(x[0].numel()), strict=True):
        (row,) = torch.autograd.grad(component.sum(), x, create_graph=create_graph, retain_graph=True)
        trace = trace + row.flatten(1)[:, direction]
    return trace


def estimated_divergence(velocity: Tensor, x: Tensor, probe: Tensor, *, create_graph: bool) -> Tensor:
    """probe^T dv/dx probe of each sample (batch): the trace in the mean, if the probe's entries are signs at random."""
    (product,) = torch.autograd.grad(velocity, x, probe, create_graph=create_graph)
    return (product * probe).flatten(1).sum(dim=1)


Integrals = Literal["none", "backward", "unweighed"]
"""How the log-determinant is solved for, which stands in no right-hand side: see `OPTIONS_OF_INTEGRALS`."""
OPTIONS_OF_INTEGRALS = {
    "none": {},
    "backward": {"integrals": 1},
    "unweighed": {"integrals": 1, "weigh_integrals": False},
}
"""Options of `torchadjoint.solve`: none of it is known; it is left out backward; out of the forward norm too."""


class ContinuousFlow(nn.Module):
    """The flow of a network from time 0, where data are, to `end_time`, where noise is."""

    def __init__(self, network: nn.Module, end_time: float, integrals: Integrals = "none"):
        super().__init__()
        self.network = network
        self.end_time = end_time
        self.integrals = integrals

    def forward(self, x: Tensor, probe: Tensor | None, solve: Solve) -> tuple[Tensor, Tensor, SolveStatistics]:
        """Where the points x (batch, ...) go, the log-determinant (batch), and what the solve did."""
        field = FlowField(self.network, probe)
        times = torch.tensor([0.0, self.end_time], device=x.device, dtype=x.dtype)
        solution = solve(field, (x, x.new_zeros(len(x))), times, **OPTIONS_OF_INTEGRALS[self.integrals])
        points, log_determinants = solution.y
        return points[-1], log_determinants[-1], solution.statistics

    def paths(self, z: Tensor, times: Sequence[float], solve: Solve) -> Tensor:
        """Where the points z (batch, ...) at the first of `times` are at all of them (times, batch, ...)."""
        return solve(self.network, z, torch.tensor(times, device=z.device, dtype=z.dtype)).y

    def inverse(self, z: Tensor, solve: Solve) -> Tensor:
        """Where the points that arrive at z (batch, ...) come from."""
        return self.paths(z, [self.end_time, 0.0], solve)[-1]


class JoinedStatistics:
    """What several solves did, one after the other; like `SolveStatistics`, the backward part comes when it is done."""

    def __init__(self, parts: Sequence[SolveStatistics]):
        self.parts = parts

    @property
    def forward(self) -> Statistics:
        return _joined([part.forward for part in self.parts])

    @property
    def backward(self) -> Statistics:
        # The gradient goes through the solves from the last to the first.
        return _joined([part.backward for part in reversed(self.parts)])


def _joined(parts: Sequence[Statistics]) -> Statistics:
    names = ("evaluation_times", "accept_times", "reject_times")
    return Statistics(*([time for part in parts for time in getattr(part, name)] for name in names))
