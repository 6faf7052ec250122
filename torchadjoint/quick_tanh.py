"""tanh on a CPU as a quotient of polynomials, in what `compiling` compiles.

torch's own is exact to half a unit in the last place. In float64 it takes seven times as long (AMD EPYC, AVX2): as much
as the products of a small network.
"""

from itertools import zip_longest

import torch
from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

LARGEST = {torch.float32: 9.2, torch.float64: 19.1}
"""From here on tanh is 1 in a dtype."""
TERMS = {torch.float32: 7, torch.float64: 15}
"""How many of Lambert's continued fraction (1768) are as good as a dtype up to half of that."""


def _convergent(terms: int, before: list[int], latest: list[int]) -> list[int]:
    """Coefficients in powers of x^2 of a side of x / (1 + x^2 / (3 + x^2 / (5 + ...))), cut off.

    Args:
        terms: how many.
        before: the coefficients after none.
        latest: those after the first.
    """
    for term in range(2, terms + 1):
        summands = zip_longest([(2 * term - 1) * of_latest for of_latest in latest], [0, *before], fillvalue=0)
        before, latest = latest, [sum(pair) for pair in summands]
    return latest


NUMERATOR = {dtype: _convergent(terms, [], [1]) for dtype, terms in TERMS.items()}
"""That of tanh(x) / x."""
DENOMINATOR = {dtype: _convergent(terms, [1], [1]) for dtype, terms in TERMS.items()}


def quick_tanh(x: Tensor) -> Tensor:
    """tanh(x), to four units in the last place of float32 or float64.

    With tanh(x / 2) = p / q, tanh(x) = 2 p q / (p^2 + q^2).
    """
    largest = LARGEST[x.dtype]
    half = torch.clamp(x, -largest, largest) * 0.5
    # What is computed here is computed again wherever it is used, until the compiler has found the repetitions. That
    # takes minutes if it is much. A square is one use, a product of two factors two.
    square = half.square()
    p, q = half * _polynomial(NUMERATOR[x.dtype], square), _polynomial(DENOMINATOR[x.dtype], square)
    return 2 * p * q / (p.square() + q.square())


def _polynomial(coefficients: list[int], x: Tensor) -> Tensor:
    total = x * coefficients[-1] + coefficients[-2]
    for coefficient in coefficients[-3::-1]:
        total = total * x + coefficient
    return total


class QuickTanh(CustomGraphPass):
    """Puts `quick_tanh` in the place of tanh in a graph of the compiler."""

    def __call__(self, graph: fx.Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.tanh.default):
            value = node.meta["val"]
            if value.dtype in LARGEST and value.device.type == "cpu":
                self._replace(node)

    def uuid(self) -> bytes:
        """What changes with this file, so that nothing is taken from an older cache."""
        return get_hash_for_files((__file__,))

    @staticmethod
    def _replace(node: fx.Node) -> None:
        graph = node.graph
        traced = make_fx(quick_tanh, decomposition_table=select_decomp_table())(node.meta["val"])
        with graph.inserting_before(node):
            copies = dict.fromkeys(traced.graph.find_nodes(op="placeholder"), node.args[0])
            output = graph.graph_copy(traced.graph, copies)
        node.replace_all_uses_with(output)
        graph.erase_node(node)
