"""What may fail without harm to the transaction around it: a wait for a lock, a violated constraint."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeVar

import sqlalchemy
from sqlalchemy import Connection, Table, false, update
from sqlalchemy.engine import NestedTransaction
from sqlalchemy.exc import DBAPIError, IntegrityError, NoSuchTableError, SQLAlchemyError
from sqlalchemy.orm import SessionTransaction

from idemq import scopes
from idemq.drivers import error_code, is_lock_timeout, kind_of
from idemq.errors import InFlight, LockTimeout
from idemq.waits import bounded, check_wait

_T = TypeVar("_T")

_LOCKED = "another transaction held the row's lock for longer than the wait"
_MYSQL_KEY = re.compile(r" for key '([^']+)'\s*$")
_SQLITE_KEY = re.compile(r"^UNIQUE constraint failed: (.+)$")
_SQLITE_LOCKED = (
    "another writer held the SQLite file for too long, or wrote since this transaction's first read"
)
_SQLITE_INDEX = re.compile(r"^index '(.+)'$")


def begin(connection: Connection) -> None:
    """Have the connection in a transaction: on SQLite a first savepoint would be one, and commit.

    Raises `LockTimeout` when SQLite's other writer does not end within the busy timeout.
    """
    try:
        scopes.begin(connection)
    except InFlight as error:
        raise LockTimeout(_SQLITE_LOCKED) from error


def undo(savepoint: NestedTransaction | SessionTransaction) -> bool:
    """Roll back to a savepoint. False: the database had undone more than that, or is gone."""
    try:
        savepoint.rollback()
    except SQLAlchemyError:
        return False
    return True


def within(connection: Connection, table: Table, wait: float, read: Callable[[], _T]) -> _T:
    """What the locking statement in `read` gives, which waits `wait` seconds at most for each lock.

    Raises `LockTimeout`, which leaves the transaction as it was; the usual bound holds again afterwards.
    """
    check_wait(wait)
    if kind_of(connection.dialect) == "sqlite":
        return _within_sqlite(connection, table, wait, read)
    begin(connection)
    savepoint = connection.begin_nested()
    try:
        with bounded(connection, wait, _LOCKED):
            found = read()
        savepoint.commit()
    except LockTimeout as error:
        # MySQL and MariaDB can be told to undo the whole transaction: then nobody may go on in it.
        if not undo(savepoint) and error.__cause__ is not None:
            raise error.__cause__ from None
        raise
    except BaseException:
        undo(savepoint)
        raise
    return found


def _within_sqlite(connection: Connection, table: Table, wait: float, read: Callable[[], _T]) -> _T:
    """The lock is the file's write lock, taken before anything is read."""
    before = connection.exec_driver_sql("PRAGMA busy_timeout").scalar_one()
    connection.exec_driver_sql(f"PRAGMA busy_timeout = {round(wait * 1000)}")
    try:
        begin(connection)
        column = next(iter(table.columns))
        # A transaction that began by reading has no write lock yet; an UPDATE takes it, also one of no row.
        connection.execute(update(table).where(false()).values({column: column}))
        return read()
    except DBAPIError as error:
        if is_lock_timeout(error):
            raise LockTimeout(_SQLITE_LOCKED) from error
        raise
    finally:
        if not connection.invalidated:
            connection.exec_driver_sql(f"PRAGMA busy_timeout = {int(before)}")


def violated(connection: Connection, error: IntegrityError) -> set[str]:
    """What the unique constraint or index that `error` is about is called; empty for any other error.

    On SQLite also its columns, as `table.column, table.column`.
    """
    kind, cause, words = kind_of(connection.dialect), error.orig, str(error.orig)
    if kind == "postgresql":
        if error_code(error) != "23505":
            return set()
        cause = getattr(cause, "driver_exception", None) or cause
        name = getattr(getattr(cause, "diag", cause), "constraint_name", None)
        return {name} if name else set()
    if kind == "sqlite":
        found = _SQLITE_KEY.match(words)
        return _violated_sqlite(connection, found[1]) if found else set()
    if error_code(error) != 1062:
        return set()
    found = _MYSQL_KEY.search(str(cause.args[1]) if cause is not None else "")
    return {found[1], found[1].rpartition(".")[2]} if found else set()  # MySQL puts the table before it


def _violated_sqlite(connection: Connection, what: str) -> set[str]:
    """SQLite names the columns; which constraint they belong to is looked up."""
    if of_expressions := _SQLITE_INDEX.match(what):
        return {of_expressions[1]}
    columns = [column.rpartition(".") for column in what.split(", ")]
    table, names = columns[0][0], {name for _, _, name in columns}
    schema = sqlalchemy.inspect(connection)
    called = {what}
    try:
        key = schema.get_pk_constraint(table)
    except NoSuchTableError:  # of an attached database: what it was called is all that is known
        return called
    for constraint in schema.get_unique_constraints(table):
        if set(constraint["column_names"]) == names and constraint["name"]:
            called.add(constraint["name"])
    for index in schema.get_indexes(table):
        if index["unique"] and set(index["column_names"]) == names and index["name"]:
            called.add(index["name"])
    if set(key["constrained_columns"]) == names and key["name"]:
        called.add(key["name"])
    return called
