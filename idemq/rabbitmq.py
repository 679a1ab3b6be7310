"""RabbitMQ as a source of messages, and as a place to publish them to.

    rabbit = RabbitMQ("amqps://shop:secret@rabbit.example/orders")

    @app.consumer("receipts", rabbit.queue("payments.settled"))

Nothing is declared unless the user says `declare=True`; what is missing, different or refused is a
`SetupError` when the consumer starts, which names it and the remedy.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal, TypeVar

from idemq.errors import BrokerUnavailable, SetupError

try:
    import amqp
    import kombu  # noqa: F401  # its url parser is used by idemq.amqp_url
    from amqp.serialization import dumps
except ImportError:
    raise SetupError('RabbitMQ needs kombu and amqp: pip install "idemq[rabbitmq]"') from None

from idemq.amqp_confirms import Confirms, Receipts
from idemq.amqp_consumer import QueueSubscription
from idemq.amqp_frames import Inbox
from idemq.amqp_link import Link, Wire, refuse_fork
from idemq.amqp_parcels import SHORT_BYTES, parcel
from idemq.amqp_publisher import AmqpPublisher
from idemq.amqp_risks import risks
from idemq.amqp_url import Address, addresses, description_of
from idemq.broker import Deliver, Destination
from idemq.kombu_callback import wrap as wrap
from idemq.message import encoded

W = TypeVar("W", bound=Wire)

#: The largest `prefetch`: every unsettled delivery is held in memory.
MOST_PREFETCH = 1000


#: What one lane holds ahead of other workers, who could have it instead.
PREFETCH_PER_LANE = 20


class RabbitMQ:
    """A RabbitMQ server or cluster. Connects only when a consumer starts; `name` is stable and secret-free.

    `url` is `amqp://user:password@host:port/vhost`, `amqps://` for TLS; several servers are separated by
    `;` and tried in that order. `?heartbeat=` and `?connect_timeout=` in the url stand for the arguments;
    both are seconds, and the second is also how long an answer of the server is waited for.
    `ssl` is True or a mapping with any of ca_certs, certfile, keyfile, cert_reqs, ciphers, server_hostname,
    tls_minimum_version; certificate and host name are verified unless it says otherwise.
    """

    def __init__(
        self,
        url: str,
        *,
        name: str = "rabbitmq",
        ssl: bool | Mapping[str, Any] | None = None,
        heartbeat: int = 30,
        connect_timeout: float = 10.0,
        login_method: Literal["PLAIN", "AMQPLAIN", "EXTERNAL"] = "PLAIN",
    ) -> None:
        if not isinstance(name, str) or not 0 < len(name.encode()) <= 255:
            raise SetupError(f"RabbitMQ: name must be a text of 1 to 255 bytes, not {name!r}")
        self.name = name
        self._addresses = addresses(
            url, ssl=ssl, heartbeat=heartbeat, connect_timeout=connect_timeout, login_method=login_method
        )
        #: The process that connected first.
        self.connected_in: int | None = None

    def __repr__(self) -> str:
        return f"RabbitMQ({description_of(self._addresses)!r}, name={self.name!r})"

    def queue(self, name: str, *, declare: bool = False, arguments: Mapping[str, Any] | None = None) -> Queue:
        """A queue to consume from. `declare=True` makes it when it is missing: durable, with `arguments`.

        Otherwise it must exist; with `arguments` it must have been declared durable with exactly these.
        For messages in order, `arguments` say `{"x-single-active-consumer": True}`.
        """
        return Queue(self, name, declare, dict(arguments or {}))

    def to(self, queue: str = "", *, exchange: str = "", routing_key: str = "") -> Destination:
        """Where to publish: `to("queue")`, or `to(exchange="events", routing_key="order.created")`."""
        if bool(queue) == bool(exchange) or (queue and routing_key):
            raise SetupError('RabbitMQ: to("queue"), or to(exchange="...", routing_key="...")')
        address = (exchange, queue or routing_key)
        for name in address:
            if not isinstance(name, str) or len(encoded(name)) > SHORT_BYTES:
                raise SetupError(f"RabbitMQ: to() takes texts of at most {SHORT_BYTES} bytes, not {name!r}")
        return Destination(self.name, address, partial(parcel, 0, address))

    def publisher(self) -> AmqpPublisher:
        """Publishes with confirms, mandatory and persistent."""

        def opened(seconds: float) -> Confirms:
            share = seconds / len(self._addresses)
            return self.connect(
                lambda address: Confirms.connect(
                    replace(address, connect_timeout=min(address.connect_timeout, share)),
                    "idemq publisher",
                    Receipts(),
                )
            )

        return AmqpPublisher(opened, self.description)

    def connect(self, opened: Callable[[Address], W]) -> W:
        """A connection, made by `opened`, to the first server that answers."""
        refuse_fork(self.connected_in)
        self.connected_in = os.getpid()
        unreachable: list[BrokerUnavailable] = []
        for address in self._addresses:
            try:
                return opened(address)
            except BrokerUnavailable as error:
                unreachable.append(error)
        raise BrokerUnavailable("; ".join(str(error) for error in unreachable)) from unreachable[-1]

    @property
    def description(self) -> str:
        return description_of(self._addresses)


class Queue:
    """A queue of a `RabbitMQ`, to be given to a consumer."""

    def __init__(self, broker: RabbitMQ, name: str, declare: bool, arguments: Mapping[str, Any]) -> None:
        if not isinstance(name, str) or not 0 < len(name.encode()) <= 255:
            raise SetupError(f"RabbitMQ queue: name must be a text of 1 to 255 bytes, not {name!r}")
        try:
            dumps("F", [arguments])
        except Exception:  # py-amqp raises whatever the value makes it raise
            raise SetupError(
                f"RabbitMQ queue {name!r}: arguments must map texts to values that AMQP knows "
                f"(texts, numbers, booleans, lists, mappings), not {arguments!r}"
            ) from None
        self.name = name
        self.broker = broker
        self._declare = declare
        self._arguments = arguments

    def __repr__(self) -> str:
        return f"<{self.description}>"

    @property
    def description(self) -> str:
        return f"queue {self.name!r} on {self.broker.description}"

    @property
    def prefetch_per_lane(self) -> int:
        return PREFETCH_PER_LANE

    def check(self) -> list[str]:
        """Raise `SetupError` for a missing or different queue and for refused access; returns warnings."""
        link = self._connect("idemq check")
        try:
            warnings = risks(self._arguments, link.server_version)
            link.close(1.0)
            return warnings
        finally:
            link.sever()

    @property
    def _single(self) -> bool:
        return self._arguments.get("x-single-active-consumer") is True

    def orders(self) -> None:
        if not self._single:
            raise SetupError(
                f"{self.description} shares its messages out between consumers, in no order: make it a queue "
                "with a single active consumer, and say so with "
                'arguments={"x-single-active-consumer": True}'
            )

    def subscribe(self, consumer: str, deliver: Deliver, prefetch: int) -> QueueSubscription:
        """Consume in a thread of its own until `close`; whatever fails is tried again for ever."""
        if type(prefetch) is not int or not 1 <= prefetch <= MOST_PREFETCH:
            raise SetupError(
                f"consumer {consumer!r}: prefetch must be from 1 to {MOST_PREFETCH}, not {prefetch!r} "
                "(0 would mean that RabbitMQ sends the whole queue at once)"
            )
        refuse_fork(self.broker.connected_in)
        connect = partial(self._connect, f"idemq {consumer}", prefetch)
        return QueueSubscription(connect, self.description, consumer, deliver)

    def _connect(self, title: str, prefetch: int | None = None) -> Link:
        """A connection on which the queue was seen to be there as declared, consuming with `prefetch`."""
        origin = {"broker": self.broker.name, "queue": self.name}
        link = self.broker.connect(lambda address: Link.connect(address, title, Inbox(origin)))
        try:
            if not self._declare:
                link.find(self.name)
            if self._declare or self._arguments:
                link.declare(self.name, self._arguments)
            if prefetch is not None:
                link.consume(self.name, prefetch, sole=self._single)
        except BaseException as error:
            link.sever()
            if isinstance(error, amqp.ChannelError):
                raise SetupError(self._refusal(error)) from error
            if isinstance(error, OSError | amqp.AMQPError):
                raise BrokerUnavailable(f"{self.description}: {error}") from error
            raise
        return link

    def _refusal(self, error: Exception) -> str:
        if isinstance(error, amqp.NotFound):
            return f"{self.description} does not exist: create it, or let idemq do so with declare=True"
        if isinstance(error, amqp.AccessRefused):
            return f"{self.description}: the user has no permission for it: {error}"
        if isinstance(error, amqp.PreconditionFailed):
            return f"{self.description} exists, but not as declare and arguments say: {error}"
        return f"{self.description} cannot be used: {error}"
