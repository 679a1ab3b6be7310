from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contract import brokers


@pytest.fixture(params=list(brokers.KINDS))
def broker(request: pytest.FixtureRequest, tmp_path: Path, unique: str) -> Iterator[brokers.Broker]:
    """A fresh queue on each broker."""
    made: brokers.Broker
    match request.param:
        case "embedded":
            made = brokers.EmbeddedBroker(str(tmp_path / "broker.db"), unique)
        case "kafka":
            made = brokers.KafkaBroker(request.getfixturevalue("kafka_servers"), unique)
        case kind:
            made = brokers.RabbitBroker(request.getfixturevalue("rabbitmq_url"), unique, kind)
    made.create()
    yield made
    made.remove()
