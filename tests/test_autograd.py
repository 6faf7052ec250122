"""A solve within autograd: graphs kept and built, hooks, tensors that change in between, transforms."""

import gc
import weakref

import pytest
import torch
from problems import (
    ADJOINTS,
    F64,
    INCREASING,
    NOT_AS_PUBLISHED,
    Network,
    T,
    backward,
    differentiate,
    distance,
    random,
    solve,
)
from torch import nn
from torch.autograd import forward_ad

from torchadjoint import Backsolve, Discrete, casting, make_norm, odeint, odeint_adjoint
from torchadjoint.field import AutogradField


@pytest.mark.parametrize("adjoint", ["seminorm", "discrete"])
def test_create_graph_gives_the_first_derivative_and_no_second(adjoint):
    func, y0 = Network(), random(3).requires_grad_()
    for loss in (torch.sum, torch.norm):
        (expected,) = torch.autograd.grad(loss(solve(func, y0, T, adjoint=adjoint).y), y0)
        found = torch.autograd.grad(
            loss(solve(func, y0, T, adjoint=adjoint).y), [y0, *func.parameters()], create_graph=True
        )
        assert torch.equal(found[0], expected)
        for gradient in found:
            with pytest.raises(NotImplementedError, match="cannot be differentiated again: what follows backward"):
                gradient.sum().backward()


@pytest.mark.parametrize("adjoint", ["seminorm", "discrete"])
def test_no_second_derivative_is_silently_zero(adjoint):
    func, y0, scale = Network(), random(3).requires_grad_(), torch.ones((), dtype=F64, requires_grad=True)
    with pytest.raises(NotImplementedError, match="cannot be differentiated again"):
        torch.autograd.functional.hessian(lambda y0: solve(func, y0, T, adjoint=adjoint).y.sum(), y0)
    inputs = [y0, scale, *func.parameters()]
    gradients = torch.autograd.grad(
        (scale * solve(func, y0, T, adjoint=adjoint).y).sum(), [y0, *func.parameters()], create_graph=True
    )
    for of in inputs:
        with pytest.raises(NotImplementedError, match="cannot be differentiated again"):
            torch.autograd.grad(gradients[0].sum(), of, allow_unused=True, retain_graph=True)


@pytest.mark.parametrize("adjoint", ["seminorm", "discrete"])
def test_parameters_that_changed_between_forward_and_backward_are_an_error(adjoint):
    func = Network()
    y = solve(func, random(3), T, adjoint=adjoint).y
    with torch.no_grad():
        func.second.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        backward(y)


@pytest.mark.parametrize("adjoint", NOT_AS_PUBLISHED)
def test_a_retained_graph_gives_the_same_gradient_twice(adjoint):
    func, y0 = Network(), random(2, 3)
    once = differentiate(func, y0, INCREASING, rtol=1e-5, atol=1e-6, adjoint=adjoint)
    start = y0.clone().requires_grad_()
    y = solve(func, start, INCREASING, rtol=1e-5, atol=1e-6, adjoint=adjoint).y
    for _ in range(2):
        gradients = torch.autograd.grad(
            (y * random(*y.shape, seed=100)).sum(), (start, *func.parameters()), retain_graph=True
        )
        assert torch.equal(torch.cat([gradient.reshape(-1) for gradient in gradients]), once.gradient)


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_each_backward_of_a_retained_graph_is_counted_alone(adjoint):
    solution = solve(Network(), random(4, 3), T, rtol=1e-5, atol=1e-7, adjoint=adjoint)
    counts = []
    for _ in range(3):
        solution.y.sum().backward(retain_graph=True)
        backward_statistics = solution.statistics.backward
        counts.append((backward_statistics.nfe, backward_statistics.num_accepted, backward_statistics.num_rejected))
    # At first `discrete` finds the last step as the forward solve left it.
    assert counts[1] == counts[2]
    assert adjoint == "discrete" or counts[0] == counts[1]


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_hooks_act_once_on_the_whole_gradient(adjoint):
    plain, hooked, factor = Network(), Network(), random(16)
    hooked.first.bias.register_hook(lambda gradient: gradient * factor)
    seen = []
    hooked.second.weight.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.grad.clone()))
    differentiate(plain, random(4, 3), T, rtol=1e-5, atol=1e-7, adjoint=adjoint)
    differentiate(hooked, random(4, 3), T, rtol=1e-5, atol=1e-7, adjoint=adjoint)
    assert distance(hooked.first.bias.grad, plain.first.bias.grad * factor) < 1e-12
    assert len(seen) == 1
    assert distance(seen[0], plain.second.weight.grad) < 1e-12
    assert torch.equal(hooked.first.weight.grad, plain.first.weight.grad)


