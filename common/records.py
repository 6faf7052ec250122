"""Records: dataclasses that are mappings too, and their way to JSON and back; results are made of them."""

import functools
import math
from collections.abc import Iterator, KeysView, Mapping
from dataclasses import Field, fields
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin

from torchadjoint.arguments import shown

IN_MEMORY_ONLY = {"in_memory_only": True}
"""The metadata of a field that JSON leaves out."""
OPTIONAL = {"optional": True}
"""The metadata of a field that a record may be without: it is None then, and neither mapping nor JSON has its name."""
NO_LIMITS: Mapping[str, Any] = {}


class Record(Mapping):
    """A dataclass whose fields can also be looked up by name, as in a dictionary."""

    def __getitem__(self, name: str) -> Any:
        item = _fields(type(self)).get(name)
        if item is None or _is_left_out(self, item):
            raise KeyError(name)
        return getattr(self, name)

    def __iter__(self) -> Iterator[str]:
        for name, item in _fields(type(self)).items():
            if not _is_left_out(self, item):
                yield name

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def keys(self) -> KeysView[str]:
        """The names. Unlike Mapping's, they print as names alone."""
        return dict.fromkeys(self).keys()


def is_optional(item: Field) -> bool:
    """Whether a record may be without this field."""
    return item.metadata.get("optional", False)


def _is_left_out(record: Record, item: Field) -> bool:
    return is_optional(item) and getattr(record, item.name) is None


def plain(value: Any) -> Any:
    """`value` in terms of strict JSON: records become objects, and numbers that are not finite become null."""
    if isinstance(value, Record):
        stored = _stored(type(value)).items()
        return {name: plain(getattr(value, name)) for name, item in stored if not _is_left_out(value, item)}
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def read_as(kind: Any, value: Any, name: str = "it", limits: Mapping[str, Any] = NO_LIMITS) -> Any:
    """`value`, in terms of JSON, as a field annotated with `kind` has it; objects become records.

    The `minimum` and `maximum` in the metadata of a record's field are `limits` of its numbers; where there are none,
    null is NaN where a number must be. Text and names become one line of printable characters, as people will read
    them.

    Raises:
        ValueError: if `value` is something else; the sentence begins with `name`.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is UnionType:
        others = [argument for argument in arguments if argument is not NoneType]
        if value is None and NoneType in arguments:
            return None
        if len(others) == 1:
            return read_as(others[0], value, name, limits)
        if type(value) in arguments:
            return read_as(type(value), value, name, limits)
    elif origin is Literal:
        if type(value) is str and value in arguments:
            return value
    elif origin is list:
        if isinstance(value, list):
            # Most numbers of a run stand in lists of times: to look at each would take most of the time of reading it.
            if arguments[0] is float and not limits and {*map(type, value)} <= {float}:
                return value
            return [read_as(arguments[0], item, f"{name}[{index}]", limits) for index, item in enumerate(value)]
    elif origin is dict:
        if isinstance(value, dict):
            return {one_line(key): read_as(arguments[1], item, f"{name}.{key}") for key, item in value.items()}
    elif kind is str and type(value) is str:
        return one_line(value)
    elif (kind is int and type(value) is int) or (kind is float and type(value) in (float, int, NoneType)):
        return _read_number(kind, value, name, limits)
    elif kind is Any or type(value) is kind:
        return value
    elif issubclass(kind, Record) and isinstance(value, Mapping):
        return _read_record(kind, value, name)
    raise ValueError(f"{one_line(name)} is {shown(value)}, not {kind if arguments else kind.__name__}")


def _read_number(kind: type, value: float | None, name: str, limits: Mapping[str, Any]) -> float:
    number = math.nan if value is None else value
    least, most = limits.get("minimum", -math.inf), limits.get("maximum", math.inf)
    if limits and not least <= number <= most:
        raise ValueError(f"{name} is {shown(value)}, but must be a number from {least} to {most}")
    try:
        return kind(number)
    except OverflowError:
        raise ValueError(f"{name} is {shown(value)}, which is too large") from None


def _read_record(kind: type[Record], values: Mapping[str, Any], name: str) -> Record:
    stored = _stored(kind)
    optional = {key for key, item in stored.items() if is_optional(item)}
    differences = {
        "lacks": stored.keys() - optional - values.keys(),
        "has the unknown": values.keys() - stored.keys(),
        "has a null for": {key for key in optional & values.keys() if values[key] is None},
    }
    told = [f"{verb} {', '.join(map(shown, sorted(names)))}" for verb, names in differences.items() if names]
    if told:
        raise ValueError(f"{name} {' and '.join(told)}")
    return kind(
        **{
            key: read_as(stored[key].type, value, f"{name}.{key}", stored[key].metadata)
            for key, value in values.items()
        }
    )


@functools.cache
def _stored(record: type[Record]) -> Mapping[str, Field]:
    """Each field that JSON has, by its name."""
    return {name: item for name, item in _fields(record).items() if not item.metadata.get("in_memory_only")}


@functools.cache
def _fields(record: type[Record]) -> Mapping[str, Field]:
    """All, by their names."""
    return {item.name: item for item in fields(record)}


def one_line(text: str) -> str:
    """`text` without line breaks and whatever else a terminal or a table would not print but obey."""
    return " ".join("".join(character if character.isprintable() else " " for character in text).split())
