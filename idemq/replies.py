"""Answers: what a handler returns goes to who asked for it, and a repeat gets the first answer again.

Guaranteed: the answer is stored with the claim, in the handler's transaction, and sent after its commit, at
least once. Who asked says where to: AMQP's `reply_to`, on Kafka and the embedded broker a header.
"""

from __future__ import annotations

import logging
from typing import Any

from sqlalchemy import ColumnElement, Connection, select, update

from idemq import schema
from idemq.broker import Broker
from idemq.errors import SetupError
from idemq.message import Message
from idemq.outgoing import REPLY, plan
from idemq.packing import as_text, result_bytes, shown

log = logging.getLogger("idemq.worker")

#: Headers that say where an answer goes, and what it is told apart by, tried in this order.
REPLY_TO = ("reply-to", "reply-topic", "kafka_replyTopic")
CORRELATION = ("correlation-id", "correlation_id", "kafka_correlationId")


class Replies:
    """Answers the messages of one consumer, in the caller's transactions."""

    def __init__(self, broker: Broker, consumer: int, schema_name: str | None) -> None:
        self._broker, self._consumer, self._schema = broker, consumer, schema_name
        self._table = schema.table("idemq_processed", schema_name)

    def first(self, connection: Connection, key: bytes, message: Message, result: object) -> None:
        """Store the answer with the claim, and send it when that commits."""
        body = result_bytes(result)
        connection.execute(update(self._table).where(self._claim(key)).values(result=body))
        self._send(connection, message, body)

    def again(self, connection: Connection, key: bytes, message: Message) -> None:
        """Send the first answer to a repeat; nothing where none was stored."""
        body = connection.scalar(select(self._table.c.result).where(self._claim(key)))
        if body is not None:
            self._send(connection, message, body)

    def _claim(self, key: bytes) -> ColumnElement[bool]:
        return (self._table.c.id == key) & (self._table.c.consumer == self._consumer)

    def _send(self, connection: Connection, question: Message, body: bytes) -> None:
        where = question.properties.get("reply_to") or _header(question, REPLY_TO)[1]
        if not where:
            return  # nobody waits for an answer
        try:
            destination = self._broker.to(_text(where))
        except SetupError as error:  # it is the sender's mistake, and no reason to undo the work
            log.warning("no answer to %r: %s", question.id, shown(str(error)))
            return
        by_property = question.properties.get("reply_to") is not None
        name, correlation = _header(question, CORRELATION)
        correlation = _short(question.properties.get("correlation_id") or correlation or question.id)
        answer = Message(
            body=body,
            headers={} if by_property else {name: correlation},
            key=question.key,
            content_type="application/json",
            properties={"correlation_id": correlation} if by_property else {},
        )
        plan(
            connection,
            REPLY,
            self._broker.name,
            answer,
            address=destination.address,
            schema_name=self._schema,
        )


def _text(where: Any) -> Any:
    try:
        return as_text(where)
    except UnicodeDecodeError:
        return where


def _short(correlation: object) -> str:
    """As every broker carries it: a text of at most 255 bytes."""
    text = correlation.decode("utf-8", "replace") if isinstance(correlation, bytes) else str(correlation)
    return text.encode("utf-8", "replace")[:255].decode("utf-8", "ignore")


def _header(message: Message, names: tuple[str, ...]) -> tuple[str, Any]:
    """The first of the headers that is there: its name, and its value."""
    for name in names:
        if value := message.headers.get(name):
            return name, value
    return names[0], None
