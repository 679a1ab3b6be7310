"""What an attempt makes of handlers that end oddly; on SQLite, because no server is asked anything here."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import URL, Connection, make_url, text
from sqlalchemy.ext.asyncio import AsyncConnection

from idemq import App, Message, Reject, migrate, names
from idemq.attempts import AsyncUnit, SyncUnit
from idemq.message import Ack, Dead, Release, Verdict
from tests.core_tools import NOWHERE


@pytest.fixture
def url(tmp_path: Path) -> URL:
    url = make_url(f"sqlite:///{tmp_path / 'shop.db'}")
    engine = App(url).engine
    assert engine is not None
    with engine.begin() as connection:
        migrate.upgrade(connection)
    with engine.begin() as connection:
        names.register(connection, "shop")
        connection.execute(text("CREATE TABLE effects (n INTEGER)"))
    engine.dispose()
    return url


def attempt(url: URL, handler: Callable[..., Any]) -> tuple[Verdict, Verdict]:
    """The verdicts of one attempt, and of another delivery of the same message afterwards."""
    app = App(url)
    app.consumer("shop", NOWHERE)(handler)
    consumer = app.consumers["shop"].consumer
    message = Message(body=b"{}", id="m1")
    if not consumer.handler.asynchronous:
        assert app.engine is not None
        unit = SyncUnit(app.engine, consumer, 1)
        verdicts = unit.run(consumer.job(message)), unit.run(consumer.job(message))
        unit.close()
        app.engine.dispose()
        return verdicts
    engine = app.async_engine
    assert engine is not None

    async def run() -> tuple[Verdict, Verdict]:
        unit = AsyncUnit(engine, consumer, 1)
        verdicts = await unit.run(consumer.job(message)), await unit.run(consumer.job(message))
        await unit.close()
        await engine.dispose()
        return verdicts

    return asyncio.run(run())


async def commit_early(connection: AsyncConnection) -> None:
    await connection.execute(text("INSERT INTO effects VALUES (1)"))
    raw = await connection.get_raw_connection()
    assert raw.driver_connection is not None
    await raw.driver_connection.execute("COMMIT")
    raise RuntimeError("after its early commit")


@pytest.mark.hazard("H3")
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_an_early_commit_is_a_dead_letter_before_anybody_else_can_take_it_for_a_repeat(
    url: URL, kind: str
) -> None:
    def early(connection: Connection) -> None:
        connection.execute(text("INSERT INTO effects VALUES (1)"))
        raw: Any = connection.connection.driver_connection
        raw.commit()
        raise RuntimeError("after its early commit")

    first, again = attempt(url, early if kind == "sync" else commit_early)
    assert first == Dead("broke its transaction")
    assert again == Ack(duplicate=True)


def forgets_to_await(message: Message) -> Any:
    async def work() -> None: ...

    return work()


async def forgets_to_await_in_async(message: Message) -> Any:
    return forgets_to_await(message)


def yields(message: Message) -> Any:
    yield


def hidden_generator(message: Message) -> Any:
    return yields(message)


def submits(message: Message) -> Any:
    return Future()


def returns_its_rejection(message: Message) -> Any:
    return Reject("no")


@pytest.mark.parametrize(
    "handler",
    [forgets_to_await, forgets_to_await_in_async, hidden_generator, submits, returns_its_rejection],
    ids=lambda handler: handler.__name__,
)
def test_unfinished_work_is_never_acknowledged(url: URL, handler: Callable[..., Any]) -> None:
    for verdict in attempt(url, handler):
        assert isinstance(verdict, Release)
        assert verdict.failed
        assert "the handler returned" in verdict.cause
