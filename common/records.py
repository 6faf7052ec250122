"""Records: dataclasses that are mappings too, and their way to JSON and back; results are made of them."""

import math
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import fields
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin

IN_MEMORY_ONLY = {"in_memory_only": True}
"""The metadata of a field that JSON leaves out."""


class Record(Mapping):
    """A dataclass whose fields can also be looked up by name, as in a dictionary."""

    def __getitem__(self, name: str) -> Any:
        if name not in self.__dataclass_fields__:
            raise KeyError(name)
        return getattr(self, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.__dataclass_fields__)

    def __len__(self) -> int:
        return len(self.__dataclass_fields__)


def plain(value: Any) -> Any:
    """`value` in terms of strict JSON: records become objects, and numbers that are not finite become null."""
    if isinstance(value, Record):
        return {name: plain(value[name]) for name in _kinds(type(value))}
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def read_as(kind: Any, value: Any, name: str = "it") -> Any:
    """`value`, in terms of JSON, as a field annotated with `kind` has it; objects become records.

    Of a kind of record and its subclasses, an object becomes that which has exactly its names. null is NaN where a
    number must be.

    Raises:
        ValueError: if `value` is something else; the sentence begins with `name`.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is UnionType:
        others = [argument for argument in arguments if argument is not NoneType]
        if type(value) in arguments:
            return value
        if len(others) == 1:
            return read_as(others[0], value, name)
    elif origin is Literal:
        if value in arguments:
            return value
    elif origin is list:
        if isinstance(value, list):
            return [read_as(arguments[0], item, f"{name}[{index}]") for index, item in enumerate(value)]
    elif origin is dict:
        if isinstance(value, dict):
            return {key: read_as(arguments[1], item, f"{name}.{key}") for key, item in value.items()}
    elif kind is Any or type(value) is kind:
        return value
    elif kind is float and type(value) in (int, NoneType):
        return math.nan if value is None else float(value)
    elif issubclass(kind, Record) and isinstance(value, Mapping):
        return _read_record(kind, value, name)
    raise ValueError(f"{name} is {reprlib.repr(value)}, not {kind if arguments else kind.__name__}")


def _read_record(kind: type[Record], values: Mapping[str, Any], name: str) -> Record:
    for record in (*kind.__subclasses__(), kind):
        kinds = _kinds(record)
        if kinds.keys() == values.keys():
            return record(**{key: read_as(kinds[key], value, f"{name}.{key}") for key, value in values.items()})
    lacking, unknown = sorted(kinds.keys() - values.keys()), sorted(values.keys() - kinds.keys())
    raise ValueError(f"{name} lacks {lacking} and has the unknown {unknown}")


def _kinds(record: type[Record]) -> dict[str, Any]:
    """The annotation of each field that JSON has."""
    return {item.name: item.type for item in fields(record) if "in_memory_only" not in item.metadata}
