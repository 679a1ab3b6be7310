"""Plays one message through the one path with a handler that sins, here or in a process that is killed."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType
from typing import Literal, Self

from sqlalchemy import URL, Connection, Engine, NullPool, create_engine, func, select
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from idemq import migrate, names, schema
from idemq.attempts import AsyncUnit, SyncUnit
from idemq.declared import Consumer
from idemq.drivers import kind_of
from idemq.failures import Job
from idemq.handlers import read
from idemq.message import Message, Verdict
from idemq.sessions import Maker, Sessions
from tests.sins.handlers import SINS, Base, Effect, Scene, Taken

#: When the process is killed: right after the sin, or at the end of the handler.
Kill = Literal["no", "after the sin", "at the end"]


@dataclass(frozen=True, slots=True)
class Stage:
    """A database with the tables, and a driver to reach it with."""

    #: The database by its sync driver, and by the driver that is played with.
    plain: URL
    url: URL
    asynchronous: bool
    trigger: bool
    number: int
    kind: str


def build(plain: URL, *, trigger: bool) -> tuple[int, str]:
    """Make the tables; the consumer's number and the kind of the database."""
    engine = create_engine(plain, poolclass=NullPool)
    with engine.begin() as connection:
        migrate.upgrade(connection, strict=trigger)
        Base.metadata.create_all(connection)
        number = names.register(connection, "sins")
        connection.exec_driver_sql("CREATE TABLE emptied (n int)")
        kind = kind_of(connection.dialect)
        if kind != "sqlite":
            body = "LANGUAGE plpgsql AS $$ BEGIN COMMIT; END $$" if kind == "postgresql" else "COMMIT"
            connection.exec_driver_sql(f"CREATE PROCEDURE committing() {body}")
        connection.execute(Taken.__table__.insert().values(pk=1))  # type: ignore[attr-defined]  # a Table
    return number, kind


@dataclass(slots=True)
class Part:
    """What the handler does now; the test changes it between attempts."""

    sin: str = "nothing"
    #: Work before the sin, and after it.
    more: bool = False
    kill: Kill = "no"
    kind: str = ""
    plain: URL | None = None
    #: What is done without swallowing its error.
    scene: Callable[[Scene], None] | None = None

    def perform(self, session: Session, connection: Connection, message: Message) -> None:
        assert message.id is not None
        assert self.plain is not None
        scene = Scene(session, connection, bytes.fromhex(message.id.replace("-", "")), self.kind, self.plain)
        scene.write("before")
        if self.scene is not None:
            self.scene(scene)
        try:
            SINS[self.sin].commit(scene)
        except Exception:  # the worst handler swallows everything
            pass
        if self.kill == "after the sin":
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            if self.more:
                scene.write("after")
        except Exception:  # here as well
            pass
        if self.kill == "at the end":
            os.kill(os.getpid(), signal.SIGKILL)


class Player:
    """One unit of the one path, with a handler that plays `part`."""

    def __init__(self, stage: Stage, *, strict: bool = False, session: Maker | None = None) -> None:
        self.stage = stage
        self.part = Part(kind=stage.kind, plain=stage.plain)

        def handler(session: Session, connection: Connection, message: Message) -> None:
            self.part.perform(session, connection, message)

        async def async_handler(session: AsyncSession, connection: AsyncConnection, message: Message) -> None:
            sync = connection.sync_connection
            assert sync is not None
            await session.run_sync(self.part.perform, sync, message)

        self.consumer = Consumer(
            name="sins",
            handler=read(async_handler if stage.asynchronous else handler, "sins"),
            strict=strict,
            sessions=Sessions(session),
        )

    @cached_property
    def _runner(self) -> asyncio.Runner:
        return asyncio.Runner()

    @cached_property
    def unit(self) -> SyncUnit | AsyncUnit:
        stage = self.stage
        engine = engine_of(stage)
        if isinstance(engine, AsyncEngine):
            return AsyncUnit(engine, self.consumer, stage.number, trigger=stage.trigger)
        return SyncUnit(engine, self.consumer, stage.number, trigger=stage.trigger)

    def run(self, job: Job) -> Verdict:
        if isinstance(self.unit, AsyncUnit):
            return self._runner.run(self.unit.run(job))
        return self.unit.run(job)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(self.unit, AsyncUnit):
            self._runner.run(self.unit.close())
            self._runner.close()
        else:
            self.unit.close()


def engine_of(stage: Stage) -> Engine | AsyncEngine:
    if stage.asynchronous:
        return create_async_engine(stage.url, poolclass=NullPool)
    return create_engine(stage.url, poolclass=NullPool)


def message(identifier: str) -> Message:
    return Message(body=b"{}", id=identifier)


def perish(stage: Stage, identifier: str, sin: str, more: bool, kill: Kill, strict: bool) -> None:
    """The main function of a process that kills itself in its handler."""
    with Player(stage, strict=strict) as player:
        player.part.sin, player.part.more, player.part.kill = sin, more, kill
        player.run(player.consumer.job(message(identifier)))


def found(stage: Stage, identifier: bytes) -> dict[str, int]:
    """What the database says of a message: its claims, dead letters and parts of work."""
    processed, failed = schema.table("idemq_processed"), schema.table("idemq_failed")
    engine = create_engine(stage.plain, poolclass=NullPool)
    with engine.connect() as connection:
        claims = select(func.count()).where(processed.c.id == identifier)
        dead = select(func.count()).where(failed.c.identity == identifier, failed.c.owns_claim)
        rows = {
            "claim": connection.execute(claims).scalar_one(),
            "dead": connection.execute(dead).scalar_one(),
        }
        parts = select(Effect.part, func.count()).where(Effect.tag == identifier).group_by(Effect.part)
        return rows | {part.decode(): count for part, count in connection.execute(parts)}
