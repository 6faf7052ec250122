"""The tensors that a function reads and that require a gradient: `odeint` differentiates with respect to them."""

import contextlib
import functools
import math
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge

from .held import EVERY_MODULES
from .problem import State

Edge = tuple[Node, int]
"""What computed a tensor, and which of its results the tensor is."""


class _Checked(nn.Module):
    """`func`, whose graphs must end in `known` tensors and what it was called with.

    An end that only one graph has was made in that evaluation, such as a time of its own: it is none that gets lost.

    Args:
        func: the function.
        known: the tensors that require a gradient.
        num_asked: how many graphs stand for all, if they end in nothing else: the first two are of the first evaluation
            and of the last step.
    """

    def __init__(self, func: Callable[..., Any], known: tuple[Tensor, ...], *, num_asked: float = math.inf):
        super().__init__()
        self.func = func
        self.known = known
        self.stops = {_edge(tensor): tensor for tensor in known if not tensor.is_leaf}
        self.num_asked = num_asked
        self.others: list[Tensor] = []
        """In which the last graph ended."""

    def forward(self, t: Tensor, y: State) -> State:
        # If nothing is known, perhaps nothing is differentiated, and no graph would be made.
        with contextlib.nullcontext() if self.known else torch.enable_grad():
            derivative = self.func(t, y)
            if self.num_asked and torch.is_grad_enabled():
                self._check(derivative, [t, *_tensors(y)])
        return derivative

    def _check(self, derivative: State, arguments: list[Tensor]) -> None:
        allowed = {id(tensor) for tensor in (*self.known, *_ends(map(_edge, arguments), {}))}
        ends = _ends(map(_edge, _tensors(derivative)), self.stops)
        others = [end for end in ends if id(end) not in allowed]
        if any(other is end for other in self.others for end in others):
            raise ValueError(
                "func reads a tensor that requires a gradient, is no parameter, and was not found at the first time: "
                "name all such tensors, by an nn.Module or in solve(..., adjoint_params=(...))"
            )
        self.others = others
        self.num_asked -= not others

    def __getattr__(self, name: str) -> Any:
        # Callbacks.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.func, name)


def capture(func: Callable[..., Any], y0: State, t: Tensor) -> tuple[Callable[..., Any], tuple[Tensor, ...] | None]:
    """The function, checked, and what an evaluation at the first time reads besides its arguments.

    These are leaves, or tensors computed from leaves where the function holds them. A module that reads no others than
    its parameters comes with None, and one that holds no others is not evaluated.
    """
    is_module = isinstance(func, nn.Module)
    unread = None if is_module else ()
    if not callable(func) or not isinstance(t, Tensor) or t.dim() != 1 or len(t) == 0:
        return func, unread  # which the solve refuses
    if not torch.is_grad_enabled() or not all(isinstance(tensor, Tensor) for tensor in _tensors(y0)):
        return func, unread
    own = tuple(parameter for parameter in func.parameters() if parameter.requires_grad) if is_module else ()
    held = [tensor for tensor in _tensors_in(func) if tensor.requires_grad]
    if is_module and {*map(id, held)} <= {*map(id, own)}:
        return _checked(func, own, num_asked=2 if own else math.inf), None
    detached = [tensor.detach().requires_grad_(tensor.is_floating_point()) for tensor in _tensors(y0)]
    time = t.detach()[0].to(detached[0]) if detached else t.detach()[0]
    derivative = func(time, tuple(detached) if isinstance(y0, tuple) else detached[0])
    inputs = {id(tensor) for tensor in (*detached, *own)}
    held = [tensor for tensor in held if _may_be_an_end(tensor, time.device)]
    ends = _independent_ends(_tensors(derivative), held, own)
    others = tuple(end for end in ends if id(end) not in inputs)
    if is_module and not others:
        return _checked(func, own), None
    known = (*own, *others)
    return _Checked(func, known), known


