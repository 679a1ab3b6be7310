"""Messages as rows of the embedded broker's file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from idemq.embedded_file import Connection, transaction
from idemq.errors import SetupError
from idemq.message import Message, encoded

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

_INSERT = (
    "INSERT INTO messages (queue, id, headers, content_type, content_encoding, sent_at, body)"
    " VALUES (?, ?, ?, ?, ?, ?, ?)"
)
_IS_READY = "SELECT 1 FROM messages WHERE queue = ? AND owner IS NULL LIMIT 1"
_OLDEST = (
    "SELECT seq, redelivered, id, headers, content_type, content_encoding, sent_at, body"
    " FROM messages WHERE queue = ? AND owner IS NULL ORDER BY seq LIMIT ?"
)
_TAKE = "UPDATE messages SET owner = ? WHERE queue = ? AND owner IS NULL AND seq <= ?"
_DEPTH = (
    "SELECT (SELECT count(*) FROM messages WHERE queue = ? AND owner IS NULL),"
    " (SELECT count(*) FROM messages WHERE owner IN (SELECT id FROM owners WHERE queue = ?))"
)


def declare(connection: Connection, queue: str) -> None:
    with transaction(connection):
        connection.execute("INSERT OR IGNORE INTO queues (name) VALUES (?)", (encoded(queue),))


def number_of(connection: Connection, queue: str) -> int:
    found = connection.execute("SELECT id FROM queues WHERE name = ?", (encoded(queue),)).fetchone()
    if found is None:
        raise SetupError(
            f"there is no queue {queue!r} in {connection.path}; make it with .queue({queue!r}, declare=True)"
        )
    return int(found[0])


def is_ready(connection: Connection, queue: int) -> bool:
    return connection.execute(_IS_READY, (queue,)).fetchone() is not None


def insert(connection: Connection, queue: int, values: list[tuple[Any, ...]]) -> None:
    connection.executemany(_INSERT, [(queue, *row) for row in values])


def fetch(connection: Connection, queue: int, owner: int, count: int) -> list[tuple[Any, ...]]:
    """Make `owner` the holder of the oldest `count` ready messages."""
    rows = connection.execute(_OLDEST, (queue, count)).fetchall()
    if rows:
        connection.execute(_TAKE, (owner, queue, rows[-1][0]))
    return rows


def depth(connection: Connection, queue: int) -> tuple[int, int]:
    ready, unacked = connection.execute(_DEPTH, (queue, queue)).fetchone()
    return ready, unacked


def give_back(connection: Connection, owner: int) -> None:
    connection.execute("UPDATE messages SET owner = NULL, redelivered = 1 WHERE owner = ?", (owner,))
    connection.execute("DELETE FROM owners WHERE id = ?", (owner,))


def row_of(message: Message) -> tuple[Any, ...]:
    """The columns of a message as they are stored; raises for what a message may not hold."""
    if not isinstance(message.body, bytes | bytearray | memoryview):  # bytes() would take numbers and lists
        kind = type(message.body).__name__
        raise TypeError(f"the body of a message of the embedded broker is bytes, not {kind}")
    headers = json.dumps(dict(message.headers), allow_nan=False).encode() if message.headers else None
    texts = (message.id, message.content_type, message.content_encoding)
    id, content_type, content_encoding = (None if text is None else encoded(text) for text in texts)
    sent = (message.sent_at or datetime.now(UTC)) - _EPOCH
    return id, headers, content_type, content_encoding, sent // timedelta(microseconds=1), bytes(message.body)


def message_of(row: Sequence[Any], origin: Mapping[str, Any]) -> Message:
    """The message of a row; what somebody damaged is delivered as unreadable."""
    _, redelivered, id, headers, content_type, content_encoding, sent_at, body = row
    try:
        fields = json.loads(headers) if headers is not None else {}
        if not isinstance(fields, dict) or not isinstance(body, bytes):
            raise TypeError("headers must be a JSON object, and the body bytes")
        return Message(
            body=body,
            headers=fields,
            id=_text(id),
            content_type=_text(content_type),
            content_encoding=_text(content_encoding),
            sent_at=_EPOCH + timedelta(microseconds=sent_at),
            redelivered=bool(redelivered),
            origin=origin,
        )
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raw = body if isinstance(body, bytes) else str(body).encode()
        return Message(body=raw, redelivered=bool(redelivered), origin=origin, unreadable=f"damaged: {error}")


def _text(stored: bytes | None) -> str | None:
    return None if stored is None else stored.decode("utf-8", "surrogatepass")
