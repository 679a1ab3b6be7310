"""Makes the tables of idemq, and brings them to the newest shape, in the caller's transaction.

Everything takes a sync Connection; with an async engine call it through `AsyncConnection.run_sync`. The
version is kept in a table of idemq's own, so the user's `alembic_version` is neither read nor written.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from io import StringIO
from typing import Any

from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext, MigrationStep
from sqlalchemy import Connection, Dialect, inspect, make_url, text
from sqlalchemy.exc import ArgumentError, NoSuchModuleError

from idemq import schema as tables
from idemq.checks import check as check
from idemq.checks import durability as durability
from idemq.errors import SchemaError, SetupError
from idemq.migrations import options, scripts

#: How long `upgrade` waits for another one on MySQL and MariaDB, in seconds.
_LOCK_WAIT = 60

#: SQLSTATE 2D000, invalid_transaction_termination, is what the refused COMMIT ends with.
_REFUSE = """\
CREATE OR REPLACE FUNCTION {prefix}idemq_refuse() RETURNS trigger LANGUAGE plpgsql AS $idemq$
BEGIN
  IF current_setting('idemq.done', true) IS DISTINCT FROM pg_current_xact_id()::text THEN
    RAISE EXCEPTION 'idemq: this transaction was committed by the handler, or by code that it called, '
      'and not by idemq; nothing of it is kept'
      USING ERRCODE = 'invalid_transaction_termination',
        HINT = 'Let the handler return instead: idemq commits its work together with the message id.';
  END IF;
  RETURN NULL;
END
$idemq$"""

# A retry inserts no claim but moves the time of the one that is there.
_TRIGGER = """\
CREATE CONSTRAINT TRIGGER idemq_strict AFTER INSERT OR UPDATE OF at ON {prefix}idemq_processed
DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION {prefix}idemq_refuse()"""


def upgrade(connection: Connection, schema: str | None = None, strict: bool = False) -> None:
    """Bring the tables to the newest version; what is there already stays as it is.

    Safe when several processes do it at once, and a second run changes nothing. The caller commits, except
    on MySQL and MariaDB, which commit every such statement by themselves. `strict` (PostgreSQL 13 and later)
    adds a trigger that refuses every COMMIT of a claim which idemq did not ask for. Raises `SchemaError` when
    the tables were made by a newer idemq, `SetupError` for what cannot be done here.
    """
    tables.tables(schema)  # refuses a name that is no plain identifier
    if strict:
        _needs_postgresql(connection.dialect)
    with _alone(connection, schema):
        if schema is not None and not inspect(connection).has_schema(schema):
            if connection.dialect.name != "postgresql":
                raise SetupError(f"the database {schema!r} named by schema= does not exist")
            connection.execute(text(f"CREATE SCHEMA {_quoted(connection.dialect, schema)}"))
        configured = {**options(schema), "fn": _steps}
        context = MigrationContext.configure(connection, opts=configured)
        context.run_migrations(op=Operations(context), schema=schema)
        if strict and not has_strict(connection, schema):
            for statement in _strict(connection.dialect, schema):
                connection.exec_driver_sql(statement)


def sql(target: str, schema: str | None = None, strict: bool = False) -> str:
    """The statements that make the tables in an empty database, for somebody else to run.

    `target` is the name of a database ("postgresql", "mysql", "mariadb", "sqlite") or any URL of one.
    """
    tables.tables(schema)
    dialect = _dialect(target)
    if strict:
        _needs_postgresql(dialect)
    out = StringIO()
    configured = {**options(schema), "fn": _steps, "as_sql": True, "output_buffer": out}
    context = MigrationContext.configure(dialect=dialect, opts=configured)
    with context.begin_transaction():
        if schema is not None and dialect.name == "postgresql":
            context.impl.static_output(f"CREATE SCHEMA IF NOT EXISTS {_quoted(dialect, schema)};\n")
        context.run_migrations(op=Operations(context), schema=schema)
        if strict:
            for statement in _strict(dialect, schema):
                context.impl.static_output(f"{statement};\n")
    return out.getvalue()


def has_strict(connection: Connection, schema: str | None = None) -> bool:
    """The trigger of `strict` is there and enabled; always False on other databases than PostgreSQL."""
    if connection.dialect.name != "postgresql":
        return False
    query = text(
        "SELECT count(*) FROM pg_trigger WHERE tgrelid = to_regclass(:name) AND tgname = 'idemq_strict'"
        " AND tgenabled IN ('O', 'A')"
    )
    name = _prefix(connection.dialect, schema) + "idemq_processed"
    return bool(connection.execute(query, {"name": name}).scalar())


def _steps(current: tuple[str, ...] | str, context: MigrationContext) -> list[MigrationStep]:
    """The scripts between the database's version and the newest one, oldest first."""
    directory = scripts()
    known = {script.revision for script in directory.walk_revisions()}
    if unknown := set(current) - known:
        raise SchemaError(
            f"the tables have version {', '.join(sorted(unknown))}, which this idemq does not know; "
            "they were made by a newer one: install that"
        )
    ahead = list(directory.iterate_revisions("head", tuple(current) or "base"))
    return [MigrationStep.upgrade_from_script(directory.revision_map, script) for script in reversed(ahead)]


