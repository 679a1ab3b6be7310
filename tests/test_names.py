from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import delete, text
from sqlalchemy.exc import DBAPIError

from idemq import names, schema
from idemq.drivers import is_transient
from idemq.errors import SetupError
from idemq.process import begin
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
    assert register(shop, "second") > first


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
