"""The distributed lock: one holder at a time, and a fence that refuses whoever held it before."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import redis
import redis.asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import (
    URL,
    BigInteger,
    Column,
    Engine,
    Integer,
    MetaData,
    Table,
    create_engine,
    delete,
    event,
    insert,
    select,
    text,
    update,
)

from idemq import SchemaError, SetupError, drivers, locks, redis_locks
from idemq.errors import LockLost, LockTimeout
from tests.core_tools import Shop, on, open_shop
from tests.servers import PATIENCE, eventually

pytestmark = pytest.mark.pattern("distributed-lock")

_metadata = MetaData()
#: The state that locks guard in these tests.
state = Table(
    "guarded_state",
    _metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("value", Integer, nullable=False),
    Column("fence", BigInteger, nullable=False),
)


class Boom(Exception):
    """What a block raises on purpose."""


@dataclass
class Guarded:
    """One row of guarded state, and the lock that is held to change it."""

    engine: Engine
    #: Arguments: the wait in seconds, and the lock's name.
    hold: Callable[..., AbstractContextManager[int]]
    #: Takes the lock from its last holder, who is not told.
    steal: Callable[[], None]
    #: Called once, when the next number is about to be taken.
    before_number: list[Callable[[], None]] = field(default_factory=list)

    def number_is_taken(self) -> None:
        if self.before_number:
            self.before_number.pop()()

    def read(self) -> int:
        with self.engine.connect() as connection:
            value: int = connection.scalars(select(state.c.value)).one()
        return value

    def take_over(self, fence: int) -> bool:
        """What a holder does first: from here on every older one is refused."""
        return self._write(state.c.fence < fence, fence=fence)

    def write(self, fence: int, value: int) -> bool:
        """A write that depends on what was read."""
        return self._write(state.c.fence == fence, value=value)

    def overwrite(self, fence: int, value: int) -> bool:
        """One write that depends on nothing read: it needs no take-over."""
        return self._write(state.c.fence < fence, value=value, fence=fence)

    def _write(self, condition: Any, **values: int) -> bool:
        with self.engine.begin() as connection:
            return connection.execute(update(state).where(condition).values(**values)).rowcount == 1


def fresh(engine: Engine) -> None:
    with engine.begin() as connection:
        _metadata.create_all(connection)
        connection.execute(delete(state))
        connection.execute(insert(state).values(id=1, value=0, fence=0))


@pytest.fixture(params=["postgres", "mariadb", "mysql", "redis"])
def guarded(request: pytest.FixtureRequest, unique: str, tmp_path: Path) -> Iterator[Guarded]:
    """The state in a database, under a lock of that database; or in SQLite, under one of Redis."""
    if request.param == "redis":
        yield from _in_redis(request.getfixturevalue("redis_url"), unique, tmp_path)
        return
    url: URL = request.getfixturevalue("_shared")(request.param)
    with open_shop(url, "psycopg" if request.param == "postgres" else "pymysql") as shop:
        yield from _in_sql(shop, unique)


def _in_sql(shop: Shop, unique: str) -> Iterator[Guarded]:
    fresh(shop.engine)
    engine = shop.new_engine(pool_size=40)
    assert isinstance(engine, Engine)
    holders: list[int] = []

    def hold(wait: float = PATIENCE, name: str = unique) -> AbstractContextManager[int]:
        return locks.hold(engine, name, wait=wait)

    def steal() -> None:
        with shop.engine.connect() as connection:
            end(connection, holders[-1])

    place = Guarded(engine, hold, steal)

    @event.listens_for(engine, "before_cursor_execute")
    def _look(connection: Any, _cursor: object, statement: str, *_rest: object) -> None:
        if statement.startswith("UPDATE idemq_lanes"):
            place.number_is_taken()
        if "GET_LOCK" in statement or "pg_advisory" in statement:
            raw = connection.connection.driver_connection
            holders.append(raw.info.backend_pid if shop.kind == "postgresql" else raw.thread_id())

    yield place
    engine.dispose()


def end(connection: Any, number: int) -> None:
    """End the server's side of a connection, and wait until it has ended."""
    if connection.dialect.name == "postgresql":
        kill, there = "SELECT pg_terminate_backend(:number)", "pg_stat_activity WHERE pid = :number"
    else:
        kill, there = "KILL :number", "information_schema.processlist WHERE id = :number"
    connection.execute(text(kill), {"number": number})
    look = text(f"SELECT count(*) FROM {there}")
    connection.commit()

    def gone() -> bool:
        count = connection.scalar(look, {"number": number})
        connection.commit()  # PostgreSQL shows the same within a transaction
        return bool(count == 0)

    eventually(gone, "the connection has ended")


