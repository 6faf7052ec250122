"""`odeint` differentiates with respect to all that a function reads, wherever it is, or says what it cannot find."""

import functools

import pytest
import torch
import torchdiffeq
from problems import F64, distance, random
from torch import nn

import torchadjoint
from torchadjoint import odeint

T = torch.linspace(0, 2, 6, dtype=F64)


def test_a_plain_function_is_differentiated_with_respect_to_what_it_reads():
    scale, other = random(3, seed=1).requires_grad_(), random(3, seed=2).requires_grad_()
    weight = scale * 2  # no leaf
    found = []
    for library in (torchadjoint, torchdiffeq):
        y = library.odeint(lambda t, y: torch.tanh(weight * y) + other * t, random(3), T, rtol=1e-6, atol=1e-8)
        found.append(torch.cat(torch.autograd.grad(y.sum(), (scale, other), retain_graph=True)))
    assert distance(*found) < 1e-7


@pytest.mark.parametrize("is_read_too", [False, True])
@pytest.mark.parametrize("bind", ["closure", "default", "partial", "method", "module"])
def test_what_a_context_is_computed_from_is_differentiated_once(bind, is_read_too):
    """Not at every stage; but if the function reads that too, it counts once all the same."""
    weight, gradients, calls = random(3, seed=1).requires_grad_(), [], []
    for by in (torchdiffeq.odeint, odeint):
        context = torch.sin(weight)
        context.register_hook(lambda gradient, by=by: calls.append(by))
        func = reading(bind, context, weight if is_read_too else torch.ones(3, dtype=F64))
        y = by(func, random(2, 3), T, rtol=1e-8, atol=1e-9)
        gradients.append(torch.autograd.grad(y.square().sum(), weight))
    assert distance(*gradients[0], *gradients[1]) < 1e-7
    assert is_read_too or calls.count(odeint) == 1


def reading(bind, context, factor):
    """tanh(y * context) * factor, which holds the context in one of the ways of Python."""
    driven = Driven()
    driven.linear.requires_grad_(False)
    torch.nn.init.eye_(driven.linear.weight)
    torch.nn.init.zeros_(driven.linear.bias)
    driven.context = context
    return {
        "closure": lambda t, y: torch.tanh(y + context) * factor,
        "default": lambda t, y, context=context: torch.tanh(y + context) * factor,
        "partial": functools.partial(lambda context, t, y: torch.tanh(y + context) * factor, context),
        "method": lambda t, y, call=driven.forward: call(t, y) * factor,
        "module": Scaled(driven, factor),
    }[bind]


class Driven(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3, dtype=F64)

    def forward(self, t, y):
        return torch.tanh(self.linear(y) + self.context)


class Scaled(nn.Module):
    def __init__(self, func, factor):
        super().__init__()
        self.func, self.factor = func, factor

    def forward(self, t, y):
        return self.func(t, y) * self.factor


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("held", ["nothing", "frozen", "another", "parameters"])
def test_a_tensor_that_a_module_hides_is_an_error_and_no_missing_gradient(held, requires_grad):
    class Hiding(nn.Module):
        def __init__(self):
            super().__init__()
            if held in ("frozen", "parameters"):
                self.layer = nn.Linear(3, 3).requires_grad_(held == "parameters")
            if held == "another":
                self.unread = torch.ones(3, requires_grad=True)

        def forward(self, t, y):
            # Of a module with parameters few graphs stand for all: of the first evaluation, and here of the last step.
            return torch.tanh(hidden * y) if t > 1 else -y

    hidden, y0 = random(3, seed=1).requires_grad_(), random(2, 3).requires_grad_(requires_grad)
    with pytest.raises(ValueError, match="requires a gradient, is no parameter, and was not found at the first time"):
        odeint(Hiding(), y0, T)
    with torch.no_grad():
        odeint(Hiding(), y0, T)


def test_contexts_that_are_computed_from_each_other_count_once():
    weight, gradients = random(3, seed=1).requires_grad_(), []
    for by in (torchdiffeq.odeint, odeint):
        context = torch.sin(weight)
        factor = torch.exp(context)
        y = by(lambda t, y: torch.tanh(y + context) * factor, random(2, 3), T, rtol=1e-8, atol=1e-9)  # noqa: B023
        gradients += torch.autograd.grad(y.square().sum(), weight)
    assert distance(*gradients) < 1e-7


