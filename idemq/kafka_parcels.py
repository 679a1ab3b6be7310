"""What a message is as a Kafka record. Needs no client of Kafka."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from idemq.broker import Unsendable
from idemq.message import ID_HEADERS, Message

#: The largest body that is tried, in bytes; below it the topic decides. Brokers end the connection, without a
#: word, at a request above 100 MiB.
MOST_BYTES = 64 * 1024 * 1024
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Record:
    """What the producer is given."""

    #: Its place in the batch.
    place: int
    topic: str
    value: bytes | None
    key: bytes | None
    headers: list[tuple[str, bytes | None]]
    timestamp_ms: int | None


def record(place: int, address: Sequence[str], message: Message) -> Record:
    """Raises `Unsendable` for what Kafka cannot carry."""
    if len(address) != 1:
        raise Unsendable(f"{tuple(address)!r} is no topic")
    if message.body is None and message.key is None:
        raise Unsendable("a tombstone (body=None) needs a key")
    for name, value in (("body", message.body), ("key", message.key)):
        if value is not None and not isinstance(value, bytes):
            raise Unsendable(f"the {name} must be bytes, not {type(value).__name__}")
        if value is not None and len(value) > MOST_BYTES:
            raise Unsendable(f"the {name} is too large: {len(value)} bytes; at most {MOST_BYTES} are tried")
    if message.properties:
        raise Unsendable(f"Kafka has no property {next(iter(message.properties))!r}: make it a header")
    timestamp = None
    if message.sent_at is not None:
        if message.sent_at.tzinfo is None or message.sent_at < _EPOCH:
            raise Unsendable("sent_at must have a time zone, and be after 1970")
        timestamp = (message.sent_at - _EPOCH) // timedelta(milliseconds=1)
    return Record(place, address[0], message.body, message.key, _headers(message), timestamp)


def _headers(message: Message) -> list[tuple[str, bytes | None]]:
    own = {
        ID_HEADERS[0]: message.id,
        "content-type": message.content_type,
        "content-encoding": message.content_encoding,
    }
    headers = [(name, _bytes(name, value)) for name, value in message.headers.items()]
    for name, text in own.items():
        if not text:
            continue
        value = message.headers.get(name)
        if value is None:
            headers.append((name, _bytes(name, text)))
        elif _bytes(name, value) != _bytes(name, text):
            # Twice it would be ambiguous, and one of them would be wrong.
            raise Unsendable(f"its header {name!r} is {value!r}, and not {text!r}: leave it out")
    return headers


def _bytes(name: str, value: object) -> bytes | None:
    if value is None or isinstance(value, bytes):
        return value
    if not isinstance(value, str) or not isinstance(name, str):
        raise Unsendable(f"the header {name!r} must be text or bytes, not {type(value).__name__}")
    try:
        name.encode()
        return value.encode()
    except UnicodeEncodeError as error:
        raise Unsendable(f"the header {name!r} is not UTF-8: {error.reason}") from None
