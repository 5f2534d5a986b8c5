"""Files of flags in YAML: read whatever they hold, and given the types that dataclass fields declare.

YAML reads ``1e-3`` as a string; and a file from anywhere may hold aliases that unfold to billions of values.
"""

from __future__ import annotations

import contextlib
import dataclasses
import types
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from tuning.errors import UserError, did_you_mean

LARGEST_FILE = 2**18  # bytes
LARGEST_TEXT = 2**20  # characters, with every alias written out
LARGEST_NUMBER = 10**40  # more digits would break messages, files and floats


class WholeNumbers(tuple[int, ...]):
    """Any number of whole numbers."""


NO_NUMBERS = WholeNumbers()
_hints: Callable[[type], dict[str, Any]] = cache(get_type_hints)


def read_yaml(path: Path, where: str) -> dict[str, Any]:
    """The flags in a YAML file, with ``_`` for ``-`` in their names; an empty file has none.

    Raises:
        UserError: no file, no YAML, or no mapping; begins with *where*.
    """
    if not path.is_file():
        raise UserError(f"{where}: there is no such file.")
    try:
        with path.open("rb") as file:
            content = parse_yaml(file.read(LARGEST_FILE + 1))
    except (OSError, ValueError) as error:
        raise UserError(f"{where} can't be read as YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{where} must hold 'flag: value' lines; it holds {type(content).__name__}.")
    return {as_key(key): value for key, value in content.items()}


def parse_yaml(text: bytes) -> Any:
    """The one document in *text*, plain values only.

    Raises:
        ValueError: it is no such document, or too large.
    """
    import yaml

    if len(text) > LARGEST_FILE:
        raise ValueError(f"it is larger than {LARGEST_FILE:,} bytes")
    loader = None
    try:
        loader = yaml.SafeLoader(text.decode("utf-8"))
        node = loader.get_single_node()
        if node is None:
            return None
        if _size(node, {}) > LARGEST_TEXT:
            raise ValueError(f"its aliases unfold to more than {LARGEST_TEXT:,} characters")
        return loader.construct_document(node)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except Exception as error:  # damaged values make PyYAML raise nearly every type
        raise ValueError(str(error)) from None
    finally:
        if loader is not None:
            loader.dispose()


def _size(node: Any, known: dict[int, int]) -> int:
    """Characters under a YAML node with every alias written out: too many for one that holds itself."""
    if isinstance(node.value, str):
        return 1 + len(node.value)
    if id(node) not in known:
        known[id(node)] = LARGEST_TEXT + 1  # until it is known: met again below itself
        pairs = [child if isinstance(child, tuple) else (child,) for child in node.value]
        known[id(node)] = 1 + sum(_size(child, known) for pair in pairs for child in pair)
    return known[id(node)]


def named_file(name: str, folder: Path, flag: str) -> Path:
    """The YAML file that *flag* means: a path, or the name of a file in *folder*.

    Raises:
        UserError: an unknown name; the nearest is named.
    """
    if Path(name).suffix in (".yaml", ".yml"):
        return Path(name)
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in names:
        raise UserError(f"{flag} {name!r} is not known.{did_you_mean(name, names)} Known: {', '.join(names)}.")
    return folder / f"{name}.yaml"


def as_key(key: Any) -> str:
    """A key read from YAML as the name of a flag."""
    return (key if isinstance(key, str) else shown(key)).replace("-", "_")


def shown(value: Any) -> str:
    """``repr`` for a message: not too long, and not failing on a whole number of thousands of digits."""
    if isinstance(value, int) and abs(value) > LARGEST_NUMBER:
        return f"{'-' if value < 0 else ''}{value.bit_length()}-bit number"
    try:
        text = repr(value)
    except ValueError:  # such a number, inside
        text = f"a {type(value).__name__}"
    return text if len(text) <= 300 else f"{text[:200]} ... {text[-80:]}"


def field_types(cls: type) -> dict[str, Any]:
    """``{field name: resolved type}`` of a dataclass."""
    hints = _hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def coerce(value: Any, wanted: Any, where: str) -> Any:
    """*value* as the type *wanted* (int, float, str, bool, Literal, a union, a tuple of texts, `WholeNumbers`).

    Raises:
        UserError: when no member of the type accepts the value; names *where* it was read.
    """
    for member in _members(wanted):
        try:
            return _as_member(value, member)
        except (TypeError, ValueError, OverflowError):
            continue
    literal = [v for m in _members(wanted) if get_origin(m) is Literal for v in get_args(m)]
    hint = did_you_mean(value, map(str, literal)) if literal and isinstance(value, str) else ""
    hint = " It is too large." if isinstance(value, int) and abs(value) > LARGEST_NUMBER else hint
    raise UserError(f"{where}: {shown(value)} is not {_describe(wanted)}.{hint}")


def _members(wanted: Any) -> tuple[Any, ...]:
    return get_args(wanted) if get_origin(wanted) in (Union, types.UnionType) else (wanted,)


def _as_member(value: Any, member: Any) -> Any:
    if member is type(None):
        return _require(value is None or value in ("None", "none", "null"), None)
    if get_origin(member) is Literal:
        return _require(value in get_args(member), value)
    if member is tuple:  # of any number of texts
        return tuple(_as_member(one, str) for one in _require(isinstance(value, list | tuple), value))
    if member is WholeNumbers:
        return WholeNumbers(_as_member(one, int) for one in _require(isinstance(value, list | tuple), value))
    if value is None or isinstance(value, list | tuple | dict | set | bytes):
        raise TypeError
    if member is bool:
        return _require(isinstance(value, bool), value)
    if isinstance(value, bool):
        raise TypeError
    if member is int:
        whole = value if isinstance(value, int) else _whole(value)
        return _require(abs(whole) <= LARGEST_NUMBER, whole)
    if member is float:
        return float(value)
    text = str(value)
    text.encode()  # half of a surrogate pair can't be written to any file
    return _require("\0" not in text, text)


def _whole(value: Any) -> Any:
    """``3.0``, ``1e3`` and, exactly, ``"3"`` as a whole number."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return int(value)
    return _require(float(value).is_integer(), int(float(value)))


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
        elif member is tuple:
            parts.append("a list")
        elif member is WholeNumbers:
            parts.append("a list of whole numbers")
        else:
            parts.append(names[member])
    return " or ".join(parts)
