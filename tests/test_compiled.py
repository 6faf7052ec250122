"""Compiled attempts do what eager ones do."""

import functools
import gc
import math
import os
import weakref

import pytest
import torch
from problems import F64, Network, Pair, differentiate, distance, random, steps
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from flows.continuous import FlowField
from flows.networks import ConcatSquash
from torchadjoint import METHODS, Backsolve, compiled, compiling, solve
from torchadjoint.quick_tanh import QuickTanh, quick_tanh

T = torch.tensor([0.0, 0.4, 2.0, 3.0], dtype=F64)
KINKS = (0.5, 1.7, 2.0)
WARM = Backsolve(warm_start=True)
TIGHT = dict(rtol=1e-6, atol=1e-8)


@pytest.fixture
def caches(monkeypatch):
    """Nothing is compiled yet, and no more than four functions are kept."""
    monkeypatch.setattr(compiled, "compiled", functools.lru_cache(maxsize=4)(compiling.compiled.__wrapped__))


@pytest.fixture
def traced(monkeypatch, caches):
    """What would be compiled runs as it is, which is enough to compare numbers."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.fixture
def graphs(monkeypatch, caches):
    """torch.compile finds out what to compile, but makes no kernels; each graph that it found, as a weak reference.

    Two forms of a function are kept.
    """
    found, compile = [], torch.compile

    def backend(graph, inputs):
        found.append(weakref.ref(graph))
        return graph.forward

    monkeypatch.setattr(
        torch, "compile", lambda function, **_: compile(function, fullgraph=True, dynamic=False, backend=backend)
    )
    with torch._dynamo.config.patch(recompile_limit=2):
        yield found


@pytest.fixture
def looks(monkeypatch, caches):
    """The functions that torch was asked to look at, one entry a call; kernels are the operations as they are."""
    calls, call = [], compiling.Compiled.__call__

    def spy(self, *arguments):
        calls.append(self.code.co_name)
        return call(self, *arguments)

    monkeypatch.setattr(compiling, "make_kernels", lambda graph, examples: graph.forward)
    monkeypatch.setattr(compiling.Compiled, "__call__", spy)
    return calls


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
    # Eager attempts leave away last stages that nobody needs, and the last step's stages stay for its reversal.
    used = (options.get("method", "dopri5"), options.get("adjoint_method", "dopri5"))
    is_fsal = all(METHODS[name].is_fsal for name in used)
    is_discrete = options.get("adjoint") == "discrete"
    for own, expected, is_equal in (
        (ours.statistics.forward, eager.statistics.forward, is_fsal),
        (ours.statistics.backward, eager.statistics.backward, is_fsal and not is_discrete),
    ):
        assert own.nfe == expected.nfe if is_equal else own.nfe >= expected.nfe
    if is_discrete:
        assert ours.statistics.backward.nfe < eager.statistics.backward.nfe + METHODS[used[0]].num_stages
    assert distance(ours.y, eager.y) < 1e-9
    for own, expected in zip(ours.gradients, eager.gradients, strict=True):
        assert (own is None) == (expected is None)
        assert own is None or (own - expected).norm() <= 1e-9 * expected.norm()
    return ours


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("times", [T, T.flip(0), T[[0, -1]]], ids=["increasing", "decreasing", "one segment"])
@pytest.mark.parametrize(
    "options", [{}, dict(adjoint=WARM), dict(adjoint_rtol=1e-7), dict(adjoint="discrete")], ids=str
)
def test_steps_and_gradients_are_those_of_eager_attempts(times, options):
    t = times.clone().requires_grad_()
    ours = compare(Kinked(), random(4, 3), t, jump_t=KINKS, **TIGHT, **options)
    assert ours.statistics.forward.num_rejected > 0
    assert t.grad.abs().min() > 0


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("adjoint", ["seminorm", "discrete"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method(method, adjoint):
    options = dict(rtol=1e-4, atol=1e-5) if METHODS[method].is_adaptive else dict(step_size=0.1)
    compare(Kinked(), random(4, 3), T.clone().requires_grad_(), jump_t=KINKS, method=method, adjoint=adjoint, **options)


@pytest.mark.usefixtures("traced")
def test_the_backward_solve_by_another_method():
    compare(Network(), random(4, 3), T, method="bosh3", adjoint_method="dopri8", rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize(
    "options", [dict(norm=lambda y: y.abs().amax()), dict(atol=torch.ones(3)), dict(adjoint="default")]
)
def test_what_cannot_be_compiled_is_refused(options):
    with pytest.raises(ValueError, match="compile=True needs"):
        solve(Network(), random(3), T, compile=True, **options)


@pytest.mark.parametrize(
    ("adjoint", "names"), [("seminorm", ["attempt_backward", "slope_backward"]), ("discrete", ["reverse_step"])]
)
def test_torch_looks_at_the_module_once_a_solve(looks, adjoint, names):
    func, options = Kinked(), dict(jump_t=KINKS, adjoint=adjoint, **TIGHT)
    compare(func, random(4, 3), T, **options)
    looks.clear()
    with torch.no_grad():
        func.rates *= 0.9
    ours = compare(func, random(4, 3), T * 0.9, **options)
    assert ours.statistics.forward.num_accepted >= 10
    assert sorted(looks) == sorted(["attempt_forward", "slope_forward", *names])


def test_an_attribute_that_the_field_writes_is_written_in_every_call(looks):
    class Remembering(Network):
        def forward(self, t, y):
            self.latest = t + 0
            return super().forward(t, y)

    func = Remembering()
    compare(func, random(4, 3), T, **TIGHT)
    with torch.no_grad():
        solve(func, random(4, 3), T, compile=True, **TIGHT)
    assert func.latest >= T[-1] - 1e-6
    assert len(looks) > 20


@pytest.mark.usefixtures("traced")
def test_observers_see_what_they_see_of_eager_attempts():
    def seen(**options):
        errors, states = [], []

        def observer(attempt):
            if attempt.is_accepted is not None:
                errors.extend(attempt.errors.values())
                states.append(attempt.state)

        differentiate(Network(), random(4, 3), T, observer=observer, **TIGHT, **options)
        return torch.tensor(errors), torch.cat(states)

    for own, expected in zip(seen(compile=True), seen(), strict=True):
        assert expected.norm() > 0
        torch.testing.assert_close(own, expected, rtol=1e-6, atol=1e-6)


def test_a_derivative_of_another_shape_is_said():
    class Summed(Network):
        def forward(self, t, y):
            return super().forward(t, y).sum(dim=0)

    with pytest.raises(ValueError, match=r"the vector field returned shape \(3,\) for a state of shape \(4, 3\)"):
        solve(Summed(), random(4, 3), T, compile=True)


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("adjoint", ["seminorm", "discrete"])
def test_a_tuple_state(adjoint):
    compare(Pair(), Pair.start(), T, adjoint=adjoint, **TIGHT)


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("options", [dict(interp="cubic"), dict(perturb=True), dict(interp="cubic", perturb=True)])
def test_fixed_steps_between_which_there_are_outputs(options):
    options = dict(method="rk4", step_size=0.3, jump_t=KINKS, adjoint="discrete", **options)
    compare(Kinked(), random(4, 3), T.clone().requires_grad_(), **options)


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("adjoint", ["seminorm", "discrete"])
def test_a_gradient_asked_for_again_is_the_same(adjoint):
    func, y0 = Kinked(), random(4, 3).requires_grad_()
    solution = solve(func, y0, T, jump_t=KINKS, adjoint=adjoint, compile=True, **TIGHT)
    once, again = (torch.autograd.grad(solution.y[1:].sum(), y0, retain_graph=True) for _ in range(2))
    assert torch.equal(*once, *again)


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("adjoint", ["seminorm", "discrete"])
def test_y0_may_change_before_the_way_back(adjoint):
    def gradient(change):
        func, y0 = Network(), random(4, 3).requires_grad_()
        y = solve(func, y0, T, adjoint=adjoint, compile=True, **TIGHT).y
        with torch.no_grad():
            y0.mul_(change)
        return torch.autograd.grad(y[1:].square().sum(), func.first.weight)[0]

    assert torch.equal(gradient(change=1), gradient(change=3))


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("adjoint", ["seminorm", "discrete"])
def test_a_field_without_parameters(adjoint):
    class Rotation(nn.Module):
        def forward(self, t, y):
            return torch.stack([-y[1], y[0]])

    compare(Rotation(), random(2), T, adjoint=adjoint, **TIGHT)


@pytest.mark.skipif("ATEN_CPU_CAPABILITY" in os.environ, reason="torch's compiler mixes kernels then")
def test_it_is_compiled_once_for_a_class_of_field_and_a_shape():
    compare(Kinked(), random(4, 3), T, jump_t=KINKS, **TIGHT)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):
            func = Kinked()
            with torch.no_grad():
                func.rates.copy_(random(len(KINKS) + 1, seed=seed))
            compare(func, random(4, 3, seed=seed), T * 0.9, jump_t=KINKS, rtol=1e-5, atol=1e-6, adjoint=WARM)


class Scaled(nn.Module):
    """A number that torch.compile takes as a constant, times the state of one or more tensors."""

    def __init__(self, scale: float):
        super().__init__()
        self.scale = scale

    def forward(self, t, y):
        return self.scale * y if isinstance(y, torch.Tensor) else tuple(self.scale * piece for piece in y)


class Tied(nn.Module):
    """A network with a weight in two places of one module, a layer in two others, and its weight in a third layer."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3, dtype=F64)
        self.first.weight = self.weight = nn.Parameter(random(3, 3))
        self.layers = nn.ModuleList([self.first, nn.Linear(3, 3, dtype=F64), self.first])
        self.layers[1].weight = self.weight

    def forward(self, t, y):
        for layer in self.layers:
            y = torch.tanh(layer(y))
        return y @ self.weight


