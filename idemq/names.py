"""Consumer names and their numbers, which scope the claims.

A number is never given to two consumers, and a name keeps its number for ever, so that a rename by
`known_as` leaves old and new processes of a rolling deploy with the same claims. Numbers are random: when the
tables are dropped and made anew, or restored from a backup, under processes that remember the old numbers,
none of them is given to another consumer, whose ids would then pass for repeats.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from weakref import WeakSet

from sqlalchemy import Connection, Table, insert, select
from sqlalchemy.engine import Transaction
from sqlalchemy.exc import DBAPIError, IntegrityError

from idemq import schema
from idemq.drivers import is_missing_table, kind_of
from idemq.errors import SchemaError, SetupError
from idemq.packing import shown

#: Moves on when tables were found missing: all connections then forget the numbers that they know.
_generation = 0
_uncommitted: WeakSet[Transaction] = WeakSet()


@contextmanager
def naming_missing_tables() -> Iterator[None]:
    """Raise `SchemaError` in the place of the database's error, where a table of idemq is missing."""
    global _generation
    try:
        yield
    except DBAPIError as error:
        if is_missing_table(error):
            _generation += 1
            raise SchemaError("the tables of idemq are missing: run `idemq db upgrade APP`") from error
        raise


def remembered(connection: Connection) -> dict[tuple[str | None, str], int]:
    """The numbers by (database schema, name) that are known to be committed where `connection` leads to.

    Each database connection remembers its own, because the next one may lead to a database that was restored,
    or whose file was replaced.
    """
    key = "idemq numbers", _generation
    numbers: dict[tuple[str | None, str], int] = connection.info.setdefault(key, {})
    return numbers


def register(
    connection: Connection, name: str, known_as: Sequence[str] = (), database_schema: str | None = None
) -> int:
    """The number of `name`, made if it is new; `known_as` are names that it had before.

    To be called in a transaction of its own. Raises `SetupError` when two of the names already belong to
    different consumers.
    """
    names = schema.table("idemq_consumer_names", database_schema)
    every = [name, *known_as]
    found = {each: number for each in every if (number := _look_up(connection, each, names)) is not None}
    if len(set(found.values())) > 1:
        raise SetupError(
            f"consumer {name!r}: known_as names another consumer, which has claims of its own "
            f"({found}); remove it from known_as, or choose another name"
        )
    number = next(iter(found.values()), None)
    if number is None:
        number = 1 + secrets.randbelow(2**31 - 1)
        connection.execute(insert(schema.table("idemq_consumers", database_schema)).values(id=number))
    for each in every:
        if each not in found:
            connection.execute(insert(names).values(name=each.encode(), consumer=number))
    return number


def number_of(connection: Connection, name: str, database_schema: str | None = None) -> int:
    """The number of `name` inside the caller's transaction, inserted there when it is missing.

    Remembered only once a committed transaction held it: another one could roll it back.
    """
    cache = remembered(connection)
    if (number := cache.get((database_schema, name))) is not None:
        return number
    names = schema.table("idemq_consumer_names", database_schema)
    transaction = connection.get_transaction()
    number = _look_up(connection, name, names)
    if number is not None:
        if transaction not in _uncommitted:
            cache[database_schema, name] = number
        return number
    if transaction is not None:
        _uncommitted.add(transaction)
    try:
        with connection.begin_nested():
            return register(connection, name, (), database_schema)
    except IntegrityError:
        number = _look_up(connection, name, names)  # somebody else was first, and has committed
        if number is None:
            raise
        return number


def find(connection: Connection, name: str, database_schema: str | None = None) -> int | None:
    """The number of `name`, or None; writes nothing."""
    names = schema.table("idemq_consumer_names", database_schema)
    return _look_up(connection, name, names)


def wanted(connection: Connection, name: str, database_schema: str | None = None) -> int:
    """The number of `name`. Raises `SetupError` that names the consumers that there are."""
    number = find(connection, name, database_schema)
    if number is not None:
        return number
    others = ", ".join(shown(each) for each in sorted(known(connection, database_schema).values()))
    hint = f"those that have: {others}" if others else "nor has another one: `idemq run` starts them"
    raise SetupError(f"no consumer named {name!r} has run on this database; {hint}")


def known(connection: Connection, database_schema: str | None = None) -> dict[int, str]:
    """Every consumer's number and name; of several names the first in the alphabet."""
    names = schema.table("idemq_consumer_names", database_schema)
    rows = connection.execute(select(names.c.consumer, names.c.name).order_by(names.c.name.desc()))
    return {number: name.decode() for number, name in rows}


def _look_up(connection: Connection, name: str, names: Table) -> int | None:
    query = select(names.c.consumer).where(names.c.name == name.encode("utf-8", "surrogatepass"))
    if kind_of(connection.dialect) in ("mysql", "mariadb"):
        query = query.with_for_update(read=True)  # a plain read could answer from an older snapshot
    return connection.execute(query).scalar_one_or_none()
