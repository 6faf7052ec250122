"""What modules hold: the backward pass evaluates the field again, and must read what the forward pass read."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

PLAIN = (bool, int, float, complex, str, tuple, type(None))
"""Attributes besides tensors that are held: what cannot change in place. A list may be there to be appended to."""


@dataclass
class Held:
    """A tensor, a module or another attribute that a module holds."""

    holder: dict[str, Any]
    name: str
    value: Any
    version: int
    """Of a tensor: grows when it is changed in place."""

    @property
    def is_as_it_was(self) -> bool:
        """Whether it has been neither replaced nor changed."""
        return self.holder.get(self.name, ABSENT) is self.value and _version(self.value) == self.version


def held_by(func: Any) -> list[Held]:
    """What the modules of `func` hold: parameters, buffers, parts, attributes, the mode. Nothing if it is no module.

    Not what lies in lists and dicts, and nothing of a scripted module but its attributes: that cannot be replaced.
    """
    if not isinstance(func, nn.Module):
        return []
    held = []
    for module in func.modules():
        attributes = vars(module)
        held += [
            Held(attributes, name, attributes[name], _version(attributes[name]))
            for name in attributes.keys() - EVERY_MODULES
            if isinstance(attributes[name], (Tensor, *PLAIN))
        ]
        for holder in (module._parameters, module._buffers, module._modules):
            if not isinstance(holder, dict):
                continue
            held += [Held(holder, name, value, _version(value)) for name, value in holder.items() if value is not None]
    return held


EVERY_MODULES = frozenset(vars(nn.Module())) - {"training"}
"""Attributes that every module has and that no field reads. To look at them takes longest."""


@contextlib.contextmanager
def as_they_were(held: list[Held]) -> Iterator[None]:
    """Inside, all these are where they were; what stands there now comes back.

    What is written there inside stays, and what is counted there inside is added to what was counted before.
    """
    replaced = [(it, it.holder.get(it.name, ABSENT)) for it in held if it.holder.get(it.name) is not it.value]
    try:
        for it, _ in replaced:
            it.holder[it.name] = it.value
        yield
    finally:
        for it, now in replaced:
            found = it.holder.get(it.name, ABSENT)
            if found is it.value and now is ABSENT:
                del it.holder[it.name]
            elif found is it.value:
                it.holder[it.name] = now
            elif all(type(number) in (int, float) for number in (found, it.value, now)):
                it.holder[it.name] = now + (found - it.value)


ABSENT = object()
"""What stands where nothing stands now."""


def _version(value: Any) -> int:
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0
