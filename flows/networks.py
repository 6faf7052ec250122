"""Networks v(t, x) whose flow carries data to noise: of vectors, and of images."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from fields.concatsquash import SpareSlots

Activation = Literal["tanh", "softplus"]


class ConcatSquash(nn.Module):
    """Layers y = (W x + b) sigmoid(w t + c) + v t of these widths, with an activation between them (FFJORD's).

    Each kind of parameter is a list of its own, one tensor a layer, so that those of a kind lie side by side in a flat
    gradient: the field written for the solver works on them at once. Initial values are those of PyTorch's linear
    layers.
    """

    def __init__(self, widths: Sequence[int], activation: Activation):
        super().__init__()
        if activation not in get_args(Activation):
            allowed = " or ".join(map(repr, get_args(Activation)))
            raise ValueError(f"activation is {activation!r}, but must be {allowed}")
        self.activation = activation
        self.spare_slots = SpareSlots()
        layers = list(map(nn.Linear, widths[:-1], widths[1:]))
        gates = [nn.Linear(1, width) for width in widths[1:]]
        shifts = [nn.Linear(1, width, bias=False) for width in widths[1:]]
        self.weights = nn.ParameterList(layer.weight for layer in layers)
        self.biases = nn.ParameterList(layer.bias for layer in layers)
        self.gate_weights = nn.ParameterList(gate.weight.detach().squeeze(1) for gate in gates)
        self.gate_biases = nn.ParameterList(gate.bias for gate in gates)
        self.shifts = nn.ParameterList(shift.weight.detach().squeeze(1) for shift in shifts)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """The velocity at (batch, width), of the same shape."""
        velocity, _ = self.along(t, x, x.new_empty(0, *x.shape))
        return velocity

    def along(self, t: Tensor, x: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        """The velocity, and its derivatives along directions (number, batch, width), of the same shape.

        The directions go through the layers beside x, which needs no graph and so can be compiled.
        """
        rows = torch.cat([x.unsqueeze(0), directions])
        layers = zip(self.weights, self.biases, self.gate_weights, self.gate_biases, self.shifts, strict=True)
        for number, (weight, bias, gate_weight, gate_bias, shift) in enumerate(layers):
            if number:
                value, slope = self._activated(rows[0])
                rows = torch.cat([value.unsqueeze(0), rows[1:] * slope])
            gate = torch.sigmoid(gate_weight * t + gate_bias)
            rows = functional.linear(rows, weight) * gate
            rows = torch.cat([(rows[0] + bias * gate + shift * t).unsqueeze(0), rows[1:]])
        return rows[0], rows[1:]

    def _activated(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The activation and its derivative."""
        if self.activation == "softplus":
            return functional.softplus(x), torch.sigmoid(x)
        value = torch.tanh(x)
        return value, 1 - value * value


class Convolutions(nn.Module):
    """Four 3x3 convolutions with softplus between them, each with t as one more channel of its input (FFJORD's)."""

    def __init__(self, num_channels: int, width: int):
        super().__init__()
        widths = [num_channels, width, width, width, num_channels]
        self.layers = nn.ModuleList(
            nn.Conv2d(inputs + 1, outputs, kernel_size=3, padding=1) for inputs, outputs in pairwise(widths)
        )

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """The velocity at (batch, channels, height, width), of the same shape."""
        for number, layer in enumerate(self.layers):
            x = functional.softplus(x) if number else x
            x = layer(torch.cat([x, t.expand(len(x), 1, *x.shape[2:])], dim=1))
        return x
