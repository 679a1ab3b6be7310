"""A `Message` as AMQP frames: persistent, and mandatory, so that the server tells when no queue takes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from struct import pack

import amqp
from amqp import spec

from idemq.amqp_frames import BODY, HEADER, METHOD
from idemq.broker import Unsendable
from idemq.message import Message, encoded

#: AMQP's short strings: names, routing keys, ids.
SHORT_BYTES = 255
#: What of `Message.properties` is published.
PROPERTIES = ("correlation_id", "reply_to", "type", "priority", "expiration")
_PERSISTENT = 2


@dataclass(frozen=True, slots=True, eq=False)
class Parcel:
    """A message made ready for the wire."""

    #: Its place in the batch.
    place: int
    exchange: str
    routing_key: str
    id: str | None
    properties: bytes = field(repr=False)
    body: bytes = field(repr=False)

    def frames(self, channel: int, frame_max: int) -> bytes:
        """Raises `Unsendable` when the properties fill more than a frame, which the server would answer by
        ending the connection."""
        address = _shorts(self.exchange, self.routing_key)
        publish = pack(">HHH", *spec.Basic.Publish, 0) + address + b"\1"  # mandatory
        header = pack(">HHQ", spec.Basic.CLASS_ID, 0, len(self.body)) + self.properties
        most = frame_max - 8
        if len(header) > most:
            raise Unsendable(f"headers and properties fill {len(header)} bytes; RabbitMQ takes {most} here")
        frames = [_frame(METHOD, channel, publish), _frame(HEADER, channel, header)]
        frames += [
            _frame(BODY, channel, self.body[start : start + most]) for start in range(0, len(self.body), most)
        ]
        return b"".join(frames)


def parcel(place: int, address: Sequence[str], message: Message) -> Parcel:
    """Raises `Unsendable` for what AMQP cannot carry."""
    if not isinstance(message.body, bytes):
        raise Unsendable("a message to RabbitMQ needs a body of bytes (None is a Kafka tombstone)")
    if len(address) != 2 or not all(isinstance(name, str) for name in address):
        raise Unsendable(f"{tuple(address)!r} is no exchange and routing key")
    if unknown := [name for name in message.properties if name not in PROPERTIES]:
        raise Unsendable(f"the property {unknown[0]!r} is not published; these are: {', '.join(PROPERTIES)}")
    if message.sent_at is not None and message.sent_at.tzinfo is None:
        raise Unsendable("sent_at has no time zone")
    texts = {
        "message_id": message.id or None,
        "content_type": message.content_type,
        "content_encoding": message.content_encoding,
        **{name: value for name, value in message.properties.items() if name != "priority"},
    }
    names = {"exchange": address[0], "routing key": address[1]} | texts
    for name, text in names.items():
        if text is not None and not isinstance(text, str):
            raise Unsendable(f"{name} must be a text, not {type(text).__name__}")
        if text is not None and len(encoded(text)) > SHORT_BYTES:
            raise Unsendable(f"{name} is {len(encoded(text))} bytes long; AMQP allows {SHORT_BYTES}")
    content = amqp.Message(
        application_headers=dict(message.headers) or None,
        delivery_mode=_PERSISTENT,
        priority=message.properties.get("priority"),
        timestamp=None if message.sent_at is None else int(message.sent_at.timestamp()),
        **texts,
    )
    try:
        properties: bytes = content._serialize_properties()
    except Exception as error:  # py-amqp raises whatever the value makes it raise
        raise Unsendable(f"AMQP cannot carry its headers, priority or sent_at: {error}") from None
    return Parcel(place, address[0], address[1], message.id or None, properties, message.body)


def _shorts(*texts: str) -> bytes:
    return b"".join(bytes([len(text)]) + text for text in map(encoded, texts))


def _frame(kind: int, channel: int, payload: bytes) -> bytes:
    return pack(">BHI", kind, channel, len(payload)) + payload + b"\xce"
