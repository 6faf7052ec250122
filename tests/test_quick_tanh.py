"""The compiler's tanh of float32 is tanh, and takes its place there alone."""

import math

import pytest
import torch
from problems import F64, random
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from torchadjoint.quick_tanh import QuickTanh, quick_tanh


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
