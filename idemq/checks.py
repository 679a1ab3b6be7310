"""Whether the tables are those that the guarantee rests on, and whether the database keeps its commits.

Nothing here writes. Each problem names the table and the command that mends it, or says that it must be
mended by hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from alembic.runtime.migration import MigrationContext
from sqlalchemy import Column, Connection, Inspector, Table, UniqueConstraint, inspect, text
from sqlalchemy.schema import CreateIndex
from sqlalchemy.types import NullType, TypeEngine

from idemq import migrations
from idemq import schema as tables

_UPGRADE = "run `idemq db upgrade APP`"
_BY_HAND = "mend it by hand (`idemq db sql APP` prints the right statements)"


@dataclass(frozen=True, slots=True)
class _Key:
    """A unique index over whole columns, checked at once for every row: what a claim can rest on."""

    name: str
    table: str
    columns: frozenset[str]
    primary: bool
    valid: bool = True


def check(connection: Connection, schema: str | None = None) -> list[str]:
    """What is wrong with the tables, in words; empty when idemq can rely on them.

    A database without a version, whose tables are right, passes: its owner made them with Alembic scripts
    from `idemq.schema.metadata`.
    """
    wanted = tables.tables(schema)
    inspector = inspect(connection)
    if schema is not None and not inspector.has_schema(schema):
        return [f"the schema {schema} does not exist: {_UPGRADE}"]
    existing = set(inspector.get_table_names(schema))
    if not any(table.name in existing for table in wanted.sorted_tables):
        return [f"the tables of idemq are missing: {_UPGRADE}"]
    found, newest = migrations.version(connection, schema), migrations.newest()
    known = {script.revision for script in migrations.scripts().walk_revisions()}
    if found is not None and found not in known:
        return [f"the tables have version {found}, made by a newer idemq: install that"]
    if found not in (None, newest):
        return [f"the tables have version {found}, but {newest} is needed: {_UPGRADE}"]
    problems = list(_storage(connection, schema))
    keys = _keys(connection, inspector, schema)
    for table in wanted.sorted_tables:
        if table.name in existing:
            problems += _columns(connection, inspector, table)
            problems += _uniqueness(table, [key for key in keys if key.table == table.name])
            problems += _indexes(connection, inspector, table)
        else:
            problems.append(f"{table.name} is missing: {_UPGRADE if found is None else _BY_HAND}")
    return problems


def _columns(connection: Connection, inspector: Inspector, table: Table) -> Iterator[str]:
    same = MigrationContext.configure(connection).impl
    found = {column["name"]: column for column in inspector.get_columns(table.name, schema=table.schema)}
    for column in table.columns:
        if (there := found.pop(column.name, None)) is None:
            yield f"{table.name} has no column {column.name}: {_BY_HAND}"
        elif isinstance(there["type"], NullType) or same.compare_type(Column("", there["type"]), column):
            wrong, right = _words(connection, there["type"]), _words(connection, column.type)
            yield f"{table.name}.{column.name} is {wrong} and must be {right}: {_BY_HAND}"
        elif column.nullable and not there["nullable"]:
            yield f"{table.name}.{column.name} must allow NULL: {_BY_HAND}"
    for name, other in found.items():
        if not other["nullable"] and other.get("default") is None:
            yield f"{table.name}.{name} is not a column of idemq and needs a default, or NULL: {_BY_HAND}"


def _words(connection: Connection, kind: TypeEngine[Any]) -> str:
    return "of no type" if isinstance(kind, NullType) else kind.compile(connection.dialect)


def _uniqueness(table: Table, keys: list[_Key]) -> Iterator[str]:
    wanted = {frozenset(table.primary_key.columns.keys()): True}
    for constraint in table.constraints:
        if isinstance(constraint, UniqueConstraint):
            wanted[frozenset(constraint.columns.keys())] = False
    for columns, primary in wanted.items():
        there = [key for key in keys if key.columns == columns and (key.primary or not primary)]
        what = f"{'primary key' if primary else 'unique constraint'} ({', '.join(sorted(columns))})"
        if not there:
            others = [f", but ({', '.join(sorted(key.columns))})" for key in keys if key.primary and primary]
            yield (
                f"{table.name} has no {what}{''.join(others)}, so a message could be processed twice: "
                f"remove the double rows, then {_BY_HAND}"
            )
        elif not any(key.valid for key in there):
            name = there[0].name
            yield (
                f"the {what} of {table.name} is not valid, so it refuses nothing: remove the double rows, "
                f"then run `REINDEX INDEX {name}`"
            )


def _indexes(connection: Connection, inspector: Inspector, table: Table) -> Iterator[str]:
    found = [index["column_names"] for index in inspector.get_indexes(table.name, schema=table.schema)]
    for index in sorted(table.indexes, key=lambda index: str(index.name)):
        columns = index.columns.keys()
        if not any(each[: len(columns)] == columns for each in found):
            mend = str(CreateIndex(index).compile(dialect=connection.dialect))
            yield f"{table.name} has no index on ({', '.join(columns)}): run `{mend}`"


_POSTGRESQL_KEYS = """
SELECT indexrelid::regclass::text, c.relname, indisprimary, indisvalid AND indisready,
  (SELECT array_agg(a.attname::text) FROM pg_attribute a
   WHERE a.attrelid = indrelid AND a.attnum = ANY (indkey[0 : indnkeyatts - 1]))
