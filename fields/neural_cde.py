"""The field of a neural controlled differential equation, f(t, z) = g(z) dX/dt, without autograd. `NeuralCDE` uses it.

What it gains over autograd on the same solver is in docs/benchmark.md. Where the gain comes from: no graph;
tanh(x) as 2 sigmoid(2 x) - 1, which takes a quarter of tanh's time on AMD: the 2 is in the weights, the -1 is one sum
of dX/dt; the product with dX/dt as one batched product in a layout that suits it; dX/dt looked up once for each
interval between knots; each layer's bias as one more input, so that no pass adds it or sums its gradient; every buffer
allocated once, and worked through in pieces that stay in cache.
"""

import bisect
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .views import views_of

relu_backward = torch.ops.aten.threshold_backward.grad_input
sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input

CHUNK_ENTRIES = 1 << 18
"""Entries of the widest tensor that are worked on at a time on a CPU: 1 MiB in float32, to stay in a core's cache."""


class _Chunk:
    """Views of some rows of a slot's buffers, made once: slicing costs as much as a small kernel."""

    def __init__(self, slot: "_Slot", rows: slice, num_hidden: int):
        self.inputs = [layer_input[rows] for layer_input in slot.inputs]
        self.values = [layer_input[:, :-1] for layer_input in self.inputs]
        self.cotangents = [cotangent[rows] for cotangent in slot.cotangents]
        self.response = slot.response[rows]
        self.response_by_channel = self.response.unflatten(1, (-1, num_hidden))


class _Slot:
    """What one linearised point keeps: each layer's input and, after the pullback, cotangents of what it puts out."""

    def __init__(self, like: Tensor, chunks: Sequence[slice], widths: Sequence[int], num_outputs: int):
        batch = max(chunk.stop for chunk in chunks)
        # A column of ones behind every input carries the layer's bias.
        self.inputs = [like.new_ones(batch, width + 1) for width in widths]
        self.cotangents = [like.new_empty(batch, width) for width in widths[1:]]
        self.response = like.new_empty(batch, num_outputs)
        """sigmoid of twice the last layer; the pullback turns it into the cotangent of what goes into tanh."""
        self.is_spent = False
        """Whether it has."""
        self.chunks = [_Chunk(self, chunk, widths[0]) for chunk in chunks]

    def copy_(self, other: "_Slot") -> None:
        for own, others in zip(self._tensors(), other._tensors(), strict=True):
            own.copy_(others)
        self.is_spent = other.is_spent

    def _tensors(self) -> list[Tensor]:
        return [*self.inputs, *self.cotangents, self.response]


