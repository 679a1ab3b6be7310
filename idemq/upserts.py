"""Insert a row or meet the one that is there: the databases' own statements for it.

Guaranteed: of all transactions that commit, at most one was told that it inserted. No row count of an INSERT
is asked, and nothing is looked up before it.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

from sqlalchemy import Column, ColumnElement, func, literal_column, select, true
from sqlalchemy.dialects import mysql, postgresql, sqlite

from idemq.errors import IdemqError, SetupError
from idemq.guarded_rows import GuardedRow, unique_sets
from idemq.savepoints import begin

#: How often a row may be deleted between the INSERT that met it and the UPDATE.
_TRIES = 10

#: The variable of the database's session in which MySQL and MariaDB say that the row was there.
_MET: ColumnElement[Any] = literal_column("@idemq_met")


def insert_or_meet(row: GuardedRow, values: Mapping[Column[Any], Any]) -> bool:
    """Whether the row was inserted; else the one that is there has the values now."""
    begin(row.connection)
    if row.connection.dialect.name in ("mysql", "mariadb"):
        return _in_one(row, values)
    dialect = postgresql if row.connection.dialect.name == "postgresql" else sqlite
    insert = dialect.insert(row.table).values({**row.key, **values})
    insert = insert.on_conflict_do_nothing(index_elements=list(row.key)).returning(literal_column("1"))
    # Two statements for a row that is there. ON CONFLICT DO UPDATE would be one, but neither database says
    # which of the two it did (PostgreSQL's xmax does, but not on a partitioned table).
    for _ in range(_TRIES):
        if row.connection.execute(insert).first() is not None:
            return True
        if not values or row.change(true(), values).applied:
            return False
    raise IdemqError(f"a row of {row.table.name} was deleted again and again while it was written")


def _in_one(row: GuardedRow, values: Mapping[Column[Any], Any]) -> bool:
    """One statement, because an INSERT that fails keeps a shared lock: two of them would deadlock."""
    _refuse_other_keys(row, values)
    mark = secrets.randbelow(2**53) + 1
    insert = mysql.insert(row.table).values({**row.key, **values})
    first = next(iter(row.key))
    # The key keeps its value; the assignment is made only when there is a row to update.
    met = getattr(func, "if")(_MET.op(":=")(mark), first, first)
    changes = {first.key: met, **{column.key: insert.inserted[column.key] for column in values}}
    row.connection.execute(insert.on_duplicate_key_update(changes))
    found = row.connection.scalar(select(_MET))
    return found is None or int(found) != mark


def _refuse_other_keys(row: GuardedRow, values: Mapping[Column[Any], Any]) -> None:
    for columns in unique_sets(row.table):
        if not columns >= row.key.keys() and not columns.isdisjoint({*row.key, *values}):
            names = ", ".join(sorted(column.key for column in columns))
            raise SetupError(
                f"upsert: on MySQL and MariaDB a row with the same {names} would be overwritten, which is "
                f"another unique constraint of {row.table.name}; insert in already_done(...) and then update"
            )
