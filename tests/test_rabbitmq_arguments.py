"""What the arguments of a RabbitMQ queue mean for order, and for what the broker may lose."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from idemq.errors import SetupError
from idemq.rabbitmq import RabbitMQ
from tests.rabbitmq_tools import Server


@pytest.fixture
def server(rabbitmq_url: str) -> Iterator[Server]:
    server = Server(rabbitmq_url)
    yield server
    server.close()


@pytest.fixture
def rabbit(rabbitmq_url: str) -> RabbitMQ:
    return RabbitMQ(rabbitmq_url)


def test_only_a_queue_with_a_single_active_consumer_delivers_in_order(
    rabbit: RabbitMQ, server: Server, unique: str
) -> None:
    single = {"x-single-active-consumer": True}
    rabbit.queue(unique, arguments=single).orders()
    for arguments in ({}, {"x-single-active-consumer": False}):
        with pytest.raises(SetupError, match=rf'queue .{unique}.*"x-single-active-consumer": True'):
            rabbit.queue(unique, arguments=arguments).orders()

    with pytest.raises(SetupError, match="does not exist"):
        rabbit.queue(unique, arguments=single).check()
    with pytest.raises(SetupError, match="does not exist"):
        rabbit.queue(unique).check()  # the first check made nothing
    server.declare(unique)
    with pytest.raises(SetupError, match=r"not as declare and arguments say: .*x-single-active-consumer"):
        rabbit.queue(unique, arguments=single).check()
    server.delete(unique)
    server.declare(unique, x_single_active_consumer=True)
    rabbit.queue(unique, arguments=single).check()
    server.delete(unique)
