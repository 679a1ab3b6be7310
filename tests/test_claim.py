"""The bare claim; ids of every shape; many callers with the same id; and what the types say."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any, assert_type
from uuid import UUID

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sqlalchemy import URL, Connection, Engine, create_engine, insert, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import (
    AsyncConnection,
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from idemq import (
    BrokeTransaction,
    Conflict,
    InFlight,
    Message,
    NoId,
    NotSettled,
    SchemaError,
    SetupError,
    claim,
    once,
)
from idemq.inplace import InPlace
from idemq.message import Ack, Release, key_of
from idemq.work import AsyncEngineWork, EngineWork, Work
from tests.once_tools import ASYNC, SYNC, Caller, Effect, caller, databases, effects, on, prepared
from tests.proxy import Side, proxy

__all__ = ["caller", "databases"]

PLAIN = [(kind, f"{driver} connection") for kind, driver in SYNC]
PLAIN_ASYNC = [(kind, f"{driver} async connection") for kind, driver in ASYNC]


@on(*PLAIN)
def test_claim_says_whether_the_id_is_new_in_the_callers_transaction(caller: Caller) -> None:
    with caller.engine.connect() as connection:
        assert claim(connection, "shop", "1", body=b"x")
        connection.rollback()
        assert claim(connection, "shop", "1", body=b"x")
        connection.execute(insert(effects).values(mark="one"))
        connection.commit()
        assert not claim(connection, "shop", "1", body=b"x")
        assert claim(connection, "shop", "2")
        with pytest.raises(Conflict):
            claim(connection, "shop", "1", body=b"y")
        connection.execute(insert(effects).values(mark="two"))  # the transaction is usable after all of them
        assert not claim(connection, "shop", "2")
        connection.commit()
    assert (caller.effects(), caller.claims()) == (["one", "two"], 2)


@on(*[(kind, how) for kind, how in PLAIN if kind != "sqlite"])
def test_claim_leaves_the_transaction_usable_when_a_twin_is_in_flight(caller: Caller) -> None:
    with caller.engine.connect() as first, caller.engine.connect() as second:
        assert claim(first, "warm", "0")
        first.commit()
        assert claim(first, "warm", "1")
        second.execute(insert(effects).values(mark="kept"))
        with pytest.raises(InFlight):
            claim(second, "warm", "1", wait=0.05)
        if caller.engine.dialect.name == "postgresql":
            assert second.scalar(text("SHOW lock_timeout")) == "0"
        second.commit()
        first.rollback()
    assert caller.effects() == ["kept"]


@on(*PLAIN_ASYNC)
def test_claim_is_reached_through_run_sync(caller: Caller) -> None:
    async def main(engine: Any) -> list[bool]:
        answers = []
        for _ in range(2):
            async with engine.begin() as connection:
                answers.append(await connection.run_sync(claim, "shop", "1", body=b"x"))
        return answers

    assert caller.runner is not None
    assert caller.runner.run(main(caller.tested)) == [True, False]


@pytest.mark.hazard("H56")
@on(*PLAIN)
def test_claim_names_missing_tables_and_leaves_the_transaction_usable(caller: Caller) -> None:
    with caller.engine.connect() as connection:
        connection.execute(insert(effects).values(mark="kept"))
        with pytest.raises(SchemaError, match="`idemq db upgrade APP`"):
            claim(connection, "shop", "1", schema="nowhere")
        connection.commit()
    assert caller.effects() == ["kept"]


def test_claim_wants_a_connection() -> None:
    target: Any = Session()
    with pytest.raises(SetupError, match=r"not Session; of a Session give session\.connection\(\)"):
        claim(target, "shop", "1")


def test_claim_gives_the_permission_of_the_strict_trigger_at_once(postgres_url: URL) -> None:
    with prepared(postgres_url, strict=True) as engine, engine.connect() as connection:
        assert claim(connection, "shop", "1")
        connection.commit()
        assert not claim(connection, "shop", "1")


#: Ids that some collation, padding or truncation holds to be equal.
PAIRS = [
    ("Order-abc", "Order-ABC"),
    ("Order-abc", "Order-abc "),
    ("abc", "ábc"),
    ("é", "e\u0301"),
    ("ß", "ss"),
    ("K", "\u212a"),
    ("😀", "😁"),
    ("a\u200bb", "ab"),
    ("a\x00", "a"),
    ("a\t", "a"),
    ("x" * 256, "x" * 257),
    ("x" * 1000, "x" * 1000 + "y"),
    ("\ud800", "\ud801"),
    ("\udc80", "\x80"),
    ("1", "01"),
    ("6F9619FF-8B86-D011-B42D-00CF4FC964FF", "6f9619ff-8b86-d011-b42d-00cf4fc964ff"),
]


@pytest.mark.hazard("H5")
@pytest.mark.hazard("H6")
@on(*PLAIN)
def test_ids_that_differ_in_any_byte_are_different(caller: Caller) -> None:
    for first, second in PAIRS:
        for identifier in (first, second):
            with caller.engine.begin() as connection:
                claim(connection, "shop", identifier)
    assert caller.claims() == len({each for pair in PAIRS for each in pair})


@pytest.mark.hazard("H25")
@on(*PLAIN)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(identifier=st.one_of(st.text(st.characters(), max_size=2000), st.binary(max_size=1500)))
@example(identifier="\x00")
@example(identifier="\ud83d")
@example(identifier=b"\xff\x00")
@example(identifier="")
@example(identifier="a" * 1024)
@example(identifier="a" * 1025)
@example(identifier="é" * 512)
@example(identifier="é" * 513)
def test_every_id_is_either_claimed_once_or_refused(caller: Caller, identifier: Any) -> None:
    with caller.engine.begin() as connection:
        connection.execute(text("DELETE FROM idemq_processed"))
    raw = identifier if isinstance(identifier, bytes) else identifier.encode("utf-8", "surrogatepass")
    answers: list[Any] = []
    for _ in range(2):
        try:
            with once(caller.engine, "shop", identifier) as work:
                answers.append(work.fresh)
        except NoId:
            answers.append("refused")
    if isinstance(identifier, str):
        allowed = 0 < len(raw) <= 1024
        assert answers == ([True, False] if allowed else ["refused", "refused"])
    assert answers in ([True, False], ["refused", "refused"])


@on(("sqlite", "pysqlite engine"))
def test_an_id_may_be_a_text_a_uuid_or_a_number(caller: Caller) -> None:
    value = UUID("018f4e2a-0000-7000-8000-000000000000")
    for identifier in (value, str(value), 7, "7"):
        with once(caller.engine, "shop", identifier):
            pass
    assert caller.claims() == 2
    assert key_of(str(value)) == value.bytes


ISOLATED = [
    (kind, f"{driver} {target}", level)
    for kind, driver, level in [
        ("postgres", "psycopg", "READ COMMITTED"),
        ("postgres", "psycopg", "REPEATABLE READ"),
        ("postgres", "psycopg", "SERIALIZABLE"),
        ("mariadb", "pymysql", "READ COMMITTED"),
        ("mariadb", "pymysql", "REPEATABLE READ"),
        ("mariadb", "pymysql", "SERIALIZABLE"),
        ("mysql", "pymysql", "REPEATABLE READ"),
        ("sqlite", "pysqlite", "SERIALIZABLE"),
    ]
    for target in ("engine", "session open")
]


@pytest.mark.hazard("H29")
@pytest.mark.parametrize(("kind", "how", "level"), ISOLATED, ids=lambda value: str(value).replace(" ", "-"))
def test_of_many_callers_with_one_id_exactly_one_has_an_effect(caller: Caller, level: str) -> None:
    caller.tested.dispose()
    engine = create_engine(caller.engine.url, isolation_level=level, pool_size=8)
    if caller.engine.dialect.name == "sqlite":
        engine = caller.engine
    with once(caller.engine, "shop", "the name is known"):
        pass
    for number in range(5):
        start = Barrier(8)

        def call(start: Barrier = start, identifier: str = f"id {number}") -> bool:
            start.wait()
            while True:
                try:
                    return _one_call(engine, caller.how, identifier)
                except (DBAPIError, InFlight):
                    pass  # a serialization failure, or a wait that ran out: nothing was done, so again

        with ThreadPoolExecutor(8) as pool:
            fresh = [pool.submit(call) for _ in range(8)]
            assert sorted(each.result() for each in fresh) == [False] * 7 + [True]
    assert sorted(caller.effects()) == [f"id {number}" for number in range(5)]
    assert caller.claims() == 6
    engine.dispose()


def _one_call(engine: Engine, how: str, identifier: str) -> bool:
    if how.endswith("engine"):
        with once(engine, "shop", identifier) as work:
            if work.fresh:
                work.session.add(Effect(mark=identifier))
        return work.fresh
    with Session(engine) as session:
        session.scalars(select(Effect)).all()  # a snapshot from before the claim
        with once(session, "shop", identifier) as lent:
            if lent.fresh:
                session.add(Effect(mark=identifier))
        session.commit()
    return lent.fresh


@on(*PLAIN)
def test_a_new_name_that_many_use_at_once_gets_one_number(caller: Caller) -> None:
    name = f"name {caller.how}"
    start = Barrier(6)

    def call(number: int) -> None:
        start.wait()
        with once(caller.engine, name, str(number)):
            pass

    with ThreadPoolExecutor(6) as pool:
        for each in [pool.submit(call, number) for number in range(6)]:
            each.result()
    with caller.engine.connect() as connection:
        query = text("SELECT count(DISTINCT consumer), count(*) FROM idemq_processed")
        assert tuple(connection.execute(query).one()) == (1, 6)


def test_a_block_inside_a_handler_is_part_of_the_handlers_transaction(postgres_url: URL) -> None:
    def handler(message: Message, session: Session, connection: Connection) -> None:
        for identifier in ("a", "b", "a"):
            with once(session, "inner", identifier) as work:
                if work.fresh:
                    session.add(Effect(mark=identifier))
        with once(connection, "inner", "c") as work:
            connection.execute(insert(effects).values(mark="c"))
        try:
            with once(session, "inner", "bad") as work:
                session.add(Effect(mark="bad"))
                raise OSError
        except OSError:
            pass
        if message.id == "fails":
            raise OSError("away")

    with prepared(postgres_url) as engine:
        place = InPlace(handler, engine, "shop", give_up=0)
        assert isinstance(place._attempt(place._consumer.job(Message(id="fails", body=b""))), Release)
        with engine.connect() as connection:
            assert list(connection.scalars(select(effects.c.mark))) == []
        assert place.run(Message(id="1", body=b"")) == Ack()
        with engine.connect() as connection:
            assert sorted(connection.scalars(select(effects.c.mark))) == ["a", "b", "c"]
        place.close()


def test_a_block_inside_an_async_handler_is_part_of_its_transaction(postgres_url: URL) -> None:
    async def handler(message: Message, session: AsyncSession) -> None:
        for identifier in ("a", "b", "a"):
            async with once(session, "inner", identifier) as work:
                if work.fresh:
                    session.add(Effect(mark=identifier))
        try:
            async with once(session, "inner", "bad"):
                session.add(Effect(mark="bad"))
                raise OSError
        except OSError:
            pass
        async with once(session, "inner", "sin"):
            if message.id == "sins":
                try:
                    await (await session.connection()).commit()
                except BrokeTransaction:
                    pass

    async def main() -> None:
        engine = create_async_engine(postgres_url.set(drivername="postgresql+asyncpg"))
        place = InPlace(handler, engine, "shop", give_up=0)
        with pytest.raises(NotSettled, match="BrokeTransaction"):
            await place.run_async(Message(id="sins", body=b""))
        assert await place.run_async(Message(id="1", body=b"")) == Ack()
        await place.close_async()
        await engine.dispose()

    with prepared(postgres_url) as engine:
        asyncio.run(main())
        with engine.connect() as connection:
            assert sorted(connection.scalars(select(effects.c.mark))) == ["a", "b"]


def test_scoped_sessions_are_sessions(postgres_url: URL) -> None:
    async def main() -> bool:
        engine = create_async_engine(postgres_url)
        registry = async_scoped_session(async_sessionmaker(engine), scopefunc=asyncio.current_task)
        async with once(registry, "shop", "2") as work:
            registry.add(Effect(mark="2"))
        await registry.commit()
        await registry.remove()
        await engine.dispose()
        return work.fresh

    with prepared(postgres_url) as engine:
        registry = scoped_session(sessionmaker(engine))
        with once(registry, "shop", "1") as work:
            assert work.fresh
            registry.add(Effect(mark="1"))
        registry.commit()
        registry.remove()
        assert asyncio.run(main())
        with engine.connect() as connection:
            assert list(connection.scalars(select(effects.c.mark))) == ["1", "2"]


def types_are_told_by_the_target(
    sync: Engine | None, others: tuple[Session, Connection, AsyncEngine, AsyncSession, AsyncConnection]
) -> Callable[[], Any]:
    """Never called: mypy reads it."""
    session, connection, async_engine, async_session, async_connection = others
    assert sync is not None
    with once(sync, "shop", "1") as work:
        assert_type(work, EngineWork)
        assert_type(work.session, Session)
        assert_type(work.connection, Connection)
        assert_type(work.fresh, bool)
    with once(session, "shop", "1") as lent:
        assert_type(lent, Work)
    with once(connection, "shop", "1", body="x", wait=1, schema="s", strict=True) as lent:
        assert_type(lent, Work)

    async def asynchronous() -> None:
        async with once(async_engine, "shop", "1") as own:
            assert_type(own, AsyncEngineWork)
            assert_type(own.session, AsyncSession)
            assert_type(own.connection, AsyncConnection)
        async with once(async_session, "shop", UUID(int=1)) as lent:
            assert_type(lent, Work)
        async with once(async_connection, "shop", 1) as lent:
            assert_type(lent, Work)

    return asynchronous


@pytest.mark.hazard("H12")
@pytest.mark.parametrize("lost", ["request", "reply"])
@pytest.mark.parametrize("kind", ["postgres", "mariadb"])
def test_a_doubt_at_the_commit_is_an_exception_and_the_next_call_finds_out(
    databases: Callable[[str], tuple[URL, Engine]], kind: str, lost: Side
) -> None:
    url, direct = databases(kind)
    assert url.host is not None
    assert url.port is not None
    with proxy(url.host, url.port) as between:
        engine = create_engine(url.set(host="127.0.0.1", port=between.port))
        with once(engine, f"shop {lost}", "the name is known"):
            pass
        answers: list[Any] = []
        for _ in range(3):
            try:
                with once(engine, f"shop {lost}", "1") as work:
                    if work.fresh:
                        work.session.execute(insert(effects).values(mark=f"{kind} {lost}"))
                    if not answers:
                        between.cut(b"COMMIT", lost)
                answers.append(work.fresh)
            except DBAPIError:
                answers.append("doubt")
        engine.dispose()
    assert answers == ["doubt", lost == "request", False]
    with direct.connect() as connection:
        assert list(connection.scalars(select(effects.c.mark))).count(f"{kind} {lost}") == 1
