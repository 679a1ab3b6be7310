"""What is due for a broker or effect that nobody declares waits, and does not wait silently."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import Connection, select, update

from idemq import Effects, Outbox
from idemq.embedded import Embedded
from tests.core_tools import Shop, on
from tests.servers import eventually
from tests.test_relay import TABLE, Scene, scene_of

DATABASES = on(
    ("sqlite", "pysqlite"), ("sqlite", "aiosqlite"), ("postgres", "psycopg"), ("mariadb", "pymysql")
)


def plan_strays(scene: Scene, other: Scene, gone: Embedded) -> None:
    """Two messages and an effect of another app, due for two minutes."""

    @other.app.effect("their-sms")
    def send(payload: dict[str, str], key: str) -> None:
        raise AssertionError("this app does not declare it")

    def plan(connection: Connection) -> None:
        Outbox(connection).publish(gone.to("q"), b"1")
        Outbox(connection).publish(gone.to("q"), b"2")
        Effects(connection).plan(send, {"to": "1"})

    scene.write(plan)

    def age(connection: Connection) -> None:
        for row in connection.execute(select(TABLE.c.seq, TABLE.c.not_before)).all():
            before = row.not_before - timedelta(minutes=2)
            connection.execute(update(TABLE).where(TABLE.c.seq == row.seq).values(not_before=before))

    scene.write(age)


@DATABASES
def test_the_relay_tells_of_what_it_has_no_broker_or_effect_for(
    shop: Shop, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mine, gone = Embedded(tmp_path / "1.db", name="mine"), Embedded(tmp_path / "2.db", name="gone")
    mine.declare("q")
    with scene_of(shop, [mine]) as scene, scene_of(shop) as other:
        plan_strays(scene, other, gone)
        with scene.relaying():
            eventually(lambda: caplog.text.count("does not declare it") == 2)
            scene.write(lambda connection: Outbox(connection).publish(mine.to("q"), b"mine"))
            eventually(lambda: mine.depth("q")[0] == 1)
            eventually(lambda: len(scene.rows()) == 3)
    told = sorted(record.getMessage() for record in caplog.records if "declare it" in record.getMessage())
    assert [words.split(" wait, since ")[0] for words in told] == [
        "1 for the effect 'their-sms'",
        "2 for the broker 'gone'",
    ]
    assert [words.split("declare it, ")[1] for words in told] == [
        "see @app.effect; they are kept",
        "see App(brokers=...); they are kept",
    ]


@on(("sqlite", "pysqlite"))
def test_what_another_app_may_be_about_to_send_is_not_told_of(
    shop: Shop, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mine, theirs = Embedded(tmp_path / "1.db", name="mine"), Embedded(tmp_path / "2.db", name="theirs")
    mine.declare("q")
    with scene_of(shop, [mine]) as scene:

        def plan(connection: Connection) -> None:
            Outbox(connection).publish(theirs.to("q"), b"theirs")
            Outbox(connection).publish(mine.to("q"), b"mine")

        scene.write(plan)
        with scene.relaying():
            eventually(lambda: mine.depth("q")[0] == 1)
    assert "declare it" not in caplog.text
    assert [row.target for row in scene.rows()] == [b"theirs"]
