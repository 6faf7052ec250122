"""The field of a Symplectic ODE-Net with two angles, with its products by hand. `SymplecticODENet` uses it.

The equations need the derivatives of the inverse mass matrix and of the potential along both angles. These ride through
the networks as two more rows for each sample, so that one matrix product serves the value and both derivatives, and
nothing is ever differentiated twice. What that gains is in the README's benchmark. The products by hand save the graph,
compute the cotangents of the layers once for both products, and evaluate softplus and its derivative from one sigmoid.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from common.dopri5 import NUM_STAGES

NUM_ROWS = 3
"""For each sample: the value, and the derivatives along q1 and q2."""

DIAGONAL_SHIFT = 0.1
"""What keeps the inverse mass matrix positive definite."""


def angle_rows(like: Tensor) -> Tensor:
    """The matrices (3, 4, 4) that take (cos q1, cos q2, sin q1, sin q2) to itself and its derivatives along q1, q2."""
    rows = like.new_zeros(NUM_ROWS, 4, 4)
    rows[0] = torch.eye(4, device=like.device)
    for angle in range(2):
        rows[1 + angle, 2 + angle, angle] = -1.0
        rows[1 + angle, angle, 2 + angle] = 1.0
    return rows


def symplectic_dynamics(y: Tensor, factor_rows: Tensor, potential_slopes: Tensor, control: Tensor) -> Tensor:
    """The time derivative (batch, 8) of the state `y` (cos q, sin q, dq, u), u being constant.

    With p = M dq and H = p^T M^-1 p / 2 + V, and since dH/dp = dq: dp/dt = -dH/dq + g u and
    d(dq)/dt = M^-1 dp/dt + (dM^-1/dt) p. All 2 x 2 algebra is written out.

    Args:
        y: (batch, 8).
        factor_rows: the entries (l11, l22, l21) of L, where M^-1 = L L^T + 0.1 I, and their derivatives along q1 and
            q2, (3, batch, 3).
        potential_slopes: dV/dq1 and dV/dq2, (2, batch).
        control: g, row by row, (batch, 4).
    """
    cosines, sines, velocities, torques = y.split(2, dim=-1)
    v1, v2 = velocities.unbind(-1)
    l11, l22, l21 = factor_rows[0].unbind(-1)
    slopes11, slopes22, slopes21 = factor_rows[1:].unbind(-1)
    m11 = l11 * l11 + DIAGONAL_SHIFT
    m21 = l11 * l21
    m22 = l22 * l22 + l21 * l21 + DIAGONAL_SHIFT
    slopes_m11 = 2 * l11 * slopes11
    slopes_m21 = l11 * slopes21 + slopes11 * l21
    slopes_m22 = 2 * (l22 * slopes22 + l21 * slopes21)

    determinant = m11 * m22 - m21 * m21
    p1 = (m22 * v1 - m21 * v2) / determinant
    p2 = (m11 * v2 - m21 * v1) / determinant
    # Row k: the derivative of M^-1 along q_k, applied to p.
    along1 = slopes_m11 * p1 + slopes_m21 * p2
    along2 = slopes_m21 * p1 + slopes_m22 * p2
    forces = (control.unflatten(-1, (2, 2)) @ torques.unsqueeze(-1)).squeeze(-1)
    dp1, dp2 = forces.T - (0.5 * (along1 * p1 + along2 * p2) + potential_slopes)
    acceleration1 = m11 * dp1 + m21 * dp2 + along1[0] * v1 + along1[1] * v2
    acceleration2 = m21 * dp1 + m22 * dp2 + along2[0] * v1 + along2[1] * v2
    accelerations = torch.stack([acceleration1, acceleration2], dim=-1)
    return torch.cat([-sines * velocities, cosines * velocities, accelerations, torch.zeros_like(torques)], dim=-1)


class _Kept:
    """What one linearised point of a network keeps for its products."""

    def __init__(self, like: Tensor, num_rows: int, batch: int, widths: Sequence[int]):
        self.activations = [like.new_empty(num_rows, batch, width) for width in widths[1:-1]]
        self.sigmoids = [like.new_empty(batch, width) for width in widths[1:-1]]
        self.complements = [like.new_empty(batch, width) for width in widths[1:-1]]
        self.outputs = like.new_empty(num_rows, batch, widths[-1])
        self.cotangents: list[Tensor] | None = None
        """Of what each layer puts out: from the pullback to the product with the parameters."""


class _Network:
    """A softplus network on rows of values and derivatives (num_rows, batch, width).

    It is worked in negated form. With -x for x, a layer followed by softplus is log(sigmoid(W x - b)), whose derivative
    1 - sigmoid comes for free, at a third of the cost of softplus itself. The output is negated too.
    """

    def __init__(self, layers: Sequence[nn.Linear], num_rows: int, batch: int):
        self.weights = [layer.weight.detach() for layer in layers]
        self.biases = [layer.bias.detach() for layer in layers]
        self.widths = [self.weights[0].shape[1], *(weight.shape[0] for weight in self.weights)]
        self.num_rows, self.batch = num_rows, batch
        self.ones = self.weights[0].new_ones(batch)
        self.one = self.weights[0].new_ones(())
        scratch = self.ones.new_empty(batch * max(self.widths))
        self.scratches = [scratch[: batch * width].view(batch, width) for width in self.widths]
        self.unused_cotangents: list[list[Tensor]] = []
        self.smallest = torch.finfo(self.ones.dtype).tiny

    def new_kept(self) -> _Kept:
        return _Kept(self.ones, self.num_rows, self.batch, self.widths)

    def evaluate(self, inputs: Tensor, kept: _Kept) -> Tensor:
        """The negated outputs, for negated inputs; all that products need stays in `kept`."""
        *hidden, last = zip(self.weights, self.biases, [*kept.activations, kept.outputs], strict=True)
        for (weight, bias, activation), sigmoid, complement, scratch in zip(
            hidden, kept.sigmoids, kept.complements, self.scratches[1:-1], strict=True
        ):
            torch.mm(inputs.flatten(0, 1), weight.T, out=activation.flatten(0, 1))
            value = activation[0].sub_(bias)
            torch.sigmoid(value, out=sigmoid)
            # Where sigmoid underflows, its logarithm is the value itself.
            torch.minimum(torch.clamp_min(sigmoid, self.smallest, out=scratch).log_(), value, out=value)
            torch.sub(self.one, sigmoid, out=complement)
            activation[1:].mul_(complement)
            inputs = activation
        weight, bias, outputs = last
        torch.mm(inputs.flatten(0, 1), weight.T, out=outputs.flatten(0, 1))
        outputs[0].sub_(bias)
        return outputs

    def pullback(self, cotangent: Tensor, kept: _Kept) -> Tensor:
        """The cotangent of the negated inputs, for that of the negated outputs."""
        if kept.cotangents is None:
            kept.cotangents = self._take_cotangents()
        below = kept.cotangents[-1].copy_(cotangent)
        for layer in reversed(range(1, len(self.weights))):
            above = kept.cotangents[layer - 1]
            torch.mm(below.flatten(0, 1), self.weights[layer], out=above.flatten(0, 1))
            activation, sigmoid = kept.activations[layer - 1], kept.sigmoids[layer - 1]
            if self.num_rows > 1:
                # How the derivatives' factor 1 - sigmoid changes with the value.
                bend = self.scratches[layer]
                torch.mul(above[1], activation[1], out=bend)
                for row in range(2, self.num_rows):
                    bend.addcmul_(above[row], activation[row])
            above.mul_(kept.complements[layer - 1])
            if self.num_rows > 1:
                above[0].addcmul_(sigmoid, bend, value=-1.0)
            below = above
        return below.flatten(0, 1).mm(self.weights[0]).unflatten(0, (self.num_rows, self.batch))

    def add_parameter_product(self, inputs: Tensor, kept: _Kept, weight: float, gradients: Sequence[Tensor]) -> None:
        """Add weight times the products with W and b of each layer to `gradients`, which alternate between the two.

        This ends the use of the cotangents.
        """
        for layer_inputs, cotangent, by_weight, by_bias in zip(
            [inputs, *kept.activations], kept.cotangents, gradients[::2], gradients[1::2], strict=True
        ):
            torch.addmm(by_weight, cotangent.flatten(0, 1).T, layer_inputs.flatten(0, 1), alpha=weight, out=by_weight)
            torch.addmv(by_bias, cotangent[0].T, self.ones, alpha=-weight, out=by_bias)
        self.unused_cotangents.append(kept.cotangents)
        kept.cotangents = None

    def _take_cotangents(self) -> list[Tensor]:
        """Buffers for cotangents, if possible those used last: they are still in the cache."""
        if self.unused_cotangents:
            return self.unused_cotangents.pop()
        return [self.ones.new_empty(self.num_rows, self.batch, width) for width in self.widths[1:]]


class _Slot:
    """What one linearised point of the field keeps."""

    def __init__(self, networks: Sequence[_Network], like: Tensor):
        self.inputs = like.new_empty(NUM_ROWS, len(like), 4)
        self.kept = [network.new_kept() for network in networks]


class SymplecticField:
    """`symplectic_dynamics` of three softplus networks of (cos q, sin q), as a `common.field.Field`.

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
        self.networks = [
            _Network(factor, NUM_ROWS, len(like)),
            _Network(potential, NUM_ROWS, len(like)),
            _Network(control, 1, len(like)),
        ]
        self.like = like.detach()
        self.negated_rows = -angle_rows(self.like)
        self.scratch = _Slot(self.networks, self.like)
        self.slots: list[_Slot | None] = [None] * NUM_STAGES
        self.gradient_views: dict[int, list[Tensor]] = {}

    def enter(self, t0: float, t1: float) -> None:
        """The field does not depend on time."""

    def _run_networks(self, slot: _Slot, y: Tensor) -> list[Tensor]:
        torch.matmul(y[:, :4], self.negated_rows, out=slot.inputs)
        outputs = []
        for network, kept in zip(self.networks, slot.kept, strict=True):
            outputs.append(network.evaluate(slot.inputs[: network.num_rows], kept))
        return outputs

    def evaluate(self, t: float, y: Tensor, out: Tensor) -> None:
        out.copy_(self._assemble(y, *self._run_networks(self.scratch, y)))

    @staticmethod
    def _assemble(y: Tensor, factor: Tensor, potential: Tensor, control: Tensor) -> Tensor:
        return symplectic_dynamics(y, -factor, -potential[1:, :, 0], -control[0])

    def linearise(self, slot: int, t: float, y: Tensor, out: Tensor) -> None:
        if self.slots[slot] is None:
            self.slots[slot] = _Slot(self.networks, self.like)
        kept = self.slots[slot]
        outputs = self._run_networks(kept, y)
        # A few dozen operations on a few numbers a sample: here autograd costs little.
        with torch.enable_grad():
            kept.leaves = [tensor.detach().clone().requires_grad_() for tensor in (y, *outputs)]
            kept.derivative = self._assemble(*kept.leaves)
        out.copy_(kept.derivative.detach())

    def pullback(self, slot: int, cotangent: Tensor, out: Tensor) -> None:
        kept = self.slots[slot]
        by_state, *by_outputs = torch.autograd.grad(kept.derivative, kept.leaves, cotangent, retain_graph=True)
        by_inputs = torch.zeros_like(kept.inputs)
        for network, network_kept, by_output in zip(self.networks, kept.kept, by_outputs, strict=True):
            by_inputs[: network.num_rows] += network.pullback(by_output, network_kept)
        out.copy_(by_state)
        out[:, :4] += torch.bmm(by_inputs, self.negated_rows.transpose(1, 2)).sum(dim=0)

    def add_parameter_product(self, slot: int, weight: float, gradient: Tensor) -> None:
        kept, views, position = self.slots[slot], self._views(gradient), 0
        for network, network_kept in zip(self.networks, kept.kept, strict=True):
            num_tensors = 2 * len(network.weights)
            inputs = kept.inputs[: network.num_rows]
            network.add_parameter_product(inputs, network_kept, weight, views[position : position + num_tensors])
            position += num_tensors

    def _views(self, gradient: Tensor) -> list[Tensor]:
        """Where in `gradient` each parameter's gradient lies, in its shape; made once for each buffer."""
        key = gradient.data_ptr()
        if key not in self.gradient_views:
            self.gradient_views[key] = self.unflatten(gradient[: sum(self.parameter_sizes)])
        return self.gradient_views[key]

    def reuse_last_slot(self) -> None:
        self.slots[0], self.slots[-1] = self.slots[-1], self.slots[0]

    def unflatten(self, gradient: Tensor) -> tuple[Tensor, ...]:
        pieces = gradient.split(self.parameter_sizes)
        return tuple(piece.view_as(parameter) for piece, parameter in zip(pieces, self.parameters, strict=True))