LOOSE = dict(rtol=1e-2, atol=1e-2, compile=True)


def test_models_of_any_number_of_widths(graphs):
    with torch.no_grad():
        for width in (4, 5, 6, 7):
            solve(Network(width=width), random(2, 3), T, **LOOSE)


def test_models_of_different_structure_do_not_drive_each_other_out(graphs):
    untied = Tied()
    untied.layers[1].weight = nn.Parameter(random(3, 3))
    other_class = type("Other", (Network,), {})
    pairs = [(Network(width=4), Network(width=5)), (Network(), other_class()), (Tied(), untied)]
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for func in (func for pair in pairs for func in pair):
            solve(func, random(2, 3), T[[0, 1]], **LOOSE)


def test_models_that_differ_in_a_number(graphs):
    for scale in (0.1, 0.2, 0.3, 0.4):
        y = solve(Scaled(scale), random(2), T, **LOOSE).y
        assert distance(y, random(2) * torch.exp(scale * T)[:, None]) < 1e-2


def test_fields_of_tuples_of_one_size(graphs):
    shapes = [[(2, 3), (6,)], [(6,), (2, 3)], [(3, 2), (6,)]]
    for scale, (first, second) in zip((0.1, 0.2, 0.3), shapes, strict=True):
        for kind in (Scaled, type("Other", (Scaled,), {})):
            y, z = solve(kind(scale), (random(*first), random(*second)), T, **LOOSE).y
            assert distance(y[-1], random(*first) * torch.exp(scale * T[-1])) < 1e-2
            assert distance(z[-1], random(*second) * torch.exp(scale * T[-1])) < 1e-2


