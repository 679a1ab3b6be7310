"""What a message is to idemq, whatever broker it came from, and what became of it.

`Message` is a plain value; `Verdict` says what is already durable about a message when it is returned, so
that acknowledging on `Ack`, `Dead` or `Parked` can lose nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from hashlib import blake2b
from types import MappingProxyType
from typing import Any
from uuid import UUID

from idemq.errors import NoId

#: The longest message id, in bytes of UTF-8.
MAX_ID_BYTES = 1024

#: Header names that carry an id when the broker's own property is empty, tried in this order.
ID_HEADERS = ("message-id", "message_id", "x-message-id", "idempotency-key")

#: A canonical UUID, of any version but 8 of RFC 9562's variant.
_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-(?!8...-[89ab])[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")

#: CloudEvents' source and id, as AMQP and Kafka spell them.
_CLOUD_EVENT = [
    (f"{prefix}source", f"{prefix}id") for prefix in ("cloudEvents:", "cloudEvents_", "ce_", "ce-")
]

_NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One message as the broker gave it: raw bytes, headers, and where it came from."""

    #: The raw bytes; None only for a Kafka tombstone.
    body: bytes | None = field(repr=False)
    #: Header values as the broker's protocol gives them; Kafka's are text where they are UTF-8, else bytes.
    headers: Mapping[str, Any] = field(default_factory=lambda: _NOTHING)
    #: The broker's own message id property, later the id that the consumer's `id=` rule found.
    id: str | None = None
    #: The Kafka record key.
    key: bytes | None = None
    content_type: str | None = None
    content_encoding: str | None = None
    #: When the publisher says it was sent (AMQP timestamp: whole seconds), None when it does not say. One
    #: without a time zone says nothing.
    sent_at: datetime | None = None
    #: It may have ended the process that had it before. RabbitMQ says so of all that was delivered before;
    #: on Kafka it is so for records that an owner may have had in hand which did not leave its partition in
    #: order. A hint: True does not say that anything was done, False not that nothing was.
    redelivered: bool = False
    #: Where it came from, for people: queue, exchange and routing key, or topic, partition and offset.
    origin: Mapping[str, Any] = field(default_factory=lambda: _NOTHING)
    #: The broker's remaining properties (AMQP `correlation_id`, `type`, `user_id`, ...).
    properties: Mapping[str, Any] = field(default_factory=lambda: _NOTHING)
    #: Header names that came more than once: never used as an id.
    repeated: frozenset[str] = frozenset()
    #: Why the broker's client could not read it (then body and headers may be incomplete), else None.
    unreadable: str | None = None


@dataclass(frozen=True, slots=True)
class Ack:
    """The claim and the work are committed (or were, by an earlier delivery): acknowledge."""

    duplicate: bool = False


@dataclass(frozen=True, slots=True)
class Dead:
    """The message is durably a dead letter: acknowledge."""

    reason: str


@dataclass(frozen=True, slots=True)
class Parked:
    """The message is durably waiting for its next attempt: acknowledge."""

    reason: str
    #: Seconds until that attempt is due.
    delay: float
    cause: str = ""


@dataclass(frozen=True, slots=True)
class Release:
    """Nothing is settled: the worker keeps the delivery and tries again after a delay."""

    cause: str
    #: The handler failed (False: the database, a twin in flight or a doubt is the cause).
    failed: bool = False
    #: Seconds until the next attempt; None: a growing delay of the worker's own.
    delay: float | None = None
    #: Somebody else works on the same message now.
    twin: bool = False
    #: The database is away or refuses to write: nothing else would get through either.
    outage: bool = False
    #: It can neither be done nor written down: the consumer must stop, and the broker keeps the message.
    stop: bool = False


Verdict = Ack | Dead | Parked | Release

#: Where a consumer takes the id from: header names tried in order, or a function of the message.
IdRule = Sequence[str] | Callable[[Message], str | UUID | int | None]


def message_id(message: Message, rule: IdRule | None) -> str:
    """The id of `message` by `rule`, as text.

    Without a rule: the broker's own property, then CloudEvents (source and id together, in the AMQP and
    Kafka spellings), then `ID_HEADERS`. Raises `NoId` where there is none, where a header that would be used
    came twice, and above 1,024 bytes: an id is never guessed.
    """
    if rule is None:
        found: object = message.id or _cloud_event(message) or _first_header(message, ID_HEADERS)
    elif callable(rule):
        found = rule(message)
    else:
        found = _first_header(message, rule)
    if isinstance(found, bytes):
        found = found.decode("utf-8", "surrogateescape")
    if found is None or found == "" or isinstance(found, bool) or not isinstance(found, str | UUID | int):
        raise NoId(f"no usable message id: {_missing(rule, found)}")
    text = str(found)
    if len(encoded(text)) > MAX_ID_BYTES:
        raise NoId(f"the message id is {len(encoded(text))} bytes long; at most {MAX_ID_BYTES} are allowed")
    return text


def _missing(rule: IdRule | None, found: object) -> str:
    if found is not None and found != "":
        return f"an id is text, and what was found is {type(found).__name__}"
    if callable(rule):
        return f"the function id= found {found!r}"
    if rule is None:
        return f"no property, no CloudEvent, and no header {', '.join(ID_HEADERS)}; id= names another place"
    return f"the message has none of the headers that id= names: {', '.join(rule)}"


def _first_header(message: Message, names: Sequence[str]) -> object:
    for name in names:
        if name in message.repeated:
            raise NoId(f"the header {name!r} came more than once")
        value = message.headers.get(name)
        if value is not None and value != "" and value != b"":
            return value
    return None


def _cloud_event(message: Message) -> object:
    for names in _CLOUD_EVENT:
        if names[0] in message.headers:
            source, event = (_first_header(message, (name,)) for name in names)
            if isinstance(source, str) and isinstance(event, str):
                return f"{source} {event}"
    return None


def encoded(text: str) -> bytes:
    """UTF-8 that accepts every str: lone surrogates and smuggled bytes keep distinct encodings."""
    return text.encode("utf-8", "surrogatepass")


def key_of(identifier: str) -> bytes:
    """The 16 bytes under which `identifier` is stored.

    A canonical UUID (any version but 8) is itself; everything else is its BLAKE2b digest (RFC 7693), stamped
    as a version 8 UUID (RFC 9562), so that the two kinds cannot meet.
    """
    if _UUID.fullmatch(identifier):
        return bytes.fromhex(identifier.replace("-", ""))
    digest = bytearray(blake2b(encoded(identifier), digest_size=16).digest())
    digest[6] = digest[6] & 0x0F | 0x80
    digest[8] = digest[8] & 0x3F | 0x80
    return bytes(digest)


def fingerprint_of(body: bytes | None) -> int:
    """Four bytes of the body's BLAKE2b digest as a signed integer; a tombstone has its own."""
    data = b"\x00idemq tombstone" if body is None else body
    return int.from_bytes(blake2b(data, digest_size=4).digest(), "big", signed=True)


def lane_of(message: Message, key: str | bytes | None) -> bytes:
    """16 bytes for the key of a message; those without a key have one together, that of their queue or
    partition."""
    if key is None:
        origin = message.origin
        text = f"{origin.get('queue')} {origin.get('topic')} {origin.get('partition')}"
        return blake2b(text.encode(), digest_size=16, person=b"idemq keyless").digest()
    data = key.encode("utf-8", "surrogatepass") if isinstance(key, str) else key
    return blake2b(data, digest_size=16, person=b"idemq lane").digest()