def _in_redis(url: str, unique: str, directory: Path) -> Iterator[Guarded]:
    class Client(redis.Redis):
        def incr(self, *arguments: Any) -> Any:
            place.number_is_taken()
            return super().incr(*arguments)

    client = Client.from_url(url)
    engine = create_engine(f"sqlite:///{directory / 'state.db'}", connect_args={"timeout": PATIENCE})
    fresh(engine)

    def hold(wait: float = PATIENCE, name: str = unique) -> AbstractContextManager[int]:
        return redis_locks.hold(client.lock(name, timeout=600, blocking_timeout=wait, sleep=0.005))

    def steal() -> None:
        assert client.pexpire(unique, 1)
        eventually(lambda: not client.exists(unique), "the lock has expired")

    place = Guarded(engine, hold, steal)
    yield place
    for key in client.scan_iter(f"{unique}*"):
        client.delete(key)
    client.close()
    engine.dispose()


@pytest.mark.situation(5)
def test_of_32_workers_under_the_lock_no_increment_is_lost_and_numbers_grow_as_they_hold(
    guarded: Guarded,
) -> None:
    fences: list[int] = []

    def work(_: int) -> None:
        with guarded.hold() as fence:
            fences.append(fence)
            assert guarded.take_over(fence)
            assert guarded.write(fence, guarded.read() + 1)

    with ThreadPoolExecutor(32) as pool:
        list(pool.map(work, range(32)))
    assert guarded.read() == 32
    assert fences == sorted(set(fences))
    assert len(fences) == 32


def test_without_a_fence_the_lock_alone_keeps_workers_apart(guarded: Guarded) -> None:
    inside: list[int] = []

    def work(number: int) -> None:
        with guarded.hold():
            inside.append(number)
            value = guarded.read()
            assert inside == [number]
            assert guarded._write(state.c.value == value, value=value + 1)
            inside.remove(number)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(16)))
    assert guarded.read() == 16


def test_the_wait_is_bounded_and_other_names_are_free(guarded: Guarded, unique: str) -> None:
    with guarded.hold() as first:
        with pytest.raises(LockTimeout, match="held by somebody else"), guarded.hold(0):
            raise AssertionError("two holders")
        with pytest.raises(LockTimeout), guarded.hold(0.1):
            raise AssertionError("two holders")
        with guarded.hold(0, f"{unique} other") as other, guarded.hold(0, unique.upper()):
            assert other >= 1
    with guarded.hold(0) as second:
        assert second > first


def test_an_exception_in_the_block_gives_the_lock_back(guarded: Guarded) -> None:
    fences = []
    for _ in range(3):
        with suppress(Boom), guarded.hold(0) as fence:
            fences.append(fence)
            raise Boom
    assert len(fences) == 3
    assert fences == sorted(set(fences))
    with guarded.hold(0) as fence:
        assert fence > fences[-1]


@pytest.mark.hazard("H52")
@pytest.mark.situation(5)
def test_a_holder_that_lost_the_lock_and_goes_on_is_refused_by_the_fence(guarded: Guarded) -> None:
    def hold_and_go_on() -> None:
        with guarded.hold() as old:
            assert guarded.take_over(old)
            read_by_old = guarded.read()
            guarded.steal()
            with guarded.hold() as new:
                assert new > old
                assert guarded.take_over(new)
                assert not guarded.write(old, read_by_old + 100)
                assert guarded.write(new, guarded.read() + 1)
            assert not guarded.write(old, read_by_old + 100)
            assert not guarded.overwrite(old, 100)
            assert not guarded.take_over(old)

    with pytest.raises(LockLost, match="only what the fence let pass"):
        hold_and_go_on()
    assert guarded.read() == 1