@pytest.mark.parametrize("adjoint", ["seminorm", "discrete"])
def test_hooks_of_adjoint_params_that_are_no_leaves_act_once(adjoint):
    raw = random(3, 3).requires_grad_()
    weight = 2 * raw
    weight.register_hook(lambda gradient: 0.5 * gradient)
    solution = solve(
        lambda t, y: torch.tanh(y @ weight), random(4, 3), T, adjoint=adjoint, adjoint_params=(weight,), rtol=1e-5
    )
    hooked, expected = raw.detach().clone().requires_grad_(), raw
    solution.y.sum().backward()
    reference = solve(
        lambda t, y: torch.tanh(y @ (2 * hooked)), random(4, 3), T, adjoint=adjoint, adjoint_params=(hooked,), rtol=1e-5
    )
    reference.y.sum().backward()
    assert distance(expected.grad, 0.5 * hooked.grad) < 1e-12


class Buffered(Network):
    """A network that also reads a buffer and a frozen parameter, and counts its evaluations in another buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(3, dtype=F64))
        self.register_buffer("count", torch.zeros(()))
        self.frozen = nn.Parameter(torch.ones(3, dtype=F64), requires_grad=False)

    def forward(self, t, y):
        self.count += 1
        return super().forward(t, y) * self.scale * self.frozen


@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("name", ["scale", "frozen"])
def test_buffers_and_frozen_parameters_that_changed_between_forward_and_backward_are_an_error(adjoint, name):
    func = Buffered()
    solution = solve(func, random(4, 3), T, rtol=1e-3, atol=1e-3, adjoint=adjoint)
    getattr(func, name).mul_(3)
    with pytest.raises(RuntimeError, match="an in-place operation has changed"):
        solution.y.sum().backward()


def test_what_the_field_itself_changes_may_change():
    func = Buffered()
    first, second = (solve(func, random(4, 3), T, rtol=1e-3, atol=1e-3) for _ in range(2))
    (first.y + second.y).sum().backward()
    assert func.count > 0


Y0 = random(4, 3)


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: torch.func.grad(lambda y0: f(y0).sum())(random(4, 3)),
        lambda f: torch.func.vmap(f)(random(2, 4, 3)),
        lambda f: torch.func.jvp(f, (random(4, 3),), (random(4, 3),)),
        lambda f: forward_mode(f, random(4, 3)),
        lambda f: torch.func.vmap(lambda factor: factor * f(Y0))(random(2)),
    ],
    ids=["grad", "vmap", "jvp", "forward mode", "vmap of others"],
)
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own forward mode imports it
def test_transforms_are_refused_in_a_sentence(transform):
    func = Network()
    with pytest.raises(NotImplementedError, match=r"a solve does not take part in .* \.backward\(\)"):
        transform(lambda y0: solve(func, y0, T).y)


def forward_mode(function, y0):
    with forward_ad.dual_level():
        return function(forward_ad.make_dual(y0, y0))


def test_solves_without_gradients():
    func = Network()
    with torch.no_grad():
        assert not odeint_adjoint(func, random(3), T).requires_grad
    func.requires_grad_(False)
    assert not odeint_adjoint(func, random(3), T).requires_grad
    assert odeint_adjoint(func, random(3).requires_grad_(), T).requires_grad


class BetweenLayers(nn.Module):
    """A network in the middle of which a solve stands."""

    def __init__(self, adjoint):
        super().__init__()
        self.first, self.func, self.last = nn.Linear(3, 3, dtype=F64), Network(), nn.Linear(3, 1, dtype=F64)
        self.adjoint = adjoint

    def forward(self, x):
        if self.adjoint is None:
            return self.last(odeint(self.func, self.first(x), T))
        return self.last(solve(self.func, self.first(x), T, adjoint=self.adjoint).y)


@pytest.mark.parametrize("adjoint", ["seminorm", "discrete", None])
# torch's compiler asks for them where the state comes in.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_model_around_a_solve_can_be_compiled(adjoint):
    model, x = BetweenLayers(adjoint), random(5, 3)

    def gradients(of):
        return torch.autograd.grad(of(x).square().sum(), [*model.parameters()])

    for found, expected in zip(gradients(torch.compile(model, backend="eager")), gradients(model), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("is_old", [False, True])
@pytest.mark.parametrize("adjoint", ["seminorm", "discrete"])
def test_the_backward_pass_casts_as_the_forward_pass_does(adjoint, is_old, monkeypatch):
    monkeypatch.setattr(casting, "CACHES_GRAPHS_ALONE", not is_old)
    func, y0, seen = nn.Linear(3, 3), random(5, 3).float(), set()

    def note(module, given, response):
        seen.add((response.dtype, torch.is_autocast_enabled("cpu") and torch.is_autocast_cache_enabled()))

    func.register_forward_hook(note)
    for is_cast, expected in ((True, torch.bfloat16), (False, torch.float32)):
        with torch.autocast("cpu", torch.bfloat16, enabled=is_cast):
            y = solve(lambda t, y: func(y), y0, T, adjoint=adjoint, adjoint_params=[*func.parameters()], rtol=1e-2).y
        with torch.autocast("cpu", torch.bfloat16, enabled=not is_cast):
            y.sum().backward()
        assert seen == {(expected, is_cast and not is_old)}, "an old torch keeps nothing that it casts"
        seen.clear()


def test_a_batch_of_gradients_at_once_is_refused_in_a_sentence():
    y0 = random(3)
    with pytest.raises(NotImplementedError, match=r"does not take part .* \(without is_grads_batched or vectorize"):
        torch.autograd.functional.jacobian(lambda y0: solve(Network(), y0, T).y[-1], y0, vectorize=True)


@pytest.mark.parametrize("adjoint", ["seminorm", "discrete"])
def test_replicas_of_data_parallel_are_differentiated(adjoint):
    func = Network()
    replicas = {module: module._replicate_for_data_parallel() for module in func.modules()}
    for module, replica in replicas.items():
        for name, part in module._modules.items():
            setattr(replica, name, replicas[part])
        for name, parameter in module._parameters.items():
            setattr(replica, name, parameter * 1)
    y0 = random(4, 3)
    backward(solve(func, y0, T, adjoint=adjoint).y)
    expected = [parameter.grad.clone() for parameter in func.parameters()]
    func.zero_grad()
    backward(solve(replicas[func], y0, T, adjoint=adjoint).y)
    for parameter, gradient in zip(func.parameters(), expected, strict=True):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-12)
    with pytest.raises(ValueError, match=r"cannot differentiate a replica of nn\.DataParallel"):
        solve(replicas[func], y0, T, adjoint="discrete", compile=True)


def test_a_replica_without_gradients_is_solved_through_its_module():
    """As nn.DataParallel makes them under no_grad: their parameters are detached, and plain attributes."""
    func = Fused()
    replica = func._replicate_for_data_parallel()
    replica.weight = func.weight.detach()
    with torch.no_grad():
        expected = solve(func, random(4, 3), T).y
        assert torch.allclose(solve(replica, random(4, 3), T).y, expected, rtol=1e-9)


class Fused(nn.Module):
    """dy/dt = y * weight, through autograd or by its own field, which counts how many there are."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(random(3, seed=1))
        self.num_fields = 0

    def forward(self, t, y):
        return y * self.weight

    def fused_field(self, y0):
        self.num_fields += 1
        return AutogradField(self, (self.weight,), y0.shape, time_gradient=False)


