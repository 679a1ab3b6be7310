"""Text from outside as a person may see it: secrets masked, and nothing that a terminal would obey."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

import msgspec

#: How much of a body or an error is shown, in characters; how much of a body that is no text, in bytes.
SHOWN, DUMPED = 20_000, 512

#: What stands for a secret.
MASK = "***"

_SMELL = r"authori[sz]ation|cookie|token|secret|passw|passphrase|pwd|credential|api[-_ ]?key|private[-_ ]?key"
_SECRET = re.compile(_SMELL, re.IGNORECASE)
_IN_URL = re.compile(r"(\b[a-z][a-z0-9+.-]{0,30}://[^\s:/@]{0,200}:)[^\s@]{1,200}@", re.IGNORECASE)
# In JSON, a query string, a call in a traceback, settings of a database; a value that was cut has no end.
_ASSIGNED = re.compile(
    rf"((?:{_SMELL})[\w .-]{{0,40}}\\{{0,4}}[\"']?\s?[:=]\s{{0,9}})"
    r"(?:\\{0,4}\"(?:[^\"\\]|\\.)*(?:\"|\Z)|\\{0,4}'(?:[^'\\]|\\.)*(?:'|\Z)|[^\s&;,\"'(){}\[\]]+)",
    re.IGNORECASE | re.DOTALL,
)
_HEADER_LINE = re.compile(r"((?:authori[sz]ation|cookie)\s?:\s?)[^\n\"']+", re.IGNORECASE)
_BEARER = re.compile(r"\b(bearer|basic)\s+[\w.~+/=-]{8,}", re.IGNORECASE)

#: A secret that begins before the cut must end, or fail to, before what was looked at ends.
_MARGIN = 500


def printable(text: str) -> str:
    """Control characters, lone surrogates and marks that turn the text's direction become escapes."""
    return "".join(each if each.isprintable() or each in "\n\t" else _escape(each) for each in text)


def one_line(text: str, longest: int = 200) -> str:
    """Cut, and on one line."""
    text = printable(text[: 2 * longest]).replace("\n", " ").replace("\t", " ")
    return text if len(text) <= longest else text[: longest - 3] + "..."


def masked(text: str) -> str:
    """Without the passwords and tokens that can be told from what stands before them."""
    text = _IN_URL.sub(rf"\1{MASK}@", text)
    text = _BEARER.sub(rf"\1 {MASK}", text)
    text = _HEADER_LINE.sub(rf"\1{MASK}", text)
    return _ASSIGNED.sub(rf"\1{MASK}", text)


def shown(text: str) -> str:
    """A long text: masked, printable, cut."""
    whole = printable(masked(text[: SHOWN + _MARGIN]))
    return whole if len(text) <= SHOWN else whole[:SHOWN] + f"\n[... {len(text):,} characters in all]"


def values(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Headers and the like, with what smells of a secret masked at any depth; bytes as the text they hold."""
    return {printable(name): MASK if _SECRET.search(name) else _value(fields[name]) for name in fields}


def body(data: bytes | None) -> str:
    """JSON laid out, other text as it is, and what is no text as a dump."""
    if data is None:
        return "(none: a tombstone)"
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return _dump(data)
    if len(data) <= 64 * SHOWN and text.lstrip()[:1] in ("{", "["):
        try:
            text = msgspec.json.format(data, indent=2).decode()
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
            pass  # it only looked like JSON
    return shown(text)


def _value(value: Any) -> Any:
    if isinstance(value, Mapping):
        return values({str(name): each for name, each in value.items()})
    if isinstance(value, str):
        return shown(value)
    if isinstance(value, bytes):
        try:
            return shown(value.decode())
        except UnicodeDecodeError:
            return "0x" + value[:DUMPED].hex() + ("..." if len(value) > DUMPED else "")
    if isinstance(value, Sequence):
        return [_value(each) for each in value]
    finite = isinstance(value, bool | int | None) or (isinstance(value, float) and isfinite(value))
    return value if finite else str(value)  # JSON has no NaN


def _dump(data: bytes) -> str:
    lines = []
    for start in range(0, min(len(data), DUMPED), 16):
        part = data[start : start + 16]
        letters = "".join(chr(each) if 32 <= each < 127 else "." for each in part)
        lines.append(f"{start:08x}  {part.hex(' '):<47}  {letters}")
    if len(data) > DUMPED:
        lines.append(f"[... {len(data):,} bytes in all]")
    return "\n".join(lines)


def _escape(character: str) -> str:
    return character.encode("unicode_escape", "backslashreplace").decode()