def test_a_context_by_a_part_of_the_module_counts_once():
    class Encoding(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Linear(3, 3, dtype=F64)

        def forward(self, t, y):
            return torch.tanh(y + self.context)

    func, x, gradients = Encoding(), random(2, 3, seed=7), []
    for by in (torchdiffeq.odeint, odeint):
        func.context = func.encoder(x)
        y = by(func, random(2, 3), T, rtol=1e-8, atol=1e-9)
        gradients.append(torch.autograd.grad(y.square().sum(), func.encoder.weight))
    assert distance(*gradients[1], *gradients[0]) < 1e-7


def test_what_a_context_itself_cannot_be_is_differentiated_behind_it():
    """A sparse matrix, and a tensor whose own gradient is asked for."""
    indices, gradients = torch.tensor([[0, 1, 2], [1, 2, 0]]), []
    weight, other = random(3, seed=1).requires_grad_(), random(3, seed=2).requires_grad_()
    for by in (torchdiffeq.odeint, odeint):
        matrix = torch.sparse_coo_tensor(indices, torch.sin(weight), (3, 3), check_invariants=True)
        context = torch.cos(other)
        context.retain_grad()
        y = by(lambda t, y: torch.sparse.mm(matrix, y) + context, random(3, 3), T, rtol=1e-8, atol=1e-9)  # noqa: B023
        y.square().sum().backward()
        gradients.append(torch.stack([weight.grad, other.grad, context.grad]))
        weight.grad = other.grad = None
    assert distance(*gradients) < 1e-7


def test_a_module_is_differentiated_with_respect_to_a_context_that_it_holds():
    func, y0, weight = Driven(), random(2, 3), random(3, seed=5).requires_grad_()
    gradients = []
    for by in (torchdiffeq.odeint, odeint):
        func.context = 2 * weight
        y = by(func, y0, T, rtol=1e-8, atol=1e-9)
        gradients.append(torch.autograd.grad(y.square().sum(), [weight, *func.parameters()]))
    for theirs, ours in zip(*gradients, strict=True):
        assert distance(ours, theirs) < 1e-7


@pytest.mark.parametrize(
    "hold",
    [
        lambda tensor: [tensor],
        lambda tensor: ("name", {"within": (tensor,)}),
        lambda tensor: [Weighted(tensor)],
        lambda tensor: in_a_circle(tensor),
    ],
    ids=["list", "dict in a tuple", "module in a list", "circle"],
)
def test_a_module_is_differentiated_with_respect_to_what_lies_in_its_containers(hold):
    class Holding(nn.Module):
        def __init__(self, held):
            super().__init__()
            self.held = held

        def forward(self, t, y):
            return torch.tanh(y * leaf(self.held))

    def leaf(held):
        while not isinstance(held, torch.Tensor):
            held = (
                held.weight if isinstance(held, nn.Module) else held["within"] if isinstance(held, dict) else held[-1]
            )
        return held

    func = Holding(hold(nn.Parameter(random(3, seed=5))))
    theirs, ours = (
        torch.autograd.grad(by(func, random(2, 3), T, rtol=1e-8, atol=1e-9).square().sum(), leaf(func.held))
        for by in (torchdiffeq.odeint, odeint)
    )
    assert distance(*ours, *theirs) < 1e-7


def in_a_circle(tensor):
    circle = [tensor]
    circle.insert(0, circle)
    return circle


class Weighted(nn.Module):
    """Holds a parameter."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight


def test_a_plain_function_that_reads_another_parameter_later_is_an_error():
    first, later = random(3, seed=1).requires_grad_(), random(3, seed=2).requires_grad_()
    for known in (first, -1):
        with pytest.raises(ValueError, match=r"reads a tensor that requires a gradient, .* not found at the first"):
            odeint(lambda t, y, at=known: (at if t < 1 else later) * y, random(3), T, rtol=1e-4).sum().backward()


def test_a_plain_function_needs_no_parameters():
    y0 = random(3).requires_grad_()
    odeint(lambda t, y: -y, y0, T).sum().backward()
    assert distance(y0.grad, torch.exp(-T).sum() * torch.ones(3, dtype=F64)) < 1e-5
    assert not odeint(lambda t, y: -y, y0.detach(), T).requires_grad


def test_callbacks_are_called_where_there_is_a_gradient():
    func = Recorded()
    odeint(func, random(3), T, rtol=1e-4).sum().backward()
    assert func.accepted


class Recorded(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3, dtype=F64)
        self.accepted = []

    def forward(self, t, y):
        return torch.tanh(self.linear(y))

    def callback_accept_step(self, t0, y0, dt):
        self.accepted.append(t0.item())


def test_a_function_of_single_precision_at_times_of_double():
    linear = nn.Linear(1, 3)
    odeint(lambda t, y: torch.tanh(y + linear(t.reshape(1))), torch.ones(2, 3), T).sum().backward()
    assert linear.weight.grad.any()


def test_a_plain_function_of_a_tuple():
    def func(t, state):
        y, _ = state
        return -rate * y, y.sum(0)

    rate, found = random(3).requires_grad_(), []
    for library in (torchadjoint, torchdiffeq):
        y = library.odeint(func, (random(4, 3), random(3)), T, rtol=1e-8, atol=1e-9)
        found.append(torch.autograd.grad(y[0].square().sum() + y[1].sum(), rate)[0])
    assert distance(*found) < 1e-7