def test_one_write_that_depends_on_nothing_read_needs_no_take_over(guarded: Guarded) -> None:
    with suppress(LockLost), guarded.hold() as old:
        guarded.steal()
        with guarded.hold() as new:
            assert guarded.overwrite(new, 2)
        assert not guarded.overwrite(old, 1)
    assert guarded.read() == 2


def test_who_lost_the_lock_before_its_number_was_taken_does_not_enter_the_block(guarded: Guarded) -> None:
    fences: list[int] = []

    def another_holder() -> None:
        guarded.steal()
        with guarded.hold() as fence:
            fences.append(fence)

    guarded.before_number.append(another_holder)
    with pytest.raises(LockLost, match="before it was used"), guarded.hold():
        raise AssertionError("the lock is somebody else's")
    with guarded.hold() as fence:
        assert fence > fences[0]


def test_the_error_of_the_block_is_told_also_when_the_lock_was_lost(guarded: Guarded) -> None:
    def fail() -> None:
        with guarded.hold():
            guarded.steal()
            raise Boom

    with pytest.raises(Boom):
        fail()
    with guarded.hold(0):
        pass


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from(["well", "badly"])), max_size=8))
def test_numbers_grow_for_each_name_by_itself(
    guarded: Guarded, unique: str, steps: list[tuple[str, str]]
) -> None:
    last: dict[str, int] = {}
    for name in "ab":
        with guarded.hold(0, f"{unique} {name}") as fence:
            last[name] = fence
    for name, ends in steps:
        with suppress(Boom), guarded.hold(0, f"{unique} {name}") as fence:
            assert fence == last[name] + 1
            last[name] = fence
            if ends == "badly":
                raise Boom


@on(("postgres", "psycopg"))
def test_a_holder_keeps_vacuum_from_nothing(shop: Shop, unique: str) -> None:
    query = text(
        "SELECT backend_xid IS NULL AND backend_xmin IS NULL FROM pg_stat_activity JOIN pg_locks USING (pid) "
        "WHERE locktype = 'advisory' AND datname = current_database()"
    )
    with locks.hold(shop.engine, unique), shop.engine.connect() as connection:
        assert connection.scalars(query).all() == [True]


@on(("postgres", "psycopg"), ("mariadb", "pymysql"))
@pytest.mark.parametrize("level", ["AUTOCOMMIT", "REPEATABLE READ", "SERIALIZABLE"])
def test_the_isolation_level_of_the_engine_changes_nothing(shop: Shop, unique: str, level: Any) -> None:
    engine = shop.new_engine(isolation_level=level)
    assert isinstance(engine, Engine)
    with locks.hold(engine, unique) as first, pytest.raises(LockTimeout), locks.hold(engine, unique, wait=0):
        raise AssertionError("two holders")
    with locks.hold(engine, unique, wait=0) as second:
        assert second == first + 1
    engine.dispose()


@on(("postgres", "psycopg"), ("mariadb", "pymysql"))
def test_a_pooled_connection_is_used_again_and_keeps_no_lock(shop: Shop, unique: str) -> None:
    engine = shop.new_engine()
    assert isinstance(engine, Engine)
    made: list[object] = []
    event.listen(engine, "connect", lambda connection, _: made.append(connection))
    with locks.hold(shop.engine, unique):
        for _ in range(3):
            with suppress(LockTimeout), locks.hold(engine, unique, wait=0):
                raise AssertionError("two holders")
    for _ in range(3):
        with suppress(Boom), locks.hold(engine, unique, wait=0):
            raise Boom
        with locks.hold(shop.engine, unique, wait=0):
            pass
    assert len(made) <= 2
    engine.dispose()


