"""The field of a continuous normalising flow, (v(t, x), div v), of a concatsquash network. `flows.FlowField` uses it.

The divergence is a sum over directions e of e^T J e: over all axes it is the exact trace, over one vector of random
signs Hutchinson's estimate. The derivatives J e ride through the network as further rows of each sample, so that one
matrix product a layer serves the value and all directions. The pullback goes back through both, so it has the second
derivatives, for which autograd would need two graphs. Gates and shifts of all layers lie side by side, as they depend
on t alone: three operations make those of an evaluation, whatever the number of layers. tanh(x) is 2 sigmoid(2 x) - 1,
as in the Neural CDE's field.
"""

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .directions import directions_of
from .views import unflattened, views_of

Points = tuple[Tensor, Tensor]
"""Points (batch, dims) and log-determinants (batch), or what belongs to them."""


class _Layer:
    """What one linearised point keeps of a layer: rows (1 + directions, batch, width), the value first."""

    def __init__(self, slot: "_Slot", columns: slice, num_rows: int, batch: int):
        gates = slot.gates[columns]
        width = len(gates)
        self.gate, self.shift = gates, slot.shifts[columns]
        self.raw_value = gates.new_empty(batch, width)
        """W times the layer's input value."""
        self.rows = gates.new_empty(num_rows, batch, width)
        """What the layer hands on: activations, and their derivatives along the directions."""
        self.slope, self.scaled = gates.new_empty(2, batch, width).unbind()
        """The activation's derivative, and that times the gate."""
        self.cotangents = gates.new_empty(num_rows, batch, width)
        """Of W times the layer's input rows, after the pullback."""
        self.by_value, self.by_rows = slot.by_value[:, columns], slot.by_rows[:, columns]
        self.matrix, self.cotangent_matrix = self.rows.flatten(0, 1), self.cotangents.flatten(0, 1)
        self.value, self.tangents = self.rows[0], self.rows[1:]
        self.value_cotangent, self.tangent_cotangents = self.cotangents[0], self.cotangents[1:]


class _Slot:
    """What one linearised point of the field keeps."""

    def __init__(self, widths: Sequence[int], directions: Tensor, batch: int):
        num_directions, _, num_dims = directions.shape
        total = sum(widths[1:])
        self.gates, self.shifts, self.offsets = directions.new_empty(3, total).unbind()
        self.by_value, self.by_rows = directions.new_empty(2, batch, total).unbind()
        """Of each layer's values before the activation the cotangent, and what else its gate is due (batch, total)."""
        self.inputs = directions.new_empty(1 + num_directions, batch, num_dims)
        """The points, and behind them the directions."""
        self.points, self.input_matrix = self.inputs[0], self.inputs.flatten(0, 1)
        ends = torch.tensor(widths[1:]).cumsum(0).tolist()
        columns = [slice(end - width, end) for end, width in zip(ends, widths[1:], strict=True)]
        self.offset_views = [self.offsets[part] for part in columns]
        self.layers = [_Layer(self, part, 1 + num_directions, batch) for part in columns]
        self.matrices = [self.input_matrix, *(layer.matrix for layer in self.layers[:-1])]


MOST_SPARE = 16
"""As many as the stages of a step have, and the evaluations beside them."""


class SpareSlots:
    """Buffers that solves of one network hand on to each other: to make them anew costs as much as some evaluations.

    They are those of the latest size.
    """

    def __init__(self):
        self.latest: tuple[tuple | None, list[_Slot]] = (None, [])
        """What size, and the slots: one attribute, so that no thread sees the one without the other."""

    def of(self, like: Tensor, directions: Tensor) -> list[_Slot]:
        """Those for such points and directions; whoever takes one puts it back."""
        kind = (like.shape, directions.shape, like.dtype, like.device, torch.is_inference_mode_enabled())
        latest, slots = self.latest
        if kind != latest:
            slots = []
            self.latest = kind, slots
        return slots

    def __deepcopy__(self, memo) -> "SpareSlots":
        return SpareSlots()

    def __reduce__(self):
        return SpareSlots, ()


def _hand_on(taken: list[_Slot], spare: list[_Slot]) -> None:
    spare.extend(taken[: max(0, MOST_SPARE - len(spare))])


