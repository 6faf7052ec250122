"""Models as people have written them for torchdiffeq, with their habits: all that changes is the import."""

import pytest
import torch
import torchdiffeq
from problems import random
from torch import nn

import torchadjoint

LIBRARIES = [torchdiffeq, torchadjoint]
TIGHT = dict(rtol=1e-8, atol=1e-9)
CLOSE = dict(rtol=1e-5, atol=1e-6)
BY = pytest.mark.parametrize("by", ["odeint", "odeint_adjoint"])


class SpiralField(nn.Module):
    """Without parameters, and of a state of rows."""

    def __init__(self):
        super().__init__()
        self.matrix = torch.tensor([[-0.1, 2.0], [-2.0, -0.1]])

    def forward(self, t, y):
        return torch.mm(y**3, self.matrix)


class LatentField(nn.Module):
    """It counts its evaluations and overwrites its activations."""

    def __init__(self):
        super().__init__()
        self.elu = nn.ELU(inplace=True)
        self.first, self.last = nn.Linear(4, 20), nn.Linear(20, 4)
        self.nfe = 0

    def forward(self, t, y):
        self.nfe += 1
        return self.last(self.elu(self.first(y)))


class HyperField(nn.Module):
    """A flow whose weights are a function of time; its divergence is taken within, by autograd."""

    def __init__(self, width=8):
        super().__init__()
        self.width = width
        self.hyper = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 5 * width))

    def forward(self, t, states):
        z = states[0]
        with torch.set_grad_enabled(True):
            z.requires_grad_(True)
            inner, outer, bias = (
                self.hyper(t.reshape(1, 1)).reshape(-1).split([2 * self.width, 2 * self.width, self.width])
            )
            hidden = torch.tanh(z @ inner.reshape(2, self.width) + bias)
            dz = hidden @ outer.reshape(self.width, 2) / self.width
            divergence = sum(
                torch.autograd.grad(dz[:, i].sum(), z, create_graph=True)[0][:, i] for i in range(z.shape[1])
            )
        return dz, -divergence.view(len(z), 1)


class EstimatedFlow(nn.Module):
    """A layer of a flow on images: an estimated divergence whose noise is kept, a penalty as one more state, a buffer
    that counts, and an end time that is learnt."""

    def __init__(self):
        super().__init__()
        self.end = nn.Parameter(torch.tensor(0.3))
        self.net = nn.Conv2d(2, 1, 3, padding=1)
        self.register_buffer("num_evals", torch.tensor(0.0))

    def derivative(self, t, state):
        x, logp = state[:2]
        self.num_evals += 1
        with torch.enable_grad():
            x.requires_grad_(True)
            logp.requires_grad_(True)
            t = t.clone().type_as(x)
            t.requires_grad_(True)
            dx = torch.tanh(self.net(torch.cat([x, t * torch.ones_like(x)], dim=1)))
            product = torch.autograd.grad(dx, x, self.noise, create_graph=True)[0]
            divergence = (product * self.noise).flatten(1).sum(dim=1, keepdim=True)
        return dx, -divergence, dx.square().mean().reshape(1)

    def forward(self, odeint, x, reverse=False):
        times = torch.stack([torch.zeros_like(self.end), self.end])
        times = times.flip(0) if reverse else times
        self.noise = random(*x.shape, seed=5, dtype=x.dtype).sign()
        state = (x, torch.zeros(len(x), 1).to(x), torch.zeros(1).to(x))
        return tuple(part[-1] for part in odeint(Wrapped(self), state, times, **TIGHT))


class Wrapped(nn.Module):
    """A module around a method of another one, as regularising wrappers are."""

    def __init__(self, flow):
        super().__init__()
        self.flow = flow

    def forward(self, t, state):
        return self.flow.derivative(t, state)


def same(results, **tolerances):
    theirs, ours = results
    torch.testing.assert_close(ours, theirs, **tolerances)


@BY
def test_a_demo_of_a_spiral(by):
    t = torch.linspace(0.0, 5.0, 100)
    with torch.no_grad():
        solutions = [getattr(library, by)(SpiralField(), torch.tensor([[2.0, 0.0]]), t) for library in LIBRARIES]
    same(solutions, rtol=0, atol=1e-5)


@BY
def test_a_latent_ode(by):
    func, decoder = LatentField().double(), nn.Linear(4, 2).double()
    t, parameters = torch.linspace(0.0, 2.0, 20), [*func.parameters(), *decoder.parameters()]
    results = []
    for library in LIBRARIES:
        func.nfe, z0 = 0, random(6, 4).requires_grad_()
        z = getattr(library, by)(func, z0, t, **TIGHT).permute(1, 0, 2)
        results.append(torch.autograd.grad(decoder(z).square().mean(), [z0, *parameters]))
        assert func.nfe > 0
    same(results, **CLOSE)
    with torch.no_grad():
        same([getattr(library, by)(func, random(4), -t, **TIGHT) for library in LIBRARIES], **CLOSE)


@BY
def test_a_flow_whose_weights_depend_on_time(by):
    func, x, logp = HyperField().double(), random(5, 2), torch.zeros(5, 1, dtype=torch.float64)
    results = []
    for library in LIBRARIES:
        z, change = getattr(library, by)(func, (x, logp), torch.tensor([1.0, 0.0]), method="dopri5", **TIGHT)
        loss = (0.5 * z[-1].square().sum(1) + change[-1].view(-1)).mean()
        results.append(torch.autograd.grad(loss, list(func.parameters())))
    same(results, **CLOSE)


@BY
def test_a_flow_of_single_precision_at_times_of_double(by):
    func, state = HyperField(), (random(5, 2, dtype=torch.float32), torch.zeros(5, 1))
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    with torch.no_grad():
        results = [getattr(library, by)(func, state, t, rtol=1e-5, atol=1e-5) for library in LIBRARIES]
    assert results[1][0].dtype == torch.float32
    same(results, rtol=1e-4, atol=1e-4)


@BY
def test_a_layer_of_a_flow_on_images(by):
    flow, x = EstimatedFlow().double(), random(3, 1, 4, 4)
    results = []
    for library in LIBRARIES:
        z, logp, penalty = flow(getattr(library, by), x)
        loss = z.square().mean() + logp.mean() + 0.1 * penalty.sum()
        results.append(torch.autograd.grad(loss, list(flow.parameters())))
        assert flow.num_evals > 0
        with torch.no_grad():
            torch.testing.assert_close(flow(getattr(library, by), z, reverse=True)[0], x, rtol=1e-6, atol=1e-7)
    same(results, **CLOSE)
