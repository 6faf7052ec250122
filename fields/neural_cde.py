"""The field of a neural controlled differential equation, f(t, z) = g(z) dX/dt, without autograd. `NeuralCDE` uses it.

What it gains over autograd on the same solver is in the README's benchmark. Where the gain comes from: no graph; the
product with dX/dt as one batched product in a layout that suits it; dX/dt looked up once for each interval between
knots; the last layer's bias as one more input, so that no pass over the widest tensor adds it or sums its gradient;
every buffer allocated once, and worked through in pieces that stay in cache.
"""

import bisect
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from common.dopri5 import NUM_STAGES

relu_backward = torch.ops.aten.threshold_backward.grad_input
tanh_backward = torch.ops.aten.tanh_backward.grad_input

CHUNK_ENTRIES = 1 << 18
"""Entries of the widest tensor that are worked on at a time on a CPU: 1 MiB in float32, to stay in a core's cache."""


class _Chunk:
    """Views of some rows of a slot's buffers, made once: slicing costs as much as a small kernel."""

    def __init__(self, slot: "_Slot", rows: slice, num_hidden: int):
        self.activations = [activation[rows] for activation in slot.activations]
        self.cotangents = [cotangent[rows] for cotangent in slot.cotangents]
        self.features = slot.features[rows]
        self.response = slot.response[rows]
        self.response_by_channel = self.response.unflatten(1, (-1, num_hidden))


class _Slot:
    """What one linearised point keeps: activations and, after the pullback, cotangents of what each layer puts out."""

    def __init__(self, like: Tensor, chunks: Sequence[slice], widths: Sequence[int], num_outputs: int):
        batch = max(chunk.stop for chunk in chunks)
        self.y = like.new_empty(batch, widths[0])
        # One column of ones behind the last hidden activation carries the last layer's bias.
        self.features = like.new_ones(batch, widths[-1] + 1)
        self.activations = [*(like.new_empty(batch, width) for width in widths[1:-1]), self.features[:, :-1]]
        self.cotangents = [like.new_empty(batch, width) for width in widths[1:]]
        self.response = like.new_empty(batch, num_outputs)
        """tanh of the last layer; its pullback turns it into the cotangent of what goes into tanh."""
        self.chunks = [_Chunk(self, chunk, widths[0]) for chunk in chunks]


