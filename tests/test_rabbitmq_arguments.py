"""What the arguments of a RabbitMQ queue mean for order, and for what the broker may lose."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest

from idemq import App, Message, SetupError, migrate
from idemq.amqp_risks import risks
from idemq.cli.run import prepare
from idemq.rabbitmq import RabbitMQ
from tests.rabbitmq_tools import Server


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


QUORUM = {"x-queue-type": "quorum"}
SAFE = {
    "x-dead-letter-exchange": "dead",
    "x-dead-letter-strategy": "at-least-once",
    "x-overflow": "reject-publish",
}


@pytest.mark.hazard("H21")
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({}, []),
        (QUORUM, []),
        (QUORUM | {"x-delivery-limit": 5}, [r"delivery limit \(5\).*dropped.*x-dead-letter-exchange"]),
        (QUORUM | {"x-delivery-limit": 5} | SAFE, []),
        (QUORUM | SAFE | {"x-overflow": "drop-head"}, ["exchange 'dead'.*lost.*x-overflow"]),
        (QUORUM | {"x-dead-letter-exchange": "dead"}, ["exchange 'dead'.*lost.*x-dead-letter-strategy"]),
        ({"x-dead-letter-exchange": ""}, ["exchange ''.*lost.*x-queue-type"]),
    ],
    ids=str,
)
def test_arguments_by_which_the_broker_may_lose_messages_are_told(
    rabbit: RabbitMQ, server: Server, unique: str, arguments: dict[str, Any], says: list[str]
) -> None:
    warnings = rabbit.queue(unique, declare=True, arguments=arguments).check()
    server.delete(unique)
    assert len(warnings) == len(says)
    assert all(re.search(each, warning) for each, warning in zip(says, warnings, strict=True))


@pytest.mark.hazard("H21")
@pytest.mark.parametrize(
    ("arguments", "version", "says"),
    [
        (QUORUM, "4.0.5", [r"delivery limit \(20, the default of RabbitMQ 4\).*dropped.*-1"]),
        (QUORUM | {"x-delivery-limit": -1}, "4.1.0", []),
        (QUORUM | SAFE, "4.1.0", []),
        ({"x-queue-type": "classic"}, "4.1.0", []),
        (QUORUM, "3.13.7", []),
        (QUORUM, "unheard of", []),
    ],
)
def test_rabbitmq_4_limits_deliveries_without_being_asked(
    arguments: dict[str, Any], version: str, says: list[str]
) -> None:
    warnings = risks(arguments, version)
    assert len(warnings) == len(says)
    assert all(re.search(each, warning) for each, warning in zip(says, warnings, strict=True))


@pytest.mark.hazard("H21")
def test_the_worker_tells_at_start_what_the_broker_may_lose(
    rabbit: RabbitMQ, server: Server, unique: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    app = App(f"sqlite:///{tmp_path / 'shop.db'}")
    assert app.engine is not None
    with app.engine.begin() as connection:
        migrate.upgrade(connection)
    limited = rabbit.queue(unique, declare=True, arguments=QUORUM | {"x-delivery-limit": 5})

    @app.consumer("receipts", limited)
    def handle(message: Message) -> None: ...

    with caplog.at_level(logging.WARNING, "idemq"):
        prepare(app, list(app.consumers.values()))
    server.delete(unique)
    app.engine.dispose()
    assert re.search(rf"receipts: queue '{unique}' .*delivery limit", caplog.text)
