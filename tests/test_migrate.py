from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Barrier

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import URL, Connection, Engine, NullPool, create_engine, inspect, make_url, text
from sqlalchemy.exc import DBAPIError, InternalError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.schema import CreateIndex, CreateTable

from idemq import migrate, migrations, schema
from idemq.drivers import url_for
from idemq.errors import SchemaError, SetupError

NAMES = {table.name for table in schema.metadata.sorted_tables} | {"idemq_version"}


@contextmanager
def engine_on(url: URL) -> Iterator[Engine]:
    engine = create_engine(url, poolclass=NullPool)
    yield engine
    engine.dispose()


@pytest.fixture
def engine(database_url: URL) -> Iterator[Engine]:
    with engine_on(database_url) as engine:
        yield engine


@pytest.fixture
def postgres(postgres_url: URL) -> Iterator[Engine]:
    with engine_on(postgres_url) as engine:
        yield engine


@pytest.fixture
def migrated(engine: Engine) -> Engine:
    with engine.begin() as connection:
        migrate.upgrade(connection)
    return engine


@pytest.fixture
def migrated_postgres(postgres: Engine) -> Engine:
    with postgres.begin() as connection:
        migrate.upgrade(connection)
    return postgres


def problems(engine: Engine, database_schema: str | None = None) -> list[str]:
    with engine.begin() as connection:
        return migrate.check(connection, database_schema)


def change(engine: Engine, *statements: str) -> None:
    with engine.begin() as connection:
        for statement in statements:
            connection.execute(text(statement))


def test_after_an_upgrade_autogenerate_finds_nothing_to_change(migrated: Engine) -> None:
    with migrated.begin() as connection:
        context = MigrationContext.configure(
            connection,
            opts={"compare_type": True, "compare_server_default": True, **migrations.options(None)},
        )
        assert compare_metadata(context, schema.metadata) == []
        assert migrate.check(connection) == []
        assert migrations.version(connection) == migrations.newest()


@pytest.mark.parametrize("database", ["postgresql", "mysql", "mariadb", "sqlite"])
@pytest.mark.parametrize("database_schema", [None, "shop"])
def test_the_migration_makes_the_very_statements_of_the_metadata(
    database: str, database_schema: str | None
) -> None:
    def plain(statement: object) -> str:
        return " ".join(str(statement).split())

    dialect = make_url(f"{database}://").get_dialect()()
    expected = set()
    for table in schema.build(database_schema).sorted_tables:
        expected.add(plain(CreateTable(table).compile(dialect=dialect)))
        expected |= {plain(CreateIndex(index).compile(dialect=dialect)) for index in table.indexes}
    printed = re.sub("--.*", "", migrate.sql(database, database_schema))
    made = {plain(statement) for statement in printed.split(";") if "idemq_" in statement}
    assert {statement for statement in made if "idemq_version" not in statement} == expected


def test_the_printed_statements_make_tables_that_pass_the_check(engine: Engine) -> None:
    printed = migrate.sql(engine.dialect.name)
    change(engine, *(statement for statement in printed.split(";") if statement.strip()))
    assert problems(engine) == []
    with engine.begin() as connection:
        migrate.upgrade(connection)
        assert migrations.version(connection) == migrations.newest()


def test_a_second_upgrade_changes_nothing(migrated: Engine) -> None:
    change(migrated, "INSERT INTO idemq_consumers (keep) VALUES (7)")
    with migrated.begin() as connection:
        migrate.upgrade(connection)
        assert connection.execute(text("SELECT keep FROM idemq_consumers")).scalars().all() == [7]


def test_an_upgrade_is_undone_with_the_transaction_of_its_caller(engine: Engine) -> None:
    if engine.dialect.name == "mysql":
        pytest.skip("MySQL and MariaDB commit every CREATE TABLE")
    with engine.connect() as connection:
        migrate.upgrade(connection)
        connection.rollback()
    assert inspect(engine).get_table_names() == []


def test_upgrades_at_the_same_time_make_the_tables_once(engine: Engine) -> None:
    together = Barrier(6)

    def upgrade(_: int) -> None:
        together.wait(90)
        with engine.begin() as connection:
            migrate.upgrade(connection)

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(upgrade, range(6))) == [None] * 6
    assert problems(engine) == []
    with engine.begin() as connection:
        assert connection.execute(text("SELECT count(*) FROM idemq_version")).scalar() == 1


