"""Kafka, through aiokafka: `Kafka("localhost:9092").topic("payments", group="ledger")`.

A record is committed only after everything before it in its partition is settled; what a record was worth
committing is decided in `offsets`, the reading itself happens in `kafka_consumer`.
"""

from __future__ import annotations

import asyncio
import os
import re
import ssl
from collections.abc import Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any, TypeVar

from idemq.broker import Deliver, Destination, Publisher, Subscription
from idemq.errors import BrokerUnavailable, SetupError
from idemq.kafka_connect import (
    PROTOCOLS,
    REACH_SECONDS,
    Reading,
    missing,
    reach,
    sasl_options,
    server_list,
    ssl_options,
    told,
)
from idemq.kafka_parcels import record
from idemq.kafka_process import process as process
from idemq.kafka_process import process_sync as process_sync
from idemq.kafka_process import release as release

T = TypeVar("T")

_TOPIC = re.compile(r"[A-Za-z0-9._-]{1,249}")


#: A partition has one reader, so nobody else could have these records; few fetches cost less.
PREFETCH_PER_LANE = 200


class Kafka:
    """A Kafka cluster. Nothing is connected before it is used; the password is shown nowhere."""

    def __init__(
        self,
        servers: str | Sequence[str],
        *,
        name: str = "kafka",
        security_protocol: str = "PLAINTEXT",
        ssl_context: ssl.SSLContext | None = None,
        ssl_cafile: str | None = None,
        ssl_certfile: str | None = None,
        ssl_keyfile: str | None = None,
        sasl_mechanism: str | None = None,
        sasl_username: str | None = None,
        sasl_password: str | None = None,
        sasl_token_provider: Any = None,
        client_id: str = "idemq",
    ) -> None:
        """`servers` are `host:port`, several as a list or separated by commas.

        SSL verifies the server: against `ssl_cafile`, or the system's authorities; `ssl_context` replaces the
        three files. `sasl_token_provider` is an `aiokafka.abc.AbstractTokenProvider`, for OAUTHBEARER.
        """
        if find_spec("aiokafka") is None:
            raise SetupError('Kafka needs aiokafka: pip install "idemq[kafka]"')
        if not name or not isinstance(name, str):
            raise SetupError("Kafka(name=...) must be a text that is not empty")
        self.name = name
        self._pid: int | None = None
        self.servers = server_list(servers)
        if security_protocol not in PROTOCOLS:
            raise SetupError(f"Kafka(security_protocol=...) must be one of {', '.join(PROTOCOLS)}")
        self._options: dict[str, Any] = {
            "bootstrap_servers": self.servers,
            "client_id": client_id,
            "security_protocol": security_protocol,
        }
        files = {"ssl_cafile": ssl_cafile, "ssl_certfile": ssl_certfile, "ssl_keyfile": ssl_keyfile}
        self._options |= ssl_options(security_protocol, ssl_context, files)
        self._options |= sasl_options(
            security_protocol, sasl_mechanism, sasl_username, sasl_password, sasl_token_provider
        )

    def __repr__(self) -> str:
        return f"Kafka({','.join(self.servers)!r}, name={self.name!r})"

    def topic(
        self,
        name: str,
        *,
        group: str,
        declare: bool = False,
        partitions: int = 1,
        replication: int = 1,
        session_timeout: float = 10.0,
        rebalance_timeout: float | None = None,
        stuck_after: float | None = None,
    ) -> Topic:
        """The topic `name`, read by the consumer group `group` from its committed positions, else the start.

        With `declare=True` a missing topic is created, with so many `partitions` and as many copies as
        `replication` says. A process that sends no heartbeat for `session_timeout` seconds loses its
        partitions; at a rebalance, handlers get 0.6 times `rebalance_timeout` (default: the session timeout)
        to finish. A consumer that makes no progress for `stuck_after` seconds (default: thrice the longer of
        the two) is built anew.
        """
        _check_topic(name)
        if not isinstance(group, str) or not group:
            raise SetupError(f"topic {name!r}: group=... must name the consumer group")
        for option, number in (("partitions", partitions), ("replication", replication)):
            if not isinstance(number, int) or isinstance(number, bool) or number < 1:
                raise SetupError(f"topic {name!r}: {option}={number!r} must be a whole number from 1 up")
        waits = {
            "session_timeout": session_timeout,
            "rebalance_timeout": session_timeout if rebalance_timeout is None else rebalance_timeout,
        }
        _check_seconds(name, waits)
        waits["stuck_after"] = 3 * max(waits.values()) if stuck_after is None else stuck_after
        _check_seconds(name, waits)
        if waits["stuck_after"] <= waits["rebalance_timeout"]:
            raise SetupError(f"topic {name!r}: stuck_after must be longer than rebalance_timeout")
        return Topic(
            self, name, group, declare=declare, partitions=partitions, replication=replication, **waits
        )

    def to(self, topic: str) -> Destination:
        """Where to publish; messages with the same key go to the same partition, in their order."""
        _check_topic(topic)
        return Destination(self.name, (topic,), partial(record, 0, (topic,)))

    def publisher(self) -> Publisher:
        """Publishes with `acks="all"`, by an idempotent producer."""
        from idemq.kafka_publisher import KafkaPublisher

        return KafkaPublisher(self.options, self.description)

    @property
    def description(self) -> str:
        return f"kafka://{','.join(self.servers)}"

    def options(self) -> dict[str, Any]:
        """What every aiokafka client of this cluster is given. Holds the password: do not print it.

        Refused in a process that was forked from one which had used this object: connections, threads and
        locks do not survive that.
        """
        if self._pid is None:
            self._pid = os.getpid()
        elif self._pid != os.getpid():
            raise SetupError(
                f"{self!r} was used in process {self._pid} before this one was forked from it; "
                "start processes with the `spawn` method, or use Kafka only after the fork"
            )
        return dict(self._options)


