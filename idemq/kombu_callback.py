"""A handler as the callback of a kombu Consumer, for programs that drain their connection themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Unpack

from sqlalchemy import Engine

from idemq.amqp_frames import moment
from idemq.errors import SetupError
from idemq.inplace import InPlace, Options
from idemq.message import Message


class Callback:
    """`on_message` of a kombu Consumer; `undecodable` is its `on_decode_error`."""

    def __init__(self, place: InPlace, broker: str) -> None:
        self._place, self._broker = place, broker

    def __call__(self, message: Any) -> None:
        """Run the message to its end, then acknowledge it. Raises `NotSettled`, with nothing acknowledged."""
        self._settle(message, None)

    def undecodable(self, message: Any, error: Exception) -> None:
        """A message that kombu cannot decompress becomes a dead letter."""
        self._settle(message, f"kombu cannot read it: {type(error).__name__}: {error}")

    def _settle(self, message: Any, unreadable: str | None) -> None:
        self._place.run(message_of(message, self._broker, unreadable))
        message.ack()

    def close(self) -> None:
        """Give the database connections back to the engine's pool."""
        self._place.close()


def wrap(
    handler: Callable[..., Any],
    engine: Engine,
    consumer: str,
    *,
    give_up: float = 60.0,
    broker: str = "rabbitmq",
    **options: Unpack[Options],
) -> Callback:
    """The handler as a callback: `Consumer(channel, [queue], on_message=callback, prefetch_count=10,
    on_decode_error=callback.undecodable)`.

    The callback acknowledges by itself, and only what is processed, was processed before, or is a dead
    letter. A failed handler is tried again inside, and for `give_up` seconds at most; then `NotSettled`
    leaves the loop that drains the connection. Do not use `no_ack`, and call it on the thread that drains.
    `broker` is the name under which a dead letter's origin is filed; the other options are those of App.
    """
    place = InPlace(handler, engine, consumer, give_up=give_up, **options)
    if place.asynchronous:
        raise SetupError(f"consumer {consumer!r}: kombu calls back on a thread: its handler must be sync")
    return Callback(place, broker)


def message_of(message: Any, broker: str, unreadable: str | None = None) -> Message:
    """The message in a kombu one, as raw as kombu leaves it, which decompresses but does not decode."""
    properties = dict(message.properties)
    headers = dict(message.headers)
    properties.pop("application_headers", None)
    if unreadable is None:
        headers.pop("compression", None)  # it is undone already
    info = message.delivery_info
    sent_at = moment(properties.pop("timestamp", None))
    body = message.body
    return Message(
        body=body.encode() if isinstance(body, str) else bytes(body or b""),
        headers=headers,
        id=properties.pop("message_id", None) or None,
        content_type=properties.pop("content_type", None) or message.content_type,
        content_encoding=properties.pop("content_encoding", None) or message.content_encoding,
        sent_at=sent_at,
        redelivered=bool(info.get("redelivered")),
        origin={
            "broker": broker,
            "exchange": info.get("exchange"),
            "routing_key": info.get("routing_key"),
        },
        properties=properties,
        unreadable=unreadable,
    )
