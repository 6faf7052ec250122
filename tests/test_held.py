"""The backward pass reads what the forward pass read, whatever was replaced in between."""

import pytest
import torch
from problems import F64, Network, T, backward, random, solve
from torch import nn


class Held(nn.Module):
    """Reads a parameter, a buffer, a plain tensor and a part, by the names that it is given."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(random(2, 2))
        self.register_buffer("scale", random(2, seed=1))
        self.shift = random(2, seed=2)
        self.part = nn.Linear(2, 2, dtype=F64)

    def forward(self, t, y):
        return torch.tanh(self.part(y @ self.weight * self.scale + self.shift))


def replace(func, name):
    torch.manual_seed(7)
    new = nn.Linear(2, 2, dtype=F64) if name == "part" else 3 * random(*getattr(func, name).shape, seed=3)
    setattr(func, name, nn.Parameter(new) if name == "weight" else new)


@pytest.mark.parametrize("adjoint", ["seminorm", "default", "discrete"])
@pytest.mark.parametrize("name", ["weight", "scale", "shift", "part"])
def test_the_backward_pass_reads_what_the_forward_pass_read(adjoint, name):
    func, y0 = Held(), random(3, 2)
    held = [*func.parameters()]
    y = solve(func, y0, T, adjoint=adjoint).y
    expected = torch.autograd.grad(y.square().sum(), held, retain_graph=True)
    replace(func, name)
    now = getattr(func, name)
    found = torch.autograd.grad(y.square().sum(), held)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert getattr(func, name) is now


def test_a_plain_tensor_that_was_changed_in_place_is_an_error():
    func = Held()
    y = solve(func, random(3, 2), T).y
    func.shift += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        backward(y)


@pytest.mark.parametrize("adjoint", ["seminorm", "discrete"])
def test_what_was_held_then_and_is_not_there_now_is_gone_again(adjoint):
    func = Held()
    y = solve(func, random(3, 2), T, adjoint=adjoint).y
    del func.shift
    backward(y)
    assert "shift" not in vars(func)


@pytest.mark.parametrize("adjoint", ["seminorm", "discrete"])
def test_a_functional_call_differentiates_what_it_was_given(adjoint):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.func = Network()

        def forward(self, y0):
            return solve(self.func, y0, T, adjoint=adjoint, rtol=1e-9, atol=1e-9).y

    model, y0 = Model(), random(4, 3)
    given = {name: (1.5 * value.detach()).requires_grad_() for name, value in model.named_parameters()}
    torch.func.functional_call(model, given, (y0,)).square().sum().backward()
    other = Model()
    with torch.no_grad():
        for own, value in zip(other.parameters(), given.values(), strict=True):
            own.copy_(value)
    other(y0).square().sum().backward()
    for own, value in zip(other.parameters(), given.values(), strict=True):
        assert torch.allclose(value.grad, own.grad, rtol=1e-7)
    assert all(parameter.grad is None for parameter in model.parameters())
