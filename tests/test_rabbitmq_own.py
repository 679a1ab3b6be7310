"""RabbitMQ with TLS, and RabbitMQ that is killed: on a server that nobody else uses."""

from __future__ import annotations

import logging
import os
import ssl
from collections.abc import Callable
from typing import Any

import pytest

from idemq.errors import BrokerUnavailable, SetupError
from idemq.message import Message
from idemq.rabbitmq import RabbitMQ
from tests.rabbitmq_tools import OwnServer, Server, consuming
from tests.servers import eventually


def test_everything_passes_through_tls(own_rabbitmq: OwnServer, unique: str) -> None:
    rabbit = RabbitMQ(
        f"amqps://localhost:{own_rabbitmq.tls_port}", ssl={"ca_certs": own_rabbitmq.ca_certs}, heartbeat=1
    )
    source = rabbit.queue(unique, declare=True)
    source.check()
    server = Server(own_rabbitmq.url)
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
    own_rabbitmq: OwnServer, host: str, options: dict[str, Any]
) -> None:
    trusted = dict.fromkeys(options, own_rabbitmq.ca_certs)
    with pytest.raises(SetupError, match=r"certificate is not trusted.*ca_certs"):
        RabbitMQ(f"amqps://{host}:{own_rabbitmq.tls_port}", ssl=trusted).queue("q").check()


def test_verification_can_be_turned_off_on_purpose(own_rabbitmq: OwnServer, unique: str) -> None:
    rabbit = RabbitMQ(f"amqps://127.0.0.1:{own_rabbitmq.tls_port}", ssl={"cert_reqs": ssl.CERT_NONE})
    rabbit.queue(unique, declare=True).check()


@pytest.mark.parametrize("swapped", ["amqps on the plain port", "amqp on the TLS port"])
def test_the_wrong_port_is_unavailable_and_says_why(own_rabbitmq: OwnServer, swapped: str) -> None:
    encrypted = swapped.startswith("amqps")
    port = own_rabbitmq.port if encrypted else own_rabbitmq.tls_port
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
    own_rabbitmq: OwnServer,
    unique: str,
    kind: str,
    down: Callable[[OwnServer], None],
    up: Callable[[OwnServer], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    source = RabbitMQ(own_rabbitmq.url, connect_timeout=2).queue(
        unique, declare=True, arguments={"x-queue-type": kind}
    )
    source.check()
    publisher = RabbitMQ(own_rabbitmq.url).publisher()
    # Confirmed: what is not may not be on the disk yet when the server is killed.
    assert publisher.publish([(("", unique), Message(body=b"kept", id="kept"))], 60.0) == [None]
    publisher.close()
    with caplog.at_level(logging.INFO, "idemq"), consuming(source) as (subscription, got):
        held = got.take()

        down(own_rabbitmq)
        eventually(lambda: not subscription.connected)
        up(own_rabbitmq)

        again = got.take(60)
        held.ack()
        assert (again.message.body, again.start(), held.start()) == (b"kept", True, False)
        again.ack()
    server = Server(own_rabbitmq.url)
    eventually(lambda: server.counts(unique) == (0, 0))
    server.close()

    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert warnings
    assert all(record.exc_info is None for record in warnings), caplog.text
