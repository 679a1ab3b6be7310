"""The claim: one statement that records a message id in the caller's transaction and says whose it is.

Guaranteed for each (consumer, key): among all transactions that commit, at most one was told *fresh*. The
database's primary key decides, never a row count and never a look-up before the insert.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import Connection, Dialect, Integer, LargeBinary, String, bindparam, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.types import TypeEngine

from idemq import schema
from idemq.drivers import error_code, is_lock_timeout, kind_of, refuse_autocommit
from idemq.errors import InFlight

#: Seconds that a repeat waits for its twin in flight when nothing else is said.
WAIT = 2.0

#: A claim that neither inserted nor found a row proves nothing: the transaction is run again.
NO_ANSWER = "the claim found neither a new nor a stored row"

#: `lost`: the row that a parked message was picked from is somebody else's now.
State = Literal["fresh", "duplicate", "conflict", "lost"]


@dataclass(frozen=True, slots=True)
class Claim:
    """The answer to a claim."""

    state: State
    #: Names the attempt that wrote the row: PostgreSQL's xmin, elsewhere eight random bytes.
    token: str | bytes
    #: PostgreSQL's transaction id when fresh, for the guard.
    xid: str | None = None


#: Whatever the session's default is.
_DURABLE = """CASE current_setting('synchronous_commit') WHEN 'off' THEN
  set_config('synchronous_commit', 'on', true) END"""


def clock(connection: Connection) -> datetime:
    """The database's clock. On PostgreSQL the transaction's commit will reach the disk: what is written down
    at this moment lets a message be acknowledged, or a call be made."""
    kind = kind_of(connection.dialect)
    durable = f", {_DURABLE}" if kind == "postgresql" else ""
    query = text(f"SELECT {NOW[kind]} AS now{durable}").columns(now=schema.Time())
    moment: datetime = connection.execute(query).scalar_one()
    return moment


class Statement:
    """SQL written once with `:name` parameters, compiled once for a driver and run on the driver's cursor."""

    def __init__(self, dialect: Dialect, sql: str, **types: TypeEngine[Any]) -> None:
        binds = [bindparam(name, type_=kind) for name, kind in types.items()]
        compiled = text(sql).bindparams(*binds).compile(dialect=dialect)
        self.sql = compiled.string
        # Asked for its description, psycopg makes an object for each column.
        self._answers = "RETURNING" in self.sql or self.sql.startswith("SELECT")
        self._error: Any = dialect.loaded_dbapi.Error
        self._order: Sequence[str] | None = getattr(compiled, "positiontup", None)
        self._convert: dict[str, Callable[[Any], Any]] = {}
        for name, kind in types.items():
            if processor := kind.dialect_impl(dialect).bind_processor(dialect):
                self._convert[name] = processor

    def first(self, connection: Connection, **values: Any) -> Sequence[Any] | None:
        """The first row, if there is one. Raises database errors as SQLAlchemy does.

        SQLAlchemy's own way to the driver's cursor takes a fifth of a claim's time.
        """
        for name, convert in self._convert.items():
            values[name] = convert(values[name])
        parameters = values if self._order is None else tuple(values[name] for name in self._order)
        pooled = connection.connection
        cursor = pooled.cursor()
        try:
            cursor.execute(self.sql, parameters)
            row: Sequence[Any] | None = cursor.fetchone() if self._answers else None
            return row
        except self._error as error:
            gone = connection.dialect.is_disconnect(error, pooled.dbapi_connection, cursor)
            wrapped = DBAPIError.instance(
                self.sql, None, error, self._error, connection_invalidated=gone, dialect=connection.dialect
            )
            if gone:
                connection.invalidate(error)
            raise wrapped from error
        finally:
            with suppress(self._error):  # of a connection that is gone
                cursor.close()


_TYPES: dict[str, TypeEngine[Any]] = {
    "consumer": Integer(),
    "id": schema.Key(),
    "fingerprint": Integer(),
    "sent_at": schema.Time(),
}

