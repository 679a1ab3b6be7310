"""A broker in one SQLite file, for several processes of one machine and without a server.

A message is durable when `publish` returns, and is delivered until it is acknowledged. What a dead process
held is delivered again, marked `redelivered`, as soon as another consumer of the queue looks; what a living
one holds never is, also not while it is stopped or slow.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import Any

from idemq import embedded_rows as rows
from idemq.broker import Deliver, Destination, Unsendable
from idemq.embedded_consumer import Subscription, wake_all
from idemq.embedded_file import Connection, connect, errors, is_forked, refuse_fork, transaction
from idemq.errors import SetupError
from idemq.message import Message, encoded

#: What one lane holds ahead of other workers, who could have it instead.
PREFETCH_PER_LANE = 20


class Embedded:
    """A broker in the SQLite file `path`, which belongs to it alone; never the application's database.

    Thread-safe. The file is made by the first `declare`. A process that was forked from one that had the file
    open is refused: spawn processes instead, or `close` before the fork.
    """

    def __init__(self, path: str | os.PathLike[str], *, name: str = "embedded") -> None:
        text = os.fspath(path)
        if not text or text == ":memory:" or text.startswith("file:"):
            raise SetupError(f"Embedded({text!r}): give the path of a file, which its processes can share")
        self.name = _checked("Embedded(name=...)", name)
        self.path = Path(os.path.realpath(text))
        self._connection: Connection | None = None
        self._lock = threading.Lock()

    def queue(self, name: str, *, declare: bool = False) -> Queue:
        """The queue as a source for consumers; `declare=True` makes it, and the file, when it is missing."""
        return Queue(self, name, declare=declare)

    def to(self, queue: str) -> Destination:
        """Where to publish."""
        return Destination(self.name, (_checked("a queue's name", queue),), _row)

    def publisher(self) -> Publisher:
        """Publishes whole batches, durably; with a connection of its own."""
        return Publisher(self.path)

    @property
    def description(self) -> str:
        return f"embedded broker in {self.path}"

    def declare(self, queue: str) -> None:
        """Make the queue, and the file, when it is missing."""
        with closing(connect(self.path, create=True)) as connection, errors(self.path):
            rows.declare(connection, _checked("a queue's name", queue))

    def publish(
        self,
        queue: str,
        body: bytes,
        *,
        id: str | None = None,
        headers: Mapping[str, Any] | None = None,
        content_type: str | None = "application/json",
        sent_at: datetime | None = None,
    ) -> None:
        """Put one message into the queue; it is durable on return. `sent_at=None` means now."""
        message = Message(body=body, id=id, headers=headers or {}, content_type=content_type, sent_at=sent_at)
        self.publish_many(queue, [message])

    def publish_many(self, queue: str, messages: Iterable[Message]) -> None:
        """Put all of them into the queue, in this order, or none; they are durable on return.

        What is kept is body, id, headers (JSON), content type and encoding, and sent_at (None: now).
        """
        refuse_fork(self.path)  # before the lock, which a thread of the parent may have held
        values = [rows.row_of(message) for message in messages]
        with self._lock, errors(self.path):
            connection = self._connected()
            with transaction(connection):
                rows.insert(connection, rows.number_of(connection, queue), values)
        wake_all(self.path, queue)

    def depth(self, queue: str) -> tuple[int, int]:
        """How many messages of the queue are ready, and how many are delivered and not acknowledged."""
        refuse_fork(self.path)
        with self._lock, errors(self.path):
            connection = self._connected()
            return rows.depth(connection, rows.number_of(connection, queue))

    def close(self) -> None:
        """Close the connection for publishing; the next publish opens another. Subscriptions go on."""
        if is_forked(self.path):
            return  # the connection is the parent's
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def _connected(self) -> Connection:
        if self._connection is not None and not self._connection.is_current():
            self._connection.close()
            self._connection = None
        if self._connection is None:
            self._connection = connect(self.path)
        return self._connection


class Publisher:
    """A connection for publishing to the broker in the file `path`: see `broker.Publisher`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._connection: Connection | None = None

    def publish(self, batch: Sequence[tuple[tuple[str, ...], Message]], timeout: float) -> list[str | None]:
        refuse_fork(self._path)
        answers: dict[int, str | None] = {}
        queues: dict[str, dict[int, tuple[Any, ...]]] = {}
        for place, (address, message) in enumerate(batch):
            try:
                queues.setdefault(_queue(address), {})[place] = _row(message)
            except Unsendable as error:
                answers[place] = str(error)
        try:
            answers |= self._insert(queues, timeout)
        except SetupError as error:  # there is no such file, or it cannot be written to
            answers |= {place: str(error) for places in queues.values() for place in places}
        for queue, places in queues.items():
            if None in map(answers.get, places):
                wake_all(self._path, queue)
        return [answers[place] for place in range(len(batch))]

    def close(self) -> None:
        refuse_fork(self._path)
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _insert(
        self, queues: Mapping[str, Mapping[int, tuple[Any, ...]]], timeout: float
    ) -> dict[int, str | None]:
        """All in one transaction; only a missing queue is left out."""
        answers: dict[int, str | None] = {}
        try:
            with errors(self._path):
                if self._connection is not None and not self._connection.is_current():
                    self.close()
                self._connection = connection = self._connection or connect(self._path)
                connection.execute(f"PRAGMA busy_timeout = {int(1000 * timeout)}")
                with transaction(connection):
                    for queue, values in queues.items():
                        try:
                            rows.insert(connection, rows.number_of(connection, queue), [*values.values()])
                            answers |= dict.fromkeys(values)
                        except SetupError as error:
                            answers |= dict.fromkeys(values, str(error))
        except BaseException:
            self.close()
            raise
        return answers


