"""A message that ends its process: counted, made a dead letter, and nobody else is blamed."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from idemq import Message
from idemq.embedded import Embedded
from tests.servers import eventually
from tests.test_cli_run import idemq, running

SHOP = """
import os
from sqlalchemy import text
from sqlalchemy.orm import Session
from sqlalchemy.ext.asyncio import AsyncSession
from idemq import App, Message
from idemq.embedded import Embedded

broker = Embedded("broker.db")
app = App("sqlite:///shop.db")

class Bomb:
    @classmethod
    def go_off(cls) -> None:
        os._exit(7)

{handler}
"""

SYNC = """
@app.consumer("receipts", broker.queue("payments", declare=True))
def receipt(message: Message, session: Session) -> None:
    if message.id.startswith("poison"):
        Bomb.go_off()
    session.execute(text("INSERT INTO receipts VALUES (:id)"), {"id": message.id})
"""

ASYNC = (
    SYNC.replace("def receipt", "async def receipt")
    .replace("session: S", "session: AsyncS")
    .replace("session.execute", "await session.execute")
)


@pytest.mark.hazard("H21")
@pytest.mark.parametrize("handler", [SYNC, ASYNC], ids=["sync", "async"])
def test_what_ends_its_process_goes_dead_and_its_neighbours_get_through(tmp_path: Path, handler: str) -> None:
    (tmp_path / "shop.py").write_text(SHOP.replace("{handler}", handler))
    with sqlite3.connect(tmp_path / "shop.db") as connection:
        connection.execute("CREATE TABLE receipts (id TEXT)")
    assert idemq(tmp_path, "db", "upgrade", "shop:app").returncode == 0
    broker = Embedded(tmp_path / "broker.db")
    broker.declare("payments")
    ids = [f"good {n}" for n in range(20)]
    ids[7:7] = ["poison 1"]
    broker.publish_many("payments", [Message(id=each, body=b"") for each in ids])

    def settled() -> bool:
        with sqlite3.connect(tmp_path / "shop.db", timeout=30) as connection:
            waiting = connection.execute("SELECT count(*) FROM idemq_failed WHERE state = 1").fetchone()[0]
        return waiting == 0 and sum(broker.depth("payments")) == 0

    with running(tmp_path):
        eventually(settled)
    with sqlite3.connect(tmp_path / "shop.db") as connection:
        receipts = connection.execute("SELECT id FROM receipts").fetchall()
        dead = connection.execute("SELECT reason, crashes, owns_claim FROM idemq_failed").fetchall()
    assert sorted(row[0] for row in receipts) == sorted(f"good {n}" for n in range(20))
    assert dead == [("crashed", 3, 1)]
