"""`idemq run` as a user meets it: what it says, what it refuses, and how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import NullPool, create_engine
from sqlalchemy.ext.asyncio import create_async_engine

from idemq import App, Message, SetupError
from idemq.cli.run import prepare, refuse_small_pools
from idemq.embedded import Embedded
from idemq.packing import shown
from tests.core_tools import NOWHERE
from tests.servers import eventually

SHOP = """
import time
from dataclasses import dataclass
from sqlalchemy import text
from sqlalchemy.orm import Session
from idemq import App, Message
from idemq.embedded import Embedded

broker = Embedded("broker.db")
app = App("sqlite:///shop.db")

@dataclass
class Payment:
    n: int

@app.consumer("receipts", broker.queue("payments", declare=True))
def receipt(payment: Payment, session: Session) -> None:
    if payment.n < 0:
        raise RuntimeError(f"cannot pay {payment.n}")
    session.execute(text("INSERT INTO receipts VALUES (:n)"), {"n": payment.n})

@app.consumer("audit", broker.queue("audit", declare=True), concurrency=3)
def audit(message: Message) -> None: ...
"""
PREPARE = """
from sqlalchemy import text
from shop import app, broker
with app.engine.begin() as connection:
    connection.execute(text("CREATE TABLE receipts (n INTEGER)"))
broker.declare("payments")
"""


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """A directory with an app whose tables are made."""
    (tmp_path / "shop.py").write_text(SHOP)
    subprocess.run([sys.executable, "-c", PREPARE], cwd=tmp_path, check=True)
    assert idemq(tmp_path, "db", "upgrade", "shop:app").returncode == 0
    return tmp_path


def idemq(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "idemq", *arguments]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False, timeout=90)


@contextmanager
def running(directory: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """`idemq run shop:app` in the background, its output in the file `log`; killed at the end if need be."""
    command = [sys.executable, "-m", "idemq", "run", "shop:app", *arguments]
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=directory, stdout=log, stderr=log)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def said(directory: Path, pattern: str) -> list[str]:
    return re.findall(pattern, (directory / "log").read_text())


PUBLISH = """
import sys
from shop import broker
broker.publish("payments", sys.argv[2].encode(), id=sys.argv[1])
"""


def publish(directory: Path, identifier: str, body: str) -> None:
    subprocess.run([sys.executable, "-c", PUBLISH, identifier, body], cwd=directory, check=True)


def test_it_says_what_it_consumes_and_ends_with_zero_at_sigterm(shop: Path) -> None:
    for number in (1, 2, 1):
        publish(shop, f"m{number}", f'{{"n": {number}}}')
    with running(shop) as process:
        eventually(lambda: idemq(shop, "seen", "shop:app", "receipts", "m2").returncode == 0)
        process.send_signal(signal.SIGTERM)
        assert process.wait(90) == 0
    assert said(shop, r"receipts: from queue 'payments' in .*, 1 at a time .*, into sqlite.*shop.db")
    assert said(shop, r"audit: from queue 'audit' in .*, 3 at a time")
    assert said(shop, r"receipts: processed 2, duplicates 1, parked 0, dead 0, failures 0")


def test_only_runs_the_named_consumer_and_json_is_one_object_a_line(shop: Path) -> None:
    with running(shop, "--only", "audit", "--log-format", "json") as process:
        eventually(lambda: said(shop, "started, process"))
        process.send_signal(signal.SIGTERM)
        assert process.wait(90) == 0
    lines = [json.loads(line) for line in (shop / "log").read_text().splitlines()]
    assert all({"at", "level", "logger", "process", "message"} <= line.keys() for line in lines)
    assert any(line["message"].startswith("audit: from") for line in lines)
    assert not any("receipts" in line["message"] for line in lines)


def test_an_unknown_consumer_is_a_set_up_error(shop: Path) -> None:
    done = idemq(shop, "run", "shop:app", "--only", "receits")
    assert done.returncode == 2
    assert "receits" in done.stderr
    assert "receipts, audit" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.hazard("H56")
def test_missing_tables_stop_it_and_the_command_that_mends_it_is_named(tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text(SHOP)
    done = idemq(tmp_path, "run", "shop:app", "--processes", "2")
    assert done.returncode == 2
    assert "`idemq db upgrade shop:app`" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_queue_is_named_with_its_consumer(shop: Path) -> None:
    source = (shop / "shop.py").read_text()
    (shop / "shop.py").write_text(source.replace('"audit", declare=True', '"nowhere"'))
    done = idemq(shop, "run", "shop:app")
    assert done.returncode == 2
    assert "consumer 'audit'" in done.stderr
    assert "'nowhere'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.hazard("S7")
def test_an_unreachable_database_is_retried_in_words_without_its_password(shop: Path) -> None:
    pytest.importorskip("psycopg")
    source = (shop / "shop.py").read_text()
    url = "postgresql+psycopg://shop:verysecret@127.0.0.1:1/shop"
    (shop / "shop.py").write_text(source.replace("sqlite:///shop.db", url))
    with running(shop):
        eventually(lambda: len(said(shop, "cannot be reached: .*tried again")) >= 2)
    assert not said(shop, "verysecret|Traceback")


@pytest.mark.hazard("S7")
def test_no_body_and_no_control_character_reaches_the_log(shop: Path) -> None:
    publish(shop, "a\x1b[31m\r\nERROR forged", '{"n": "marker"}')
    publish(shop, "m1", '{"n": -7351}')
    with running(shop):
        eventually(lambda: said(shop, "not done") and said(shop, r"dead letter \(unreadable\)"))
    assert not said(shop, "marker|\x1b|^ERROR forged")
    assert said(shop, "RuntimeError")


def test_text_from_outside_is_one_printable_line() -> None:
    assert shown("a\x1b[31m\r\nb\u2028c") == "a [31m  b c"
    assert len(shown("x" * 1000)) == 203


@pytest.mark.hazard("H54")
def test_what_dies_is_started_again_and_a_dead_parent_takes_its_children_along(shop: Path) -> None:
    with running(shop, "--processes", "2") as process:
        eventually(lambda: len(said(shop, r"started, process (\d+)")) == 2)
        first, second = map(int, said(shop, r"started, process (\d+)"))
        os.kill(first, signal.SIGKILL)
        eventually(lambda: len(said(shop, r"started, process (\d+)")) == 3)
        third = int(said(shop, r"started, process (\d+)")[2])
        process.send_signal(signal.SIGKILL)
        process.wait()
        eventually(lambda: not any(alive(child) for child in (second, third)))
    assert said(shop, "a worker process ended .signal SIGKILL.")


def alive(pid: int) -> bool:
    """Whether the process runs; one that is dead and only not yet reaped does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_ends_it_at_once_with_the_code_that_shells_know(
    shop: Path, number: signal.Signals, code: int
) -> None:
    source = (shop / "shop.py").read_text()
    hold = 'open("entered", "w").close(); time.sleep(600)'
    (shop / "shop.py").write_text(source.replace("raise RuntimeError", f"{hold}; raise RuntimeError"))
    publish(shop, "m1", '{"n": -1}')
    with running(shop) as process:
        eventually(lambda: (shop / "entered").exists())
        process.send_signal(number)
        eventually(lambda: said(shop, "stopping: finishing what was begun"))
        process.send_signal(number)
        assert process.wait(90) == code


