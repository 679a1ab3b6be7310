"""PostgreSQL's NOTIFY: what other processes have planned is noticed at once.

Nothing depends on it: the pumps ask for rows all the same, and where nobody can listen (behind PgBouncer in
its transaction mode, or on another database) they are what notices.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from idemq.bridge import EventLoop
from idemq.drivers import throw_away
from idemq.outgoing import CHANNEL
from idemq.packing import shown, words
from idemq.retry import pause

log = logging.getLogger("idemq.relay")

#: How often a listener looks whether it is to end, in seconds.
LOOK_EVERY = 0.25


def can_listen(engine: Engine | AsyncEngine) -> bool:
    return engine.dialect.name == "postgresql"


class Listener(threading.Thread):
    """Holds one connection, and calls `planned` when a transaction that planned something has committed."""

    def __init__(
        self, engine: Engine | AsyncEngine, loop: EventLoop | None, planned: Callable[[], None]
    ) -> None:
        super().__init__(name="idemq-relay-listener", daemon=True)
        self._engine, self._loop, self._planned = engine, loop, planned
        self._stopping = threading.Event()
        self._failures = 0

    def stop(self) -> None:
        self._stopping.set()

    def run(self) -> None:
        while not self._stopping.is_set():
            try:
                if isinstance(self._engine, Engine):
                    self._listen(self._engine)
                else:
                    assert self._loop is not None
                    self._loop.run(self._listen_async(self._engine))
            except Exception as error:
                self._failures += 1
                log.debug("not listening: %s", shown(words(error)))
                self._stopping.wait(pause(self._failures))

    def _listening(self) -> None:
        self._failures = 0
        self._planned()  # what was planned before

    def _listen(self, engine: Engine) -> None:
        """Until it is to end. Raises database errors."""
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            try:
                connection.exec_driver_sql(f"LISTEN {CHANNEL}")
                self._listening()
                driver: Any = connection.connection.driver_connection
                while not self._stopping.is_set():
                    for _ in driver.notifies(timeout=LOOK_EVERY, stop_after=1):
                        self._planned()
            finally:
                throw_away(connection)  # who gets it next does not listen

    async def _listen_async(self, engine: AsyncEngine) -> None:
        async with engine.connect() as connection:
            try:
                await connection.execution_options(isolation_level="AUTOCOMMIT")
                await self._until_stopped(connection)
            finally:
                await connection.run_sync(throw_away)

    async def _until_stopped(self, connection: AsyncConnection) -> None:
        driver: Any = (await connection.get_raw_connection()).driver_connection
        if connection.dialect.driver == "asyncpg":
            await driver.add_listener(CHANNEL, lambda *_: self._planned())
            self._listening()
            while True:
                await asyncio.sleep(LOOK_EVERY)
                if self._stopping.is_set() or driver.is_closed():
                    return
        await connection.exec_driver_sql(f"LISTEN {CHANNEL}")
        self._listening()
        while not self._stopping.is_set():
            async for _ in driver.notifies(timeout=LOOK_EVERY, stop_after=1):
                self._planned()
