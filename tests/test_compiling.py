"""What is compiled is shared, kept, released, and refused where it cannot be."""

import gc
from types import SimpleNamespace

import pytest
import torch
from problems import F64, Network, Tied, distance, random
from torch import nn

from torchadjoint import compiling, solve

T = torch.tensor([0.0, 0.4, 2.0, 3.0], dtype=F64)


class Scaled(nn.Module):
    """A number that torch.compile takes as a constant, times the state of one or more tensors."""

    def __init__(self, scale: float):
        super().__init__()
        self.scale = scale

    def forward(self, t, y):
        return self.scale * y if isinstance(y, torch.Tensor) else tuple(self.scale * piece for piece in y)


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


RATE = 1.0


class Growing(nn.Module):
    """Growth at a rate that is no attribute."""

    def forward(self, t, y):
        return RATE * y


@pytest.mark.filterwarnings("ignore:Skipping serialization of")  # that of torch 2.6 says so
def test_a_global_of_the_user_that_changes_is_seen(caches, monkeypatch):
    func, y0 = Growing(), random(2)
    with torch.no_grad():
        for rate in (1.0, 0.5):
            monkeypatch.setitem(globals(), "RATE", rate)
            torch.testing.assert_close(solve(func, y0, T, **LOOSE).y, solve(func, y0, T, rtol=1e-2, atol=1e-2).y)


@pytest.mark.parametrize(
    ("name", "is_asked"),
    [
        ("G['___unnamed_scope_140'].RATE", True),  # of a module that sys.modules does not have
        ("G['__import_user_dot_module'].RATE", True),
        ("G['__import_torch_dot_nn'].Module", False),
        ("G['len']", False),
        ("func.rate", True),
        ("shape[0]", False),
    ],
)
def test_which_guards_are_asked(name, is_asked):
    assert compiling._are_asked(["shape"], [SimpleNamespace(name=name)]) == [is_asked]


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


def test_what_is_refused_is_refused_every_time(graphs):
    class Counting(Scaled):
        def forward(self, t, y):
            self.scale += 1
            return super().forward(t, y)

    func = Counting(0)
    for _ in range(4):
        with pytest.raises(ValueError, match=r"func cannot be .* changes whenever it is called"):
            solve(func, random(1), T, **LOOSE)


def test_dtypes_do_not_drive_each_other_out(graphs):
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for dtype in (F64, torch.float32, F64):
            solve(Network(dtype=dtype), random(2, 3, dtype=dtype), T[[0, 1]].to(dtype), **LOOSE)


@pytest.mark.parametrize("adjoint", ["seminorm", "discrete"])
def test_a_compiled_field_is_cast_as_it_is_without(graphs, adjoint):
    found, y0 = [], random(2, 3, dtype=torch.float32)
    for compile in (False, True):
        func = Network(dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            y = solve(func, y0, T.float(), rtol=1e-2, atol=1e-2, adjoint=adjoint, compile=compile).y
        y.square().sum().backward()
        found.append([y.detach(), *(parameter.grad for parameter in func.parameters())])
    torch.testing.assert_close(*found, rtol=0.05, atol=0.05)
    exact = solve(Network(dtype=torch.float32), y0, T.float(), rtol=1e-2, atol=1e-2).y
    assert not torch.equal(found[1][0], exact), "it was cast"
