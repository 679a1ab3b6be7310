"""A distributed lock: one holder of a name at a time, each with a larger number than all before it.

    with hold(engine, f"report {day}", wait=10) as fence:
        # UPDATE report SET fence = :fence WHERE day = :day AND state = 'open' AND fence < :fence
        if not take_over(day, fence):
            return  # done already, or a newer holder was here
        total = work_of_many_minutes()
        # UPDATE report SET total = :total, state = 'done' WHERE day = :day AND fence = :fence
        if not store(day, fence, total):
            raise Overtaken

A lock alone is no idempotence. A holder that hangs, or whose connection dies, loses the lock without knowing
and goes on; its number lets the *write* refuse it. Take the state over before it is read, and write only
`WHERE fence = :mine`, as above; or make one write `WHERE fence < :mine` that depends on nothing read. And
check the state, as the first UPDATE does: the next holder must find that the work is done.

Work that fits into one transaction needs no such lock: lock the row there. For Redis see `idemq.redis_locks`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any

from sqlalchemy import Connection, Engine, insert, select, text, update
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from idemq import names
from idemq import schema as tables
from idemq.drivers import kind_of
from idemq.errors import LockLost, LockTimeout, SetupError
from idemq.ledger import NOW, WAIT
from idemq.waits import bounded, check_wait

#: The numbers are kept in rows that belong to no consumer; consumers are numbered from 1.
_NO_CONSUMER = 0


@contextmanager
def hold(engine: Engine, name: str, *, wait: float = WAIT, schema: str | None = None) -> Iterator[int]:
    """Hold the lock `name` (1 to 255 bytes) for the block, and give it its fencing number.

    The number is committed while the lock is held, so numbers grow in the order of holding, also when holders
    die. Raises `LockTimeout` when the lock is not free within `wait` seconds (MySQL and MariaDB: whole ones),
    and `LockLost` when the lock was lost: before the block, which is then not entered, or at the end of a
    block that ended well. `SchemaError`: the tables are missing in the database schema `schema`.

    PostgreSQL: an advisory lock of a transaction that is open, and idle, as long as the block; a pooler in
    transaction mode respects it, and `idle_in_transaction_session_timeout` ends it. MySQL and MariaDB:
    `GET_LOCK`, which only that one server knows, no other node of a cluster; `wait_timeout` ends it. SQLite
    is refused with `SetupError`: it has one writer at a time. The lock lives as long as its connection: a
    holder that is stopped keeps it until the server gives the connection up, one whose connection died has
    none. It cannot be taken twice by the same holder.

    It takes a connection of the engine's pool to wait and to hold, and for a moment a second one; the block
    most often takes one more. Have room for all in the pool, or give the locks an engine of their own.
    """
    raw = _checked(engine, name)
    check_wait(wait)
    table = tables.table("idemq_lanes", schema)
    lane = blake2b(raw, digest_size=16, person=b"idemq lock").digest()
    with engine.connect().execution_options(isolation_level="READ COMMITTED") as connection:
        lock = _lock_of(connection, lane, schema)
        lock.acquire(wait, f"the lock {name!r} is held by somebody else, and the wait of {wait} s ran out")
        try:
            fence = _next(engine, table, lane)
            # Whoever lost the lock before could have the number of, or a larger one than, the holder of now.
            if not lock.is_held():
                raise LockLost(f"the lock {name!r} was lost before it was used: try again")
            yield fence
        except BaseException:
            lock.release()
            raise
        if not lock.release():
            raise LockLost(
                f"the lock {name!r} was lost while fence {fence} worked: only what the fence let pass counts"
            )


class _Advisory:
    """PostgreSQL's advisory lock, of the connection's transaction."""

    take, ask, give_back = "SELECT pg_advisory_xact_lock(:key)", "SELECT true", "SELECT true"

    def __init__(self, connection: Connection, key: Any) -> None:
        self._connection, self._key = connection, key

    def acquire(self, wait: float, busy: str) -> None:
        """Raises `LockTimeout(busy)`."""
        with bounded(self._connection, wait, busy):
            self._connection.execute(text(self.take), {"key": self._key})

    def is_held(self) -> bool:
        """Asks the server; a connection that is gone has lost its lock."""
        return self._says_yes(self.ask)

    def release(self) -> bool:
        """Let go, and say whether it was held until now."""
        held = self._says_yes(self.give_back)
        if held:
            self._connection.rollback()
        else:
            self._connection.invalidate()  # the server ends what may be left
        return held

    def _says_yes(self, sql: str) -> bool:
        parameters = {"key": self._key} if ":key" in sql else {}
        try:
            return bool(self._connection.scalar(text(sql), parameters))
        except SQLAlchemyError:
            return False


class _Named(_Advisory):
    """MySQL's and MariaDB's named lock, of the connection, whatever becomes of its transactions."""

    take = "SELECT GET_LOCK(:key, :wait)"
    ask, give_back = "SELECT IS_USED_LOCK(:key) = CONNECTION_ID()", "SELECT RELEASE_LOCK(:key)"

    def acquire(self, wait: float, busy: str) -> None:
        try:
            taken = self._connection.scalar(text(self.take), {"key": self._key, "wait": math.ceil(wait)})
        except BaseException:
            self._connection.invalidate()  # in the pool, it could keep the lock
            raise
        if taken != 1:
            raise LockTimeout(busy)


def _lock_of(connection: Connection, lane: bytes, schema: str | None) -> _Advisory:
    if kind_of(connection.dialect) == "postgresql":
        digest = blake2b(lane + (schema or "").encode(), digest_size=8, person=b"idemq lock").digest()
        return _Advisory(connection, int.from_bytes(digest, "big", signed=True))
    # Named locks are the server's; each database has locks of its own.
    database = schema or connection.scalar(text("SELECT DATABASE()")) or ""
    digest = blake2b(lane + database.encode(), digest_size=16, person=b"idemq lock").digest()
    return _Named(connection, f"idemq:{digest.hex()}")


def _next(engine: Engine, table: Any, lane: bytes) -> int:
    """The next number, committed in a transaction of its own: it is never given again."""
    with names.naming_missing_tables(), engine.connect() as plain:
        connection = plain.execution_options(isolation_level="READ COMMITTED")
        row = (table.c.consumer == _NO_CONSUMER) & (table.c.lane == lane)
        moment = text(NOW[kind_of(connection.dialect)])
        higher = update(table).where(row).values(generation=table.c.generation + 1, at=moment)
        if connection.execute(higher).rowcount == 0:  # of the UPDATE
            first = {"consumer": _NO_CONSUMER, "lane": lane, "generation": 1, "at": moment}
            try:
                connection.execute(insert(table).values(first))
            except IntegrityError as error:  # only the lock's holder inserts
                raise LockLost from error
        fence: int = connection.scalars(select(table.c.generation).where(row)).one()
        connection.commit()
    return fence


def _checked(engine: Engine, name: str) -> bytes:
    if not isinstance(engine, Engine):
        raise SetupError(
            f"hold() takes a sync Engine, not {type(engine).__name__}: the lock needs a connection "
            "of its own, which no commit or rollback of the work ends"
        )
    if engine.dialect.name == "sqlite":
        raise SetupError(
            "hold(): SQLite has one writer at a time and needs no lock beside it: begin the transaction with "
            "BEGIN IMMEDIATE, and check the state inside"
        )
    raw = name.encode("utf-8", "surrogatepass") if isinstance(name, str) else b""
    if not 1 <= len(raw) <= 255:
        raise SetupError(f"hold(): name={name!r}: a name is a text of 1 to 255 bytes")
    return raw
