"""Give a value read from YAML the type that a dataclass field declares (YAML reads ``1e-3`` as a string)."""

from __future__ import annotations

import dataclasses
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from tuning.errors import UserError, did_you_mean


def field_types(cls: type) -> dict[str, Any]:
    """``{field name: resolved type}`` of a dataclass."""
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def coerce(value: Any, wanted: Any, where: str) -> Any:
    """*value* as the type *wanted* (int, float, str, bool, Literal, or a union of these).

    Raises:
        UserError: when no member of the type accepts the value; names *where* it was read.
    """
    for member in _members(wanted):
        try:
            return _as_member(value, member)
        except (TypeError, ValueError, OverflowError):
            continue
    literal = [v for m in _members(wanted) if get_origin(m) is Literal for v in get_args(m)]
    hint = did_you_mean(str(value), map(str, literal)) if literal else ""
    raise UserError(f"{where}: {value!r} is not {_describe(wanted)}.{hint}")


def _members(wanted: Any) -> tuple[Any, ...]:
    return get_args(wanted) if get_origin(wanted) in (Union, types.UnionType) else (wanted,)


def _as_member(value: Any, member: Any) -> Any:
    if member is type(None):
        return _require(value is None or value in ("None", "none", "null"), None)
    if get_origin(member) is Literal:
        return _require(value in get_args(member), value)
    if value is None or isinstance(value, list | dict | set | bytes):
        raise TypeError
    if member is bool:
        return _require(isinstance(value, bool), value)
    if isinstance(value, bool):
        raise TypeError
    if member is int:
        return value if isinstance(value, int) else _require(float(value).is_integer(), int(float(value)))
    if member is float:
        return float(value)
    return str(value)


def _require(condition: bool, value: Any) -> Any:
    if not condition:
        raise ValueError
    return value


def _describe(wanted: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "None"}
    parts = []
    for member in _members(wanted):
        if get_origin(member) is Literal:
            parts += [repr(v) for v in get_args(member)]
        else:
            parts.append(names[member])
    return " or ".join(parts)
