"""Softplus networks with derivatives along two directions, and their products by hand. `SymplecticField` uses them.

They are worked in negated form. With -x for x, a layer followed by softplus is log(sigmoid(W x - b)), whose derivative
1 - sigmoid comes for free. In float32 that takes a small part of softplus's time on AMD; in float64 it takes as long.
Inputs and outputs are negated too, and have the batch last, being narrow: (width, rows * batch), where the rows are a
value and its derivatives along the directions.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

NUM_ROWS = 3
"""For each sample: the value, and the derivatives along both directions."""


class _Softplus:
    """The activation of a layer of a given width, with the scratch that it works in."""

    def __init__(self, scratch: Tensor, batch: int, width: int):
        self.slopes, self.products = scratch[: 2 * batch * width].view(2, batch, width).unbind()
        self.one = scratch.new_ones(())
        self.smallest = torch.finfo(scratch.dtype).tiny

    def slope(self, sigmoid: Tensor) -> Tensor:
        """1 - sigmoid, to be used at once: the next call writes it over."""
        return torch.sub(self.one, sigmoid, out=self.slopes)

    def apply_(self, value: Tensor, sigmoid: Tensor) -> None:
        """Put log(sigmoid) in the place of `value`."""
        # Where sigmoid underflows, its logarithm is the value itself.
        torch.minimum(torch.clamp_min(sigmoid, self.smallest, out=self.slopes).log_(), value, out=value)


class _KeptRows:
    """What one linearised point of a `RowNetwork` keeps for its products."""

    def __init__(self, scratch: Tensor, num_rows: int, batch: int, widths: Sequence[int]):
        self.batch = batch
        self.softplus = [_Softplus(scratch, batch, width) for width in widths[1:-1]]
        self.activations = [scratch.new_empty(num_rows, batch, width) for width in widths[1:-1]]
        self.matrices = [activation.flatten(0, 1) for activation in self.activations]
        self.sigmoids = [scratch.new_empty(batch, width) for width in widths[1:-1]]
        self.cotangents: list[Tensor] | None = None
        """Of what each layer puts out, (num_rows * batch, width): from the pullback to the parameters' product."""


class RowNetwork:
    """A network on rows: on a value and its derivatives at once, or with a single row on a value alone.

    Args:
        layers: linear layers, with softplus between them.
        num_rows: 1 or NUM_ROWS.
        scratch: twice as many entries as the batch has in the widest layer, shared with whoever works at other times.
    """

    def __init__(self, layers: Sequence[nn.Linear], num_rows: int, scratch: Tensor):
        self.weights = [layer.weight.detach() for layer in layers]
        self.biases = [layer.bias.detach() for layer in layers]
        self.first_transposed = self.weights[0].T.contiguous()
        self.last_bias = self.biases[-1].unsqueeze(1)
        self.widths = [self.weights[0].shape[1], *(weight.shape[0] for weight in self.weights)]
        self.num_rows = num_rows
        self.scratch = scratch
        self.unused_cotangents: list[list[Tensor]] = []

    def new_kept(self, batch: int) -> _KeptRows:
        return _KeptRows(self.scratch, self.num_rows, batch, self.widths)

    def evaluate(self, inputs: Tensor, kept: _KeptRows) -> Tensor:
        """The outputs; all that products need stays in `kept`."""
        below = inputs.T
        for weight, bias, softplus, activation, matrix, sigmoid in zip(
            self.weights[:-1],
            self.biases[:-1],
            kept.softplus,
            kept.activations,
            kept.matrices,
            kept.sigmoids,
            strict=True,
        ):
            torch.mm(below, weight.T, out=matrix)
            value = activation[0].sub_(bias)
            torch.sigmoid(value, out=sigmoid)
            activation[1:].mul_(softplus.slope(sigmoid))
            softplus.apply_(value, sigmoid)
            below = matrix
        outputs = torch.mm(self.weights[-1], below.T)
        outputs[:, : kept.batch].sub_(self.last_bias)
        return outputs

    def pullback(self, cotangent: Tensor, kept: _KeptRows) -> Tensor:
        """The cotangent of the inputs, for that of the outputs."""
        if kept.cotangents is None:
            kept.cotangents = self._take_cotangents(kept.batch)
        below = kept.cotangents[-1].copy_(cotangent.T)
        for layer in reversed(range(1, len(self.weights))):
            softplus, activation, sigmoid = (
                tensors[layer - 1] for tensors in (kept.softplus, kept.activations, kept.sigmoids)
            )
            above = torch.mm(below, self.weights[layer], out=kept.cotangents[layer - 1])
            rows, below = above.unflatten(0, (self.num_rows, kept.batch)), above
            if self.num_rows > 1:
                # How the derivatives' factor 1 - sigmoid changes with the value.
                bend = torch.mul(rows[1], activation[1], out=softplus.products)
                bend.addcmul_(rows[2], activation[2]).mul_(sigmoid)
            rows.mul_(softplus.slope(sigmoid))
            if self.num_rows > 1:
                rows[0].sub_(bend)
        return self.first_transposed.mm(below.T)

    def add_parameter_product(
        self, inputs: Tensor, kept: _KeptRows, weight: float, gradients: Sequence[Tensor]
    ) -> None:
        """Add weight times the products with W and b of each layer to `gradients`, which alternate between the two.

        This ends the use of the cotangents.
        """
        for layer_input, cotangent, by_weight, by_bias in zip(
            [inputs.T, *kept.matrices], kept.cotangents, gradients[::2], gradients[1::2], strict=True
        ):
            torch.addmm(by_weight, cotangent.T, layer_input, alpha=weight, out=by_weight)
            by_bias.sub_(cotangent[: kept.batch].sum(dim=0), alpha=weight)
        self.unused_cotangents.append(kept.cotangents)
        kept.cotangents = None

    def _take_cotangents(self, batch: int) -> list[Tensor]:
        """Buffers for cotangents, if possible those used last: they are still in the cache."""
        if self.unused_cotangents:
            return self.unused_cotangents.pop()
        return [self.scratch.new_empty(self.num_rows * batch, width) for width in self.widths[1:]]


