"""What a `once` block may not do, over every kind of target: it is refused, and nothing is lost or kept."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from sqlalchemy import Connection, create_engine, insert, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session
from sqlalchemy.pool import StaticPool

from idemq import BrokeTransaction, SetupError, once
from idemq.work import Work
from tests.once_tools import (
    BORROWED,
    EVERY,
    SYNC,
    Base,
    Caller,
    Do,
    Effect,
    caller,
    databases,
    effects,
    make_caller,
    mark,
    on,
    prepared,
)

__all__ = ["caller", "databases"]

SESSIONS = [(kind, how) for kind, how in BORROWED if "session" in how]


def sin(what: Any, *, swallowed: bool) -> Do:
    """Work, the sin, and more work."""

    def do(work: Work, connection: Connection, session: Session | None) -> None:
        mark("before")(work, connection, session)
        if session is not None:
            session.flush()
        try:
            what(connection, session)
        except Exception:
            if not swallowed:
                raise
        try:
            mark("after")(work, connection, session)
        except Exception:
            pass  # the connection may be gone

    return do


def _commit(connection: Connection, session: Session | None) -> None:
    connection.commit()


def _session_commit(connection: Connection, session: Session | None) -> None:
    assert session is not None
    session.commit()


def _rollback(connection: Connection, session: Session | None) -> None:
    (session or connection).rollback()


def _transaction_commit(connection: Connection, session: Session | None) -> None:
    transaction = connection.get_transaction()
    assert transaction is not None
    transaction.commit()


def _raw_commit(connection: Connection, session: Session | None) -> None:
    connection.execute(text("/* quick */ COMMIT"))


def _close(connection: Connection, session: Session | None) -> None:
    (session or connection).close()


def _close_connection(connection: Connection, session: Session | None) -> None:
    connection.close()


def _own_savepoint(connection: Connection, session: Session | None) -> None:
    if session is not None:
        nested = session.get_nested_transaction()
        assert nested is not None
        nested.commit()
    else:
        inner = connection.get_nested_transaction()
        assert inner is not None
        inner.rollback()


@pytest.mark.hazard("H3")
@pytest.mark.parametrize("swallowed", [False, True], ids=["raised", "swallowed"])
@pytest.mark.parametrize("what", [_commit, _rollback, _transaction_commit, _raw_commit, _close])
@on(*BORROWED)
def test_a_block_in_the_callers_transaction_may_not_end_it(
    caller: Caller, what: Any, swallowed: bool
) -> None:
    with pytest.raises(BrokeTransaction):
        caller("1", sin(what, swallowed=swallowed))
    assert (caller.effects(), caller.claims()) == ([], 0)
    assert caller("1") == (True, None)
    assert caller.effects() == ["effect"]


@pytest.mark.hazard("H3")
@pytest.mark.parametrize("what", [_commit, _rollback, _transaction_commit, _raw_commit, _close_connection])
@on(*[(kind, how) for kind, how in EVERY if how.endswith("engine")])
def test_a_block_with_its_own_transaction_may_not_end_it(caller: Caller, what: Any) -> None:
    with pytest.raises(BrokeTransaction):
        caller("1", sin(what, swallowed=True))
    assert (caller.effects(), caller.claims()) == ([], 0)
    assert caller("1") == (True, None)


@pytest.mark.hazard("H3")
@on(*BORROWED)
def test_a_refusal_that_is_turned_into_another_error_loses_nothing(caller: Caller) -> None:
    def do(work: Work, connection: Connection, session: Session | None) -> None:
        mark("before")(work, connection, session)
        if session is not None:
            session.flush()
        try:
            _transaction_commit(connection, session)
        except BrokeTransaction:
            raise OSError("something else") from None

    with pytest.raises(OSError, match="something else"):
        caller("1", do)
    assert (caller.effects(), caller.claims()) == ([], 0)
    assert caller("1") == (True, None)


@pytest.mark.hazard("H3")
@on(*SESSIONS)
def test_a_swallowed_refusal_of_session_commit_still_loses_nothing(caller: Caller) -> None:
    with pytest.raises(BrokeTransaction, match="may not commit the session"):
        caller("1", sin(_session_commit, swallowed=True))
    assert (caller.effects(), caller.claims()) == ([], 0)
    assert caller("1") == (True, None)


@on(*[(kind, how) for kind, how in EVERY if how.endswith("engine")])
def test_a_commit_of_the_sessions_own_only_flushes(caller: Caller) -> None:
    caller("1", sin(_session_commit, swallowed=False))
    assert (caller.effects(), caller.claims()) == (["before", "after"], 1)


@on(*[(kind, how) for kind, how in BORROWED if how.endswith("open")])
def test_a_block_that_ends_its_own_savepoint_rolls_everything_back(caller: Caller) -> None:
    with pytest.raises(BrokeTransaction):
        caller("1", sin(_own_savepoint, swallowed=True))
    assert (caller.effects(), caller.claims()) == ([], 0)


@on()
def test_savepoints_of_the_blocks_own_are_welcome(caller: Caller) -> None:
    def do(work: Work, connection: Connection, session: Session | None) -> None:
        target = session or connection
        with target.begin_nested():
            mark("kept")(work, connection, session)
        undone = target.begin_nested()
        mark("undone")(work, connection, session)
        undone.rollback()
        target.begin_nested()
        mark("left open")(work, connection, session)

    caller("1", do)
    assert (caller.effects(), caller.claims()) == (["kept", "left open"], 1)


@pytest.mark.hazard("H2")
@on(*[(kind, how) for kind, how in EVERY if kind == "postgres"])
def test_a_swallowed_database_error_is_noticed(caller: Caller) -> None:
    def swallow(connection: Connection, session: Session | None) -> None:
        with pytest.raises(DBAPIError):
            connection.execute(text("SELECT 1/0"))

    with pytest.raises((BrokeTransaction, DBAPIError), match=r"swallowed|aborted"):
        caller("1", sin(swallow, swallowed=True))
    assert (caller.effects(), caller.claims()) == ([], 0)
    assert caller("1") == (True, None)


@pytest.mark.hazard("H2")
@on(*[(kind, how) for kind, how in EVERY if "session" in how or how.endswith("engine")])
def test_a_swallowed_flush_error_is_noticed(caller: Caller) -> None:
    def do(work: Work, connection: Connection, session: Session | None) -> None:
        assert session is not None
        session.add_all([Effect(mark="same"), Effect(mark="same")])
        try:
            session.flush()
        except DBAPIError:
            pass

    with pytest.raises(BrokeTransaction):
        caller("1", do)
    assert (caller.effects(), caller.claims()) == ([], 0)


@pytest.mark.hazard("H3")
@on(*[(kind, how) for kind, how in EVERY if kind in ("mariadb", "mysql")])
def test_a_statement_that_commits_by_itself_is_refused(caller: Caller) -> None:
    def ddl(connection: Connection, session: Session | None) -> None:
        connection.execute(text("CREATE TABLE sin (n int)"))

    with pytest.raises(BrokeTransaction, match="was not sent"):
        caller("1", sin(ddl, swallowed=True))
    assert (caller.effects(), caller.claims()) == ([], 0)


@on(("sqlite", "pysqlite session"), ("postgres", "asyncpg async session open"))
def test_a_session_that_writes_on_a_second_engine_is_refused(caller: Caller) -> None:
    other = create_engine("sqlite://", poolclass=StaticPool)
    Base.metadata.create_all(other)

    def elsewhere(connection: Connection, session: Session | None) -> None:
        assert session is not None
        session.execute(insert(effects).values(mark="elsewhere"), bind_arguments={"bind": other})

    with pytest.raises(BrokeTransaction, match="second connection"):
        caller("1", sin(elsewhere, swallowed=True))
    assert (caller.effects(), caller.claims()) == ([], 0)
    other.dispose()


@on(*[(kind, f"{driver} connection open") for kind, driver in SYNC])
def test_the_callers_connection_is_left_as_it_was(caller: Caller) -> None:
    class Boom(Exception):
        pass

    with caller.engine.connect() as connection:
        raw: Any = connection.connection.driver_connection
        fairy: Any = connection.connection.dbapi_connection
        before = [dict(getattr(each, "__dict__", {})) for each in (connection, raw, fairy)]
        for identifier, error in (("1", None), ("2", Boom), ("1", None)):
            connection.begin()
            try:
                with once(connection, "shop", identifier):
                    if error is not None:
                        raise error
            except Boom:
                pass
            connection.commit()
        for each, was in zip((connection, raw, fairy), before, strict=True):
            now = getattr(each, "__dict__", {})
            assert not {"commit", "rollback", "close"} & (now.keys() - was.keys())
        assert list(connection.dispatch.commit) == []
        assert list(connection.dispatch.before_cursor_execute) == []
        connection.execute(text("SELECT 1"))
    assert caller.claims() == 1


@pytest.mark.parametrize(
    "level", [{"isolation_level": "AUTOCOMMIT"}, {}], ids=["SQLAlchemy's", "the driver's"]
)
@pytest.mark.hazard("H4")
@on(*[(kind, how) for kind, how in EVERY if how.endswith(("engine", "connection", "session"))])
def test_autocommit_is_refused(caller: Caller, level: dict[str, Any]) -> None:
    if not level and ("sqlite" in caller.how or "asyncpg" in caller.how):
        pytest.skip("has no such argument")
    options = level or {"connect_args": {"autocommit": True}}
    careless = make_caller(caller.url, caller.how, caller.engine, **options)
    try:
        with pytest.raises(SetupError, match=r"(?i)autocommit"):
            careless("1")
    finally:
        careless.close()
    assert caller.claims() == 0


def test_a_pool_that_gives_everybody_one_connection_is_refused() -> None:
    engine = create_engine("sqlite://", poolclass=StaticPool)
    with pytest.raises(SetupError, match="StaticPool"), once(engine, "shop", "1"):
        pass
    engine.dispose()


@pytest.mark.parametrize("kind", ["session", "connection"])
@pytest.mark.parametrize("swallowed", [False, True])
def test_a_block_under_the_strict_trigger_gets_its_permission_at_its_end(
    postgres_url: Any, kind: str, swallowed: bool
) -> None:
    with prepared(postgres_url, strict=True) as engine:
        caller = make_caller(postgres_url, f"psycopg {kind}", engine)
        assert caller("1") == (True, None)
        assert caller("1") == (False, None)

        def early(work: Work, connection: Connection, session: Session | None) -> None:
            mark("early")(work, connection, session)
            if session is not None:
                session.flush()
            raw: Any = connection.connection.driver_connection
            raw.pgconn.exec_(b"COMMIT")  # past every guard in this process

        def second(work: Work, connection: Connection, session: Session | None) -> None:
            with once(session or connection, "shop", "inner"):
                pass
            early(work, connection, session)

        for do in (early, second):
            with pytest.raises(BrokeTransaction):
                caller("2", do)
        assert (caller.effects(), caller.claims()) == (["effect"], 1)
        caller.close()


def test_the_async_engine_is_left_without_open_transactions_by_a_cancelled_block(postgres_url: Any) -> None:
    async def cancelled(engine: Any) -> None:
        inside = asyncio.Event()

        async def block() -> None:
            async with once(engine, "shop", "1") as work:
                await work.session.execute(insert(effects).values(mark="never"))
                inside.set()
                await asyncio.sleep(3600)

        task = asyncio.create_task(block())
        await inside.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert engine.pool.checkedout() == 0

    with prepared(postgres_url) as engine:
        caller = make_caller(postgres_url, "asyncpg async engine", engine)
        assert caller.runner is not None
        caller.runner.run(cancelled(caller.tested))
        assert (caller.effects(), caller.claims()) == ([], 0)
        assert caller("1") == (True, None)
        caller.close()
