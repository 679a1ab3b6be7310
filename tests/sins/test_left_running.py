"""Threads and tasks that a handler starts: they cannot reach the connection of another attempt."""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import Connection, NullPool, create_engine
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
from sqlalchemy.orm import Session, sessionmaker

from idemq import App, SetupError
from idemq.attempts import AsyncUnit, SyncUnit
from idemq.declared import Consumer
from idemq.handlers import read
from idemq.message import Ack, Message, Release
from idemq.sessions import Sessions
from tests.sins.handlers import Effect, Scene, changed_row, deadlock
from tests.sins.play import Player, Stage, engine_of, found, message

Stages = Callable[[str, bool], Stage]
WHOLE = {"claim": 1, "dead": 0, "before": 1}


def consumer(handler: Callable[..., Any]) -> Consumer:
    return Consumer(name="sins", handler=read(handler, "sins"), sessions=Sessions())


def write(session: Session, identifier: uuid.UUID, part: bytes) -> None:
    session.add(Effect(tag=identifier.bytes, part=part))
    session.flush()


def by_session(session: Session, connection: Connection, tag: bytes) -> None:
    session.add(Effect(tag=tag, part=b"stray"))
    session.flush()


def by_connection(session: Session, connection: Connection, tag: bytes) -> None:
    connection.execute(Effect.__table__.insert().values(tag=tag, part=b"stray"))  # type: ignore[attr-defined]  # a Table


def by_commit(session: Session, connection: Connection, tag: bytes) -> None:
    connection.commit()


def by_transaction(session: Session, connection: Connection, tag: bytes) -> None:
    transaction = connection.get_transaction()
    assert transaction is not None
    transaction.commit()


@pytest.mark.hazard("H3")
@pytest.mark.parametrize("stray", [by_session, by_connection, by_commit, by_transaction])
@pytest.mark.parametrize("driver", ["psycopg", "pymysql", "sqlite"])
def test_a_thread_left_running_cannot_touch_the_next_message(
    driver: str, stray: Callable[[Session, Connection, bytes], None], stages: Stages
) -> None:
    stage, errors = stages(driver, False), []
    first, second = uuid.uuid4(), uuid.uuid4()
    go = threading.Event()
    threads: list[threading.Thread] = []

    def handler(session: Session, connection: Connection, message: Message) -> None:
        if message.id == str(first):

            def later() -> None:
                go.wait(90)
                try:
                    stray(session, connection, first.bytes)
                except Exception as error:
                    errors.append(error)

            threads.append(threading.Thread(target=later))
            threads[0].start()
            write(session, first, b"before")
        else:
            write(session, second, b"before")
            go.set()
            threads[0].join()

    engine = create_engine(stage.url, poolclass=NullPool)
    declared = consumer(handler)
    unit = SyncUnit(engine, declared, stage.number)
    assert unit.run(declared.job(message(str(first)))) == Ack()
    job = declared.job(message(str(second)))
    attempts = [unit.run(job)]
    while isinstance(attempts[-1], Release) and len(attempts) < 4:
        attempts.append(unit.run(job))
    unit.close()
    assert attempts[-1] == Ack()
    assert len(errors) == 1
    assert found(stage, first.bytes) == found(stage, second.bytes) == WHOLE


@pytest.mark.hazard("H3")
@pytest.mark.parametrize("how", ["session", "connection"])
@pytest.mark.parametrize("driver", ["psycopg-async", "asyncpg", "asyncmy", "aiosqlite"])
def test_a_task_left_running_cannot_touch_the_next_message(driver: str, how: str, stages: Stages) -> None:
    stage = stages(driver, False)
    first, second = uuid.uuid4(), uuid.uuid4()

    async def play() -> tuple[object, object, object]:
        go = asyncio.Event()
        tasks: list[asyncio.Task[None]] = []

        async def handler(session: AsyncSession, connection: AsyncConnection, message: Message) -> None:
            async def later() -> None:
                await go.wait()
                statement = Effect.__table__.insert().values(tag=first.bytes, part=b"stray")  # type: ignore[attr-defined]
                await (session if how == "session" else connection).execute(statement)

            if message.id == str(first):
                tasks.append(asyncio.create_task(later()))
                await session.run_sync(write, first, b"before")
            else:
                await session.run_sync(write, second, b"before")
                go.set()
                await asyncio.wait(tasks)

        declared = consumer(handler)
        engine: Any = engine_of(stage)
        unit = AsyncUnit(engine, declared, stage.number)
        verdict = await unit.run(declared.job(message(str(first))))
        job = declared.job(message(str(second)))
        attempt = await unit.run(job)
        if isinstance(attempt, Release):
            attempt = await unit.run(job)
        await unit.close()
        return verdict, attempt, tasks[0].exception()

    verdict, attempt, error = asyncio.run(play())
    assert (verdict, attempt) == (Ack(), Ack())
    assert error is not None
    assert found(stage, first.bytes) == found(stage, second.bytes) == WHOLE


@pytest.mark.hazard("H4")
@pytest.mark.parametrize("driver", ["psycopg", "pymysql", "sqlite"])
def test_a_sessionmaker_with_binds_writes_in_the_transaction_of_the_claim(
    driver: str, stages: Stages
) -> None:
    stage = stages(driver, False)
    elsewhere = create_engine(stage.url, poolclass=NullPool)
    identifier = uuid.uuid4()
    with Player(stage, session=sessionmaker(binds={Effect: elsewhere})) as player:
        player.part.sin = "session_rollback"
        job = player.consumer.job(message(str(identifier)))
        assert isinstance(player.run(job), Release)
        assert found(stage, identifier.bytes) == {"claim": 0, "dead": 0}
        player.part.sin = "nothing"
        assert player.run(job) == Ack()
    assert found(stage, identifier.bytes) == WHOLE


@pytest.mark.hazard("H28")
@pytest.mark.parametrize("driver", ["pymysql", "asyncmy"])
@pytest.mark.parametrize("failure", [deadlock, changed_row])
def test_an_undone_transaction_that_is_not_swallowed_is_no_failure_of_the_message(
    driver: str, failure: Callable[[Scene], None], stages: Stages
) -> None:
    stage, identifier = stages(driver, False), uuid.uuid4()
    with Player(stage) as player:
        player.part.scene = failure
        job = player.consumer.job(message(str(identifier)))
        verdict = player.run(job)
        assert isinstance(verdict, Release)
        assert not verdict.failed
        player.part.scene = None
        assert player.run(job) == Ack()
    assert found(stage, identifier.bytes) == WHOLE


@pytest.mark.hazard("H4")
@pytest.mark.parametrize("driver", ["psycopg", "pymysql", "sqlite"])
def test_an_engine_in_autocommit_is_refused(driver: str, stages: Stages) -> None:
    url = stages(driver, False).url
    for engine in (
        create_engine(url, isolation_level="AUTOCOMMIT"),
        create_engine(url, execution_options={"isolation_level": "AUTOCOMMIT"}),
        create_engine(url).execution_options(isolation_level="AUTOCOMMIT"),
    ):
        with pytest.raises(SetupError, match="AUTOCOMMIT"):
            App(engine)
