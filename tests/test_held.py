"""The backward pass reads what the forward pass read, whatever was replaced in between."""

import gc
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from problems import F64, Network, T, backward, random, solve
from torch import nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from torchadjoint import Discrete, SolverError, odeint, odeint_adjoint

needs_hooks_told = pytest.mark.skipif(
    not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"), reason="this torch does not tell of its hooks"
)


class Held(nn.Module):
    """Reads a parameter, a buffer, a plain tensor, a part, numbers, a tuple, text, None and the mode."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(random(2, 2))
        self.register_buffer("scale", random(2, seed=1))
        self.shift = random(2, seed=2)
        self.part = nn.Linear(2, 2, dtype=F64)
        self.factor = 1.5
        self.pair = (random(2, seed=4),)
        self.power, self.kind, self.extra = 2, "tanh", None
        self.calls = []

    def forward(self, t, y):
        self.calls.append(t.item())
        y = getattr(torch, self.kind)(self.part(y @ self.weight * self.scale + self.shift)) ** self.power
        y = y if self.extra is None else y + self.extra
        return self.factor * y * self.pair[0] * (2 if self.training else 1)


def replace(func, name):
    torch.manual_seed(7)
    plain = {"factor": -1.0, "pair": (random(2, seed=5),), "training": False, "power": 3, "kind": "sin", "extra": 1.0}
    new = {"part": nn.Linear(2, 2, dtype=F64), **plain}.get(name)
    if new is None:
        new = 3 * random(*getattr(func, name).shape, seed=3)
    setattr(func, name, nn.Parameter(new) if name == "weight" else new)


@pytest.mark.parametrize("adjoint", ["seminorm", "default", "discrete"])
@pytest.mark.parametrize(
    "name", ["weight", "scale", "shift", "part", "factor", "pair", "training", "power", "kind", "extra"]
)
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


@pytest.mark.parametrize("adjoint", ["seminorm", "discrete"])
def test_a_list_that_was_replaced_is_the_one_that_the_backward_pass_appends_to(adjoint):
    func = Held()
    y = solve(func, random(3, 2).requires_grad_(), T, adjoint=adjoint).y
    func.calls = []
    backward(y)
    assert func.calls


@pytest.mark.parametrize("adjoint", ["seminorm", "discrete"])
def test_a_scripted_module_and_one_with_a_buffer_of_inference_mode(adjoint):
    func, y0 = Network(), random(4, 3)
    expected = torch.autograd.grad(solve(func, y0, T, adjoint=adjoint).y.sum(), list(func.parameters()))
    with torch.inference_mode():
        func.register_buffer("unread", torch.ones(3))
    found = torch.autograd.grad(solve(func, y0, T, adjoint=adjoint).y.sum(), list(func.parameters()))
    assert all(map(torch.equal, found, expected))
    del func.unread
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is on its way out
        scripted = torch.jit.script(func)
    found = torch.autograd.grad(solve(scripted, y0, T, adjoint=adjoint).y.sum(), list(scripted.parameters()))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("adjoint", ["seminorm", "discrete"])
def test_a_parameter_that_was_frozen_in_between_gets_nothing(adjoint):
    func, y0 = Network(), random(4, 3).requires_grad_()
    y = solve(func, y0, T, adjoint=adjoint).y
    expected = torch.autograd.grad(y.sum(), [y0, *func.parameters()], retain_graph=True)
    first = next(func.parameters()).requires_grad_(False)
    y.sum().backward()
    assert torch.equal(y0.grad, expected[0])
    for parameter, gradient in zip(func.parameters(), expected[1:], strict=True):
        assert (
            (parameter.grad is None or not parameter.grad.any())
            if parameter is first
            else torch.equal(parameter.grad, gradient)
        )


@pytest.mark.parametrize("adjoint", ["seminorm", "discrete"])
def test_a_sparse_embedding_is_differentiated(adjoint):
    class Embedded(nn.Module):
        def __init__(self, sparse):
            super().__init__()
            torch.manual_seed(0)
            self.rows = nn.Embedding(5, 3, sparse=sparse, dtype=F64)

        def forward(self, t, y):
            return torch.tanh(y * self.rows(torch.tensor([1, 3, 1, 0])))

    dense, sparse = (
        torch.autograd.grad(solve(func, random(4, 3), T, adjoint=adjoint).y.sum(), list(func.parameters()))
        for func in (Embedded(False), Embedded(True))
    )
    assert torch.equal(*dense, *sparse)


@pytest.mark.parametrize("adjoint", ["seminorm", "discrete"])
def test_what_the_backward_pass_counts_is_added(adjoint):
    class Counting(Network):
        def __init__(self):
            super().__init__()
            self.num_backward = 0

        def forward(self, t, y):
            self.num_backward += torch.is_grad_enabled()
            return super().forward(t, y)

    func, found = Counting(), []
    for number in (1, 2):
        solutions = [solve(func, random(4, 3), T, adjoint=adjoint).y for _ in range(number)]
        func.num_backward = 5
        torch.autograd.backward([y.sum() for y in solutions])
        found.append(func.num_backward - 5)
    assert found[1] == 2 * found[0] > 0


@needs_hooks_told
def test_a_checkpoint_around_a_solve_keeps_nothing():
    def step():
        y = checkpoint(lambda y0: solve(func, y0, T, adjoint="discrete").y, y0, use_reentrant=False)
        y.sum().backward()

    func, y0 = Network(), random(4, 3).requires_grad_()
    alive = []
    for _ in range(3):
        step()
        gc.collect()
        alive.append(sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()))
    assert alive[1] == alive[2]


def test_hooks_for_saved_tensors_act_on_what_is_kept():
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: packed.append(tensor) or tensor, lambda tensor: tensor
    ):
        y = solve(Network(), random(4, 3), T, adjoint=Discrete(linearised="solve")).y
    assert len(packed) > 50
    backward(y)


@needs_hooks_told
@pytest.mark.parametrize("adjoint", ["seminorm", "discrete", Discrete(linearised="solve")])
def test_a_checkpoint_around_a_solve_evaluates_it_once_more(adjoint):
    func, y0 = Held(), random(3, 2).requires_grad_()
    plain = torch.autograd.grad(solve(func, y0, T, adjoint=adjoint).y.sum(), [y0, *func.parameters()])
    per_gradient = len(func.calls)
    func.calls.clear()
    y = checkpoint(lambda y0: solve(func, y0, T, adjoint=adjoint).y, y0, use_reentrant=False)
    forward = len(func.calls)
    found = torch.autograd.grad(y.sum(), [y0, *func.parameters()])
    assert all(map(torch.equal, found, plain))
    assert len(func.calls) == per_gradient + forward


def test_a_plain_tensor_that_was_changed_in_place_is_an_error():
    func = Held()
    y = solve(func, random(3, 2), T).y
    func.shift += 1
    with pytest.raises(RuntimeError, match="func holds the tensor 'shift', which an in-place operation has changed"):
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


class Noisy(Network):
    """Draws its noise in the first evaluation after it was taken away, as FFJORD does."""

    def __init__(self):
        super().__init__()
        self.noise = None

    def forward(self, t, y):
        if self.noise is None:
            self.noise = torch.randn_like(y)
        return super().forward(t, y) * self.noise


@pytest.mark.parametrize("adjoint", ["seminorm", "discrete"])
def test_what_a_field_makes_itself_in_a_solve_is_read_again_on_the_way_back(adjoint):
    func, y0 = Noisy(), random(4, 3)
    first = solve(func, y0, T, adjoint=adjoint).y
    drawn, func.noise = func.noise, None
    second = solve(func, y0, T, adjoint=adjoint).y
    others = func.noise
    assert not torch.equal(drawn, others)
    found = [torch.autograd.grad(y.square().sum(), [*func.parameters()]) for y in (first, second)]
    assert func.noise is others
    for noise, gradients in zip((drawn, others), found, strict=True):
        func.noise = noise
        expected = torch.autograd.grad(solve(func, y0, T, adjoint=adjoint).y.square().sum(), [*func.parameters()])
        assert all(map(torch.equal, gradients, expected))


@pytest.mark.parametrize("adjoint", ["seminorm", "default", "discrete", Discrete(linearised="stage")])
def test_what_a_field_makes_itself_must_not_be_changed_in_place(adjoint):
    func = Noisy()
    y = solve(func, random(4, 3), T, adjoint=adjoint).y
    func.noise.normal_()
    with pytest.raises(RuntimeError, match="func holds the tensor 'noise', which an in-place operation has changed"):
        backward(y)


class Conditioned(Network):
    """Reads what another network has computed."""

    def forward(self, t, y):
        return super().forward(t, y) + self.context


@pytest.mark.parametrize("by", [partial(solve, adjoint="seminorm"), partial(solve, adjoint="discrete"), odeint_adjoint])
def test_a_tensor_that_gets_no_gradient_is_named(by):
    func, y0, weight = Conditioned(), random(4, 3), random(3).requires_grad_()
    func.context = 2 * weight
    func.another = func.context
    with pytest.warns(UserWarning, match="func holds 'another' and 'context', which need a gradient") as found:
        by(func, y0, T)
    assert Path(found[0].filename).name == ("api.py" if by is odeint_adjoint else "problems.py"), "who called solve"
    del func.another
    func.own = 2 * func.first.weight
    with pytest.warns(UserWarning, match="func holds 'context', which"):
        by(func, y0, T)
    y = by(func, y0, T, adjoint_params=(*func.parameters(), func.context))
    (y if by is odeint_adjoint else y.y).sum().backward()
    assert weight.grad.abs().min() > 0
    with torch.no_grad():
        by(func, y0, T)
    func.context = func.context.detach()
    by(func, y0, T)


class Remembering(Network):
    """Makes a count and a state of its own in the first evaluation, and another state in each."""

    def __init__(self):
        super().__init__()
        self.count = self.last = None

    def forward(self, t, y):
        if self.count is None:
            self.count = torch.zeros(())
        self.count += 1
        self.last = super().forward(t, y)
        return self.last


@pytest.mark.parametrize("adjoint", ["seminorm", "discrete", Discrete(linearised="stage")])
def test_what_a_field_makes_and_changes_itself_may_change(adjoint):
    func, y0 = Remembering(), random(4, 3)
    first, second = (solve(func, y0, T, adjoint=adjoint).y.sum() for _ in range(2))
    (first + second).backward(retain_graph=True)
    func.count.zero_()
    first.backward()


@pytest.mark.parametrize("change", [prune.random_unstructured, nn.utils.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_tensors_that_hooks_compute_from_parameters_are_differentiated(change):
    func = Network()
    change(func.first, "weight", **({"amount": 0.5} if change is prune.random_unstructured else {}))
    solve(func, random(4, 3), T).y.sum().backward()
    assert all(parameter.grad.norm() > 0 for parameter in func.parameters())


class Cached(nn.Module):
    """dy/dt = -tanh(a) y, of which it computes the factor once."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.5, dtype=F64))
        self.factor = None

    def forward(self, t, y):
        if self.factor is None:
            self.factor = self.a.tanh()
        return -self.factor * y


