"""The field of a continuous normalising flow of images, (v(t, x), div v), by convolutions. `flows.FlowField` uses it.

As in `fields.concatsquash`, the derivatives J e along the directions of the divergence ride through the network as
further images, behind the values, and the pullback goes back through both. The channel that holds t is not built: what
a convolution makes of it is t times a map that depends on the weights alone. Images lie in memory with their channels
last, for which convolutions and their products take half the time. As in `fields.softplus_networks`, all is worked in
negated form: softplus becomes log(sigmoid(...)).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from .directions import directions_of
from .views import unflattened

State = tuple[Tensor, Tensor]
"""Points (batch, channels, height, width) and log-determinants (batch), or what belongs to them."""

_BY_INPUT, _BY_WEIGHT = [True, False, False], [False, True, False]


def _product(cotangent: Tensor, images: Tensor, weight: Tensor, wanted: Sequence[bool]) -> Tensor:
    """The cotangent of `images` or of `weight`, given that of their convolution."""
    found = torch.ops.aten.convolution_backward(
        cotangent, images, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, wanted
    )
    return found[wanted.index(True)]


class _Point:
    """What one linearised point of the field keeps.

    Of each layer: what it is given, (rows * batch, channels, height, width), of which the first row are the values and
    each further one the derivatives along a direction; the sigmoid in the activation before it; and, after a pullback,
    the cotangent of what it gives.
    """

    def __init__(self, t: float):
        self.t = t
        self.inputs: list[Tensor] = []
        self.sigmoids: list[Tensor] = []
        self.cotangents: list[Tensor] = []


class ConvolutionsField:
    """Velocity and divergence of a network of convolutions, as a `torchadjoint.Field` of a tuple.

    Not static: it depends on t.

    Args:
        network: the `flows.networks.Convolutions`.
        probe: as the points, to estimate the divergence by; None for the exact one.
        state: points (batch, channels, height, width) and log-determinants (batch).
    """

    is_static = False

    def __init__(self, network: nn.Module, probe: Tensor | None, state: State):
        points = state[0]
        self.batch = len(points)
        self.smallest = torch.finfo(points.dtype).tiny
        self.minus_directions = -directions_of(points, probe)
        self.parameters = tuple(network.parameters())
        self.parameter_sizes = tuple(parameter.numel() for parameter in self.parameters)
        self.weights, self.time_maps, self.biases = [], [], []
        self.ones = points.new_ones(1, 1, *points.shape[2:])
        for layer in network.layers:
            weight = layer.weight.detach()
            self.weights.append(weight[:, :-1].contiguous(memory_format=torch.channels_last))
            self.time_maps.append(functional.conv2d(self.ones, weight[:, -1:], padding=1).squeeze(0))
            self.biases.append(layer.bias.detach().view(-1, 1, 1))
        self.points: dict[int, _Point] = {}

    def enter(self, t0: float, t1: float) -> None:
        """The field is smooth in time."""

    def evaluate(self, t: float, y: State, out: State) -> None:
        self._evaluate(t, y, out)

    def linearise(self, slot: int, t: float, y: State, out: State) -> None:
        self.points[slot] = self._evaluate(t, y, out)

    def _evaluate(self, t: float, y: State, out: State) -> _Point:
        kept = _Point(t)
        rows = self._rows(y[0].neg(), self.minus_directions)
        for number, weight in enumerate(self.weights):
            if number:
                value, *tangents = rows.split(self.batch)
                sigmoid = torch.sigmoid(value)
                # Where sigmoid underflows, its logarithm is the value itself.
                torch.minimum(sigmoid.clamp_min(self.smallest).log_(), value, out=value)
                slope = 1 - sigmoid
                for tangent in tangents:
                    tangent.mul_(slope)
                kept.sigmoids.append(sigmoid)
            kept.inputs.append(rows)
            rows = functional.conv2d(rows, weight, padding=1)
            rows[: self.batch] -= torch.add(self.biases[number], self.time_maps[number], alpha=t)
        velocity, divergence = out
        torch.neg(rows[: self.batch], out=velocity)
        shares = rows[self.batch :].view_as(self.minus_directions) * self.minus_directions
        torch.sum(shares, dim=(0, 2, 3, 4), out=divergence)
        return kept

    def _rows(self, value: Tensor, tangents: Tensor) -> Tensor:
        rows = torch.cat([value.unsqueeze(0), tangents]).flatten(0, 1)
        return rows.contiguous(memory_format=torch.channels_last)

    def pullback(self, slot: int, cotangent: State, out: State) -> None:
        kept = self.points[slot]
        by_velocity, by_divergence = cotangent
        above = self._rows(by_velocity.neg(), self.minus_directions * by_divergence.view(-1, 1, 1, 1))
        kept.cotangents = [above]
        for number in range(len(self.weights) - 1, 0, -1):
            rows, sigmoid = kept.inputs[number], kept.sigmoids[number - 1]
            above = _product(above, rows, self.weights[number], _BY_INPUT)
            by_value, *by_tangents = above.split(self.batch)
            _, *tangents = rows.split(self.batch)
            slope = 1 - sigmoid
            by_value.mul_(slope)
            # How the activation's slope bends with the value, felt along each direction.
            for by_tangent, tangent in zip(by_tangents, tangents, strict=True):
                by_value.addcmul_(by_tangent * tangent, sigmoid, value=-1)
                by_tangent.mul_(slope)
            kept.cotangents.append(above)
        kept.cotangents.reverse()
        torch.neg(_product(above[: self.batch], kept.inputs[0][: self.batch], self.weights[0], _BY_INPUT), out=out[0])
        out[1].zero_()

    def add_parameter_product(self, slot: int, weight: float, gradient: Tensor) -> None:
        kept = self.points[slot]
        pieces = gradient.split([*self.parameter_sizes, len(gradient) - sum(self.parameter_sizes)])
        *_, by_time = pieces
        for number, (rows, by_rows) in enumerate(zip(kept.inputs, kept.cotangents, strict=True)):
            by_weight = pieces[2 * number].view(self.parameters[2 * number].shape)
            by_weight[:, :-1].add_(_product(by_rows, rows, self.weights[number], _BY_WEIGHT), alpha=weight)
            by_map = by_rows[: self.batch].sum(dim=0, keepdim=True).neg_()
            of_ones = _product(by_map, self.ones, by_weight[:, -1:], _BY_WEIGHT)
            by_weight[:, -1:].add_(of_ones, alpha=weight * kept.t)
            pieces[2 * number + 1].add_(by_map.sum(dim=(0, 2, 3)), alpha=weight)
            if len(by_time):
                by_time.add_(by_map.flatten().dot(self.time_maps[number].flatten()), alpha=weight)

    def reuse_slot(self, slot: int) -> None:
        self.points[0], self.points[slot] = self.points[slot], self.points[0]

    def unflatten(self, gradient: Tensor) -> tuple[Tensor, ...]:
        return unflattened(gradient, self.parameters)
