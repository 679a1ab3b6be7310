"""`once` over every kind of target. What its guard refuses is in `test_once_sins`, ids in `test_claim`."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import Connection, create_engine, event, insert, select, text
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.orm import Session

from idemq import Conflict, InFlight, NoId, SchemaError, SetupError, once
from idemq.work import Work
from tests.once_tools import BORROWED, EVERY, Caller, Effect, caller, databases, effects, mark, on

__all__ = ["caller", "databases"]


class Boom(Exception):
    """What a block raises on purpose."""


@pytest.mark.situation(3)
@pytest.mark.pattern("dedup-table")
@pytest.mark.pattern("result-cache")
@on()
def test_the_work_is_done_once_and_both_calls_get_the_first_answer(caller: Caller) -> None:
    def do(work: Work, connection: Connection, session: Session | None) -> None:
        mark()(work, connection, session)
        work.result = {"status": "accepted", "at": (1, 2)}

    first = caller("1", do, body=b"x")
    second = caller("1", do, body="x")
    assert first == (True, {"status": "accepted", "at": [1, 2]})
    assert second == (False, first[1])
    assert (caller.effects(), caller.claims()) == (["effect"], 1)


@on()
def test_an_exception_undoes_claim_and_work_together(caller: Caller) -> None:
    def do(work: Work, connection: Connection, session: Session | None) -> None:
        mark()(work, connection, session)
        work.result = "never"
        if session is not None:
            session.flush()
        raise Boom

    with pytest.raises(Boom):
        caller("1", do)
    assert (caller.effects(), caller.claims()) == ([], 0)
    assert caller("1") == (True, None)
    assert caller.effects() == ["effect"]


@on()
def test_a_failed_flush_at_the_end_of_the_block_undoes_both(caller: Caller) -> None:
    def twice(work: Work, connection: Connection, session: Session | None) -> None:
        mark("same")(work, connection, session)
        mark("same")(work, connection, session)

    with pytest.raises(Exception, match=r"(?i)unique|duplicate"):
        caller("1", twice)
    assert (caller.effects(), caller.claims()) == ([], 0)
    assert caller("1") == (True, None)


@pytest.mark.situation(3)
@pytest.mark.pattern("global-id")
@on()
def test_the_same_id_with_another_body_is_a_conflict_and_changes_nothing(caller: Caller) -> None:
    caller("1", body=b"x")
    with pytest.raises(Conflict):
        caller("1", mark("other"), body=b"y")
    assert caller("1", mark("other")) == (False, None)  # without a body nothing is compared
    assert (caller.effects(), caller.claims()) == (["effect"], 1)


@on(*[(kind, how) for kind, how in EVERY if kind != "sqlite"])
def test_a_twin_in_flight_is_waited_for_and_then_named(caller: Caller) -> None:
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with once(caller.engine, "shop", "1", wait=30) as work:
            work.session.execute(insert(effects).values(mark="twin"))
            inside.set()
            assert leave.wait(90)

    with ThreadPoolExecutor(1) as pool:
        twin = pool.submit(hold)
        assert inside.wait(90)
        with pytest.raises(InFlight):
            caller("1", wait=0.05)
        leave.set()
        assert caller("1", wait=30) == (False, None)
        twin.result()
    assert caller.effects() == ["twin"]


@on(*[(kind, how) for kind, how in EVERY if kind == "sqlite"])
def test_on_sqlite_any_other_writer_may_be_the_twin_when_its_lock_is_waited_for_too_long(
    caller: Caller,
) -> None:
    tested = caller.tested.sync_engine if isinstance(caller.tested, AsyncEngine) else caller.tested
    event.listen(tested, "connect", lambda connection, _: connection.execute("PRAGMA busy_timeout = 50"))
    with once(caller.engine, "shop", "1") as work:
        work.session.execute(insert(effects).values(mark="twin"))
        with pytest.raises(InFlight, match="SQLite") as raised:
            caller("1")
        assert isinstance(raised.value.__cause__, OperationalError)
    assert caller("1") == (False, None)
    assert caller.effects() == ["twin"]


@on(("sqlite", "pysqlite engine"))
def test_on_sqlite_a_lock_in_a_transaction_that_was_begun_for_reading_is_in_flight_too(
    caller: Caller,
) -> None:
    with caller.engine.connect() as reader:
        reader.exec_driver_sql("PRAGMA busy_timeout = 50")
        reader.exec_driver_sql("BEGIN")
        reader.execute(select(effects.c.mark)).all()
        with once(caller.engine, "shop", "1"), pytest.raises(InFlight), once(reader, "shop", "1"):
            pass
    assert caller("1") == (False, None)


@on(*BORROWED)
def test_what_the_caller_did_before_the_block_is_not_touched_by_a_failing_block(caller: Caller) -> None:
    def before(work: Work, connection: Connection, session: Session | None) -> None:
        try:
            with once(session or connection, "inner", "1") as inner:
                assert inner.fresh
                mark("inside")(inner, connection, session)
                raise Boom
        except Boom:
            pass
        mark("outside")(work, connection, session)

    assert caller("1", before) == (True, None)
    assert (caller.effects(), caller.claims()) == (["outside"], 1)


@on()
def test_blocks_may_follow_each_other_and_stand_in_each_other_in_one_transaction(caller: Caller) -> None:
    def do(work: Work, connection: Connection, session: Session | None) -> None:
        target = session or connection
        for identifier in ("a", "b", "a"):
            with once(target, "inner", identifier) as inner:
                if inner.fresh:
                    mark(identifier)(inner, connection, session)
                    inner.result = identifier
                    with once(target, "innermost", identifier) as innermost:
                        assert innermost.fresh
                        mark("innermost " + identifier)(inner, connection, session)
            assert inner.result == identifier
        mark()(work, connection, session)

    assert caller("1", do) == (True, None)
    assert caller("1", do) == (False, None)
    assert sorted(caller.effects()) == ["a", "b", "effect", "innermost a", "innermost b"]
    assert caller.claims() == 5


@on()
def test_one_failing_block_of_several_is_undone_alone(caller: Caller) -> None:
    def do(work: Work, connection: Connection, session: Session | None) -> None:
        for identifier in ("a", "bad", "b"):
            try:
                with once(session or connection, "inner", identifier) as inner:
                    mark(identifier)(inner, connection, session)
                    if identifier == "bad":
                        raise Boom
            except Boom:
                pass

    caller("1", do)
    assert caller.effects() == ["a", "b"]
    assert caller.claims() == 3


@on(*[(kind, how) for kind, how in EVERY if how.endswith("engine")])
def test_the_work_of_a_repeat_has_no_transaction_to_be_written_in(caller: Caller) -> None:
    caller("1")
    seen: list[Any] = []

    def unlooked(engine: Any) -> None:
        with once(engine, "shop", "1") as work:
            seen.append(work)
            work.session.add(object())

    async def unlooked_async(engine: Any) -> None:
        async with once(engine, "shop", "1") as work:
            seen.append(work)
            work.session.add(object())

    def call() -> None:
        if caller.runner is None:
            unlooked(caller.tested)
        else:
            caller.runner.run(unlooked_async(caller.tested))

    with pytest.raises(SetupError, match=r"work\.session is there only .* where work\.fresh is true"):
        call()
    assert not seen[0].fresh


@on(("sqlite", "pysqlite engine"), ("postgres", "asyncpg async session"), ("mariadb", "pymysql connection"))
def test_an_answer_that_is_too_long_or_no_json_is_refused_before_the_commit(caller: Caller) -> None:
    def long(work: Work, connection: Connection, session: Session | None) -> None:
        mark()(work, connection, session)
        work.result = "x" * (64 * 1024 - 1)

    def odd(work: Work, connection: Connection, session: Session | None) -> None:
        work.result = object()

    with pytest.raises(ValueError, match="65537 bytes of JSON; at most 65536 are kept"):
        caller("1", long)
    with pytest.raises(TypeError):
        caller("1", odd)
    assert (caller.effects(), caller.claims()) == ([], 0)

    def longest(work: Work, connection: Connection, session: Session | None) -> None:
        work.result = "x" * (64 * 1024 - 2)

    assert caller("1", longest)[0]
    assert len(caller("1", longest)[1]) == 64 * 1024 - 2


@on(("sqlite", "pysqlite session"))
def test_an_answer_can_be_changed_only_where_it_is_stored(caller: Caller) -> None:
    with Session(caller.engine) as session:
        with once(session, "shop", "1") as work:
            work.result = {"seen": 1}
            work.result["seen"] = 2  # a copy: what was stored is what everybody reads
        session.commit()
        for late in (work, *_repeats(session)):
            with pytest.raises(SetupError, match=r"work\.result can be set only inside the block"):
                late.result = 3
            assert late.result == {"seen": 1}


def _repeats(session: Session) -> list[Work]:
    with once(session, "shop", "1") as work:
        return [work]


@pytest.mark.parametrize(
    ("consumer", "identifier", "options", "error", "said"),
    [
        ("", "1", {}, SetupError, "1 to 200 bytes"),
        ("é" * 101, "1", {}, SetupError, "1 to 200 bytes"),
        (7, "1", {}, SetupError, "1 to 200 bytes"),
        ("shop", "1", {"wait": 0}, SetupError, "wait=0"),
        ("shop", "1", {"wait": "2"}, SetupError, "wait='2'"),
        ("shop", "1", {"schema": "a b"}, SetupError, "schema='a b' is no plain identifier"),
        ("shop", "", {}, NoId, "id"),
        ("shop", None, {}, NoId, "id"),
        ("shop", True, {}, NoId, "id"),
        ("shop", "é" * 513, {}, NoId, "1026 bytes"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_happens(
    consumer: Any, identifier: Any, options: dict[str, Any], error: type[Exception], said: str
) -> None:
    engine = create_engine("sqlite:////nowhere/at/all.db")
    with pytest.raises(error, match=said):
        once(engine, consumer, identifier, **options)


def test_a_target_that_is_none_is_named() -> None:
    target: Any = "postgresql://localhost"
    with pytest.raises(SetupError, match="str is no Engine, Session or Connection"):
        once(target, "shop", "1")


@on(("postgres", "psycopg session open"), ("sqlite", "pysqlite engine"))
def test_a_block_may_be_entered_used_and_left_in_different_threads(caller: Caller) -> None:
    """As web frameworks do with a dependency."""
    session = Session(caller.engine)
    block: Any = once(session, "shop", "1") if "session" in caller.how else once(caller.engine, "shop", "1")
    steps = [
        block.__enter__,
        lambda: session.add(Effect(mark="effect")),
        session.flush,
        lambda: block.__exit__(None, None, None),
        session.commit,
        session.close,
    ]
    if "engine" in caller.how:
        work: list[Any] = []
        steps = [
            lambda: work.append(block.__enter__()),
            lambda: work[0].session.add(Effect(mark="effect")),
            lambda: work[0].session.flush(),
            lambda: block.__exit__(None, None, None),
        ]
    for step in steps:
        thread = threading.Thread(target=step)
        thread.start()
        thread.join()
    assert (caller.effects(), caller.claims()) == (["effect"], 1)


@pytest.mark.parametrize("make", [create_engine, create_async_engine], ids=["sync", "async"])
def test_as_a_decorator_it_is_refused_because_nobody_would_look_at_fresh(make: Any) -> None:
    drivername = "sqlite" if make is create_engine else "sqlite+aiosqlite"
    decorate: Any = once(make(f"{drivername}:////nowhere/at/all.db"), "shop", "1")

    def work() -> None: ...

    with pytest.raises(SetupError, match=r"no decorator.*work\.fresh.*with once\("):
        decorate(work)


@pytest.mark.hazard("H56")
@on()
def test_missing_tables_are_named_with_the_command_that_makes_them(caller: Caller) -> None:
    with pytest.raises(SchemaError, match="`idemq db upgrade APP`") as raised:
        caller("1", schema="nowhere")
    assert isinstance(raised.value.__cause__, DBAPIError)
    assert caller("1") == (True, None)  # the connection went back in order


@on(*[pair for pair in EVERY if pair[1].endswith("engine")])
def test_a_missing_table_of_the_users_own_is_the_databases_error(caller: Caller) -> None:
    with pytest.raises(DBAPIError, match="nothere"):
        caller("1", lambda work, connection, session: connection.execute(text("SELECT * FROM nothere")))