def test_upgrades_at_the_same_time_in_repeatable_read_make_the_tables_once(postgres: Engine) -> None:
    strict = postgres.execution_options(isolation_level="REPEATABLE READ")
    test_upgrades_at_the_same_time_make_the_tables_once(strict)


@pytest.mark.parametrize("database_url", ["mariadb", "mysql"], indirect=True)
def test_an_upgrade_on_mysql_is_done_when_it_returns_and_sees_what_others_did(engine: Engine) -> None:
    change(engine, "CREATE TABLE theirs (a INTEGER) ENGINE=InnoDB")
    with engine.connect() as first, engine.connect() as second:
        second.execute(text("SET SESSION innodb_lock_wait_timeout = 1"))
        second.execute(text("SET SESSION TRANSACTION ISOLATION LEVEL REPEATABLE READ"))
        second.commit()
        second.execute(text("SELECT * FROM theirs"))  # the snapshot from before the first upgrade
        migrate.upgrade(first)
        migrate.upgrade(second)
        first.rollback()
        second.rollback()
    assert problems(engine) == []


@pytest.mark.parametrize("database_url", ["mariadb", "mysql"], indirect=True)
def test_an_upgrade_that_was_killed_half_way_is_taken_up(engine: Engine) -> None:
    statements = migrate.sql("mysql").split(";")
    created = [statement for statement in statements if "CREATE" in statement]
    for count in (1, 4, len(created) // 2, len(created) - 1):
        change(engine, *created[:count])
        with engine.begin() as connection:
            migrate.upgrade(connection)
        assert problems(engine) == []
        change(engine, "SET foreign_key_checks = 0", *(f"DROP TABLE {name}" for name in sorted(NAMES)))


def test_the_users_own_alembic_and_logging_are_left_alone(engine: Engine) -> None:
    change(
        engine,
        "CREATE TABLE alembic_version (version_num VARCHAR(32) PRIMARY KEY)",
        "INSERT INTO alembic_version VALUES ('theirs')",
    )
    root = logging.getLogger()
    before = (list(root.handlers), root.level, logging.getLogger("alembic").level, root.manager.disable)
    with engine.begin() as connection:
        migrate.upgrade(connection)
        assert connection.execute(text("SELECT version_num FROM alembic_version")).scalars().all() == [
            "theirs"
        ]
    after = (list(root.handlers), root.level, logging.getLogger("alembic").level, root.manager.disable)
    assert after == before
    assert set(inspect(engine).get_table_names()) == NAMES | {"alembic_version"}


def test_tables_made_by_the_users_own_alembic_pass_the_check_and_can_be_taken_over(engine: Engine) -> None:
    with engine.begin() as connection:
        schema.metadata.create_all(connection)
    assert problems(engine) == []
    with engine.begin() as connection:
        migrate.upgrade(connection)
        assert migrations.version(connection) == migrations.newest()


@pytest.mark.parametrize("name", ["shop", "Shop", "user"])
def test_a_schema_of_its_own_holds_everything(postgres: Engine, name: str) -> None:
    with postgres.begin() as connection:
        assert "does not exist" in migrate.check(connection, name)[0]
        migrate.upgrade(connection, name, strict=True)
        migrate.upgrade(connection, name, strict=True)
        assert migrate.check(connection, name) == []
        assert migrate.has_strict(connection, name)
        assert not migrate.has_strict(connection)
    inspector = inspect(postgres)
    assert set(inspector.get_table_names(name)) == NAMES
    assert inspector.get_table_names() == []
    assert "missing" in problems(postgres)[0]


def test_the_default_schema_can_be_named(migrated_postgres: Engine) -> None:
    assert problems(migrated_postgres, "public") == []


def test_tables_of_the_same_name_in_another_schema_are_no_concern(migrated_postgres: Engine) -> None:
    change(migrated_postgres, "CREATE SCHEMA other", "CREATE UNLOGGED TABLE other.idemq_processed (id text)")
    assert problems(migrated_postgres) == []


@pytest.mark.parametrize("name", ['x"; drop table t; --', "a.b", "1x", "", "x\n", "ü", "x" * 64])
def test_a_schema_that_is_no_plain_identifier_is_refused(name: str) -> None:
    with pytest.raises(SetupError, match="plain identifier"):
        migrate.sql("postgresql", name)


@pytest.mark.parametrize("database_url", ["sqlite", "mariadb", "mysql"], indirect=True)
def test_a_schema_that_is_missing_is_not_made_outside_postgresql(engine: Engine) -> None:
    with engine.begin() as connection, pytest.raises(SetupError, match="does not exist"):
        migrate.upgrade(connection, "nowhere_to_be_found")


def test_tables_of_a_newer_idemq_are_not_touched(migrated: Engine) -> None:
    change(migrated, "UPDATE idemq_version SET version_num = '9999'")
    assert problems(migrated) == ["the tables have version 9999, made by a newer idemq: install that"]
    with migrated.begin() as connection, pytest.raises(SchemaError, match="newer"):
        migrate.upgrade(connection)


def test_an_async_engine_upgrades_through_run_sync(database_url: URL) -> None:
    async def upgrade() -> list[str]:
        engine = create_async_engine(url_for(database_url, asynchronous=True), poolclass=NullPool)
        both = [engine.connect(), engine.connect()]

        async def one(number: int) -> None:
            async with both[number] as connection:
                await connection.run_sync(migrate.upgrade)
                await connection.commit()

        await asyncio.gather(one(0), one(1))
        async with engine.begin() as connection:
            found = await connection.run_sync(migrate.check)
        await engine.dispose()
        return found

    assert asyncio.run(upgrade()) == []


def test_an_unknown_database_is_named(database_url: URL) -> None:
    with pytest.raises(SetupError, match="unknown database 'oracel'"):
        migrate.sql("oracel://user:secret@host/db")
    assert "secret" not in migrate.sql(str(database_url))


# --- strict ---------------------------------------------------------------------------------------------

CLAIM = "INSERT INTO idemq_processed (consumer, id, at) VALUES (1, gen_random_uuid(), now())"
DONE = "SELECT set_config('idemq.done', pg_current_xact_id()::text, true)"


@pytest.fixture
def strict(postgres: Engine) -> Engine:
    with postgres.begin() as connection:
        migrate.upgrade(connection)
        assert not migrate.has_strict(connection)
        migrate.upgrade(connection, strict=True)
        assert migrate.has_strict(connection)
        migrate.upgrade(connection)
        assert migrate.has_strict(connection)
    return postgres


def count(connection: Connection) -> int:
    return int(connection.execute(text("SELECT count(*) FROM idemq_processed")).scalar_one())


@pytest.mark.hazard("H3")
def test_strict_refuses_a_commit_that_idemq_did_not_ask_for(strict: Engine) -> None:
    with strict.connect() as connection:
        connection.execute(text(CLAIM))
        with pytest.raises(InternalError, match="committed by the handler") as caught:
            connection.execute(text("COMMIT"))
        assert getattr(caught.value.orig, "sqlstate", None) == "2D000"
        connection.invalidate()
        connection.rollback()
        assert count(connection) == 0


@pytest.mark.hazard("H3")
def test_strict_refuses_the_commit_of_a_retry_that_idemq_did_not_ask_for(strict: Engine) -> None:
    change(strict, CLAIM, DONE)
    with strict.connect() as connection:
        connection.execute(text("UPDATE idemq_processed SET at = now()"))
        with pytest.raises(InternalError, match="committed by the handler"):
            connection.commit()


@pytest.mark.hazard("H3")
def test_the_permission_of_an_earlier_transaction_does_not_count_under_strict(strict: Engine) -> None:
    with strict.connect() as connection:
        for statement in (CLAIM, DONE):
            connection.execute(text(statement))
        connection.commit()
        assert count(connection) == 1
        connection.execute(text(DONE.replace("true", "false")))  # a session-wide setting outlives the commit
        connection.commit()
        connection.execute(text(CLAIM))
        with pytest.raises(InternalError, match="committed by the handler"):
            connection.commit()


@pytest.mark.parametrize("database_url", ["sqlite", "mariadb", "mysql"], indirect=True)
def test_strict_needs_postgresql_and_says_so(engine: Engine) -> None:
    with engine.begin() as connection:
        with pytest.raises(SetupError, match="strict needs PostgreSQL"):
            migrate.upgrade(connection, strict=True)
        assert not migrate.has_strict(connection)
    assert inspect(engine).get_table_names() == []
    with pytest.raises(SetupError, match="strict needs PostgreSQL"):
        migrate.sql(engine.dialect.name, strict=True)


def test_a_disabled_trigger_is_no_strict(strict: Engine) -> None:
    change(strict, "ALTER TABLE idemq_processed DISABLE TRIGGER idemq_strict")
    with strict.begin() as connection:
        assert not migrate.has_strict(connection)


# --- wrong tables ---------------------------------------------------------------------------------------


@pytest.mark.hazard("H56")
def test_missing_tables_are_named_with_the_command_that_makes_them(engine: Engine) -> None:
    assert problems(engine) == ["the tables of idemq are missing: run `idemq db upgrade APP`"]
    with engine.begin() as connection:
        migrate.upgrade(connection)
        connection.execute(text("DROP TABLE idemq_lanes"))
    (problem,) = problems(engine)
    assert problem.startswith("idemq_lanes is missing: mend it by hand")


PROCESSED = {
    "sqlite": "consumer INTEGER NOT NULL, id BLOB NOT NULL, fingerprint INTEGER, sent_at DATETIME,"
    " at DATETIME NOT NULL, result BLOB, token BLOB",
    "postgresql": "consumer INTEGER NOT NULL, id UUID NOT NULL, fingerprint INTEGER, sent_at TIMESTAMPTZ,"
    " at TIMESTAMPTZ(0) NOT NULL, result BYTEA, token BYTEA",
    "mysql": "consumer INTEGER NOT NULL, id BINARY(16) NOT NULL, fingerprint INTEGER, sent_at DATETIME(6),"
    " at DATETIME(6) NOT NULL, result MEDIUMBLOB, token BINARY(8)",
}


def replace_processed(engine: Engine, more: str, suffix: str = "", **changes: str) -> None:
    columns = PROCESSED[engine.dialect.name]
    for old, new in changes.items():
        columns = re.sub(rf"\b{old} [A-Z]+(\(\d+\))?", f"{old} {new}", columns)
    change(
        engine,
        "DROP TABLE idemq_processed",
        f"CREATE TABLE idemq_processed ({columns}{more}) {suffix}",
        "CREATE INDEX idemq_processed_at ON idemq_processed (at)",
    )


@pytest.mark.hazard("H56")
def test_a_primary_key_in_either_order_of_its_columns_is_right(migrated: Engine) -> None:
    replace_processed(migrated, ", PRIMARY KEY (consumer, id)")
    assert problems(migrated) == []


@pytest.mark.hazard("H56")
@pytest.mark.parametrize(
    "key", ["", ", PRIMARY KEY (consumer, id, at)", ", UNIQUE (id)", ", PRIMARY KEY (id)"]
)
def test_a_missing_or_other_primary_key_is_found(migrated: Engine, key: str) -> None:
    replace_processed(migrated, key)
    (problem,) = problems(migrated)
    assert problem.startswith("idemq_processed has no primary key (consumer, id)")
    assert "processed twice" in problem


@pytest.mark.hazard("H56")
def test_a_missing_unique_constraint_of_the_failures_is_found(migrated: Engine) -> None:
    if migrated.dialect.name == "sqlite":
        columns = schema.metadata.tables["idemq_failed"].columns
        change(migrated, "ALTER TABLE idemq_failed RENAME TO old")
        change(
            migrated,
            "DROP INDEX idemq_failed_due",
            "DROP INDEX idemq_failed_lane",
            f"CREATE TABLE idemq_failed AS SELECT {', '.join(c.name for c in columns)} FROM old",
        )
    else:
        kind = "CONSTRAINT" if migrated.dialect.name == "postgresql" else "INDEX"
        change(migrated, f"ALTER TABLE idemq_failed DROP {kind} idemq_failed_identity")
    assert any(
        problem.startswith("idemq_failed has no unique constraint (consumer, identity)")
        for problem in problems(migrated)
    )


@pytest.mark.hazard("H56")
@pytest.mark.parametrize(
    "definition",
    [
        "UNIQUE INDEX {0} ON idemq_failed (consumer, identity) WHERE state = 1",
        "UNIQUE INDEX {0} ON idemq_failed (consumer, (identity::text))",
        "INDEX {0} ON idemq_failed (consumer, identity)",
    ],
)
def test_an_index_over_a_part_of_the_rows_is_no_unique_constraint(
    migrated_postgres: Engine, definition: str
) -> None:
    name = "idemq_failed_identity"
    change(
        migrated_postgres,
        f"ALTER TABLE idemq_failed DROP CONSTRAINT {name}",
        "CREATE " + definition.format(name),
    )
    assert "no unique constraint (consumer, identity)" in problems(migrated_postgres)[0]


@pytest.mark.hazard("H56")
def test_a_deferred_unique_constraint_is_none(migrated_postgres: Engine) -> None:
    replace_processed(migrated_postgres, ", PRIMARY KEY (consumer, id) DEFERRABLE")
    assert "no primary key (consumer, id)" in problems(migrated_postgres)[0]


@pytest.mark.hazard("H56")
def test_an_index_that_failed_to_build_is_found_and_its_command_mends_it(migrated_postgres: Engine) -> None:
    columns = (
        "pk, consumer, identity, owns_claim, state, reason, attempts, starts, crashes, alone, copies,"
        " first_at, last_at"
    )
    row = (
        "gen_random_uuid(), 1, '00000000-0000-0000-0000-000000000000', true, 2, 'x', 0, 0, 0, false, 1,"
        " now(), now()"
    )
    change(
        migrated_postgres,
        "ALTER TABLE idemq_failed DROP CONSTRAINT idemq_failed_identity",
        *[f"INSERT INTO idemq_failed ({columns}) VALUES ({row})"] * 2,
    )
    outside = migrated_postgres.execution_options(isolation_level="AUTOCOMMIT")
    with outside.connect() as connection, pytest.raises(DBAPIError, match="could not create unique index"):
        connection.execute(
            text("CREATE UNIQUE INDEX CONCURRENTLY again ON idemq_failed (consumer, identity)")
        )
    (problem,) = problems(migrated_postgres)
    assert "is not valid" in problem
    assert problem.endswith("run `REINDEX INDEX again`")
    change(migrated_postgres, "DELETE FROM idemq_failed", problem.split("`")[1])
    assert problems(migrated_postgres) == []


@pytest.mark.hazard("H57")
def test_a_table_partitioned_by_time_is_refused_and_one_by_the_key_is_not(migrated_postgres: Engine) -> None:
    replace_processed(migrated_postgres, ", PRIMARY KEY (consumer, id, at)", "PARTITION BY RANGE (at)")
    (problem,) = problems(migrated_postgres)
    assert problem.startswith("idemq_processed has no primary key (consumer, id), but (at, consumer, id)")
    replace_processed(migrated_postgres, ", PRIMARY KEY (consumer, id)", "PARTITION BY HASH (id)")
    assert problems(migrated_postgres) == []


@pytest.mark.hazard("H57")
def test_a_partitioned_key_that_is_not_on_every_partition_is_refused(migrated_postgres: Engine) -> None:
    replace_processed(migrated_postgres, "", "PARTITION BY HASH (id)")
    change(
        migrated_postgres,
        "CREATE TABLE part PARTITION OF idemq_processed FOR VALUES WITH (MODULUS 1, REMAINDER 0)",
        "ALTER TABLE ONLY idemq_processed ADD PRIMARY KEY (id, consumer)",
    )
    assert "is not valid" in problems(migrated_postgres)[0]


@pytest.mark.hazard("H56")
def test_a_column_of_another_type_is_found(migrated: Engine) -> None:
    key = ", PRIMARY KEY (consumer, id)"
    types = {"sqlite": ["TEXT"], "postgresql": ["TEXT", "BYTEA", "VARCHAR(36)"]}
    for kind in types.get(migrated.dialect.name, ["VARCHAR(64)", "VARBINARY(16)", "BINARY(8)", "CHAR(16)"]):
        replace_processed(migrated, key, id=kind)
        (problem,) = problems(migrated)
        assert problem.startswith("idemq_processed.id is "), kind
        assert "by hand" in problem


@pytest.mark.hazard("H56")
@pytest.mark.parametrize("database_url", ["mariadb", "mysql"], indirect=True)
def test_a_body_that_would_be_cut_off_is_found(migrated: Engine) -> None:
    change(migrated, "ALTER TABLE idemq_failed MODIFY body BLOB")
    assert problems(migrated)[0].startswith("idemq_failed.body is BLOB and must be LONGBLOB")


@pytest.mark.hazard("H56")
def test_missing_and_foreign_columns_are_found(migrated: Engine) -> None:
    change(migrated, "ALTER TABLE idemq_lanes DROP COLUMN owner")
    change(migrated, "ALTER TABLE idemq_tokens ADD COLUMN harmless INTEGER")
    assert [problem.split(":")[0] for problem in problems(migrated)] == ["idemq_lanes has no column owner"]
    if migrated.dialect.name != "sqlite":
        change(migrated, "ALTER TABLE idemq_tokens ADD COLUMN harmful INTEGER NOT NULL")
        assert "idemq_tokens.harmful is not a column of idemq" in problems(migrated)[1]


@pytest.mark.hazard("H56")
def test_a_missing_index_comes_with_the_statement_that_makes_it(migrated: Engine) -> None:
    on = " ON idemq_processed" if migrated.dialect.name == "mysql" else ""
    change(migrated, f"DROP INDEX idemq_processed_at{on}")
    (problem,) = problems(migrated)
    assert "run `CREATE INDEX idemq_processed_at ON idemq_processed (at)`" in problem
    change(migrated, problem.split("`")[1])
    assert problems(migrated) == []


@pytest.mark.hazard("H16")
@pytest.mark.parametrize("database_url", ["mariadb", "mysql"], indirect=True)
@pytest.mark.parametrize("storage", ["MyISAM", "MEMORY"])
def test_a_table_that_cannot_roll_back_is_refused_and_its_command_mends_it(
    migrated: Engine, storage: str
) -> None:
    # MEMORY holds no BLOBs, so it is a table without them there.
    table = "idemq_lanes" if storage == "MEMORY" else "idemq_processed"
    change(migrated, f"ALTER TABLE {table} ENGINE={storage}")
    (problem,) = problems(migrated)
    assert (
        problem == f"{table} is in {storage}, which cannot roll back: run `ALTER TABLE {table} ENGINE=InnoDB`"
    )
    change(migrated, problem.split("`")[1])
    assert problems(migrated) == []


@pytest.mark.hazard("H16")
@pytest.mark.parametrize("database_schema", [None, "Shop"])
def test_an_unlogged_table_is_refused_and_its_command_mends_it(
    postgres: Engine, database_schema: str | None
) -> None:
    with postgres.begin() as connection:
        migrate.upgrade(connection, database_schema)
    prefix = f'"{database_schema}".' if database_schema else ""
    change(postgres, f"ALTER TABLE {prefix}idemq_processed SET UNLOGGED")
    (problem,) = problems(postgres, database_schema)
    assert problem.startswith(f"{prefix}idemq_processed is UNLOGGED, a crash empties it")
    change(postgres, problem.split("`")[1])
    assert problems(postgres, database_schema) == []


# --- unsafe settings ------------------------------------------------------------------------------------


def test_durable_settings_bring_no_warning(engine: Engine) -> None:
    with engine.connect() as connection:
        found = [warning for warning in migrate.durability(connection) if not warning.startswith("note:")]
    assert found == []


@pytest.mark.hazard("H16")
@pytest.mark.parametrize("setting", ["off", "local", "remote_write"])
def test_a_commit_that_does_not_wait_for_the_disk_is_told(postgres: Engine, setting: str) -> None:
    with postgres.connect() as connection:
        connection.execute(text(f"SET synchronous_commit = {setting}"))
        (warning,) = migrate.durability(connection)
        assert warning.startswith(f"synchronous_commit = {setting}: a crash can lose committed work")
        connection.execute(text("SET synchronous_commit = remote_apply"))
        assert migrate.durability(connection) == []


@pytest.mark.hazard("H16")
@pytest.mark.parametrize(
    ("statements", "word"),
    [
        (["PRAGMA synchronous = OFF"], "synchronous = OFF"),
        (["PRAGMA journal_mode = WAL", "PRAGMA synchronous = NORMAL"], "synchronous = NORMAL"),
        (["PRAGMA journal_mode = MEMORY"], "journal_mode = memory"),
    ],
)
@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_sqlite_file_that_may_lose_commits_is_told(
    engine: Engine, statements: list[str], word: str
) -> None:
    with engine.connect() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)
        (warning,) = migrate.durability(connection)
        assert word in warning
        connection.exec_driver_sql("PRAGMA journal_mode = WAL")
        connection.exec_driver_sql("PRAGMA synchronous = FULL")
        assert migrate.durability(connection) == []


@pytest.mark.parametrize("database_url", ["postgres", "mariadb", "mysql"], indirect=True)
def test_isolation_above_read_committed_is_mentioned(engine: Engine) -> None:
    for level, expected in (("REPEATABLE READ", 1), ("SERIALIZABLE", 1), ("READ COMMITTED", 0)):
        with engine.execution_options(isolation_level=level).connect() as connection:
            notes = [warning for warning in migrate.durability(connection) if level in warning]
            assert len(notes) == expected
