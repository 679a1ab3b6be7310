"""The outbox: messages that are published if, and only if, the transaction commits.

    with engine.begin() as connection:
        connection.execute(insert(orders).values(...))
        Outbox(connection).publish(rabbit.to("orders.created"), body, key=order)

The relay publishes them after the commit, at least once and under the same message id; a consumer of idemq
takes each once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from uuid import UUID

import msgspec
from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
from sqlalchemy.orm import Session

from idemq.broker import Destination, Unsendable
from idemq.errors import SetupError
from idemq.message import MAX_ID_BYTES, Message, encoded
from idemq.outgoing import MESSAGE, lane_of, plan


class Outbox:
    """Writes messages in the transaction of a Connection or Session.

    A handler that has a parameter of this type gets one; elsewhere: `Outbox(session)`.
    """

    def __init__(self, target: Connection | Session, *, schema: str | None = None) -> None:
        if not isinstance(target, Connection | Session):
            raise SetupError(f"Outbox() takes a Connection or Session, not {type(target).__name__}")
        self._target, self._schema = target, schema

    def publish(
        self,
        destination: Destination,
        body: object,
        *,
        headers: Mapping[str, Any] | None = None,
        key: str | bytes | None = None,
        id: str | None = None,
        content_type: str | None = "application/json",
        properties: Mapping[str, Any] | None = None,
    ) -> str:
        """Have a message published after the commit; returns its id.

        `destination` is `broker.to(...)`. `body`: bytes are sent as they are, everything else as JSON.
        Messages with the same `key` reach a broker in the order in which they were written, one that it
        does not take holds those after it; on Kafka it is the record's key. `id`: your own message id instead
        of a random UUID. `properties`: of AMQP, `correlation_id` for example. Raises `ValueError` for more
        than 16 MiB and for what the broker could not carry, and `TypeError` for a body that is no JSON.
        """
        if not isinstance(destination, Destination):
            raise SetupError(f"publish() takes broker.to(...) as its destination, not {destination!r}")
        if id is not None and not 0 < len(encoded(id)) <= MAX_ID_BYTES:
            raise ValueError(f"a message id is a text of 1 to {MAX_ID_BYTES} bytes")
        message = Message(
            body=body if isinstance(body, bytes) else msgspec.json.encode(body),
            headers=headers or {},
            id=id,
            key=key.encode() if isinstance(key, str) else key,
            content_type=content_type,
            properties=properties or {},
        )
        try:
            destination.check(message)
        except Unsendable as error:
            raise ValueError(f"it could never be published to {destination.broker!r}: {error}") from None
        target = self._target
        connection = target.connection() if isinstance(target, Session) else target
        lane = None if key is None else lane_of(destination.broker, key)
        pk = plan(
            connection,
            MESSAGE,
            destination.broker,
            message,
            address=destination.address,
            lane=lane,
            schema_name=self._schema,
        )
        return id if id is not None else str(UUID(bytes=pk.bytes))


class AsyncOutbox:
    """`Outbox` for an AsyncConnection or AsyncSession."""

    def __init__(self, target: AsyncConnection | AsyncSession, *, schema: str | None = None) -> None:
        if not isinstance(target, AsyncConnection | AsyncSession):
            raise SetupError(
                f"AsyncOutbox() takes an AsyncConnection or AsyncSession, not {type(target).__name__}"
            )
        self._target, self._schema = target, schema

    async def publish(self, destination: Destination, body: object, **options: Any) -> str:
        """`Outbox.publish`."""
        return await self._target.run_sync(
            lambda target: Outbox(target, schema=self._schema).publish(destination, body, **options)
        )
