"""What modules hold: the backward pass evaluates the field again, and must read what the forward pass read."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

PLAIN = (bool, int, float, complex, str, tuple, type(None))
"""Attributes besides tensors that are held: what cannot change in place. A list may be there to be appended to."""


@dataclass
class Held:
    """A tensor, a module or another attribute that a module holds."""

    holder: dict[str, Any]
    others: tuple[dict[str, Any], ...]
    """The other dicts in which its module looks up names."""
    name: str
    value: Any
    version: int
    """Of a tensor: grows when it is changed in place."""
    may_change: bool = False
    """Whether the field itself changes the tensor in place, so that others may too."""

    @property
    def is_as_it_was(self) -> bool:
        """Whether it has been neither replaced nor changed."""
        return self.now is self.value and _version(self.value) == self.version

    def refuse_changes(self) -> None:
        """Raise RuntimeError if this is a tensor that has been changed in place, as autograd does for what it saves."""
        if isinstance(self.value, Tensor) and _version(self.value) != self.version and not self.may_change:
            raise RuntimeError(
                f"func holds the tensor {self.name!r}, which an in-place operation has changed since the forward pass "
                "of a solve, and the backward pass would read it as it is now: change it after backward(), or solve a "
                "module that does not hold it"
            )

    @property
    def now(self) -> Any:
        """What stands there now."""
        return self.holder.get(self.name, ABSENT)

    @property
    def is_made_anew(self) -> bool:
        """Whether something stands where None was, such as noise that a field draws in its first evaluation."""
        return self.value is None and isinstance(self.now, (Tensor, nn.Module))

    def as_made_anew(self) -> "Held":
        """What stands there now, held."""
        return replace(self, value=self.now, version=_version(self.now))

    @property
    def places(self) -> list[dict[str, Any]]:
        """Its holder, and where else its module would find something else by its name."""
        return [self.holder, *(other for other in self.others if other is not self.holder and self.name in other)]


def held_by(func: Any) -> list[Held]:
    """What the modules of `func` hold: parameters, buffers, parts, attributes, the mode. Nothing if it is no module.

    Not what lies in lists and dicts, and nothing of a scripted module but its attributes: that cannot be replaced.
    """
    if not isinstance(func, nn.Module):
        return []
    held = []
    for module in func.modules():
        attributes = vars(module)
        kinds = tuple(kind for kind in (module._parameters, module._buffers, module._modules) if isinstance(kind, dict))
        held += [
            Held(attributes, kinds, name, attributes[name], _version(attributes[name]))
            for name in attributes.keys() - EVERY_MODULES
            if isinstance(attributes[name], (Tensor, *PLAIN))
        ]
        everywhere = (attributes, *kinds)
        for holder in kinds:
            held += [Held(holder, everywhere, name, value, _version(value)) for name, value in holder.items()]
    return held


EVERY_MODULES = frozenset(vars(nn.Module())) - {"training"}
"""Attributes that every module has and that no field reads. To look at them takes longest."""


@contextlib.contextmanager
def as_they_were(held: list[Held]) -> Iterator[None]:
    """Inside, all these are where they were; what stands there now comes back.

    What is written there inside stays, and what is counted there inside is added to what was counted before.
    """
    changed = [it for it in held if it.now is not it.value]
    own = {(id(it.holder), it.name) for it in held} if changed else set()
    replaced = [
        (it, place, place.get(it.name, ABSENT))
        for it in changed
        for place in it.places
        if place is it.holder or (id(place), it.name) not in own
    ]
    try:
        for it, place, _ in replaced:
            place[it.name] = it.value
        yield
    finally:
        for it, place, now in replaced:
            found = place.get(it.name, ABSENT)
            if found is it.value and now is ABSENT:
                del place[it.name]
            elif found is it.value:
                place[it.name] = now
            elif all(type(number) in (int, float) for number in (found, it.value, now)):
                place[it.name] = now + (found - it.value)


ABSENT = object()
"""What stands where nothing stands now."""


def _version(value: Any) -> int:
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0
