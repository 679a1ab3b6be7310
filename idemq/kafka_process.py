"""A handler over single Kafka records, for loops that poll and commit by themselves."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, Unpack, overload

from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncEngine

from idemq.errors import SetupError
from idemq.inplace import InPlace, Options
from idemq.message import Ack, Dead, Message

#: By engine and consumer: what `process` was last called with, and what it made of that.
_places: dict[Engine | AsyncEngine, dict[str, tuple[Any, InPlace]]] = {}


async def process(
    record: Any,
    handler: Callable[..., Any],
    engine: Engine | AsyncEngine,
    consumer: str,
    *,
    give_up: float = 60.0,
    broker: str = "kafka",
    **options: Unpack[Options],
) -> Ack | Dead:
    """Run one record of an aiokafka consumer to its end; commit its offset afterwards.

    An async handler wants an AsyncEngine; a sync one an Engine, and runs in a thread, so that the loop and
    with it the consumer's heartbeats go on. Returns `Ack` (processed now or before) or `Dead` (a dead letter
    was written). A failed handler is tried again inside, for `give_up` seconds at most; then `NotSettled` is
    raised: do not commit, and leave the loop, because Kafka gives nothing again that was polled.

    The consumer needs `enable_auto_commit=False` and no deserializers. `broker` is the name under which a
    dead letter's origin is filed; the other options are those of App. The engine's connection is held
    between calls, until `release(engine)`.
    """
    place, replaced = _place(handler, engine, consumer, give_up, options)
    if replaced is not None:
        await _close(replaced)
    message = _message(record, broker)
    return await (place.run_async(message) if place.asynchronous else place.run_in_thread(message))


def process_sync(
    record: Any,
    handler: Callable[..., Any],
    engine: Engine,
    consumer: str,
    *,
    give_up: float = 60.0,
    broker: str = "kafka",
    **options: Unpack[Options],
) -> Ack | Dead:
    """`process` in a loop without asyncio, over any client whose records look like aiokafka's."""
    place, replaced = _place(handler, engine, consumer, give_up, options)
    if place.asynchronous:
        raise SetupError(f"consumer {consumer!r}: process_sync() wants a sync handler; await process()")
    if replaced is not None:
        replaced.close()
    return place.run(_message(record, broker))


def _place(
    handler: Callable[..., Any], engine: Engine | AsyncEngine, consumer: str, give_up: float, options: Options
) -> tuple[InPlace, InPlace | None]:
    """The place for these arguments; and the one that it replaces, where they were others the last time."""
    places = _places.setdefault(engine, {})
    given = (handler, give_up, options)
    last = places.get(consumer)
    if last is not None and last[0] == given:
        return last[1], None
    place = InPlace(handler, engine, consumer, give_up=give_up, **options)
    places[consumer] = given, place
    return place, last[1] if last is not None else None


def _message(record: Any, broker: str) -> Message:
    from idemq.kafka_records import message_from  # needs aiokafka, which is an extra

    for part in (record.key, record.value):
        if part is not None and not isinstance(part, bytes):
            raise SetupError("process() needs a consumer without deserializers: a key and a body of bytes")
    return message_from(record, broker)


@overload
def release(engine: Engine) -> None: ...
@overload
def release(engine: AsyncEngine) -> Coroutine[Any, Any, None]: ...
def release(engine: Engine | AsyncEngine) -> Coroutine[Any, Any, None] | None:
    """Give the connections that `process` holds back to the engine's pool; await it for an AsyncEngine."""
    places = [place for _, place in _places.pop(engine, {}).values()]
    if isinstance(engine, AsyncEngine):
        return _close(*places)
    for place in places:
        place.close()
    return None


async def _close(*places: InPlace) -> None:
    for place in places:
        place.close()
        await place.close_async()
