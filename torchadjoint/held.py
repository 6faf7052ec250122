"""What modules hold: the backward pass evaluates the field again, and must read what the forward pass read."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass
class Held:
    """A tensor or a module that a module holds."""

    holder: dict[str, Any]
    name: str
    value: Tensor | nn.Module
    version: int
    """Of a tensor: grows when it is changed in place."""

    @property
    def is_as_it_was(self) -> bool:
        """Whether it has been neither replaced nor changed."""
        return self.holder.get(self.name) is self.value and _version(self.value) == self.version


def held_by(func: Any) -> list[Held]:
    """All that the modules of `func` hold: parameters, buffers, parts, plain attributes. Nothing if it is no module."""
    if not isinstance(func, nn.Module):
        return []
    held = []
    for module in func.modules():
        attributes = vars(module)
        held += [
            Held(attributes, name, attributes[name], attributes[name]._version)
            for name in attributes.keys() - EVERY_MODULES
            if isinstance(attributes[name], Tensor)
        ]
        for holder in (module._parameters, module._buffers, module._modules):
            held += [Held(holder, name, value, _version(value)) for name, value in holder.items() if value is not None]
    return held


EVERY_MODULES = frozenset(vars(nn.Module()))
"""Attributes that every module has, none of which is a tensor. To look at them takes longest."""


@contextlib.contextmanager
def as_they_were(held: list[Held]) -> Iterator[None]:
    """Inside, all these are where they were; what stands there now comes back."""
    replaced = [(it, it.holder.get(it.name, ABSENT)) for it in held if it.holder.get(it.name) is not it.value]
    try:
        for it, _ in replaced:
            it.holder[it.name] = it.value
        yield
    finally:
        for it, now in replaced:
            it.holder[it.name] = now
            if now is ABSENT:
                del it.holder[it.name]


ABSENT = object()
"""What stands where nothing stands now."""


def _version(value: Tensor | nn.Module) -> int:
    return value._version if isinstance(value, Tensor) else 0