@pytest.mark.parametrize(
    "by", [odeint, odeint_adjoint, partial(solve, adjoint="default"), partial(solve, adjoint="discrete")]
)
def test_what_a_field_makes_of_parameters_in_its_first_evaluation_is_differentiated(by):
    func = Cached()
    y = by(func, torch.ones(1, dtype=F64), T)
    (y if isinstance(y, torch.Tensor) else y.y)[-1].sum().backward()
    a = torch.tensor(0.5, dtype=F64, requires_grad=True)
    torch.exp(-a.tanh() * (T[-1] - T[0])).backward()
    assert func.a.grad.item() == pytest.approx(a.grad.item(), rel=1e-6)
    other = Cached()
    with torch.no_grad():
        by(other, torch.ones(1, dtype=F64), T)
    assert not other.factor.requires_grad


class Optional(Network):
    """Reads a buffer and an attribute that are None at first."""

    def __init__(self):
        super().__init__()
        self.register_buffer("shift", None)
        self.register_buffer("scale", torch.ones(3, dtype=F64))
        self.extra = None

    def forward(self, t, y):
        y = super().forward(t, y) * self.scale
        y = y if self.shift is None else y * self.shift
        return y if self.extra is None else y * self.extra


@pytest.mark.parametrize("adjoint", ["seminorm", "discrete"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("shift", torch.zeros(3, dtype=F64)),
        ("extra", nn.Parameter(torch.zeros(3, dtype=F64))),
        ("scale", nn.Parameter(torch.zeros(3, dtype=F64))),
    ],
    ids=["a buffer that was None", "a parameter where None was", "a parameter where a buffer was"],
)
def test_what_changes_its_kind_is_read_as_it_was(name, value, adjoint):
    func, y0 = Optional(), random(4, 3)
    parameters = [*func.parameters()]
    y = solve(func, y0, T, adjoint=adjoint).y
    expected = torch.autograd.grad(y.square().sum(), parameters, retain_graph=True)
    setattr(func, name, value)
    names = [key for key, _ in func.named_parameters()]
    found = torch.autograd.grad(y.square().sum(), parameters)
    assert all(map(torch.equal, found, expected))
    assert getattr(func, name) is value
    assert [key for key, _ in func.named_parameters()] == names