def test_a_start_that_a_graph_has_made(graphs):
    """As an encoder's output is."""
    y0 = 2 * random(4, 3).requires_grad_()
    solve(Network(), y0, T[[0, 1]], **LOOSE).y.sum().backward()
    assert graphs


@pytest.mark.parametrize("probe", [None, random(4, 2).sign()], ids=["exact", "estimated"])
def test_the_field_of_a_flow(graphs, probe):
    func = FlowField(ConcatSquash([2, 5, 4, 2], "tanh").double(), probe)
    compare(func, (random(4, 2), random(4)), T[[0, 1]], rtol=1e-4, atol=1e-4)
    assert graphs


@pytest.mark.parametrize("adjoint", ["seminorm", "discrete"])
def test_a_weight_in_two_places(graphs, adjoint):
    compare(Tied(), random(2, 3), T[[0, 1]], rtol=1e-4, atol=1e-4, adjoint=adjoint)


def test_what_was_not_used_for_long_is_released(graphs):
    with torch.no_grad():
        for size in (2, 3, 4):
            solve(Scaled(0.1), random(size), T, **LOOSE)
        solve(Scaled(0.1), random(3), T, **LOOSE)
    gc.collect()
    # Of each size a slope and an attempt.
    assert [graph() is not None for graph in graphs] == [False, False, True, True, True, True]