class ConcatSquashField:
    """Velocity and divergence of a concatsquash network, as a `torchadjoint.Field` of a tuple.

    Not static: gates and shifts depend on t.

    Args:
        network: the `flows.networks.ConcatSquash`.
        probe: (batch, dims) to estimate the divergence by; None for the exact one.
        state: points (batch, dims) and log-determinants (batch).
    """

    is_static = False

    def __init__(self, network: nn.Module, probe: Tensor | None, state: Points):
        points = state[0]
        batch, num_dims = points.shape
        self.is_tanh = network.activation == "tanh"
        self.weights = [weight.detach() for weight in network.weights]
        self.transposed = [weight.T for weight in self.weights]
        kinds = (network.biases, network.gate_weights, network.gate_biases, network.shifts)
        vectors = [torch.cat(list(kind)).detach() for kind in kinds]
        self.biases, self.gate_weights, self.gate_biases, self.shifts = vectors
        self.parameters = tuple(network.parameters())
        self.parameter_sizes = tuple(parameter.numel() for parameter in self.parameters)
        self.widths = [num_dims, *(len(weight) for weight in self.weights)]
        self.directions = directions_of(points, probe)
        self.batch = batch
        self.spare, self.taken = network.spare_slots.of(points, self.directions), []
        # They outlive the field: its solve may be differentiated long after, and then it is over.
        weakref.finalize(self, _hand_on, self.taken, self.spare)
        self.one = points.new_ones(())
        self.minus_one = -self.one
        self.smallest = torch.finfo(points.dtype).tiny
        self.scratch = self._new_slot()
        most = max(self.widths[1:-1], default=1)
        self.products = points.new_empty(len(self.directions), batch, most)
        self.slots: dict[int, _Slot] = {}
        self.times: dict[int, float] = {}
        self.gradient_views: dict[int, list[Tensor]] = {}

    def _new_slot(self) -> _Slot:
        try:
            slot = self.spare.pop()
        except IndexError:
            slot = _Slot(self.widths, self.directions, self.batch)
        slot.inputs[1:] = self.directions
        self.taken.append(slot)
        return slot

    def enter(self, t0: float, t1: float) -> None:
        """The field is smooth in time."""

    def evaluate(self, t: float, y: Points, out: Points) -> None:
        self._evaluate(self.scratch, t, y, out)

    def linearise(self, slot: int, t: float, y: Points, out: Points) -> None:
        if slot not in self.slots:
            self.slots[slot] = self._new_slot()
        self.times[slot] = t
        self._evaluate(self.slots[slot], t, y, out)

    def _evaluate(self, kept: _Slot, t: float, y: Points, out: Points) -> None:
        torch.add(self.gate_biases, self.gate_weights, alpha=t, out=kept.gates).sigmoid_()
        torch.mul(self.shifts, t, out=kept.shifts)
        torch.addcmul(kept.shifts, self.biases, kept.gates, out=kept.offsets)
        kept.points.copy_(y[0])
        *hidden, last = kept.layers
        for layer, matrix, transposed, offset in zip(
            hidden, kept.matrices, self.transposed, kept.offset_views, strict=False
        ):
            torch.mm(matrix, transposed, out=layer.matrix)
            layer.raw_value.copy_(layer.value)
            torch.addcmul(offset, layer.raw_value, layer.gate, out=layer.value)
            if self.is_tanh:
                torch.add(self.minus_one, layer.value.mul_(2).sigmoid_(), alpha=2, out=layer.value)
                torch.addcmul(self.one, layer.value, layer.value, value=-1, out=layer.slope)
            else:
                # softplus(x) is -log(sigmoid(-x)), for less time; where that underflows, it is x itself.
                rest = torch.neg(layer.value, out=layer.slope).sigmoid_()
                torch.maximum(rest.clamp_min(self.smallest).log_().neg_(), layer.value, out=layer.value)
                torch.sub(self.one, rest, out=layer.slope)
            torch.mul(layer.slope, layer.gate, out=layer.scaled)
            layer.tangents.mul_(layer.scaled)
        torch.mm(kept.matrices[-1], self.transposed[-1], out=last.matrix)
        last.raw_value.copy_(last.value)
        velocity, divergence = out
        torch.addcmul(kept.offset_views[-1], last.raw_value, last.gate, out=velocity)
        # The share of each component in the divergence (batch, dims): its sum is the divergence, and its gate's due.
        last.tangents.mul_(self.directions)
        torch.sum(last.tangents, dim=0, out=last.value).mul_(last.gate)
        torch.sum(last.value, dim=1, out=divergence)

    def pullback(self, slot: int, cotangent: Points, out: Points) -> None:
        kept = self.slots[slot]
        by_velocity, by_divergence = cotangent
        *hidden, last = kept.layers
        last.by_value.copy_(by_velocity)
        torch.mul(last.value, by_divergence.unsqueeze(1), out=last.by_rows)
        torch.mul(by_velocity, last.gate, out=last.value_cotangent)
        torch.mul(self.directions, by_divergence.unsqueeze(1), out=last.tangent_cotangents).mul_(last.gate)
        above = last
        for layer, weight in zip(reversed(hidden), reversed(self.weights), strict=False):
            torch.mm(above.cotangent_matrix, weight, out=layer.cotangent_matrix)
            # How the activation's derivative bends with the value, felt along each direction.
            products = torch.mul(
                layer.tangent_cotangents, layer.tangents, out=self.products[..., : layer.tangents.shape[-1]]
            )
            bend = torch.sum(products, dim=0, out=layer.by_rows)
            by_value = torch.mul(layer.value_cotangent, layer.slope, out=layer.by_value)
            if self.is_tanh:
                by_value.addcmul_(bend, layer.value, value=-2)
            else:
                by_value.add_(bend).addcmul_(bend, layer.slope, value=-1)
            torch.mul(by_value, layer.gate, out=layer.value_cotangent)
            layer.tangent_cotangents.mul_(layer.scaled)
            above = layer
        torch.mm(above.value_cotangent, self.weights[0], out=out[0])
        out[1].zero_()

    def add_parameter_product(self, slot: int, weight: float, gradient: Tensor) -> None:
        kept, t = self.slots[slot], self.times[slot]
        *by_weights, by_biases, by_gate_weights, by_gate_biases, by_shifts, by_time = self._views(gradient)
        for by_weight, layer, matrix in zip(by_weights, kept.layers, kept.matrices, strict=True):
            torch.addmm(by_weight, layer.cotangent_matrix.T, matrix, alpha=weight, out=by_weight)
        by_offsets = kept.by_value.sum(dim=0)
        by_shifts.add_(by_offsets, alpha=weight * t)
        # W x + b is the raw value and the bias; the gate multiplies both, and the derivatives.
        raw = [torch.mul(layer.raw_value, layer.by_value).sum(dim=0) for layer in kept.layers]
        by_gates = torch.addcmul(torch.cat(raw), self.biases, by_offsets).mul_(kept.gates)
        by_gates.add_(kept.by_rows.sum(dim=0)).mul_(self.one - kept.gates)
        by_biases.addcmul_(by_offsets, kept.gates, value=weight)
        by_gate_weights.add_(by_gates, alpha=weight * t)
        by_gate_biases.add_(by_gates, alpha=weight)
        if len(by_time):
            rate = by_gates.dot(self.gate_weights) + by_offsets.dot(self.shifts)
            by_time.add_(rate, alpha=weight)

    def _views(self, gradient: Tensor) -> list[Tensor]:
        """Where in `gradient` the matrices lie, behind them each kind of vectors, and t."""

        def make() -> list[Tensor]:
            sizes = [weight.numel() for weight in self.weights] + [len(self.biases)] * 4
            pieces = gradient.split([*sizes, len(gradient) - sum(sizes)])
            matrices = [piece.view_as(weight) for piece, weight in zip(pieces, self.weights, strict=False)]
            return [*matrices, *pieces[len(matrices) :]]

        return views_of(gradient, self.gradient_views, make)

    def reuse_slot(self, slot: int) -> None:
        self.slots[0], self.slots[slot] = self.slots[slot], self.slots[0]
        self.times[0] = self.times[slot]

    def unflatten(self, gradient: Tensor) -> tuple[Tensor, ...]:
        return unflattened(gradient, self.parameters)
