"""Compiled attempts do what eager ones do."""

import os

import pytest
import torch
from problems import F64, Network, Pair, differentiate, distance, random, steps
from torch import nn

from common import compiled
from common.adjoint import solve

T = torch.tensor([0.0, 0.4, 2.0, 3.0], dtype=F64)
KINKS = (0.5, 1.7, 2.0)
TIGHT = dict(rtol=1e-6, atol=1e-8)


compiles = pytest.mark.skipif(
    "ATEN_CPU_CAPABILITY" in os.environ, reason="torch's compiler takes no notice of ATEN_CPU_CAPABILITY"
)


@pytest.fixture
def traced(monkeypatch):
    """What would be compiled runs as it is, which is enough to compare numbers."""
    monkeypatch.setattr(compiled, "_compiled", lambda function, *_: function)


class Kinked(nn.Module):
    """A network of y whose speed has jumps in t, with a parameter that is used twice and one that is never used."""

    def __init__(self):
        super().__init__()
        self.network = Network()
        self.rates = nn.Parameter(random(len(KINKS) + 1, seed=3))
        self.unused = nn.Parameter(torch.ones(2, dtype=F64))
        self.frozen = nn.Parameter(torch.ones((), dtype=F64), requires_grad=False)
        self.register_buffer("kinks", torch.tensor(KINKS, dtype=F64))

    def forward(self, t, y):
        rate = self.rates.index_select(0, torch.bucketize(t, self.kinks).reshape(1))
        return self.frozen * self.network(t, y) * rate + self.rates.sum() * torch.sin(t)


def compare(func, y0, t, **options):
    eager = differentiate(func, y0, t, **options)
    ours = differentiate(func, y0, t, **options, compile=True)
    assert steps(ours.statistics) == [pytest.approx(times, abs=1e-7) for times in steps(eager.statistics)]
    assert ours.statistics.forward.nfe == eager.statistics.forward.nfe
    assert ours.statistics.backward.nfe == eager.statistics.backward.nfe
    assert distance(ours.y, eager.y) < 1e-9
    for own, expected in zip(ours.gradients, eager.gradients, strict=True):
        assert (own is None) == (expected is None)
        assert own is None or (own - expected).norm() <= 1e-9 * expected.norm()
    return ours


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("times", [T, T.flip(0), T[[0, -1]]], ids=["increasing", "decreasing", "one segment"])
@pytest.mark.parametrize("options", [{}, dict(warm_start=True), dict(adjoint_rtol=1e-7)], ids=str)
def test_steps_and_gradients_are_those_of_eager_attempts(times, options):
    t = times.clone().requires_grad_()
    ours = compare(Kinked(), random(4, 3), t, jump_t=KINKS, **TIGHT, **options)
    assert ours.statistics.backward.num_rejected > 0
    assert t.grad.abs().min() > 0


@pytest.mark.usefixtures("traced")
def test_a_tuple_state():
    compare(Pair(), Pair.start(), T, **TIGHT)


@pytest.mark.usefixtures("traced")
def test_a_field_without_parameters():
    class Rotation(nn.Module):
        def forward(self, t, y):
            return torch.stack([-y[1], y[0]])

    compare(Rotation(), random(2), T, **TIGHT)


@compiles
def test_it_is_compiled_once_for_a_class_of_field_and_a_shape():
    compare(Kinked(), random(4, 3), T, jump_t=KINKS, **TIGHT)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):
            func = Kinked()
            with torch.no_grad():
                func.rates.copy_(random(len(KINKS) + 1, seed=seed))
            compare(func, random(4, 3, seed=seed), T * 0.9, jump_t=KINKS, rtol=1e-5, atol=1e-6, warm_start=True)


@compiles
def test_what_cannot_be_compiled_is_said():
    class Undecided(nn.Module):
        def forward(self, t, y):
            return y if y.sum() > 0 else -y

    with pytest.raises(
        ValueError, match=r"func, a Undecided, cannot be compiled as a whole \(.+\): leave compile=True"
    ):
        differentiate(Undecided(), random(1), T, rtol=1e-3, atol=1e-3, compile=True)


@compiles
def test_what_changes_from_solve_to_solve_is_refused():
    class Moody(Network):
        def forward(self, t, y):
            return super().forward(t, y) * self.mood

    func, options = Moody(), dict(rtol=1e-2, atol=1e-2, compile=True)
    with torch.no_grad(), torch._dynamo.config.patch(cache_size_limit=1):
        func.mood = 1
        solve(func, random(1, 3), T, **options)
        func.mood = 2
        with pytest.raises(ValueError, match=r"a Moody, cannot be .* compiled again and again"):
            solve(func, random(1, 3), T, **options)