FROM pg_index JOIN pg_class c ON c.oid = indrelid JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = :schema AND c.relname LIKE 'idemq%' AND indisunique AND indimmediate
  AND indpred IS NULL AND indexprs IS NULL"""

_MYSQL_KEYS = """
SELECT index_name, table_name, index_name = 'PRIMARY', 1, group_concat(column_name)
FROM information_schema.statistics
WHERE table_schema = coalesce(:schema, database()) AND table_name LIKE 'idemq%' AND non_unique = 0
GROUP BY table_name, index_name HAVING count(sub_part) = 0"""


def _keys(connection: Connection, inspector: Inspector, schema: str | None) -> list[_Key]:
    kind = connection.dialect.name
    if kind == "sqlite":
        return list(_sqlite_keys(inspector, schema))
    if kind == "postgresql":
        query = connection.execute(
            text(_POSTGRESQL_KEYS), {"schema": schema or inspector.default_schema_name}
        )
        rows = [(*row[:4], row[4]) for row in query]
    else:
        query = connection.execute(text(_MYSQL_KEYS), {"schema": schema})
        rows = [(*row[:4], row[4].split(",")) for row in query]
    return [
        _Key(name, table, frozenset(columns), bool(pk), bool(ok)) for name, table, pk, ok, columns in rows
    ]


def _sqlite_keys(inspector: Inspector, schema: str | None) -> Iterator[_Key]:
    for table in inspector.get_table_names(schema):
        primary = inspector.get_pk_constraint(table, schema=schema)["constrained_columns"]
        if primary:
            yield _Key("primary key", table, frozenset(primary), primary=True)
        for unique in inspector.get_unique_constraints(table, schema=schema):
            yield _Key(str(unique["name"]), table, frozenset(unique["column_names"]), primary=False)
        for index in inspector.get_indexes(table, schema=schema):
            if index["unique"] and not index.get("dialect_options", {}).get("sqlite_where"):
                columns = frozenset(str(column) for column in index["column_names"])
                yield _Key(str(index["name"]), table, columns, primary=False)


def _storage(connection: Connection, schema: str | None) -> Iterator[str]:
    """Tables whose rows do not survive a crash, or a rollback."""
    if connection.dialect.name == "postgresql":
        query = text(
            "SELECT oid::regclass::text FROM pg_class WHERE relname LIKE 'idemq%' AND relkind IN ('r', 'p')"
            " AND relnamespace = coalesce(to_regnamespace(:schema), current_schema()::regnamespace)"
            " AND relpersistence = 'u' ORDER BY 1"
        )
        quoted = connection.dialect.identifier_preparer.quote_identifier(schema) if schema else None
        for (name,) in connection.execute(query, {"schema": quoted}):
            yield f"{name} is UNLOGGED, a crash empties it: run `ALTER TABLE {name} SET LOGGED`"
    elif connection.dialect.name in ("mysql", "mariadb"):
        query = text(
            "SELECT table_name, engine FROM information_schema.tables"
            " WHERE table_schema = coalesce(:schema, database()) AND table_name LIKE 'idemq%'"
            " AND engine <> 'InnoDB' ORDER BY table_name"
        )
        for name, engine in connection.execute(query, {"schema": schema}):
            yield f"{name} is in {engine}, which cannot roll back: run `ALTER TABLE {name} ENGINE=InnoDB`"


def durability(connection: Connection) -> list[str]:
    """Settings under which the database may lose what it committed, after the message was acknowledged.

    Also an isolation level above READ COMMITTED: safe, but more transactions fail and are run again.
    """
    kind = connection.dialect.name
    if kind == "sqlite":
        return list(_sqlite_durability(connection))
    warnings = list(
        _postgresql_durability(connection) if kind == "postgresql" else _mysql_durability(connection)
    )
    level = connection.get_isolation_level()
    if level in ("REPEATABLE READ", "SERIALIZABLE"):
        warnings.append(f"note: transactions run at {level}; READ COMMITTED is enough and fails less often")
    return warnings


def _postgresql_durability(connection: Connection) -> Iterator[str]:
    query = text(
        "SELECT current_setting('fsync'), current_setting('full_page_writes'),"
        " current_setting('synchronous_commit')"
    )
    fsync, full_pages, synchronous = connection.execute(query).one()
    for name, setting in (("fsync", fsync), ("full_page_writes", full_pages)):
        if setting != "on":
            yield f"{name} = {setting}: a crash of the machine can destroy the database; set it to on"
    if synchronous not in ("on", "remote_apply"):
        yield (
            f"synchronous_commit = {synchronous}: a crash can lose committed work whose "
            "message was acknowledged; set it to on"
        )


def _mysql_durability(connection: Connection) -> Iterator[str]:
    query = text("SELECT @@innodb_flush_log_at_trx_commit, @@innodb_doublewrite, @@log_bin, @@sync_binlog")
    flush, double_write, log_bin, sync = connection.execute(query).one()
    lost = "a crash can lose committed work whose message was acknowledged; set it to 1"
    if int(flush) != 1:
        yield f"innodb_flush_log_at_trx_commit = {flush}: {lost}"
    if int(log_bin) == 1 and int(sync) != 1:
        yield f"sync_binlog = {sync}: {lost}"
    if str(double_write) in ("0", "OFF"):
        yield f"innodb_doublewrite = {double_write}: a crash can leave torn pages; set it to ON"


def _sqlite_durability(connection: Connection) -> Iterator[str]:
    synchronous = connection.exec_driver_sql("PRAGMA synchronous").scalar_one()
    journal = connection.exec_driver_sql("PRAGMA journal_mode").scalar_one()
    if synchronous == 0:
        yield "PRAGMA synchronous = OFF: a power failure can destroy the database; set it to FULL"
    elif synchronous == 1 and journal == "wal":
        yield (
            "PRAGMA synchronous = NORMAL with a WAL: a power failure can lose committed work whose message "
            "was acknowledged; set it to FULL"
        )
    if journal in ("off", "memory"):
        yield f"PRAGMA journal_mode = {journal}: a crash can destroy the database; set it to WAL"
