from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import URL, make_url

from idemq.broker import Source
from tests.contract import brokers
from tests.contract.running import Act, Make, Shop


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


@pytest.fixture(params=["sync", "async"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def url(broker: brokers.Broker, request: pytest.FixtureRequest, tmp_path: Path) -> URL:
    """The embedded broker goes with SQLite, so that no server is needed; the others with PostgreSQL."""
    if isinstance(broker, brokers.EmbeddedBroker):
        return make_url(f"sqlite:///{tmp_path / 'shop.db'}")
    url: URL = request.getfixturevalue("postgres_url")
    return url


@pytest.fixture
def make(broker: brokers.Broker, kind: str, url: URL) -> Iterator[Make]:
    shops: list[Shop] = []

    def shop(
        act: Act = lambda message: None, *, source: Source | None = None, at: URL = url, **options: Any
    ) -> Shop:
        shops.append(Shop(at, source or broker.source(), kind, act, **options))
        return shops[-1]

    yield shop
    for each in shops:
        each.dispose()