def _checked(func: nn.Module, own: tuple[Tensor, ...], *, num_asked: float = math.inf) -> nn.Module:
    """A module that is differentiated with respect to its parameters."""
    return func if hasattr(func, "fused_field") else _Checked(func, own, num_asked=num_asked)


def _may_be_an_end(tensor: Tensor, device: torch.device) -> bool:
    """Whether a solve can be differentiated with respect to this tensor itself, and nobody would notice."""
    is_taken = tensor.layout is torch.strided and tensor.is_floating_point() and tensor.device == device
    return is_taken and not tensor.is_leaf and not tensor.retains_grad


def _independent_ends(tensors: Iterable[Any], held: Iterable[Tensor], own: Iterable[Tensor]) -> list[Tensor]:
    """Where the graphs of these end: in `held` tensors, which spares what lies behind them, and in leaves.

    In leaves alone if a held one depends on another end or an `own` parameter: its part of the gradient would count
    twice.
    """
    edges = [*map(_edge, tensors)]
    ends = _ends(edges, {_edge(tensor): tensor for tensor in held})
    stops = {_edge(end): end for end in (*ends, *own)}
    behind = (edge for end in ends if not end.is_leaf for edge in end.grad_fn.next_functions)
    if any(_edge(end) in stops for end in _ends(behind, stops)):
        return _ends(edges, {})
    return ends


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in a value and in what it is made of, circles or not.

    That is: modules, lists, tuples, dicts, and what functions close over or are bound to.
    """
    left, seen = [value], set()
    while left:
        value = left.pop()
        if isinstance(value, Tensor):
            yield value
        elif id(value) not in seen:
            seen.add(id(value))
            # A log of numbers may be long.
            left.extend(part for part in _parts(value) if isinstance(part, WALKED))


WALKED = (Tensor, nn.Module, list, tuple, dict, types.FunctionType, types.MethodType, functools.partial)
"""What tensors may be in."""


def _parts(value: Any) -> Iterator[Any]:
    if isinstance(value, nn.Module):
        for module in value.modules():
            yield from module.parameters(recurse=False)
            yield from (part for _, part in module._buffers.items())
            yield from (part for name, part in vars(module).items() if name not in EVERY_MODULES)
    elif isinstance(value, list | tuple):
        yield from value
    elif isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, types.FunctionType):
        for cell in value.__closure__ or ():
            with contextlib.suppress(ValueError):  # it is empty
                yield cell.cell_contents
        yield from value.__defaults__ or ()
        yield value.__kwdefaults__
    elif isinstance(value, types.MethodType):
        yield from (value.__self__, value.__func__)
    elif isinstance(value, functools.partial):
        yield from (value.func, value.args, value.keywords)


def _tensors(state: Any) -> list[Any]:
    return list(state) if isinstance(state, tuple | list) else [state]


def _edge(tensor: Any) -> Edge | None:
    """None of what has no graph."""
    return get_gradient_edge(tensor)[:2] if isinstance(tensor, Tensor) and tensor.requires_grad else None


def leaves_behind(tensor: Tensor) -> list[Tensor]:
    """What a tensor was computed from, as far as it gets a gradient; itself if it is a leaf that does."""
    return _ends([_edge(tensor)], {})


def _ends(edges: Iterable[Edge | None], stops: dict[Edge, Tensor]) -> list[Tensor]:
    """The tensors in which the graphs end that begin there, each once: leaves, and what is among the `stops`."""
    found, seen, edges = {}, set(), [*edges]
    while edges:
        edge = edges.pop()
        if edge is None or edge[0] is None or edge in seen:
            continue
        seen.add(edge)
        node = edge[0]
        end = stops.get(edge, getattr(node, "variable", None))
        if end is not None:
            found[id(end)] = end
        elif node not in seen:
            seen.add(node)
            edges.extend(node.next_functions)
    return list(found.values())