@on(("sqlite", "pysqlite"))
def test_on_sqlite_begin_immediate_is_the_lock(shop: Shop) -> None:
    with pytest.raises(SetupError, match="BEGIN IMMEDIATE"), locks.hold(shop.engine, "x"):
        raise AssertionError("no lock")
    fresh(shop.engine)

    def work(_: int) -> None:
        with shop.engine.connect() as connection, drivers.begin(connection):
            value = connection.scalars(select(state.c.value)).one()
            connection.execute(update(state).values(value=value + 1))

    with ThreadPoolExecutor(32) as pool:
        list(pool.map(work, range(32)))
    with shop.engine.connect() as connection:
        assert connection.scalars(select(state.c.value)).one() == 32


@on(("postgres", "psycopg"))
def test_bad_arguments_are_refused_and_named(shop: Shop) -> None:
    wrong: Any
    for wrong in ("", "x" * 256, None, 7):
        with pytest.raises(SetupError, match="name="), locks.hold(shop.engine, wrong):
            raise AssertionError("no lock")
    for wrong in (-1, "1", True, 3601, None, float("nan")):
        with pytest.raises(SetupError, match="wait="), locks.hold(shop.engine, "x", wait=wrong):
            raise AssertionError("no lock")
    with shop.engine.connect() as connection:
        for wrong in (connection, None, "postgresql://"):
            with pytest.raises(SetupError, match="sync Engine"), locks.hold(wrong, "x"):
                raise AssertionError("no lock")
    for wrong in (None, 7):
        with pytest.raises(SetupError, match="redis-py"), redis_locks.hold(wrong):
            raise AssertionError("no lock")
    forever = redis.Redis().lock("x")
    with pytest.raises(SetupError, match="no timeout"), redis_locks.hold(forever):
        raise AssertionError("no lock")


@pytest.mark.parametrize("database_url", ["postgres", "mariadb"], indirect=True)
def test_missing_tables_are_named(database_url: URL) -> None:
    engine = create_engine(database_url)
    for _ in range(2):  # and the lock is free again
        with pytest.raises(SchemaError, match="idemq db upgrade"), locks.hold(engine, "x", wait=0):
            raise AssertionError("no lock")
    engine.dispose()


def test_locks_of_asyncio_clients(redis_url: str, unique: str) -> None:
    fences: list[int] = []
    inside: list[int] = []

    async def run() -> None:
        async with redis.asyncio.Redis.from_url(redis_url) as client:

            async def work(number: int, wait: float = PATIENCE) -> None:
                lock = client.lock(unique, timeout=600, blocking_timeout=wait, sleep=0.005)
                async with redis_locks.hold_async(lock) as fence:
                    inside.append(number)
                    await client.ping()
                    assert inside == [number]
                    inside.remove(number)
                    fences.append(fence)

            await asyncio.gather(*(work(number) for number in range(16)))

            async def lose() -> None:
                async with redis_locks.hold_async(client.lock(unique, timeout=600)):
                    with pytest.raises(LockTimeout):
                        await work(1, wait=0)
                    await client.delete(unique)

            async def fail() -> None:
                async with redis_locks.hold_async(client.lock(unique, timeout=600)):
                    raise Boom

            with pytest.raises(LockLost):
                await lose()
            with pytest.raises(Boom):
                await fail()
            await work(2, wait=0)
            await client.delete(f"{unique}:fence")

    asyncio.run(run())
    assert fences == sorted(set(fences))


def test_a_redis_lock_is_extended_while_it_is_held(redis_url: str, unique: str) -> None:
    with redis.Redis.from_url(redis_url) as client:
        lock = client.lock(unique, timeout=60, blocking_timeout=0)
        with redis_locks.hold(lock):
            lock.extend(600, replace_ttl=True)
            assert client.pttl(unique) > 60_000
        assert not client.exists(unique)
        client.delete(f"{unique}:fence")


def test_without_redis_py_the_extra_is_named_and_nothing_else_needs_it() -> None:
    script = """
import sys
sys.modules["redis"] = None
import idemq, idemq.tokens, idemq.locks, idemq.redis_tokens
try:
    import idemq.redis_locks
except idemq.SetupError as error:
    print(error)
"""
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert told.stdout == 'Redis needs redis-py: pip install "idemq[redis]"\n'
