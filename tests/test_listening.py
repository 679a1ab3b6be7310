"""What other processes have planned is noticed at once on PostgreSQL, not when the relay looks again."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import text

from idemq import Outbox, outgoing, pumps
from idemq.embedded import Embedded
from tests import core_tools
from tests.core_tools import Shop
from tests.servers import eventually
from tests.test_relay import Scene, scene_of

LISTENERS = (
    "SELECT pid FROM pg_stat_activity WHERE query ILIKE 'LISTEN %' AND datname = current_database() AND {}"
)

ON_POSTGRESQL = core_tools.on(("postgres", "psycopg"), ("postgres", "psycopg async"), ("postgres", "asyncpg"))


def listeners(scene: Scene, where: str = "true") -> list[int]:
    with scene.engine.connect() as connection:
        return list(connection.scalars(text(LISTENERS.format(where))))


@pytest.fixture
def broker(tmp_path: Path) -> Embedded:
    broker = Embedded(tmp_path / "broker.db")
    broker.declare("q")
    return broker


@ON_POSTGRESQL
def test_what_another_process_plans_is_sent_at_once_also_after_the_connection_was_lost(
    shop: Shop, broker: Embedded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pumps, "LOOK_EVERY", 3600.0)

    def plan() -> None:
        scene.write(lambda connection: Outbox(connection).publish(broker.to("q"), b"1"))

    with scene_of(shop, [broker]) as scene, scene.relaying():
        monkeypatch.setattr(outgoing, "relays", set())  # as in a process that has none
        eventually(lambda: len(listeners(scene)) == 1)
        plan()
        eventually(lambda: broker.depth("q")[0] == 1)
        (first,) = listeners(scene)
        with scene.engine.connect() as connection:
            connection.execute(text(f"SELECT pg_terminate_backend({first})"))
        eventually(lambda: len(listeners(scene, f"pid <> {first}")) == 1)
        plan()
        eventually(lambda: broker.depth("q")[0] == 2)
    with scene_of(shop) as scene:
        eventually(lambda: listeners(scene) == [])


@core_tools.on(("postgres", "psycopg"))
def test_a_process_with_a_relay_tells_nobody_else(shop: Shop, broker: Embedded) -> None:
    """Notifications have one commit wait for the other."""
    with scene_of(shop, [broker]) as scene, scene.engine.connect() as connection:
        heard = connection.execution_options(isolation_level="AUTOCOMMIT")
        heard.exec_driver_sql(f"LISTEN {outgoing.CHANNEL}")
        with scene.relaying() as worker:
            eventually(lambda: worker._relay is not None)
            scene.write(lambda other: Outbox(other).publish(broker.to("q"), b"1"))
            eventually(lambda: broker.depth("q")[0] == 1)
        scene.write(lambda other: Outbox(other).publish(broker.to("q"), b"2"))
        heard.exec_driver_sql(f"NOTIFY {outgoing.CHANNEL}, 'the end'")
        driver = heard.connection.driver_connection
        assert driver is not None
        assert [each.payload for each in driver.notifies(stop_after=2)] == ["", "the end"]
