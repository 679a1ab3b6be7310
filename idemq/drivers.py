"""What differs between the databases and drivers that are supported, and nothing else.

Error codes, the driver's own view of its transaction, and which sync and async drivers belong together.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection
from typing import Any
from weakref import WeakSet

from sqlalchemy import URL, Connection, Dialect, Engine, event
from sqlalchemy.engine import RootTransaction
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from idemq.errors import SetupError

#: (database, driver) -> (extra to install, module, the same database's driver of the other kind).
DRIVERS: dict[tuple[str, str], tuple[str, str, str]] = {
    ("postgresql", "psycopg"): ("postgresql", "psycopg", "psycopg"),
    ("postgresql", "asyncpg"): ("postgresql", "asyncpg", "psycopg"),
    ("mysql", "pymysql"): ("mysql", "pymysql", "asyncmy"),
    ("mysql", "asyncmy"): ("mysql", "asyncmy", "pymysql"),
    ("mariadb", "pymysql"): ("mysql", "pymysql", "asyncmy"),
    ("mariadb", "asyncmy"): ("mysql", "asyncmy", "pymysql"),
    ("sqlite", "pysqlite"): ("sqlite", "sqlite3", "aiosqlite"),
    ("sqlite", "aiosqlite"): ("sqlite", "aiosqlite", "pysqlite"),
}

#: Drivers that serve async engines (psycopg serves both).
ASYNC = frozenset({"asyncpg", "asyncmy", "aiosqlite", "psycopg"})
SYNC = frozenset({"psycopg", "pymysql", "pysqlite"})

#: Too many connections, disk or table full, changed since the snapshot, shutting down, lock timeout,
#: deadlock, lock table full, read-only, connection killed, refused or lost.
_TRANSIENT_MYSQL = frozenset(
    {1020, 1021, 1040, 1053, 1114, 1203, 1205, 1206, 1213, 1290, 1836, 1927, 3572}
    | {2002, 2003, 2006, 2013, 2055}
)

#: SERVER_STATUS_IN_TRANS of the MySQL protocol.
_IN_TRANSACTION = 1

#: Bytes that PyMySQL and asyncmy write as two, and room for what stands in a statement beside the values.
_ESCAPED = tuple(bytes([byte]) for byte in b"\x00\n\r\x1a\"'\\")
_BESIDE = 128 * 1024

_DEFAULT = {"postgresql": "psycopg", "mysql": "pymysql", "mariadb": "pymysql", "sqlite": "pysqlite"}


def url_for(url: URL, *, asynchronous: bool) -> URL:
    """`url` with the driver of the wanted kind. Raises `SetupError` for what idemq does not support."""
    database = url.get_backend_name()
    driver = url.drivername.partition("+")[2] or _DEFAULT.get(database, "")
    if (database, driver) not in DRIVERS:
        known = ", ".join(sorted({f"{name}+{driver}" for name, driver in DRIVERS}))
        raise SetupError(
            f"idemq does not support the database driver {url.drivername!r}; it supports {known}"
        )
    if driver not in (ASYNC if asynchronous else SYNC):
        driver = DRIVERS[database, driver][2]
    return url.set(drivername=f"{database}+{driver}")


def require(url: URL) -> None:
    """Raise `SetupError` naming the extra when the driver of `url` is not installed."""
    extra, module, _ = DRIVERS[url.get_backend_name(), url.drivername.partition("+")[2]]
    if importlib.util.find_spec(module) is None:
        raise SetupError(f'the database driver {module} is not installed: pip install "idemq[{extra}]"')


def kind_of(dialect: Dialect) -> str:
    """`postgresql`, `mysql`, `mariadb` or `sqlite`. MariaDB is told by the server, so connect first."""
    if dialect.name == "mysql" and getattr(dialect, "is_mariadb", False):
        return "mariadb"
    return dialect.name


def error_code(error: DBAPIError) -> str | int | None:
    """The database's own code: an SQLSTATE on PostgreSQL, a number on MySQL, MariaDB and SQLite."""
    cause: Any = error.orig
    arguments = getattr(cause, "args", ())
    if arguments and isinstance(arguments[0], int):  # PyMySQL's errors have an SQLSTATE too, which says less
        return arguments[0]
    for name in ("sqlstate", "pgcode", "sqlite_errorcode"):
        code = getattr(cause, name, None)
        if isinstance(code, str | int):
            return code
    return None


