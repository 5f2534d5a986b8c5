"""YAML for what the manifests hold: mappings, lists, texts, numbers, booleans."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

Value = str | int | float | bool | Sequence["Value"] | Mapping[str, "Value"]
_PLAIN_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_./-]*")
_NOT_TEXT = ("y", "n", "yes", "no", "on", "off", "true", "false", "null")  # unless they are quoted
_BLOCK = re.compile(r"[\n\x20-\x7e\u00a1-\u2027\u2030-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]+")
_ESCAPED = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r"}


def dump(value: Mapping[str, Value]) -> str:
    """*value* as a YAML document; every text is quoted or a block, so that none is read as something else."""
    return "\n".join(_mapping(value, "")) + "\n"


def quoted(text: str) -> str:
    """*text* in double quotes, all that YAML would break or change as an escape."""
    return '"' + "".join(_letter(letter) for letter in text) + '"'


def _letter(letter: str) -> str:
    if letter in _ESCAPED:
        return _ESCAPED[letter]
    if _BLOCK.fullmatch(letter):
        return letter
    code = ord(letter)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"


def _mapping(value: Mapping[str, Value], indent: str) -> Iterator[str]:
    for key, item in value.items():
        plain = _PLAIN_KEY.fullmatch(key) and key.lower() not in _NOT_TEXT
        name = key if plain else quoted(key)
        yield from _item(f"{indent}{name}:", item, indent)


def _list(value: Sequence[Value], indent: str) -> Iterator[str]:
    for item in value:
        if isinstance(item, Mapping) and item:
            first, *others = _mapping(item, indent + "  ")
            yield f"{indent}- {first.lstrip()}"
            yield from others
        else:
            yield from _item(f"{indent}-", item, indent)


def _item(head: str, item: Value, indent: str) -> Iterator[str]:
    if isinstance(item, Mapping):
        yield head if item else f"{head} {{}}"
        yield from _mapping(item, indent + "  ")
    elif isinstance(item, str):
        yield from _text(head, item, indent + "  ")
    elif isinstance(item, Sequence):
        yield head if item else f"{head} []"
        yield from _list(item, indent + "  ")
    else:
        yield f"{head} {str(item).lower() if isinstance(item, bool) else item}"


def _text(head: str, text: str, indent: str) -> Iterator[str]:
    """Several lines as a block that reads as they do, if YAML keeps them so; else quoted."""
    ends_once = text.endswith("\n") and not text.endswith("\n\n")
    if text.count("\n") > 1 and ends_once and text[0] not in " \n" and _BLOCK.fullmatch(text):
        yield f"{head} |"
        yield from (f"{indent}{line}" if line else "" for line in text[:-1].split("\n"))
    else:
        yield f"{head} {quoted(text)}"