class NeuralCDEField:
    """tanh(W h(z) + b) dX/dt with h a ReLU network, for a path X linear between its knots, as a `torchadjoint.Field`.

    Static: `t` matters only to `enter`, which copies the slope of its interval to where it is read.

    Args:
        hidden_layers: the linear layers of h, each followed by a ReLU.
        last_layer: W and b: from h to hidden channels times path channels, the latter running fastest.
        knots: times of the path's knots, ascending, (knots,).
        slopes: dX/dt between the knots, (knots - 1, batch, path channels).
    """

    is_static = True

    def __init__(
        self, hidden_layers: Sequence[nn.Linear], last_layer: nn.Linear, knots: Sequence[float], slopes: Tensor
    ):
        self.knots = knots
        self.slopes = slopes
        self.interval = None
        batch, self.num_channels = slopes.shape[1:]
        self.num_hidden = last_layer.out_features // self.num_channels
        # dX/dt as the evaluation reads it, 2 dX/dt and minus its sum, and as the pullback does, 4 dX/dt.
        self.twice_slope = slopes.new_empty(batch, 1, self.num_channels)
        self.minus_sum = slopes.new_empty(batch, 1, 1)
        self.four_slope = slopes.new_empty(batch, self.num_channels, 1)

        layers = [*hidden_layers, last_layer]
        self.parameters = tuple(parameter for layer in layers for parameter in (layer.weight, layer.bias))
        self.parameter_sizes = tuple(parameter.numel() for parameter in self.parameters)
        # Channels before hidden, so that the product with dX/dt is one batched product of a row with a matrix.
        by_hidden = (self.num_hidden, self.num_channels)
        last_weight = last_layer.weight.detach().unflatten(0, by_hidden).transpose(0, 1).flatten(0, 1)
        last_bias = last_layer.bias.detach().unflatten(0, by_hidden).T.flatten()
        weights = [*((layer.weight.detach(), layer.bias.detach()) for layer in hidden_layers), (last_weight, last_bias)]
        self.weights = [weight for weight, _ in weights]
        self.matrices = [torch.cat([weight.T, bias.unsqueeze(0)]) for weight, bias in weights]
        self.matrices[-1].mul_(2)
        self.matrix_sizes = [matrix.numel() for matrix in self.matrices]

        self.widths = [weight.shape[1] for weight in self.weights]
        num_outputs = len(last_weight)
        rows = batch if slopes.is_cuda else max(1, min(batch, CHUNK_ENTRIES // num_outputs))
        self.chunks = [slice(start, min(start + rows, batch)) for start in range(0, batch, rows)]
        minus_sums = self.minus_sum.expand(-1, 1, self.num_hidden)
        self.slope_chunks = [
            (self.twice_slope[chunk], minus_sums[chunk], self.four_slope[chunk]) for chunk in self.chunks
        ]
        # Evaluations without products go through the rows of one chunk again and again.
        same_rows = [slice(0, chunk.stop - chunk.start) for chunk in self.chunks]
        self.scratch = _Slot(slopes, same_rows, self.widths, num_outputs)
        self.slots: dict[int, _Slot] = {}
        self.gradient_views: dict[int, list[Tensor]] = {}

    def enter(self, t0: float, t1: float) -> None:
        interval = min(max(bisect.bisect_right(self.knots, (t0 + t1) / 2) - 1, 0), len(self.slopes) - 1)
        goes_below = interval > 0 and min(t0, t1) < self.knots[interval]
        goes_above = interval < len(self.slopes) - 1 and max(t0, t1) > self.knots[interval + 1]
        if goes_below or goes_above:
            raise ValueError(f"the path has a knot between {t0} and {t1}: name its knots by jump_t=path.grid_points")
        if interval != self.interval:
            self.interval = interval
            slope = self.slopes[interval]
            torch.mul(slope.unsqueeze(1), 2, out=self.twice_slope)
            torch.sum(slope.unsqueeze(1), dim=2, keepdim=True, out=self.minus_sum).neg_()
            torch.mul(slope.unsqueeze(2), 4, out=self.four_slope)

    def evaluate(self, t: float, y: Tensor, out: Tensor) -> None:
        self._evaluate(self.scratch, y, out)

    def linearise(self, slot: int, t: float, y: Tensor, out: Tensor) -> None:
        if slot not in self.slots:
            self.slots[slot] = _Slot(self.slopes, self.chunks, self.widths, self.weights[-1].shape[0])
        self._evaluate(self.slots[slot], y, out)

    def _rows(self, tensor: Tensor) -> Sequence[Tensor]:
        return [tensor[chunk] for chunk in self.chunks] if len(self.chunks) > 1 else (tensor,)

    def _evaluate(self, kept: _Slot, y: Tensor, out: Tensor) -> None:
        kept.is_spent = False
        for chunk, (twice_slope, minus_sum, _), state, derivative in zip(
            kept.chunks, self.slope_chunks, self._rows(y), self._rows(out.unsqueeze(1)), strict=True
        ):
            chunk.values[0].copy_(state)
            for layer_input, matrix, value in zip(chunk.inputs, self.matrices, chunk.values[1:], strict=False):
                torch.mm(layer_input, matrix, out=value).relu_()
            self._respond(chunk)
            torch.baddbmm(minus_sum, twice_slope, chunk.response_by_channel, out=derivative)

    def _respond(self, chunk: _Chunk) -> None:
        torch.mm(chunk.inputs[-1], self.matrices[-1], out=chunk.response).sigmoid_()

    def pullback(self, slot: int, cotangent: Tensor, out: Tensor) -> None:
        kept = self.slots[slot]
        if kept.is_spent:  # of a graph that is gone through again
            for chunk in kept.chunks:
                self._respond(chunk)
        kept.is_spent = True
        for chunk, (_, _, four_slope), by_derivative, by_state in zip(
            kept.chunks, self.slope_chunks, self._rows(cotangent.unsqueeze(1)), self._rows(out), strict=True
        ):
            response = chunk.response_by_channel
            # The outer product with dX/dt is never made: the cotangent is spread over the channels as a view.
            sigmoid_backward(by_derivative.expand_as(response), response, grad_input=response)
            response.mul_(four_slope)
            below = chunk.response
            for layer in reversed(range(1, len(self.weights))):
                below = torch.mm(below, self.weights[layer], out=chunk.cotangents[layer - 1])
                relu_backward(below, chunk.values[layer], 0, grad_input=below)
            torch.mm(below, self.weights[0], out=by_state)

    def add_parameter_product(self, slot: int, weight: float, gradient: Tensor) -> None:
        kept = self.slots[slot]
        for by_matrix, layer_input, cotangent in zip(
            self._views(gradient), kept.inputs, [*kept.cotangents, kept.response], strict=True
        ):
            torch.addmm(by_matrix, layer_input.T, cotangent, alpha=weight, out=by_matrix)

    def _views(self, gradient: Tensor) -> list[Tensor]:
        """Where in `gradient` each layer's gradient lies, in the form of its matrix."""

        def make() -> list[Tensor]:
            pieces = gradient[: sum(self.matrix_sizes)].split(self.matrix_sizes)
            return [piece.view_as(matrix) for piece, matrix in zip(pieces, self.matrices, strict=True)]

        return views_of(gradient, self.gradient_views, make)

    def reuse_slot(self, slot: int) -> None:
        self.slots[0].copy_(self.slots[slot])

    def unflatten(self, gradient: Tensor) -> tuple[Tensor, ...]:
        *hidden, last = self._views(gradient)
        last = last.unflatten(1, (self.num_channels, self.num_hidden)).transpose(1, 2).flatten(1)
        return tuple(piece for by_matrix in [*hidden, last] for piece in (by_matrix[:-1].T, by_matrix[-1]))
