from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from sqlalchemy import URL, Connection, Engine, create_engine, delete, select, text
from sqlalchemy.exc import DBAPIError

from idemq import migrate, names, once, schema
from idemq.drivers import begin, is_transient
from idemq.errors import SchemaError, SetupError
from tests.core_tools import PROCESSED, REPEATED, Shop, message, on

DATABASES = [("sqlite", "pysqlite"), ("postgres", "psycopg"), ("mariadb", "pymysql"), ("mysql", "pymysql")]


def register(shop: Shop, name: str, *known_as: str) -> int:
    """As a process does at its start: again, when another one was in the way."""
    for _ in range(50):
        try:
            with shop.engine.begin() as connection:
                return names.register(connection, name, known_as)
        except DBAPIError as error:
            if not (is_transient(error) or "idemq_consumer_names" in str(error)):
                raise
    raise AssertionError("never registered")


@pytest.mark.hazard("H1")
@on(*DATABASES)
def test_a_renamed_consumer_keeps_its_claims_beside_the_old_name(shop: Shop) -> None:
    old = shop.attempts(name="old")
    assert old(message("1")) == PROCESSED
    assert register(shop, "new", "old") == register(shop, "old")
    new = shop.attempts(name="new")
    assert new(message("1")) == REPEATED
    assert new(message("2")) == PROCESSED
    assert old(message("2")) == REPEATED  # an old process of the rolling deploy


@pytest.mark.hazard("H1")
@on(*DATABASES)
def test_two_consumers_that_exist_are_not_made_one(shop: Shop) -> None:
    first, second = register(shop, "first"), register(shop, "second")
    assert first != second
    with pytest.raises(SetupError, match="known_as"):
        register(shop, "first", "second")
    assert (register(shop, "first"), register(shop, "second")) == (first, second)


@pytest.mark.hazard("H1")
@on(*DATABASES)
def test_names_are_compared_as_bytes(shop: Shop) -> None:
    different = ["shop", "Shop", "shop ", "sh\u00f6p", "sho\u0308p", "shop\x00", "\U0001f600", "\U0001f601"]
    numbers = [register(shop, name) for name in different]
    assert len(set(numbers)) == len(different)
    assert [register(shop, name) for name in different] == numbers


@pytest.mark.hazard("H1")
@on(*DATABASES)
def test_registered_by_many_at_once_a_name_has_one_number(shop: Shop) -> None:
    start = threading.Barrier(8)

    def run(_: int) -> int:
        start.wait()
        return register(shop, "shop", "before")

    with ThreadPoolExecutor(8) as threads:
        numbers = set(threads.map(run, range(8)))
    assert len(numbers) == 1
    assert register(shop, "before") in numbers


@pytest.mark.hazard("H1")
@on(*DATABASES)
def test_a_number_is_never_given_twice(shop: Shop) -> None:
    first = register(shop, "first")
    with shop.engine.begin() as connection:
        connection.execute(delete(schema.table("idemq_consumer_names")))
        connection.execute(delete(schema.table("idemq_consumers")))
    assert register(shop, "second") != first


@pytest.mark.hazard("H1")
@on(*DATABASES)
def test_a_number_that_was_rolled_back_is_not_remembered(shop: Shop) -> None:
    with shop.engine.connect() as connection:
        transaction = begin(connection)
        names.number_of(connection, "shop")
        assert names.number_of(connection, "shop") == names.find(connection, "shop")
        transaction.rollback()
    with shop.engine.connect() as connection:
        assert names.find(connection, "shop") is None
        connection.rollback()
        transaction = begin(connection)
        number = names.number_of(connection, "shop")
        transaction.commit()
        assert connection.execute(text("SELECT count(*) FROM idemq_consumers")).scalar_one() == 1
    with shop.engine.connect() as connection:
        assert names.number_of(connection, "shop") == number


def claim_once(engine: Engine, consumer: str) -> bool:
    with once(engine, consumer, "1") as work:
        return work.fresh


def make_anew(url: URL) -> None:
    """What a test suite, a restore or a mistake does beside processes that are connected."""
    with closing_engine(url) as engine, engine.begin() as connection:
        migrate.upgrade(connection)


def drop(url: URL) -> None:
    with closing_engine(url) as engine, engine.begin() as connection:
        schema.metadata.drop_all(connection)
        connection.execute(text("DROP TABLE idemq_version"))


@contextmanager
def closing_engine(url: URL) -> Iterator[Engine]:
    engine = create_engine(url)
    try:
        yield engine
    finally:
        engine.dispose()


def consumers_of_claims(engine: Engine) -> set[int]:
    with engine.connect() as connection:
        return set(connection.scalars(select(schema.table("idemq_processed").c.consumer)))


def number(engine: Engine, name: str) -> int | None:
    with engine.connect() as connection:
        return names.find(connection, name)


@pytest.fixture
def engine(database_url: URL) -> Iterator[Engine]:
    make_anew(database_url)
    with closing_engine(database_url) as made:
        yield made


@pytest.mark.hazard("H1")
def test_a_number_from_dropped_tables_is_nobody_elses_in_the_new_ones(
    database_url: URL, engine: Engine
) -> None:
    assert claim_once(engine, "receipts")
    drop(database_url)
    make_anew(database_url)
    with closing_engine(database_url) as other:
        assert claim_once(other, "audit")  # the first one of the new tables
    assert claim_once(engine, "receipts"), "taken for a repeat, it would be lost"


def use(connection: Connection) -> None:
    with once(connection, "receipts", "1"):
        pass
    connection.commit()


def claim_on(engine: Engine) -> None:
    with engine.connect() as connection:
        use(connection)


@pytest.mark.hazard("H1")
@pytest.mark.parametrize("find_out", [claim_on, lambda engine: claim_once(engine, "receipts")])
def test_numbers_are_forgotten_by_all_connections_when_one_finds_the_tables_missing(
    database_url: URL, engine: Engine, find_out: Callable[[Engine], object]
) -> None:
    with engine.connect() as first, engine.connect() as second:
        for connection in (first, second):
            use(connection)  # twice, because the first one may not remember what it has inserted itself
            use(connection)
    drop(database_url)
    with pytest.raises(SchemaError):
        find_out(engine)
    make_anew(database_url)
    with engine.connect() as first, engine.connect() as second:
        use(first)
        use(second)
    assert consumers_of_claims(engine) == {number(engine, "receipts")}


@pytest.mark.hazard("H1")
def test_a_new_connection_asks_again_because_it_may_lead_to_a_restored_database(
    database_url: URL, engine: Engine
) -> None:
    assert claim_once(engine, "receipts")
    engine.dispose()  # all connections are lost, as they are when a server is stopped for the restore
    drop(database_url)
    make_anew(database_url)
    assert claim_once(engine, "receipts")
    assert consumers_of_claims(engine) == {number(engine, "receipts")}