def test_a_fused_field_is_taken_where_all_parameters_are_named():
    func, y0 = Fused(), random(4, 3)
    for named, num_fields in (((func.weight,), 1), ((func.weight, random(2).requires_grad_()), 1), (None, 2)):
        backward(solve(func, y0, T, adjoint_params=named).y)
        assert func.num_fields == num_fields


def test_a_parameter_that_is_named_twice_counts_once():
    func, y0 = Network(), random(4, 3)
    backward(solve(func, y0, T).y)
    expected = func.second.weight.grad.clone()
    func.zero_grad()
    backward(solve(func, y0, T, adjoint_params=(*func.parameters(), func.second.weight)).y)
    assert torch.equal(func.second.weight.grad, expected)


@pytest.mark.parametrize(
    "adjoint", [Discrete(linearised="solve"), "discrete", "seminorm", "default", Backsolve(make_norm(random(4, 3)))]
)
def test_what_a_solve_keeps_goes_with_its_backward_pass(adjoint):
    func = Network()
    y = solve(func, random(4, 3), T, adjoint=adjoint).y
    kept = weakref.ref(y.grad_fn.plan.differentiation)
    y.sum().backward(retain_graph=True)
    assert kept() is not None
    gc.disable()  # nothing lies in a circle
    try:
        backward(y)
        assert kept() is None
    finally:
        gc.enable()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        backward(y)