# The wait is set and restored inside the claim, because statements of their own cost two round trips; by
# CASE, which fixes the order and is cheaper than a CTE. The restoring call runs only for a fresh row; every
# other answer ends the transaction or its savepoint, which restores the setting as well. A commit must reach
# the disk before the ack, whatever the session's default. The stored row is looked up by a statement of its
# own, because looking in this one costs every fresh message a third of its claim.
_POSTGRESQL = """
INSERT INTO {processed} (consumer, id, fingerprint, sent_at, at) VALUES (
  CASE WHEN set_config('idemq.wait', current_setting('lock_timeout'), true) IS NOT NULL THEN
    CASE WHEN set_config('lock_timeout', :wait, true) IS NOT NULL THEN :consumer END END,
  :id, :fingerprint, :sent_at, now())
ON CONFLICT (consumer, id) DO NOTHING
RETURNING xmin::text, pg_current_xact_id_if_assigned()::text,
  set_config('lock_timeout', current_setting('idemq.wait'), true), {durable}
"""

_MARIADB = """
SET STATEMENT innodb_lock_wait_timeout = {wait} FOR
INSERT INTO {processed} (consumer, id, fingerprint, sent_at, at, token)
VALUES (:consumer, :id, :fingerprint, :sent_at, UTC_TIMESTAMP(6), :token)
ON DUPLICATE KEY UPDATE id = id RETURNING token, fingerprint
"""

_MYSQL = """
INSERT INTO {processed} (consumer, id, fingerprint, sent_at, at, token)
VALUES (:consumer, :id, :fingerprint, :sent_at, UTC_TIMESTAMP(6), :token)
"""

_SQLITE = """
INSERT INTO {processed} (consumer, id, fingerprint, sent_at, at, token)
VALUES (:consumer, :id, :fingerprint, :sent_at, strftime('%Y-%m-%d %H\\:%M\\:%f000', 'now'), :token)
ON CONFLICT (consumer, id) DO UPDATE SET id = id RETURNING token, fingerprint
"""

# A parked message that is run again: its claim becomes that of the new attempt.
_AGAIN_POSTGRESQL = """
UPDATE {processed} SET at = now() WHERE consumer = :consumer AND id = :id
RETURNING xmin::text, pg_current_xact_id_if_assigned()::text, {durable}
"""

_AGAIN = "UPDATE {processed} SET at = {now}, token = :token WHERE consumer = :consumer AND id = :id"

#: What the current moment is called, for the statements of other modules.
NOW = {
    "postgresql": "now()",
    "mysql": "UTC_TIMESTAMP(6)",
    "mariadb": "UTC_TIMESTAMP(6)",
    "sqlite": "strftime('%Y-%m-%d %H\\:%M\\:%f000', 'now')",
}