class NeuralCDEField:
    """tanh(W h(z) + b) dX/dt with h a ReLU network, for a path X linear between its knots, as a `common.field.Field`.

    Args:
        hidden_layers: the linear layers of h, each followed by a ReLU.
        last_layer: W and b: from h to hidden channels times path channels, the latter running fastest.
        knots: times of the path's knots, ascending, (knots,).
        slopes: dX/dt between the knots, (knots - 1, batch, path channels).
    """

    def __init__(
        self, hidden_layers: Sequence[nn.Linear], last_layer: nn.Linear, knots: Sequence[float], slopes: Tensor
    ):
        self.knots = knots
        self.slopes = slopes
        self.interval = None
        batch, self.num_channels = slopes.shape[1:]
        self.num_hidden = last_layer.out_features // self.num_channels
        self.slope = slopes.new_empty(batch, 1, self.num_channels)

        layers = [*hidden_layers, last_layer]
        self.parameters = tuple(parameter for layer in layers for parameter in (layer.weight, layer.bias))
        self.parameter_sizes = tuple(parameter.numel() for parameter in self.parameters)
        self.weights = [layer.weight.detach() for layer in hidden_layers]
        self.layers = [(layer.weight.detach().T, layer.bias.detach()) for layer in hidden_layers]
        # Channels before hidden, so that the product with dX/dt is one batched product of a row with a matrix.
        weight = last_layer.weight.detach().view(self.num_hidden, self.num_channels, -1).permute(2, 1, 0)
        bias = last_layer.bias.detach().view(1, self.num_hidden, self.num_channels).transpose(1, 2)
        self.last_weight = torch.cat([weight, bias]).flatten(1)
        self.last_weight_transposed = weight.flatten(1).T.contiguous()

        self.widths = [self.num_hidden, *(weight.shape[0] for weight in self.weights)]
        num_outputs = self.num_channels * self.num_hidden
        rows = batch if slopes.is_cuda else max(1, min(batch, CHUNK_ENTRIES // num_outputs))
        self.chunks = [slice(start, min(start + rows, batch)) for start in range(0, batch, rows)]
        self.slope_chunks = [self.slope[chunk] for chunk in self.chunks]
        self.ones = slopes.new_ones(batch)
        # Evaluations without products go through the rows of one chunk again and again.
        self.scratch = _Slot(
            slopes, [slice(0, chunk.stop - chunk.start) for chunk in self.chunks], self.widths, num_outputs
        )
        self.slots: list[_Slot | None] = [None] * NUM_STAGES
        self.gradient_views: dict[int, list[Tensor]] = {}

    def enter(self, t0: float, t1: float) -> None:
        interval = min(max(bisect.bisect_right(self.knots, (t0 + t1) / 2) - 1, 0), len(self.slopes) - 1)
        goes_below = interval > 0 and min(t0, t1) < self.knots[interval]
        goes_above = interval < len(self.slopes) - 1 and max(t0, t1) > self.knots[interval + 1]
        if goes_below or goes_above:
            raise ValueError(f"the path has a knot between {t0} and {t1}: name its knots by jump_t=path.grid_points")
        if interval != self.interval:
            self.interval = interval
            self.slope.copy_(self.slopes[interval].unsqueeze(1))

    def evaluate(self, t: float, y: Tensor, out: Tensor) -> None:
        self._evaluate(self.scratch, y, out)

    def linearise(self, slot: int, t: float, y: Tensor, out: Tensor) -> None:
        if self.slots[slot] is None:
            self.slots[slot] = _Slot(self.slopes, self.chunks, self.widths, self.last_weight.shape[1])
        self.slots[slot].y.copy_(y)
        self._evaluate(self.slots[slot], y, out)

    def _rows(self, tensor: Tensor) -> Sequence[Tensor]:
        return [tensor[chunk] for chunk in self.chunks] if len(self.chunks) > 1 else (tensor,)

    def _evaluate(self, kept: _Slot, y: Tensor, out: Tensor) -> None:
        out = out.unsqueeze(1)
        for chunk, slope, hidden, derivative in zip(
            kept.chunks, self.slope_chunks, self._rows(y), self._rows(out), strict=True
        ):
            for (weight, bias), activation in zip(self.layers, chunk.activations, strict=True):
                hidden = torch.addmm(bias, hidden, weight, out=activation).relu_()
            torch.mm(chunk.features, self.last_weight, out=chunk.response).tanh_()
            torch.bmm(slope, chunk.response_by_channel, out=derivative)

    def pullback(self, slot: int, cotangent: Tensor, out: Tensor) -> None:
        for chunk, slope, by_derivative, by_state in zip(
            self.slots[slot].chunks, self.slope_chunks, self._rows(cotangent.unsqueeze(1)), self._rows(out), strict=True
        ):
            response = chunk.response_by_channel
            # The outer product with dX/dt is never made: the cotangent is spread over the channels as a view.
            tanh_backward(by_derivative.expand_as(response), response, grad_input=response)
            response.mul_(slope.transpose(1, 2))
            targets = [by_state, *chunk.cotangents]
            below = torch.mm(chunk.response, self.last_weight_transposed, out=targets[-1])
            for layer in reversed(range(len(self.weights))):
                relu_backward(below, chunk.activations[layer], 0, grad_input=below)
                below = torch.mm(below, self.weights[layer], out=targets[layer])

    def add_parameter_product(self, slot: int, weight: float, gradient: Tensor) -> None:
        kept = self.slots[slot]
        *hidden_gradients, last_gradient = self._views(gradient)
        inputs = [kept.y, *kept.activations[:-1]]
        for (by_weight, by_bias), cotangent, layer_input in zip(hidden_gradients, kept.cotangents, inputs, strict=True):
            torch.addmm(by_weight, cotangent.T, layer_input, alpha=weight, out=by_weight)
            torch.addmv(by_bias, cotangent.T, self.ones, alpha=weight, out=by_bias)
        torch.addmm(last_gradient, kept.features.T, kept.response, alpha=weight, out=last_gradient)

    def _views(self, gradient: Tensor) -> list:
        """Where in `gradient` each layer's gradients lie, the last one's as `last_weight`; made once a buffer."""
        key = gradient.data_ptr()
        if key not in self.gradient_views:
            pieces = gradient[: sum(self.parameter_sizes)].split(self.parameter_sizes)
            hidden = [
                (by_weight.view_as(weight), by_bias)
                for by_weight, by_bias, weight in zip(pieces[:-2:2], pieces[1:-2:2], self.weights, strict=True)
            ]
            last = gradient[: sum(self.parameter_sizes)][sum(self.parameter_sizes[:-2]) :].view_as(self.last_weight)
            self.gradient_views[key] = [*hidden, last]
        return self.gradient_views[key]

    def reuse_last_slot(self) -> None:
        self.slots[0], self.slots[-1] = self.slots[-1], self.slots[0]

    def unflatten(self, gradient: Tensor) -> tuple[Tensor, ...]:
        *hidden, last = self._views(gradient)
        by_last = last.view(-1, self.num_channels, self.num_hidden).permute(2, 1, 0).flatten(0, 1)
        return (*(piece for pair in hidden for piece in pair), by_last[:, :-1], by_last[:, -1])