def test_no_more_than_some_are_kept():
    assert compiling.compiled.cache_info().maxsize < 100


def test_what_cannot_be_compiled_is_said(graphs):
    class Undecided(nn.Module):
        def forward(self, t, y):
            return y if y.sum() > 0 else -y

    with pytest.raises(ValueError, match=r"func cannot be compiled as a whole \(.+\): leave compile away"):
        solve(Undecided(), random(1), T, **LOOSE)


def test_what_cannot_be_differentiated_when_compiled_is_said_before_the_solve(graphs):
    class Detached(Network):
        def forward(self, t, y):
            return super().forward(t, y).detach().requires_grad_()

    with torch.no_grad():
        solve(Detached(), random(2, 3), T, **LOOSE)
    with pytest.raises(ValueError, match=r"func cannot be compiled as a whole \(.+\): leave compile away"):
        solve(Detached(), random(2, 3), T, **LOOSE)


def test_what_changes_from_solve_to_solve_is_refused(graphs):
    func = Scaled(0.1)
    solve(func, random(1), T, **LOOSE)
    func.scale = 0.2
    solve(func, random(1), T, **LOOSE)
    func.scale = 0.3
    with pytest.raises(ValueError, match=r"func cannot be .* compiled again and again"):
        solve(func, random(1), T, **LOOSE)


def test_a_field_of_tuples_that_changes_is_refused_too(graphs):
    """Every solve wraps it anew, but its parameter stays."""
    func = Scaled(0.1)
    func.unused = nn.Parameter(torch.ones(1))
    with torch.no_grad():
        for func.scale in (0.1, 0.2):
            solve(func, (random(1),), T, **LOOSE)
        func.scale = 0.3
        with pytest.raises(ValueError, match=r"func cannot be .* compiled again and again"):
            solve(func, (random(1),), T, **LOOSE)


def test_what_changes_with_every_call_is_refused_at_once(graphs):
    class Counting(Scaled):
        def forward(self, t, y):
            self.scale += 1
            return super().forward(t, y)

    with pytest.raises(ValueError, match=r"func cannot be .* changes whenever it is called"):
        solve(Counting(0), random(1), T, **LOOSE)
    assert len(graphs) == 1


def test_the_quick_tanh_is_tanh():
    x = torch.cat(
        [torch.linspace(-20, 20, 100_001), torch.logspace(-30, 0, 1_001), torch.tensor([math.inf, -math.inf])]
    )
    expected = torch.tanh(x.double())
    assert ((quick_tanh(x) - expected).abs() <= 4 * torch.finfo(torch.float32).eps * expected.abs()).all()
    assert quick_tanh(torch.tensor(math.nan)).isnan()


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_the_quick_tanh_takes_the_place_of_tanh_in_float32_alone(dtype):
    graph = make_fx(lambda x: torch.tanh(x) * 2 + torch.tanh(2 * x))(random(3, dtype=dtype)).graph
    for node in graph.nodes:
        if node.op != "output":
            node.meta["val"] = random(3, dtype=dtype)
    QuickTanh()(graph)
    graph.lint()
    is_there = bool(graph.find_nodes(op="call_function", target=torch.ops.aten.tanh.default))
    assert is_there == (dtype == F64)
    x = random(3, seed=1, dtype=dtype)
    found = torch.fx.GraphModule(nn.Module(), graph)(x)
    torch.testing.assert_close(found, torch.tanh(x) * 2 + torch.tanh(2 * x), rtol=1e-6, atol=0)
