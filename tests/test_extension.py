"""What a user adds stands outside the library: nothing there is edited for it."""

import torch
from problems import F64, Network, differentiate, distance, random

from torchadjoint import Backsolve

T = torch.tensor([0.0, 1.0, 2.0], dtype=F64)
TOLERANCES = dict(rtol=1e-5, atol=1e-7)


def test_a_norm_of_ones_own():
    """The largest entry of z and a_z: stricter than their root mean square, so more steps and a smaller error."""

    def largest(tensors):
        _, z, a_z, *_ = tensors
        return torch.cat([z.reshape(-1), a_z.reshape(-1)]).abs().amax()

    func, y0 = Network(), random(4, 3)
    exact = differentiate(func, y0, T, rtol=1e-11, atol=1e-13)
    own, named = (differentiate(func, y0, T, adjoint=Backsolve(norm), **TOLERANCES) for norm in (largest, "seminorm"))
    assert own.statistics.backward.nfe > named.statistics.backward.nfe
    assert distance(own.gradient, exact.gradient) < distance(named.gradient, exact.gradient)
