"""The compiler's tanh is tanh, and takes its place in float32 and float64 alone."""

import math

import pytest
import torch
from problems import F64, random
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from torchadjoint.compiling import make_kernels
from torchadjoint.quick_tanh import QuickTanh, quick_tanh

F32 = torch.float32


@pytest.mark.parametrize("dtype", [F32, F64])
def test_the_quick_tanh_is_tanh(dtype):
    smallest = math.log10(torch.finfo(dtype).tiny)
    x = torch.cat([torch.linspace(-20, 20, 100_001), torch.logspace(smallest, 1, 1_001, dtype=F64)]).to(dtype)
    x = torch.cat([x, x.new_tensor([math.inf, -math.inf])])
    # float64's own is exact to half a unit.
    expected = torch.tanh(x.double())
    assert ((quick_tanh(x) - expected).abs() <= 4 * torch.finfo(dtype).eps * expected.abs()).all()
    assert quick_tanh(x).abs().max() == 1


@pytest.mark.parametrize("dtype", [F32, F64])
def test_the_quick_tanh_of_nan_is_nan(dtype):
    assert quick_tanh(torch.tensor(math.nan, dtype=dtype)).isnan()


@pytest.mark.filterwarnings("ignore:Skipping serialization of")  # that of torch 2.6 says so
def test_the_kernels_have_it_too():
    x = torch.cat([torch.linspace(-20, 20, 1_003, dtype=F64), torch.tensor([math.inf, -math.inf, math.nan], dtype=F64)])
    inputs = (x.float(), torch.cat([x, torch.linspace(8.8, 19.2, 20_000, dtype=F64)]))
    kernels = torch.compile(lambda *given: tuple(map(torch.tanh, given)), backend=make_kernels)
    for found, given in zip(kernels(*inputs), inputs, strict=True):
        torch.testing.assert_close(
            found, quick_tanh(given), rtol=2 * torch.finfo(given.dtype).eps, atol=0, equal_nan=True
        )
        assert not torch.equal(found, torch.tanh(given))
        assert found[found.isfinite()].abs().max() == 1


@pytest.mark.parametrize("dtype", [F32, F64, torch.bfloat16])
def test_the_quick_tanh_takes_the_place_of_tanh_where_it_is_known(dtype):
    graph = make_fx(lambda x: torch.tanh(x) * 2 + torch.tanh(2 * x))(random(3).to(dtype)).graph
    for node in graph.nodes:
        if node.op != "output":
            node.meta["val"] = random(3).to(dtype)
    QuickTanh()(graph)
    graph.lint()
    is_there = bool(graph.find_nodes(op="call_function", target=torch.ops.aten.tanh.default))
    assert is_there == (dtype == torch.bfloat16)
    x = random(3, seed=1).to(dtype)
    found = torch.fx.GraphModule(nn.Module(), graph)(x)
    torch.testing.assert_close(found, torch.tanh(x) * 2 + torch.tanh(2 * x), rtol=1e-6, atol=0)


def test_tanh_of_whole_numbers_stays():
    graph = make_fx(torch.tanh, tracing_mode="fake")(torch.arange(3)).graph
    QuickTanh()(graph)
    assert graph.find_nodes(op="call_function", target=torch.ops.aten.tanh.default)