class _KeptSlopes:
    """What one linearised point of a `SlopeNetwork` keeps.

    The product with W of either hidden layer has two terms: `first` and `second` hold their left factors side by side,
    `inputs` and `inner` their right ones. The second terms are those of the way back.
    """

    def __init__(self, scratch: Tensor, batch: int, num_inputs: int, width: int):
        self.batch = batch
        self.softplus = _Softplus(scratch, batch, width)
        self.sigmoids = scratch.new_empty(2, batch, width).unbind()
        self.first, self.second, self.inner = scratch.new_empty(3, 2, batch, width).unbind()
        self.inputs = scratch.new_empty(num_inputs, 2, batch)
        self.by_last_weight = scratch.new_empty(1, width)


class SlopeNetwork:
    """The derivatives along two directions of a network with one output, which is followed back for its gradient.

    With s1 and s2 for the derivatives of softplus, the gradient is W1^T s1 W2^T s2 w3: two large products, where rows
    would take three. Its Jacobian is symmetric, so the pullback of a cotangent is the tangent along it: of the way
    forward and of the way back.

    Args:
        layers: two hidden layers of the same width, each with softplus, and the last.
        scratch: as for `RowNetwork`.
    """

    def __init__(self, layers: Sequence[nn.Linear], scratch: Tensor):
        self.first_weight, self.second_weight, self.last_weight = (layer.weight.detach() for layer in layers)
        self.first_bias, self.second_bias, _ = (layer.bias.detach() for layer in layers)
        self.first_transposed = self.first_weight.T.contiguous()
        self.scratch = scratch

    def new_kept(self, batch: int) -> _KeptSlopes:
        return _KeptSlopes(self.scratch, batch, self.first_weight.shape[1], self.first_weight.shape[0])

    def evaluate(self, inputs: Tensor, kept: _KeptSlopes) -> Tensor:
        """The derivatives (2, batch), for the inputs (width, 3 * batch)."""
        rows = inputs.unflatten(1, (NUM_ROWS, kept.batch))
        kept.inputs[:, 0] = rows[:, 0]
        first_sigmoid, second_sigmoid = kept.sigmoids
        value = torch.mm(rows[:, 0].T, self.first_weight.T, out=kept.inner[0]).sub_(self.first_bias)
        torch.sigmoid(value, out=first_sigmoid)
        kept.softplus.apply_(value, first_sigmoid)
        torch.mm(kept.inner[0], self.second_weight.T, out=second_sigmoid).sub_(self.second_bias).sigmoid_()
        back = torch.mul(kept.softplus.slope(second_sigmoid), self.last_weight, out=kept.second[1])
        torch.mm(back, self.second_weight, out=kept.first[1]).mul_(kept.softplus.slope(first_sigmoid))
        kept.gradient = self.first_transposed.mm(kept.first[1].T)
        return (rows[:, 1:] * kept.gradient.unsqueeze(1)).sum(dim=0)

    def pullback(self, cotangent: Tensor, inputs: Tensor, kept: _KeptSlopes) -> Tensor:
        """The cotangent of the inputs, for that of the derivatives."""
        rows = inputs.unflatten(1, (NUM_ROWS, kept.batch))
        first_sigmoid, second_sigmoid = kept.sigmoids
        by_gradient = kept.inputs[:, 1]
        torch.sum(rows[:, 1:] * cotangent, dim=1, out=by_gradient)
        tangent = torch.mm(by_gradient.T, self.first_weight.T, out=kept.softplus.products)
        torch.mul(tangent, kept.softplus.slope(first_sigmoid), out=kept.inner[1])
        # The bend of the first softplus on the way back.
        torch.mul(tangent, first_sigmoid, out=kept.first[0]).mul_(kept.first[1])
        tangent = torch.mm(kept.inner[1], self.second_weight.T, out=kept.softplus.products)
        torch.mul(tangent, second_sigmoid, out=kept.second[0])
        torch.sum(tangent.sub_(kept.second[0]), dim=0, keepdim=True, out=kept.by_last_weight)
        kept.second[0].mul_(kept.second[1]).neg_()
        above = torch.mm(kept.second[0], self.second_weight, out=kept.softplus.products)
        torch.sub(above.mul_(kept.softplus.slope(first_sigmoid)), kept.first[0], out=kept.first[0])
        by_value = self.first_transposed.mm(kept.first[0].T).unsqueeze(1)
        return torch.cat([by_value, kept.gradient.unsqueeze(1) * cotangent], dim=1).flatten(1)

    def add_parameter_product(self, kept: _KeptSlopes, weight: float, gradients: Sequence[Tensor]) -> None:
        """As `RowNetwork.add_parameter_product`; the last bias has no part in the derivatives."""
        by_first, by_first_bias, by_second, by_second_bias, by_last, _ = gradients
        for by_weight, by_bias, left, right in (
            (by_first, by_first_bias, kept.first, kept.inputs.flatten(1).T),
            (by_second, by_second_bias, kept.second, kept.inner.flatten(0, 1)),
        ):
            torch.addmm(by_weight, left.flatten(0, 1).T, right, alpha=weight, out=by_weight)
            by_bias.sub_(left[0].sum(dim=0), alpha=weight)
        by_last.add_(kept.by_last_weight, alpha=weight)
