"""The field of a Symplectic ODE-Net with two angles, with its products by hand. `SymplecticODENet` uses it.

The equations need the derivatives of the inverse mass matrix along both angles, and the gradient of the potential. The
former ride through their network as two more rows for each sample, so that one matrix product serves the value and both
derivatives; for the latter the potential's network is followed back. So nothing is ever differentiated twice. What that
gains is in docs/benchmark.md. The products by hand save the graph, and compute the cotangents of the layers once
for both products.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .softplus_networks import NUM_ROWS, RowNetwork, SlopeNetwork
from .symplectic_dynamics import SymplecticDynamics, angle_rows
from .views import unflattened, views_of


class _Slot:
    """What one linearised point of the field keeps."""

    def __init__(self, networks: Sequence[RowNetwork | SlopeNetwork], like: Tensor):
        batch = len(like)
        self.kept = [network.new_kept(batch) for network in networks]
        self.inputs = like.new_empty(4, NUM_ROWS * batch)
        self.rows = self.inputs.view(-1, batch)
        self.values = self.inputs[:, :batch]


class SymplecticField:
    """`SymplecticDynamics` of three softplus networks of (cos q, sin q), as a `torchadjoint.Field`.

    Args:
        factor, potential, control: the linear layers of L (4 -> 3), V (4 -> 1) and g (4 -> 4).
        like: a state (batch, 8).
    """

    is_static = False

    def __init__(
        self,
        factor: Sequence[nn.Linear],
        potential: Sequence[nn.Linear],
        control: Sequence[nn.Linear],
        like: Tensor,
    ):
        layers = [*factor, *potential, *control]
        self.parameters = tuple(parameter for layer in layers for parameter in (layer.weight, layer.bias))
        self.parameter_sizes = tuple(parameter.numel() for parameter in self.parameters)
        self.like = like.detach()
        scratch = self.like.new_empty(2 * len(like) * max(layer.out_features for layer in layers))
        self.factor = RowNetwork(factor, NUM_ROWS, scratch)
        self.potential = SlopeNetwork(potential, scratch)
        self.control = RowNetwork(control, 1, scratch)
        self.networks = (self.factor, self.potential, self.control)
        self.num_tensors = (2 * len(factor), 2 * len(potential), 2 * len(control))
        self.negated_rows = -angle_rows(self.like).permute(2, 0, 1).flatten(0, 1)
        self.scratch = _Slot(self.networks, self.like)
        self.slots: dict[int, _Slot] = {}
        self.gradient_views: dict[int, list[Sequence[Tensor]]] = {}

    def enter(self, t0: float, t1: float) -> None:
        """The field does not depend on time."""

    def evaluate(self, t: float, y: Tensor, out: Tensor) -> None:
        self._evaluate(self.scratch, y, out)

    def linearise(self, slot: int, t: float, y: Tensor, out: Tensor) -> None:
        if slot not in self.slots:
            self.slots[slot] = _Slot(self.networks, self.like)
        self._evaluate(self.slots[slot], y, out)

    def _evaluate(self, slot: _Slot, y: Tensor, out: Tensor) -> None:
        state = y.T.clone(memory_format=torch.contiguous_format)  # later stages overwrite y
        torch.mm(self.negated_rows, state[:4], out=slot.rows)
        factor_kept, potential_kept, control_kept = slot.kept
        # All that the networks put out is negated. The equations do not change with the sign of L.
        factor = self.factor.evaluate(slot.inputs, factor_kept).unflatten(1, (NUM_ROWS, len(y)))
        slopes = self.potential.evaluate(slot.inputs, potential_kept)
        slot.control = self.control.evaluate(slot.values, control_kept).unflatten(0, (2, 2))
        slot.dynamics = SymplecticDynamics(state, factor, slopes - (slot.control * state[6:]).sum(dim=1))
        out.copy_(slot.dynamics.derivative.T)

    def pullback(self, slot: int, cotangent: Tensor, out: Tensor) -> None:
        kept = self.slots[slot]
        factor_kept, potential_kept, control_kept = kept.kept
        by_state, by_factor, by_forces = kept.dynamics.pullback(cotangent.T.contiguous())
        by_control = -by_forces.unsqueeze(1) * kept.dynamics.y[6:]
        by_inputs = self.potential.pullback(by_forces, kept.inputs, potential_kept)
        by_inputs += self.factor.pullback(by_factor.flatten(1), factor_kept)
        by_inputs[:, : len(cotangent)] += self.control.pullback(by_control.flatten(0, 1), control_kept)
        by_state[6:] -= (kept.control * by_forces.unsqueeze(1)).sum(dim=0)
        by_state[:4] += self.negated_rows.T @ by_inputs.view_as(kept.rows)
        out.copy_(by_state.T)

    def add_parameter_product(self, slot: int, weight: float, gradient: Tensor) -> None:
        kept = self.slots[slot]
        factor_kept, potential_kept, control_kept = kept.kept
        by_factor, by_potential, by_control = self._views(gradient)
        self.factor.add_parameter_product(kept.inputs, factor_kept, weight, by_factor)
        self.potential.add_parameter_product(potential_kept, weight, by_potential)
        self.control.add_parameter_product(kept.values, control_kept, weight, by_control)

    def _views(self, gradient: Tensor) -> list[Sequence[Tensor]]:
        """Where in `gradient` each network's gradients lie, in the parameters' shapes."""

        def make() -> list[Sequence[Tensor]]:
            views = iter(self.unflatten(gradient[: sum(self.parameter_sizes)]))
            return [[next(views) for _ in range(number)] for number in self.num_tensors]

        return views_of(gradient, self.gradient_views, make)

    def reuse_slot(self, slot: int) -> None:
        self.slots[0], self.slots[slot] = self.slots[slot], self.slots[0]

    def unflatten(self, gradient: Tensor) -> tuple[Tensor, ...]:
        return unflattened(gradient, self.parameters)