class Ledger:
    """The claim statement for one database driver, schema and wait (seconds)."""

    def __init__(self, dialect: Dialect, database_schema: str | None, wait: float) -> None:
        quote = dialect.identifier_preparer
        self.schema = database_schema
        self.processed = f"{quote.quote_schema(database_schema)}." if database_schema else ""
        self.processed += "idemq_processed"
        self._wait = wait
        self._bound = f"{max(1, round(wait * 1000))}ms"  # as PostgreSQL is told
        self.kind = kind_of(dialect)
        look = "SELECT token, fingerprint FROM {processed} WHERE consumer = :consumer AND id = :id"
        if self.kind == "postgresql":
            self._insert = self._statement(dialect, _POSTGRESQL, wait=String(), **_TYPES)
            look = look.replace("token", "xmin::text", 1)
            self._again = self._statement(dialect, _AGAIN_POSTGRESQL, consumer=Integer(), id=schema.Key())
        else:
            sql = {"mariadb": _MARIADB, "mysql": _MYSQL, "sqlite": _SQLITE}[self.kind]
            self._insert = self._statement(dialect, sql, token=LargeBinary(8), **_TYPES)
            look += "" if self.kind == "sqlite" else " LOCK IN SHARE MODE"
            self._again = self._statement(
                dialect, _AGAIN, token=LargeBinary(8), consumer=Integer(), id=schema.Key()
            )
        self._look = self._statement(dialect, look, consumer=Integer(), id=schema.Key())
        probe = "SELECT 1 FROM {processed} FORCE INDEX (PRIMARY) WHERE id = '' AND consumer = 0"
        self._probe = self._statement(dialect, probe) if self.kind in ("mysql", "mariadb") else None

    def _statement(self, dialect: Dialect, sql: str, **types: TypeEngine[Any]) -> Statement:
        whole_seconds = max(1, math.ceil(self._wait))
        parts = {"processed": self.processed, "now": NOW[self.kind], "durable": _DURABLE}
        sql = sql.format(wait=whole_seconds, **parts)
        return Statement(dialect, sql.strip(), **types)

    def check(self, connection: Connection) -> None:
        """To be called once for a connection, outside a transaction: raises when claims on it prove nothing.

        Without the primary key, the claim itself fails on PostgreSQL and SQLite; on MySQL and MariaDB it
        would make every repeat fresh, and a statement that needs the key fails in its place.
        """
        refuse_autocommit(connection)
        if self._probe is not None:
            with connection.begin():
                self._probe.first(connection)

    def claim(
        self,
        connection: Connection,
        consumer: int,
        key: bytes,
        fingerprint: int | None,
        sent_at: datetime | None,
    ) -> Claim:
        """Record (consumer, key) in the connection's transaction, or say who has it.

        Raises `InFlight` when another transaction holds the key for longer than the wait; the caller's
        transaction (or savepoint) must then be rolled back. Other database errors pass through.
        """
        values = {"consumer": consumer, "id": key, "fingerprint": fingerprint, "sent_at": sent_at}
        try:
            if self.kind == "postgresql":
                return self._claim_postgresql(connection, values)
            if self.kind == "mysql":
                return self._claim_mysql(connection, values)
            token = secrets.token_bytes(8)
            row = self._insert.first(connection, token=token, **values)
        except DBAPIError as error:
            if is_lock_timeout(error):
                raise InFlight from error
            raise
        if row is None:
            raise InFlight(NO_ANSWER)
        if row[0] == token:
            return Claim("fresh", token)
        return _stored(row[0], row[1], fingerprint)

    def reclaim(self, connection: Connection, consumer: int, key: bytes) -> Claim | None:
        """Make the claim that a parked message owns this transaction's: `at` is now, the token is new.

        None: the claim is not there any more.
        """
        values = {"consumer": consumer, "id": key}
        if self.kind == "postgresql":
            row = self._again.first(connection, **values)
            return Claim("fresh", row[0], row[1]) if row is not None else None
        token = secrets.token_bytes(8)
        self._again.first(connection, token=token, **values)
        return Claim("fresh", token) if self.token(connection, consumer, key) == token else None

    def token(self, connection: Connection, consumer: int, key: bytes) -> str | bytes | None:
        """Which attempt wrote the claim that is there; None without one."""
        row = self._look.first(connection, consumer=consumer, id=key)
        return row[0] if row is not None else None

    def horizon(self, connection: Connection, consumer: int) -> datetime | None:
        """The newest `sent_at` that pruning has forgotten, read so that no pruning under way can pass us."""
        table = schema.table("idemq_consumers", self.schema)
        query = select(table.c.horizon).where(table.c.id == consumer).with_for_update(read=True)
        found: datetime | None = connection.scalar(query)
        return found

    def _claim_postgresql(self, connection: Connection, values: dict[str, Any]) -> Claim:
        row = self._insert.first(connection, wait=self._bound, **values)
        if row is not None:
            return Claim("fresh", row[0], row[1])
        # Only a new statement sees the row of a twin that committed after the first one's snapshot.
        return self._read(connection, values)

    def _claim_mysql(self, connection: Connection, values: dict[str, Any]) -> Claim:
        before = connection.exec_driver_sql("SELECT @@innodb_lock_wait_timeout").scalar_one()
        bound = f"SET SESSION innodb_lock_wait_timeout = {max(1, math.ceil(self._wait))}"
        connection.exec_driver_sql(bound)
        token = secrets.token_bytes(8)
        try:
            self._insert.first(connection, token=token, **values)
            return Claim("fresh", token)
        except IntegrityError as error:
            if error_code(error) != 1062:
                raise
            return self._read(connection, values)
        finally:
            connection.exec_driver_sql(f"SET SESSION innodb_lock_wait_timeout = {int(before)}")

    def _read(self, connection: Connection, values: dict[str, Any]) -> Claim:
        row = self._look.first(connection, consumer=values["consumer"], id=values["id"])
        if row is None:
            raise InFlight(NO_ANSWER)
        return _stored(row[0], row[1], values["fingerprint"])


def _stored(token: Any, stored: int | None, offered: int | None) -> Claim:
    differs = stored is not None and offered is not None and stored != offered
    return Claim("conflict" if differs else "duplicate", token)
