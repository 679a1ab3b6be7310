"""RabbitMQ with TLS, and RabbitMQ that is killed: on a server that nobody else uses."""

from __future__ import annotations

import logging
import os
import ssl
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import make_url

from idemq.errors import BrokerUnavailable, SetupError
from idemq.message import Message
from idemq.rabbitmq import RabbitMQ
from tests import servers
from tests.contract.brokers import RabbitBroker
from tests.contract.running import Shop
from tests.rabbitmq_tools import OwnServer, Server, consuming
from tests.servers import eventually


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnServer]:
    try:
        servers.require_engine()
    except servers.Unavailable as missing:
        reason = f"needs a RabbitMQ of its own: {missing}"
        if servers.required():
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)
    with OwnServer(tmp_path_factory.mktemp("tls")) as server:
        yield server


def test_everything_passes_through_tls(own: OwnServer, unique: str) -> None:
    rabbit = RabbitMQ(f"amqps://localhost:{own.tls_port}", ssl={"ca_certs": own.ca_certs}, heartbeat=1)
    source = rabbit.queue(unique, declare=True)
    source.check()
    server = Server(own.url)
    large = os.urandom(3_000_000)
    bodies = [b"%d" % n for n in range(300)]
    server.publish(unique, large)
    for body in bodies:
        server.publish(unique, body)

    with consuming(source, prefetch=50) as (subscription, got):
        first = got.take()
        assert first.message.body == large
        first.ack()
        for body in bodies:
            delivery = got.take()
            assert delivery.message.body == body
            delivery.ack()
        assert subscription.connected
    eventually(lambda: server.counts(unique) == (0, 0))
    server.close()


@pytest.mark.parametrize(
    ("host", "options"),
    [("localhost", {}), ("127.0.0.1", {"ca_certs": True})],
    ids=["unknown authority", "another host name"],
)
def test_a_certificate_that_does_not_fit_is_refused(
    own: OwnServer, host: str, options: dict[str, Any]
) -> None:
    trusted = dict.fromkeys(options, own.ca_certs)
    with pytest.raises(SetupError, match=r"certificate is not trusted.*ca_certs"):
        RabbitMQ(f"amqps://{host}:{own.tls_port}", ssl=trusted).queue("q").check()


def test_verification_can_be_turned_off_on_purpose(own: OwnServer, unique: str) -> None:
    rabbit = RabbitMQ(f"amqps://127.0.0.1:{own.tls_port}", ssl={"cert_reqs": ssl.CERT_NONE})
    rabbit.queue(unique, declare=True).check()


@pytest.mark.parametrize("swapped", ["amqps on the plain port", "amqp on the TLS port"])
def test_the_wrong_port_is_unavailable_and_says_why(own: OwnServer, swapped: str) -> None:
    encrypted = swapped.startswith("amqps")
    port = own.port if encrypted else own.tls_port
    rabbit = RabbitMQ(f"{'amqps' if encrypted else 'amqp'}://localhost:{port}", connect_timeout=2)
    with pytest.raises(BrokerUnavailable, match=f"localhost:{port} cannot be reached: .+"):
        rabbit.queue("q").check()


# RabbitMQ 3.10 itself forgets a new quorum queue when it is killed, so that one is stopped in order.
@pytest.mark.hazard("H8")
@pytest.mark.hazard("H9")
@pytest.mark.parametrize(
    ("kind", "down", "up"),
    [
        ("classic", OwnServer.kill, OwnServer.start),
        ("quorum", OwnServer.stop_app, OwnServer.start_app),
    ],
    ids=["classic", "quorum"],
)
def test_a_broker_that_was_down_is_consumed_from_again_when_it_is_back(
    own: OwnServer,
    unique: str,
    kind: str,
    down: Callable[[OwnServer], None],
    up: Callable[[OwnServer], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    source = RabbitMQ(own.url, connect_timeout=2).queue(
        unique, declare=True, arguments={"x-queue-type": kind}
    )
    source.check()
    publisher = RabbitMQ(own.url).publisher()
    # Confirmed: what is not may not be on the disk yet when the server is killed.
    assert publisher.publish([(("", unique), Message(body=b"kept", id="kept"))], 60.0) == [None]
    publisher.close()
    with caplog.at_level(logging.INFO, "idemq"), consuming(source) as (subscription, got):
        held = got.take()

        down(own)
        eventually(lambda: not subscription.connected)
        up(own)

        again = got.take(60)
        held.ack()
        assert (again.message.body, again.start(), held.start()) == (b"kept", True, False)
        again.ack()
    server = Server(own.url)
    eventually(lambda: server.counts(unique) == (0, 0))
    server.close()

    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert warnings
    assert all(record.exc_info is None for record in warnings), caplog.text


@pytest.mark.hazard("H9")
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_worker_goes_on_after_the_broker_was_killed_under_it(
    own: OwnServer, unique: str, kind: str, tmp_path: Path
) -> None:
    # A classic queue: RabbitMQ 3.10 does not answer for a quorum queue that was new when it was killed.
    broker = RabbitBroker(own.url, unique, "rabbitmq-classic")
    broker.create()
    entered, back = threading.Event(), threading.Event()
    begun: list[str | None] = []

    def hold(message: Message) -> None:
        begun.append(message.id)
        if message.id == "m0":
            entered.set()
            assert back.wait(90)

    queue = RabbitMQ(own.url, connect_timeout=2).queue(unique)
    shop = Shop(make_url(f"sqlite:///{tmp_path / 'shop.db'}"), queue, kind, hold)
    broker.publish([(f"m{n}", b'{"n": 1}') for n in range(50)])
    with shop.running() as worker:
        assert entered.wait(90)
        own.kill()
        eventually(lambda: not worker.consumers[0].subscription.connected)
        own.start()
        eventually(lambda: worker.consumers[0].subscription.connected)
        back.set()
        broker.publish([(f"m{n}", b'{"n": 1}') for n in range(50, 60)])
        eventually(lambda: len(shop.counts()) == 60, "all effects")
    assert shop.counts() == Counter(f"m{n}" for n in range(60))
    assert begun.count("m0") == 1, "its copy waited for it in the worker"
    # The copy of what was being worked on may have been given back at the end.
    assert broker.left() <= 1
    shop.dispose()