def crowded(*, asynchronous: bool = False, **options: Any) -> App:
    """Two consumers that work on five messages at a time, over an engine that nobody answers at."""
    make = create_async_engine if asynchronous else create_engine
    app = App(
        make(
            "sqlite+aiosqlite:////nowhere/at/all.db" if asynchronous else "sqlite:////nowhere/at/all.db",
            **options,
        )
    )

    def handle(message: Message) -> None: ...

    async def handle_async(message: Message) -> None: ...

    for name, concurrency in (("receipts", 2), ("audit", 3)):
        app.consumer(name, NOWHERE, concurrency=concurrency)(handle_async if asynchronous else handle)
    return app


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_a_pool_that_is_too_small_for_the_lanes_is_refused(asynchronous: bool) -> None:
    app = crowded(asynchronous=asynchronous, pool_size=3, max_overflow=1)
    with pytest.raises(SetupError) as refused:
        prepare(app, list(app.consumers.values()))
    assert all(
        words in str(refused.value)
        for words in ("'receipts', 'audit'", "concurrency", "5 connections", "gives 4", "pool_size=5")
    )


@pytest.mark.parametrize(
    "options",
    [
        {"pool_size": 3, "max_overflow": 2},
        {"pool_size": 1, "max_overflow": -1},
        {"pool_size": 0},
        {"poolclass": NullPool},
    ],
    ids=str,
)
def test_a_pool_that_is_large_enough_for_the_lanes_is_used(options: dict[str, Any]) -> None:
    app = crowded(**options)
    refuse_small_pools(app, list(app.consumers.values()))


def test_the_relay_needs_one_to_send_and_one_to_listen() -> None:
    engine = create_engine("postgresql+psycopg://nowhere.invalid/", pool_size=2, max_overflow=0)
    app = App(engine, brokers=[Embedded("/nowhere/at/all.db")])

    @app.consumer("receipts", NOWHERE)
    def handle(message: Message) -> None: ...

    with pytest.raises(SetupError, match=r"1 connections, .* and 2 for the relay, .* gives 2: .*pool_size=3"):
        refuse_small_pools(app, list(app.consumers.values()))


def test_only_the_chosen_consumers_need_connections() -> None:
    app = crowded(pool_size=3, max_overflow=0)
    refuse_small_pools(app, [app.consumers["audit"]])