class Queue:
    """A queue of an embedded broker: a `Source`."""

    def __init__(self, broker: Embedded, name: str, *, declare: bool) -> None:
        self.broker = broker
        self.name = _checked("a queue's name", name)
        self._declare = declare

    @property
    def description(self) -> str:
        return f"queue {self.name!r} in {self.broker.path}"

    @property
    def prefetch_per_lane(self) -> int:
        return PREFETCH_PER_LANE

    def check(self) -> list[str]:
        with closing(self.connect()):
            return []

    def orders(self) -> None:
        raise SetupError(
            f"{self.description} shares its messages out between consumers, in no order: take a Kafka topic "
            "or a RabbitMQ queue with x-single-active-consumer"
        )

    def subscribe(self, consumer: str, deliver: Deliver, prefetch: int) -> Subscription:
        if not isinstance(prefetch, int) or prefetch < 1:
            raise SetupError(
                f"consumer {consumer!r}: prefetch must be a whole number from 1 up, not {prefetch!r}"
            )
        return Subscription(
            self.connect, self.broker.path, self.name, self.broker.name, consumer, deliver, prefetch
        )

    def connect(self) -> Connection:
        """A connection for a consumer. Its commits need not be on the disk: losing one is a redelivery."""
        connection = connect(self.broker.path, create=self._declare, durable=False)
        try:
            with errors(self.broker.path):
                if self._declare:
                    rows.declare(connection, self.name)
                rows.number_of(connection, self.name)
        except BaseException:
            connection.close()
            raise
        return connection


def _checked(what: str, name: str) -> str:
    if not isinstance(name, str) or not 0 < len(encoded(name)) <= 255:
        raise SetupError(f"{what} must be a text of 1 to 255 bytes, not {name!r}")
    return name


def _queue(address: Sequence[str]) -> str:
    if len(address) != 1:
        raise Unsendable(f"{tuple(address)!r} is no queue of an embedded broker")
    return address[0]


def _row(message: Message) -> tuple[Any, ...]:
    if message.properties:
        raise Unsendable(
            f"the embedded broker has no property {next(iter(message.properties))!r}: use a header"
        )
    try:
        return rows.row_of(message)
    except (TypeError, ValueError) as error:
        raise Unsendable(f"the embedded broker cannot keep it: {error}") from None