def begin(connection: Connection) -> RootTransaction:
    """Start a transaction; on SQLite one that has the write lock from the start (never a failing upgrade)."""
    transaction = connection.begin()
    if kind_of(connection.dialect) == "sqlite":
        raw: Any = connection.connection.driver_connection
        if raw.in_transaction:  # the engine's own events began one, most often without the write lock
            connection.exec_driver_sql("ROLLBACK")
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    return transaction


def throw_away(connection: Connection) -> None:
    """Close it for good instead of giving it back to its pool. Never raises."""
    for step in (connection.invalidate, connection.close):
        try:
            step()
        except Exception:
            pass  # it was gone already


def allow_commit(connection: Connection) -> None:
    """Tell the strict trigger that idemq asks for the COMMIT that follows."""
    connection.exec_driver_sql("SELECT set_config('idemq.done', pg_current_xact_id()::text, true)")


def is_lock_timeout(error: DBAPIError) -> bool:
    """Somebody else held a lock for longer than the bound."""
    code = error_code(error)
    if error.orig.__class__.__module__.startswith("sqlite3"):
        return isinstance(code, int) and code & 0xFF in (5, 6)
    return code in ("55P03", 1205, 3572)


def too_small_packet(connection: Connection, values: Collection[bytes]) -> int | None:
    """MySQL's and MariaDB's `max_allowed_packet`, when a statement with these values may be larger.

    Such a statement ends the connection, which would pass for an outage, again and again.
    """
    size = sum(map(len, values)) + _BESIDE
    if kind_of(connection.dialect) not in ("mysql", "mariadb") or size < 2 * _BESIDE:
        return None
    size += sum(value.count(byte) for value in values for byte in _ESCAPED)
    packet = int(connection.exec_driver_sql("SELECT @@max_allowed_packet").scalar_one())
    return packet if size > packet // 2 else None  # MariaDB 10.11 takes half of what it says


def is_missing_table(error: DBAPIError) -> bool:
    """One of idemq's own tables does not exist, or the schema for them."""
    words = (str(error.orig).splitlines() or [""])[0]  # PostgreSQL's further lines quote the statement
    missing = error_code(error) in ("42P01", 1146) or "no such table: " in words
    return missing and "idemq_" in words


def is_transient(error: BaseException) -> bool:
    """The database's state is the cause, not the message: run the whole transaction again.

    Deadlocks, serialization failures, lock timeouts, a busy SQLite, lost or refused connections, a server
    that is shutting down, read-only or full, and an exhausted pool.
    """
    if isinstance(error, PoolTimeout):
        return True
    if not isinstance(error, DBAPIError):
        return isinstance(error, ConnectionError | TimeoutError)
    if error.connection_invalidated:
        return True
    code = error_code(error)
    if isinstance(code, str) and len(code) == 5:
        # 57014: a statement that takes too long takes as long the next time.
        return (code[:2] in ("08", "40", "53", "57") and code != "57014") or code in ("55P03", "25006")
    if isinstance(code, int) and isinstance(error, OperationalError | InterfaceError):
        busy, full, readonly, io = 5, 13, 8, 10
        if error.orig.__class__.__module__.startswith("sqlite3"):
            return code & 0xFF in (busy, 6, full, readonly, io, 14)
        return code in _TRANSIENT_MYSQL
    return isinstance(error, OperationalError | InterfaceError) and code is None


