"""What a broker module offers: a `Source` to read from, which delivers `Delivery` objects, and a `Publisher`.

Brokers know no tables and the handler path knows no broker; they meet in `worker`. Everything here is
synchronous: a broker that needs a thread or an event loop of its own hides it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from idemq.message import Message


class Delivery(Protocol):
    """One message handed to this process by a broker, until it is settled or its epoch ends.

    An epoch is one incarnation of connection and channel (RabbitMQ), or one assignment of a partition
    (Kafka). When it ends, the broker gives the message to somebody again, and settling the old delivery must
    have no effect: not an error, and never an acknowledgement of something else.
    """

    @property
    def message(self) -> Message: ...

    def start(self) -> bool:
        """Called right before each attempt: False means that the epoch is over and nothing may be run."""
        ...

    def ack(self) -> None:
        """Acknowledge, at once or soon; returns without waiting for the broker; never raises.

        Called at most once, only after what the verdict says is committed.
        """
        ...

    def rest(self) -> None:
        """The attempt ended without a verdict: the worker keeps the delivery and calls `start()` again before
        the next one. A partition that is taken away need not wait for it."""
        ...

    def drop(self) -> None:
        """The worker will not settle this delivery: it is left to the broker's redelivery.

        Called when `start()` said False, and for what is still unsettled when the worker stops.
        """
        ...


#: Takes deliveries from a broker's thread; must not block.
Deliver = Callable[[Sequence[Delivery]], None]


class Subscription(Protocol):
    """A running consumer of one source."""

    @property
    def failure(self) -> BaseException | None:
        """What ended this subscription for good (refused access to a topic, for example), else None."""
        ...

    @property
    def connected(self) -> bool:
        """The broker knows this consumer now, and a sign of life came lately."""
        ...

    def pause(self) -> None:
        """Take no more deliveries. What was delivered may still be started and settled."""
        ...

    def close(self, timeout: float) -> None:
        """Send what was acknowledged, give the rest back and disconnect, in at most `timeout` seconds."""
        ...


class Source(Protocol):
    """A queue or topic with a group, declared by the user: `rabbit.queue(...)`, `kafka.topic(...)`."""

    @property
    def description(self) -> str:
        """For people, without secrets: `queue 'payments' on amqp://shop@localhost:5672/`."""
        ...

    @property
    def prefetch_per_lane(self) -> int:
        """How many deliveries to hold for each message worked on, where the user does not say."""
        ...

    @property
    def broker(self) -> Broker:
        """Where the messages come from, and answers to them go."""
        ...

    def check(self) -> list[str]:
        """Raise `SetupError` when the queue or topic is missing or access is refused, and
        `BrokerUnavailable` when the broker does not answer. Creates what was declared with `declare=True`.
        Returns warnings: what is known of the broker's settings by which it may lose messages."""
        ...

    def orders(self) -> None:
        """Raise `SetupError`, with the remedy, when messages of one key may overtake each other on their way
        to the worker: several workers share them out, or one goes back behind those that came after it."""
        ...

    def subscribe(self, consumer: str, deliver: Deliver, prefetch: int) -> Subscription:
        """Start consuming in the background; `consumer` names threads and log lines.

        At most `prefetch` deliveries are unsettled at a time. An unreachable broker is retried for ever,
        one log line each time; nothing is raised.
        """
        ...


@dataclass(frozen=True, slots=True)
class Destination:
    """Where a message is to go: what `broker.to(...)` says. Made without a connection, and plain data."""

    #: The broker's name, by which the relay finds it.
    broker: str
    #: RabbitMQ: exchange and routing key; Kafka: topic; embedded: queue.
    address: tuple[str, ...]
    #: Raises `Unsendable` for a message that the broker could not carry, and that would wait for ever.
    check: Callable[[Message], object] = field(default=lambda message: None, repr=False, compare=False)


class Unsendable(Exception):
    """This broker cannot carry the message; the text, which `Publisher.publish` answers, says why."""


class Publisher(Protocol):
    """A connection for publishing, made when it is first needed. Used by one thread."""

    def publish(self, batch: Sequence[tuple[tuple[str, ...], Message]], timeout: float) -> list[str | None]:
        """Publish each message to its address, in this order; what the broker has answered for each of them.

        None: the broker has confirmed that it keeps the message, at this address. A text: it does not, and
        why, for people (no such exchange, no queue bound, too large). Raises `BrokerUnavailable` when that
        is not known of at least one of them, within `timeout` seconds: any of them may have been published.
        A connection on which anything was in doubt is thrown away, so that a late answer to one batch is
        never taken for one to the next.
        """
        ...

    def close(self) -> None:
        """Disconnect; the next `publish` would connect again."""
        ...


class Broker(Protocol):
    """What messages can be published to."""

    @property
    def name(self) -> str: ...

    @property
    def description(self) -> str: ...

    def to(self, queue: str, /) -> Destination:
        """A queue or topic of it. Raises `SetupError` for a name that there cannot be."""
        ...

    def publisher(self) -> Publisher: ...