def test_after_a_backward_pass_that_fails_all_is_as_it_was_before():
    func = Held()
    y = solve(func, random(3, 2), T, adjoint_options=dict(max_num_steps=1)).y
    replace(func, "factor")
    with pytest.raises(SolverError, match="more than 1 steps"):
        backward(y)
    assert func.factor == -1


class Counting(Network):
    """Counts in a tensor, which it makes anew each time."""

    def __init__(self):
        super().__init__()
        self.register_buffer("nfe", torch.zeros(()))

    def forward(self, t, y):
        self.nfe = self.nfe + 1
        return super().forward(t, y)


@pytest.mark.parametrize("adjoint", ["seminorm", "discrete"])
def test_a_tensor_that_counts_goes_on_counting(adjoint):
    func, y0 = Counting(), random(4, 3)
    first, _ = (solve(func, y0, T, adjoint=adjoint) for _ in range(2))
    before = func.nfe.clone()
    backward(first.y)
    assert func.nfe == before + first.statistics.backward.nfe


def test_an_attribute_in_front_of_a_parameter_is_the_one_that_is_read():
    func, y0 = Network(), random(4, 3)
    func.first.__dict__["weight"] = func.first.weight.detach() / 2
    y = solve(func, y0, T, adjoint_params=[func.second.weight]).y
    (expected,) = torch.autograd.grad(y.square().sum(), func.second.weight, retain_graph=True)
    func.first._parameters["weight"] = nn.Parameter(torch.zeros_like(func.first.weight))
    (found,) = torch.autograd.grad(y.square().sum(), func.second.weight)
    assert torch.equal(found, expected)
