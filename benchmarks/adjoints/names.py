"""The problems and contestants that there are, found in their folders and chosen by name."""

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeVar

from . import contestants, problems
from .contract import Problem, Step

Item = TypeVar("Item", Problem, "Contestant")
SMALL, ALL = "small", "all"
"""Names that stand for the small half of problems or contestants, and for all of them."""


@dataclass(frozen=True)
class Contestant:
    """One way of a contestant's file."""

    name: str
    way: Any
    """What the file's `WAYS` has under the name."""
    prepare: Callable[..., Step]
    packages: tuple[str, ...]
    is_small: bool
    """Whether it takes part in the small half."""

    @property
    def lacking(self) -> list[str]:
        """The packages that it needs and that are not installed."""
        return [package for package in self.packages if importlib.util.find_spec(package) is None]


def find_problems() -> dict[str, Problem]:
    """All problems, by name."""
    found = [problem for module in _modules(problems) for problem in module.PROBLEMS]
    return {problem.name: problem for problem in found}


def find_contestants() -> dict[str, Contestant]:
    """All contestants, by name; those that lack a package too."""
    found = [contestant for module in _modules(contestants) for contestant in contestants_of(module)]
    return {contestant.name: contestant for contestant in found}


def contestants_of(module: ModuleType) -> list[Contestant]:
    """The contestants in a file that keeps the contract."""
    return [
        Contestant(name, way, module.prepare, module.PACKAGES, is_small=name in module.SMALL)
        for name, way in module.WAYS.items()
    ]


def choose(what: str, names: Sequence[str], available: Mapping[str, Item]) -> list[Item]:
    """The problems or contestants of these names, each once, in the order in which they are available.

    "small" stands for those of the small half, "all" for all, and a name that ends in "*" for all that begin so.

    Raises:
        ValueError: if there is no such name.
    """
    chosen = set()
    for name in names:
        matching = {key for key, item in available.items() if _stands_for(name, key, item)}
        if not matching:
            known = ", ".join(map(repr, available))
            raise ValueError(f"there is no {what} {name!r}: use {SMALL!r}, {ALL!r}, or some of {known}")
        chosen |= matching
    return [item for key, item in available.items() if key in chosen]


def _stands_for(name: str, key: str, item: Problem | Contestant) -> bool:
    if name == SMALL:
        return item.is_small
    return name in (ALL, key) or (name.endswith("*") and key.startswith(name[:-1]))


def _modules(package: ModuleType) -> list[ModuleType]:
    return [
        importlib.import_module(f"{package.__name__}.{module.name}")
        for module in pkgutil.iter_modules(package.__path__)
    ]
