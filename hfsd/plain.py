"""Any frozen record as plain JSON data, and back: one text per record, no number that JSON does not know."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def to_json(record: Any) -> Any:
    """Plain JSON data of a record: dicts, lists, strings and finite numbers.

    Raises:
        ValueError: a number is NaN or infinite; no record may carry one to a card.
    """
    if dataclasses.is_dataclass(record) and not isinstance(record, type):
        return {f.name: to_json(getattr(record, f.name)) for f in dataclasses.fields(record)}
    if isinstance(record, dict):
        return {str(k): to_json(v) for k, v in record.items()}
    if isinstance(record, list | tuple):
        return [to_json(v) for v in record]
    if isinstance(record, float) and not math.isfinite(record):
        raise ValueError(f"a record may not carry {record}")
    if record is None or isinstance(record, bool | int | float | str):
        return record
    if hasattr(record, "item"):  # numpy and torch scalars serialise badly in YAML and JSON
        return to_json(record.item())
    raise ValueError(f"{type(record).__name__} is no part of a record")


def from_json(kind: type[T], data: Any) -> T:
    """The record of type `kind` that `to_json` wrote. Unknown keys are refused, missing ones take their default."""
    return typing.cast(T, _build(kind, data))


def load(kind: type[T], path: Path) -> T:
    """`from_json` of a file."""
    return from_json(kind, json.loads(Path(path).read_text(encoding="utf-8")))


def dumps(record: Any) -> str:
    """Deterministic JSON text of a record, or of plain data: sorted keys, two spaces, a closing newline."""
    return json.dumps(to_json(record), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def _build(kind: Any, data: Any) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return data
    if origin in (typing.Union, types.UnionType):
        if data is None:
            return None
        return _build(next(a for a in args if a is not type(None)), data)
    if origin is list:
        return [_build(args[0], v) for v in data]
    if origin is tuple:
        return tuple(_build(args[0], v) for v in data)
    if origin is dict:
        return {_build(args[0], k): _build(args[1], v) for k, v in data.items()}
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        known = {f.name for f in dataclasses.fields(kind)}
        if unknown := set(data) - known:
            raise ValueError(f"{kind.__name__}: unknown keys {sorted(unknown)}")
        return kind(**{k: _build(hints[k], v) for k, v in data.items()})
    if kind in (int, float) and not isinstance(data, bool):
        return kind(data)  # JSON keys are strings; JSON writes 1.0 as 1 elsewhere
    return data


def flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested mappings by dotted names."""
    found: dict[str, Any] = {}
    for key, value in data.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return found


def printable(data: Mapping[str, Any]) -> dict[str, str]:
    """The same as text; what is not set is left out."""
    return {
        name: ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        for name, value in flat(data).items()
        if value is not None
    }
