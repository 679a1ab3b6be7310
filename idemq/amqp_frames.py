"""Assembles AMQP frames to messages, whatever their bytes are.

py-amqp's own frame handler raises on properties that it cannot decode and leaves a channel that is of no use
afterwards: one such message would stop the queue for ever. This one keeps the raw bytes and hands the message
over as unreadable. Bodies are never decoded or decompressed here. An error of the channel is raised to the
caller: py-amqp would open the channel again under the same object, where delivery tags start again at 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from struct import unpack_from
from typing import Any

import amqp
from amqp import spec
from amqp.exceptions import error_for_code
from amqp.serialization import decode_properties_basic

from idemq.message import Message

METHOD, HEADER, BODY = 1, 2, 3
_WITH_CONTENT = (spec.Basic.Deliver, spec.Basic.Return)


class Inbox:
    """Assembles frames to messages; everything but deliveries goes on to py-amqp."""

    def __init__(self, origin: Mapping[str, Any]) -> None:
        self.arrived: list[tuple[int, Message]] = []
        self._origin = origin
        self._to_amqp: Callable[..., Any] = _unattached
        self._arguments = b""
        self._header: bytes | None = None
        self._chunks: list[bytes] = []
        self._missing = 0

    def attach(
        self, connection: Any, to_amqp: Callable[..., Any]
    ) -> Callable[[tuple[int, int, bytes]], bool]:
        """py-amqp's `frame_handler` argument."""
        self._to_amqp = to_amqp
        return self.on_frame

    def on_frame(self, frame: tuple[int, int, bytes]) -> bool:
        """Take one frame; True when it was a whole method for py-amqp."""
        kind, channel, payload = frame
        if kind == BODY:
            self._take_body(payload)
        elif kind == HEADER:
            self._header = payload
            (self._missing,) = unpack_from(">Q", payload, 4)
            self._finish_if_complete()
        elif kind == METHOD:
            method = unpack_from(">HH", payload)
            if method in _WITH_CONTENT:
                self._arguments = payload
                return False
            if method == spec.Channel.Close:
                raise _channel_closed(payload)
            if method == spec.Basic.Cancel:
                raise amqp.ConsumerCancelled("the broker cancelled the consumer (was the queue deleted?)")
            self._to_amqp(channel, method, payload, None)
            return True
        return False

    def _take_body(self, payload: bytes) -> None:
        self._chunks.append(payload)
        self._missing -= len(payload)
        self._finish_if_complete()

    def _finish_if_complete(self) -> None:
        if self._missing > 0:
            return
        header, self._header = self._header, None
        chunks, self._chunks = self._chunks, []
        assert header is not None  # RabbitMQ sends a body only after its header
        self.take(self._arguments, header, b"".join(chunks))

    def take(self, arguments: bytes, header: bytes, body: bytes) -> None:
        """A message is complete."""
        self.arrived.append(_delivered(arguments, header, body, self._origin))


class Settled:
    """Which tags of one channel are acknowledged: many in one frame, where it covers no other tag."""

    def __init__(self) -> None:
        self._floor = 0  # every tag up to this one is settled
        self._above: set[int] = set()

    def add(self, tags: Sequence[int]) -> list[tuple[int, bool]]:
        """(tag, and all below) for each frame to send. A frame names only tags that were not sent before."""
        self._above.update(tags)
        while self._floor + 1 in self._above:
            self._floor += 1
            self._above.remove(self._floor)
        covered = max((tag for tag in tags if tag <= self._floor), default=None)
        frames = [] if covered is None else [(covered, True)]
        return frames + [(tag, False) for tag in tags if tag > self._floor]


def _unattached(*_: Any) -> None:
    raise AssertionError("a frame before the connection exists")


def _channel_closed(payload: bytes) -> Exception:
    (code,) = unpack_from(">H", payload, 4)
    text, end = short(payload, 6)
    error: Exception = error_for_code(code, text, unpack_from(">HH", payload, end), amqp.ChannelError)
    return error


def short(payload: bytes, offset: int) -> tuple[str, int]:
    """A short string for people: publishers may put any bytes into a routing key."""
    end = offset + 1 + payload[offset]
    return payload[offset + 1 : end].decode("utf-8", "backslashreplace"), end


def _delivered(
    arguments: bytes, header: bytes, body: bytes, origin: Mapping[str, Any]
) -> tuple[int, Message]:
    offset = 5 + arguments[4]  # past the consumer tag
    (tag,) = unpack_from(">Q", arguments, offset)
    exchange, end = short(arguments, offset + 9)
    routing_key, _ = short(arguments, end)
    redelivered = bool(arguments[offset + 8] & 1)
    place = {**origin, "exchange": exchange, "routing_key": routing_key}
    return tag, message_of(header[12:], body, redelivered=redelivered, origin=place)


def message_of(raw: bytes, body: bytes, *, redelivered: bool, origin: Mapping[str, Any]) -> Message:
    """The message with the encoded properties `raw`; an unreadable one when they cannot be decoded."""
    try:
        properties, end = decode_properties_basic(raw, 0)
        if end != len(raw):
            raise ValueError(f"the properties end at byte {end} of {len(raw)}")
        headers = properties.pop("application_headers", {})
    except Exception as error:  # bytes from outside: whatever they do to the decoder, they are data
        reason = f"the AMQP properties cannot be decoded: {type(error).__name__}: {error}"
        return Message(
            body=body, unreadable=reason, properties={"raw": raw}, redelivered=redelivered, origin=origin
        )
    sent_at = moment(properties.get("timestamp"))
    if sent_at is not None:
        del properties["timestamp"]
    return Message(
        body=body,
        headers={_text(name): value for name, value in headers.items()},
        id=properties.pop("message_id", None) or None,
        content_type=properties.pop("content_type", None),
        content_encoding=properties.pop("content_encoding", None),
        sent_at=sent_at,
        redelivered=redelivered,
        origin=origin,
        properties=properties,
    )


def _text(name: str | bytes) -> str:
    return name if isinstance(name, str) else name.decode("utf-8", "backslashreplace")


def moment(timestamp: int | None) -> datetime | None:
    """The AMQP property as a time.

    None also for what is no second of this calendar (milliseconds): such a message says no usable time.
    """
    if timestamp is None:
        return None
    try:
        return datetime.fromtimestamp(timestamp, UTC)
    except (OverflowError, ValueError, OSError):
        return None