def test_a_cache_of_parametrizations_is_refused():
    func = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3, dtype=F64))
    field = type("Field", (nn.Module,), {"forward": lambda self, t, y: self.linear(y)})()
    field.linear = func
    with nn.utils.parametrize.cached():
        with pytest.raises(ValueError, match=r"Leave out cached\(\) around it"):
            solve(field, random(4, 3), T)
        with torch.no_grad():
            solve(field, random(4, 3), T)
    y = solve(field, random(4, 3), T, adjoint=Discrete(linearised="stage")).y
    with nn.utils.parametrize.cached(), pytest.raises(ValueError, match="and so would its backward pass"):
        y.sum().backward()


def test_a_solution_of_one_time_is_not_y0_itself():
    y0 = random(3)
    solve(Network(), y0, T[:1]).y.add_(1)
    assert torch.equal(y0, random(3))


class Uncast(nn.Module):
    """A network that computes in the dtype of its state, whatever autocast says."""

    def __init__(self):
        super().__init__()
        self.network = Network(dtype=torch.float32)

    def forward(self, t, y):
        with torch.autocast("cpu", enabled=False):
            return self.network(t, y)


@pytest.mark.parametrize("adjoint", ["seminorm", "discrete", "default"])
def test_autocast_reaches_func_and_nothing_else(adjoint):
    """Neither the solver's arithmetic nor the products of the way back."""
    func, y0, found, is_solver_cast = Uncast(), random(4, 3).float(), [], set()

    def observe(attempt):
        is_solver_cast.add(torch.is_autocast_enabled("cpu"))

    for is_cast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=is_cast):
            y = solve(func, y0, T, rtol=1e-4, atol=1e-5, adjoint=adjoint, observer=observe).y
            if is_cast:
                y.square().sum().backward(retain_graph=True)
                func.zero_grad()
        y.square().sum().backward()
        found.append([y.detach(), *(parameter.grad for parameter in func.parameters())])
        func.zero_grad(set_to_none=True)
    assert all(map(torch.equal, *found))
    assert is_solver_cast == {False}


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own forward mode imports it
def test_a_tangent_of_what_func_holds_is_refused_too():
    func, y0 = Network(), random(3)
    weight = func.first.weight.detach()
    del func.first.weight
    with forward_ad.dual_level():
        func.first.weight = forward_ad.make_dual(weight, weight)
        with pytest.raises(NotImplementedError, match="forward-mode differentiation"):
            solve(func, y0, T)


def test_a_parameter_that_retains_its_gradient_though_it_is_no_leaf_is_refused():
    raw = random(3, 3).requires_grad_()
    weight = 2 * raw
    weight.retain_grad()
    with pytest.raises(ValueError, match=r"retain_grad.* Look at its gradient by register_hook"):
        solve(lambda t, y: torch.tanh(y @ weight), random(3), T, adjoint_params=(weight,))


@pytest.mark.parametrize("adjoint", ["seminorm", "discrete"])
def test_times_alone_have_a_gradient(adjoint):
    func, t = Network().requires_grad_(False), T.clone().requires_grad_()
    found, expected = (
        torch.autograd.grad(solve(func, y0, t, adjoint=adjoint).y.square().sum(), t)[0]
        for y0 in (random(3), random(3).requires_grad_())
    )
    assert expected.any()
    assert torch.equal(found, expected)
