"""The tensors that a function reads and that require a gradient: `odeint` differentiates with respect to them."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .held import EVERY_MODULES
from .problem import State


class _Checked(nn.Module):
    """`func`, whose graphs must end in `known` tensors and what it was called with."""

    def __init__(self, func: Callable[..., Any], known: tuple[Tensor, ...]):
        super().__init__()
        self.func = func
        self.known = known

    def forward(self, t: Tensor, y: State) -> State:
        derivative = self.func(t, y)
        if torch.is_grad_enabled():
            allowed = {id(tensor) for tensor in (*self.known, *_leaves([t, *_tensors(y)]))}
            if not all(id(leaf) in allowed for leaf in _leaves(_tensors(derivative))):
                raise ValueError(
                    "func reads a tensor that requires a gradient and that it did not read at the first time: name all "
                    "such tensors, by an nn.Module or in solve(..., adjoint_params=(...))"
                )
        return derivative

    def __getattr__(self, name: str) -> Any:
        # Callbacks.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.func, name)


def capture(func: Callable[..., Any], y0: State, t: Tensor) -> tuple[Callable[..., Any], tuple[Tensor, ...] | None]:
    """The function, checked, and the leaves that an evaluation at the first time reads besides its arguments.

    A module that reads no others than its parameters is returned as it is, with None.
    """
    own: tuple[Tensor, ...] = ()
    if isinstance(func, nn.Module):
        if not _may_read_others(func):
            return func, None
        own = tuple(func.parameters())
    if not callable(func) or not isinstance(t, Tensor) or t.dim() != 1 or len(t) == 0:
        return func, ()  # which the solve refuses
    if not torch.is_grad_enabled() or not all(isinstance(tensor, Tensor) for tensor in _tensors(y0)):
        return func, ()
    detached = [tensor.detach().requires_grad_(tensor.is_floating_point()) for tensor in _tensors(y0)]
    time = t.detach()[0].to(detached[0]) if detached else t.detach()[0]
    derivative = func(time, tuple(detached) if isinstance(y0, tuple) else detached[0])
    inputs = {id(tensor) for tensor in (*detached, *own)}
    others = tuple(leaf for leaf in _leaves(_tensors(derivative)) if id(leaf) not in inputs)
    if isinstance(func, nn.Module) and not others:
        return func, None
    known = (*own, *others)
    return _Checked(func, known), known


def _may_read_others(func: nn.Module) -> bool:
    """Whether a module has tensors that require a gradient besides its parameters."""
    values = [
        value
        for module in func.modules()
        for name, value in (*vars(module).items(), *module._buffers.items())
        if name not in EVERY_MODULES
    ]
    return any(tensor.requires_grad for tensor in _tensors_in(values))


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in a value and in the modules, lists, tuples and dicts that it is made of, circles or not."""
    left, seen = [value], set()
    while left:
        value = left.pop()
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, nn.Module):
            yield from value.parameters()
        elif isinstance(value, list | tuple | dict) and id(value) not in seen:
            seen.add(id(value))
            left.extend(value.values() if isinstance(value, dict) else value)


def _tensors(state: Any) -> list[Any]:
    return list(state) if isinstance(state, tuple | list) else [state]


def _leaves(tensors: Iterable[Any]) -> list[Tensor]:
    """The tensors in which the graphs of these end, each once."""
    seen = set()
    tensors = [tensor for tensor in tensors if isinstance(tensor, Tensor)]
    found = {id(tensor): tensor for tensor in tensors if tensor.is_leaf and tensor.requires_grad}
    nodes = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            found[id(leaf)] = leaf
        nodes.extend(below for below, _ in node.next_functions if below is not None)
    return list(found.values())