@contextmanager
def _alone(connection: Connection, schema: str | None) -> Iterator[None]:
    """Keeps other upgrades of the same tables out until this one is committed."""
    identity = blake2b(f"idemq upgrade {schema or ''}".encode(), digest_size=8).digest()
    if connection.dialect.name == "postgresql":
        if connection.get_isolation_level() != "READ COMMITTED":
            # The lock is waited for by a statement, and only this level sees what was committed meanwhile.
            connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL READ COMMITTED")
        number = int.from_bytes(identity, "big", signed=True)
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({number})")
        yield
    elif connection.dialect.name == "sqlite":
        # The driver alone would begin at the first change, after the version was read.
        driver: Any = connection.connection.driver_connection
        if not driver.in_transaction:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        yield
    else:
        yield from _alone_on_mysql(connection, identity)


def _alone_on_mysql(connection: Connection, identity: bytes) -> Iterator[None]:
    # The lock counts for the whole server: the database's name belongs to it.
    name = {"name": f"idemq-{identity.hex()}-"}
    lock = text(f"SELECT GET_LOCK(concat(:name, left(sha1(database()), 32)), {_LOCK_WAIT})")
    if connection.execute(lock, name).scalar() != 1:
        raise SchemaError(f"another upgrade of the same tables has been running for {_LOCK_WAIT} s")
    try:
        # Ends a snapshot taken before the lock was had. Making tables would commit as well.
        connection.exec_driver_sql("COMMIT")
        yield
        # The version must be there before the lock is given up; the tables are committed already.
        connection.exec_driver_sql("COMMIT")
    finally:
        connection.execute(
            text("SELECT RELEASE_LOCK(concat(:name, left(sha1(database()), 32)))"), name
        ).scalar()


def _strict(dialect: Dialect, schema: str | None) -> list[str]:
    prefix = _prefix(dialect, schema)
    return [statement.format(prefix=prefix) for statement in (_REFUSE, _TRIGGER)]


def _needs_postgresql(dialect: Dialect) -> None:
    if dialect.name != "postgresql":
        raise SetupError(
            f"strict needs PostgreSQL: {dialect.name} has no deferred trigger that could refuse a COMMIT"
        )


def _dialect(target: str) -> Dialect:
    try:
        url = make_url(target if "://" in target else f"{target}://")
        return url.get_dialect()()
    except (ArgumentError, NoSuchModuleError):
        raise SetupError(
            f"unknown database {target.split('://')[0]!r}; use postgresql, mysql, mariadb or sqlite"
        ) from None


def _prefix(dialect: Dialect, schema: str | None) -> str:
    return _quoted(dialect, schema) + "." if schema else ""


def _quoted(dialect: Dialect, name: str) -> str:
    return dialect.identifier_preparer.quote_identifier(name)