@dataclass(frozen=True, slots=True)
class Topic:
    """A topic and the group that reads it: a `Source`."""

    broker: Kafka
    name: str
    group: str
    declare: bool = field(kw_only=True)
    partitions: int = field(kw_only=True)
    replication: int = field(kw_only=True)
    session_timeout: float = field(kw_only=True)
    rebalance_timeout: float = field(kw_only=True)
    stuck_after: float = field(kw_only=True)

    @property
    def description(self) -> str:
        return f"topic {self.name!r} on {self.broker.description}, group {self.group!r}"

    @property
    def prefetch_per_lane(self) -> int:
        return PREFETCH_PER_LANE

    def check(self) -> list[str]:
        _elsewhere(self._check())
        return []

    async def _check(self) -> None:
        from aiokafka.admin import AIOKafkaAdminClient
        from aiokafka.errors import KafkaError

        options = self.broker.options()
        await reach(options)
        admin = AIOKafkaAdminClient(**options)
        try:
            async with asyncio.timeout(3 * REACH_SECONDS):
                await admin.start()
                # Asking for all topics creates none; asking for one by name may.
                if self.name not in await admin.list_topics():
                    await self._create(admin)
        except (KafkaError, OSError, TimeoutError) as error:
            raise BrokerUnavailable(f"{self.description}: {told(error)}") from None
        finally:
            await admin.close()

    async def _create(self, admin: Any) -> None:
        from aiokafka.admin import NewTopic
        from aiokafka.errors import TopicAlreadyExistsError, for_code

        if not self.declare:
            raise missing(self.description)
        response = await admin.create_topics([NewTopic(self.name, self.partitions, self.replication)])
        _, code, *text = response.topic_errors[0]
        if code not in (0, TopicAlreadyExistsError.errno):
            reason = (text[0] if text else None) or for_code(code).__name__
            raise SetupError(f"{self.description}: cannot be created (declare=True): {reason}")
        while True:  # creation is answered before the brokers know of it
            if self.name in await admin.list_topics():
                return
            await asyncio.sleep(0.05)

    def orders(self) -> None:
        """A partition has one consumer of the group, and comes in the order of its offsets."""

    def subscribe(self, consumer: str, deliver: Deliver, prefetch: int) -> Subscription:
        from idemq.kafka_consumer import KafkaSubscription

        reading = Reading(
            broker=self.broker.name,
            topic=self.name,
            group=self.group,
            options=self.broker.options(),
            description=self.description,
            session_timeout=self.session_timeout,
            rebalance_timeout=self.rebalance_timeout,
            stuck_after=self.stuck_after,
        )
        return KafkaSubscription(reading, consumer, deliver, prefetch)


def _check_topic(name: object) -> None:
    if not isinstance(name, str) or not _TOPIC.fullmatch(name) or name in (".", ".."):
        raise SetupError(f"Kafka topic {name!r}: 1 to 249 of the characters A-Z a-z 0-9 . _ -")


def _check_seconds(topic: str, waits: dict[str, float]) -> None:
    for option, seconds in waits.items():
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 1 <= seconds <= 86_400:
            raise SetupError(f"topic {topic!r}: {option}={seconds!r} must be seconds from 1 to 86,400")


def _elsewhere(work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, run on a loop in a thread of its own: the caller may be on a loop itself."""
    with ThreadPoolExecutor(1, "idemq-kafka-check") as pool:
        return pool.submit(asyncio.run, work).result()