def is_contention(error: DBAPIError) -> bool:
    """Another transaction is the cause: a deadlock, a failed serialization, a lock timeout, a busy SQLite."""
    code = error_code(error)
    if isinstance(code, str) and len(code) == 5:
        return code[:2] == "40" or code == "55P03"
    if error.orig.__class__.__module__.startswith("sqlite3"):
        return isinstance(code, int) and code & 0xFF in (5, 6)
    return code in (1205, 1213, 3572)


def is_outage(error: BaseException) -> bool:
    """The database is away, is stopping, is read-only or full, or has no connection left."""
    return is_transient(error) and not (isinstance(error, DBAPIError) and is_contention(error))


def is_refused(error: BaseException) -> bool:
    """The server answered a connection attempt, and does not want this user, password or database."""
    if isinstance(error, DBAPIError) and error_code(error) in (1044, 1045, 1049, 1698):
        return True
    cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    code = getattr(cause, "sqlstate", None)
    if isinstance(code, str):
        return code[:2] in ("28", "3D")
    words = str(cause)  # psycopg gives connection errors no code
    return "password authentication failed" in words or ("FATAL" in words and "does not exist" in words)


def status_reader(connection: Connection) -> Callable[[], bool]:
    """A function that says whether the driver still sees a transaction that can be committed.

    asyncpg does not report an aborted transaction, and MySQL's drivers are stale after a deadlock: there the
    answer alone is not enough.
    """
    raw: Any = connection.connection.driver_connection
    driver = connection.dialect.driver
    if driver.startswith("psycopg"):
        in_transaction = 2
        return lambda: bool(raw.pgconn.transaction_status == in_transaction)
    if driver == "asyncpg":
        return lambda: bool(raw.is_in_transaction())
    if driver == "pymysql":
        return lambda: bool(raw.server_status & _IN_TRANSACTION)
    if driver == "asyncmy":
        return lambda: bool(raw.get_transaction_status())
    return lambda: bool(raw.in_transaction)


def note_transaction(connection: Connection) -> None:
    """Tell the driver of the transaction that the claim has begun.

    PyMySQL reads its status from answers without rows only, and MariaDB's claim answers with a row: a handler
    that only reads, or inserts with RETURNING, would leave the status of the transaction before.
    """
    if connection.dialect.driver == "pymysql":
        raw: Any = connection.connection.driver_connection
        raw.server_status |= _IN_TRANSACTION


_undone: WeakSet[Engine] = WeakSet()


def undo_before_close(engine: Engine) -> None:
    """Have SQLite connections rolled back before a pool throws them away.

    A statement that was cancelled may still be open (the claim's RETURNING), and SQLite keeps a closed
    connection, its transaction and its lock on the file until the last statement is collected.
    """
    if engine.dialect.name == "sqlite" and engine not in _undone:
        _undone.add(engine)

        @event.listens_for(engine, "invalidate")
        def _undo(connection: Any, _record: object, _error: object) -> None:
            try:
                connection.rollback()
            except Exception:
                pass  # it is closed already


def in_autocommit(target: Engine | Connection) -> bool:
    """Its isolation level says that every statement commits by itself."""
    level = target.get_execution_options().get("isolation_level") or getattr(
        target.dialect, "_on_connect_isolation_level", None
    )
    return str(level).upper() == "AUTOCOMMIT"


def refuse_autocommit(connection: Connection) -> None:
    """Raise `SetupError` when the driver commits every statement by itself, or never commits when told to."""
    raw: Any = connection.connection.driver_connection
    driver = connection.dialect.driver
    if driver in ("pymysql", "asyncmy"):
        by_itself = bool(raw.get_autocommit())
    elif driver == "asyncpg":
        adapter: Any = connection.connection.dbapi_connection
        by_itself = adapter.isolation_level == "autocommit"
    else:
        raw = getattr(raw, "_conn", raw) if driver == "aiosqlite" else raw
        by_itself = getattr(raw, "autocommit", False) is True
    if by_itself:
        raise SetupError(
            "the database driver is in autocommit mode: claim and work would not commit together; "
            "take autocommit out of connect_args"
        )
