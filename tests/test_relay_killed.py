"""The relay killed at each step of the outbox: every message is published, none is gone unconfirmed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from sqlalchemy import URL, make_url

from prove.brokers import Broker, File, Kafka, RabbitMQ
from prove.controls import OUTBOX_CONTROLS
from prove.relayed import STEPS, RelayLoop

#: Twenty in all; 200 with LONG=1.
KILLS = {"embedded": 10, "rabbitmq": 5, "kafka": 5}


@pytest.mark.timeout(1800)
@pytest.mark.hazard("H13")
@pytest.mark.hazard("H52")
@pytest.mark.situation(5)
@pytest.mark.parametrize("kind", KILLS)
def test_every_planned_message_has_one_effect_whenever_the_relay_dies(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, unique: str
) -> None:
    broker: Broker = File(tmp_path / "broker.db")
    database: URL = make_url(f"sqlite:///{tmp_path / 'shop.db'}")
    if kind != "embedded":
        database = request.getfixturevalue("postgres_url")
        if kind == "rabbitmq":
            broker = RabbitMQ(request.getfixturevalue("rabbitmq_url"))
        else:
            broker = Kafka(request.getfixturevalue("kafka_servers"))
    kills = KILLS[kind] * (10 if os.environ.get("LONG") == "1" else 1)
    found = RelayLoop(kills, broker, unique, database, tmp_path).run()
    assert (found.right, found.messages >= kills) == (True, True), found


@pytest.mark.hazard("H13")
def test_a_relay_that_deletes_before_the_confirm_is_noticed(tmp_path: Path) -> None:
    (control,) = OUTBOX_CONTROLS
    database = make_url(f"sqlite:///{tmp_path / 'shop.db'}")
    loop = RelayLoop(len(STEPS), File(tmp_path / "broker.db"), "q", database, tmp_path, control)
    found = loop.run()
    assert found.lost
    assert found.unconfirmed >= found.lost
