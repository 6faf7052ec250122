"""What a factor on the loss does to a backward solve: the same as dividing the adjoint's absolute tolerance by it.

The backward equation is linear in the adjoint, so a factor on the loss is a factor on a_z and a_theta. A step is judged
by err / (atol + rtol |a|), which stays what it was if atol gets the factor too. The state z is in the same solve, with
a scale of its own, so this holds for the parts of a norm that do not look at z.
"""

import pytest
import torch
from problems import F64, Network, distance, random, solve, steps

from torchadjoint import Backsolve
from torchadjoint.norms import rms_norm

# A power of two: a product with it is exact, so that every step is the same to the last bit.
FACTOR = 2.0**-20
TIMES = torch.tensor([0.0, 1.0, 3.0], dtype=F64)


def without_z(tensors):
    """RMS(a_z) and that of each parameter's adjoint: `per-tensor` that does not look at z and t."""
    _, _, *adjoints = tensors
    return torch.stack([rms_norm(adjoint) for adjoint in adjoints]).amax()


def gradient(norm, factor, adjoint_atol):
    """The gradient of the parameters, flat, and the steps, with this factor on the loss."""
    func = Network(width=32)
    options = dict(rtol=1e-5, atol=1e-7, adjoint_atol=adjoint_atol, adjoint=Backsolve(norm))
    # z of a size where atol does not matter to it, and a loss whose adjoint has a size where it does.
    solution = solve(func, 10 * random(4, 3), TIMES, **options)
    (factor * 1e-3 * solution.y.square().sum()).backward()
    return torch.cat([parameter.grad.flatten() for parameter in func.parameters()]), steps(solution.statistics)


def test_a_factor_on_the_loss_is_one_on_the_adjoints_absolute_tolerance():
    expected, taken = gradient(without_z, 1.0, 1e-7)
    scaled, taken_when_scaled = gradient(without_z, FACTOR, 1e-7 * FACTOR)
    assert taken_when_scaled == taken
    assert torch.equal(scaled, FACTOR * expected)
    # The factor alone, or the tolerance alone, does change the steps: atol matters here.
    assert gradient(without_z, FACTOR, 1e-7)[1] != taken
    assert gradient(without_z, 1.0, 1e-7 * FACTOR)[1] != taken


@pytest.mark.parametrize("norm", ["default", "per-tensor", "seminorm"])
def test_z_keeps_its_own_scale(norm):
    """The named norms look at z, whose tolerance the factor changes: the symmetry holds where z sets no step."""
    expected, taken = gradient(norm, 1.0, 1e-7)
    scaled, taken_when_scaled = gradient(norm, FACTOR, 1e-7 * FACTOR)
    assert [len(times) for times in taken_when_scaled] == [len(times) for times in taken]
    assert distance(scaled / FACTOR, expected) < 1e-4
    # So small an adjoint that z alone sets the steps: the other side of the symmetry has a coarser tolerance for z.
    _, set_by_z = gradient(norm, FACTOR, 1e-7)
    _, others = gradient(norm, 1.0, 1e-7 / FACTOR)
    assert set_by_z != others
