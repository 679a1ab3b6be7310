"""Headers, properties and errors as the failure table keeps them: nothing is refused, nothing guessed."""

from __future__ import annotations

import re
import traceback
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from typing import Any

import msgspec
from sqlalchemy import RowMapping
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, StatementError

from idemq.drivers import error_code
from idemq.message import Message

#: The longest error text that is kept, in characters; the middle is cut.
MAX_ERROR = 20_000

#: The largest result, in bytes of JSON.
MAX_RESULT_BYTES = 64 * 1024

#: How deep header tables may be nested before the rest is left out.
MAX_DEPTH = 100


def result_bytes(value: object) -> bytes:
    """A result as it is kept. Raises `TypeError` for what is no JSON, `ValueError` for what is too large."""
    result = msgspec.json.encode(value)
    if len(result) > MAX_RESULT_BYTES:
        raise ValueError(f"the result is {len(result)} bytes of JSON; at most {MAX_RESULT_BYTES} are kept")
    return result


def packed(values: Mapping[str, Any]) -> bytes:
    """MessagePack that keeps text and bytes apart and never refuses: what it has no type for becomes text."""
    return msgspec.msgpack.encode(_plain(dict(values)))


def unpacked(data: bytes | None) -> dict[str, Any]:
    """What `packed` made; text that is no UTF-8 comes back as its bytes."""
    return msgspec.msgpack.decode(data, type=dict[str, Any]) if data else {}


def _plain(value: Any, depth: int = 0) -> Any:
    if depth > MAX_DEPTH:
        return "(nested too deep)"
    if isinstance(value, str):
        text = str.__str__(value)  # nothing below is left a subclass, which msgspec would refuse
        try:
            text.encode()
        except UnicodeEncodeError:  # lone surrogates: kept as the bytes that they stand for
            return text.encode("utf-8", "surrogatepass")
        return text
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    if isinstance(value, Mapping):
        return {_name(name): _plain(each, depth + 1) for name, each in value.items()}
    if isinstance(value, Collection):
        return [_plain(each, depth + 1) for each in value]
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int) and -(2**63) <= value < 2**64:
        return int(value)
    if isinstance(value, float):
        return float(value)
    return (_moment(value) if isinstance(value, datetime) else None) or _plain(_text(value))


def _moment(value: datetime) -> datetime | None:
    """None for one that no calendar has in UTC."""
    if value.tzinfo is None:
        value = value.replace(tzinfo=UTC)  # AMQP's, which py-amqp gives without a zone
    try:
        there = value.astimezone(UTC)
    except (OverflowError, ValueError):
        return None
    return datetime(*there.timetuple()[:6], there.microsecond, UTC)


def _name(name: object) -> str:
    return _text(name).encode("utf-8", "backslashreplace").decode()


def error_text(error: BaseException) -> str:
    """The traceback as text that every database stores: no NUL, no lone surrogate, not too long."""
    try:
        text = "".join(traceback.format_exception(error))
    except Exception:  # the user's own class may fail at it
        text = f"{type(error).__name__} (its traceback cannot be printed)"
    text = text.encode("utf-8", "replace").decode("utf-8").replace("\x00", "\\x00")
    half = MAX_ERROR // 2
    return text if len(text) <= MAX_ERROR else f"{text[:half]}\n[...]\n{text[-half:]}"


def words(error: BaseException) -> str:
    """What a log line may say: no statement, no parameters, no row, no value out of a database's error."""
    if not isinstance(error, StatementError):
        return f"{type(error).__name__}: {_text(error).strip()}"
    cause = error.orig if error.orig is not None else error
    text = (_text(cause).strip().splitlines() or [""])[0]
    if not isinstance(error, DBAPIError) or str(error_code(error)).startswith("22"):
        text = "a value does not fit" if not isinstance(error, DBAPIError) else _VALUE.sub("...", text)
    elif isinstance(error, DataError | IntegrityError):  # PostgreSQL puts the names of constraints in "..."
        text = re.sub("'[^']*'", "...", text)
    return f"{type(cause).__name__}: {text}"


_VALUE = re.compile("'.*'|\".*\"")


def _text(value: object) -> str:
    try:
        return str(value)
    except Exception:  # the user's own class may fail at it
        return "(it cannot be printed)"


def shown(text: str) -> str:
    """Text from outside as it may stand in a log line: one line, printable, at most 200 characters."""
    text = "".join(each if each.isprintable() else " " for each in text[:400])
    return text if len(text) <= 200 else text[:200] + "..."


def kept(message: Message, *, judged: bool) -> dict[str, Any]:
    """A message as it is written down. `judged`: its id is the one that the consumer's rule found."""
    properties = properties_of(message)
    if judged:
        properties["judged"] = True
    return {
        "sent_at": message.sent_at,
        "body": message.body,
        "headers": packed(message.headers),
        "properties": packed(properties),
        "origin": packed(message.origin),
    }


def size(message: Message) -> int:
    """Bytes of a message as it is written down."""
    return sum(len(part) for part in kept(message, judged=True).values() if isinstance(part, bytes))


def properties_of(message: Message) -> dict[str, Any]:
    properties = {
        **message.properties,
        "message_id": message.id,
        "key": message.key,
        "content_type": message.content_type,
        "content_encoding": message.content_encoding,
    }
    if message.unreadable is not None:
        properties["unreadable"] = message.unreadable
    if message.repeated:
        properties["repeated"] = sorted(message.repeated)
    return properties


def message_of(row: RowMapping | Mapping[str, Any]) -> Message:
    """The message as it was written down."""
    properties = unpacked(row["properties"])
    properties.pop("judged", None)
    return Message(
        body=row["body"],
        headers=unpacked(row["headers"]),
        id=as_text(properties.pop("message_id", None)),
        key=properties.pop("key", None),
        content_type=as_text(properties.pop("content_type", None)),
        content_encoding=as_text(properties.pop("content_encoding", None)),
        repeated=frozenset(properties.pop("repeated", ())),
        unreadable=as_text(properties.pop("unreadable", None)),
        sent_at=row["sent_at"],
        origin=unpacked(row["origin"]),
        properties=properties,
    )


def as_text(value: Any) -> str | None:
    """Lone surrogates are kept as bytes."""
    return value.decode("utf-8", "surrogatepass") if isinstance(value, bytes) else value
