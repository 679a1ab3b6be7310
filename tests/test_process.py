from __future__ import annotations

import asyncio
import multiprocessing
import os
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, create_engine, event, insert, select, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

from idemq import App
from idemq.attempts import AsyncUnit
from idemq.message import Ack, Dead, Message, Release, Verdict
from tests.core_tools import NOWHERE, PROCESSED, REPEATED, Attempts, Shop, effects, message, on, write
from tests.proxy import proxy

SERVERS = [
    ("postgres", "psycopg"),
    ("postgres", "psycopg async"),
    ("postgres", "asyncpg"),
    ("mariadb", "pymysql"),
    ("mariadb", "asyncmy"),
]
_PLAIN = {
    "psycopg": {"sslmode": "disable"},
    "psycopg async": {"sslmode": "disable"},
    "asyncpg": {"ssl": False},
}


def settled(attempts: Attempts, given: Message) -> Verdict:
    """Try until it is settled, as the worker does; what is released on the way may not count as a failure."""
    job = attempts.consumer.job(given)
    for _ in range(100):
        verdict = attempts(job)
        if not isinstance(verdict, Release):
            return verdict
        assert not verdict.failed, verdict
    raise AssertionError(f"not settled after 100 attempts: {verdict}")


@pytest.mark.hazard("H12")
@pytest.mark.hazard("H19")
@on(*SERVERS)
def test_a_lost_reply_to_commit_is_neither_a_failure_nor_a_second_effect(shop: Shop) -> None:
    assert shop.url.host is not None
    assert shop.url.port is not None
    with proxy(shop.url.host, shop.url.port) as between:
        url = shop.url
        shop.url = url.set(host="127.0.0.1", port=between.port)
        engine = shop.new_engine(connect_args=_PLAIN.get(shop.driver, {}))
        shop.url = url
        attempts = shop.attempts(engine=engine)
        attempts(message("warm"))
        for number in range(10):
            lost = number % 2 == 0
            job = attempts.consumer.job(message(str(number)))
            between.cut(b"COMMIT", "reply" if lost else "request")
            verdict = attempts(job)
            assert isinstance(verdict, Release)
            assert not verdict.failed, verdict
            assert between.cut_done.wait(90)
            assert attempts(job) == Ack(duplicate=lost)
    assert len(shop.effects()) == shop.claims() == 11
    assert shop.dead() == []


@pytest.mark.hazard("H12")
@on(*SERVERS)
def test_a_reply_lost_while_burying_leaves_one_dead_letter(shop: Shop) -> None:
    assert shop.url.host is not None
    assert shop.url.port is not None
    with proxy(shop.url.host, shop.url.port) as between:
        url = shop.url
        shop.url = url.set(host="127.0.0.1", port=between.port)
        engine = shop.new_engine(connect_args=_PLAIN.get(shop.driver, {}))
        shop.url = url
        attempts = shop.attempts(engine=engine)
        attempts(message("warm"))
        with_id, without = message("1", unreadable="torn frame"), message(None)
        for bad, after in ((with_id, REPEATED), (without, Dead("no id"))):
            job = attempts.consumer.job(bad)
            between.cut(b"COMMIT", "reply")
            assert isinstance(attempts(job), Release)
            assert between.cut_done.wait(90)
            assert attempts(job) == after
    assert sorted(shop.reasons()) == ["no id", "unreadable"]


def backend(session: Session) -> int:
    postgresql = session.get_bind().dialect.name == "postgresql"
    query = "SELECT pg_backend_pid()" if postgresql else "SELECT CONNECTION_ID()"
    return int(session.execute(text(query)).scalar_one())


def terminate(shop: Shop, pid: int) -> None:
    with shop.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        if shop.kind == "postgresql":
            assert connection.execute(text(f"SELECT pg_terminate_backend({pid}, 10000)")).scalar_one()
        else:
            connection.execute(text(f"KILL {pid}"))


@pytest.mark.hazard("H12")
@on(*SERVERS)
def test_a_connection_that_the_server_ends_costs_nothing_but_another_attempt(shop: Shop) -> None:
    pids: list[int] = []

    def handler(given: Message, session: Session) -> None:
        write(given, session)
        pids.append(backend(session))
        if given.id == "inside" and pids.count(pids[-1]) and len(pids) == 2:
            terminate(shop, pids[-1])
            session.execute(text("SELECT 1"))
        if given.id == "last" and len(pids) == 4:
            terminate(shop, pids[-1])

    attempts = shop.attempts(handler)
    assert attempts(message("first")) == PROCESSED
    assert settled(attempts, message("inside")) == PROCESSED
    assert settled(attempts, message("last")) == PROCESSED
    terminate(shop, pids[-1])
    assert settled(attempts, message("next")) == PROCESSED
    assert len(shop.effects()) == shop.claims() == 4
    assert shop.dead() == []


@pytest.mark.hazard("H28")
@pytest.mark.hazard("H29")
@on(*SERVERS)
def test_a_deadlock_is_tried_again_and_not_counted(shop: Shop) -> None:
    with shop.engine.begin() as connection:
        for seq in (1, 2):
            connection.execute(insert(effects).values(seq=seq, mark="row"))
    both = threading.Barrier(2)
    tried: dict[str, int] = {"1": 0, "2": 0}

    def crossing(given: Message, session: Session) -> None:
        assert given.id is not None
        tried[given.id] += 1
        first, second = (1, 2) if given.id == "1" else (2, 1)
        change = text("UPDATE effects SET mark = CONCAT(mark, '+') WHERE seq = :seq")
        session.execute(change, {"seq": first})
        if tried[given.id] == 1:
            both.wait(90)
        session.execute(change, {"seq": second})

    units = [shop.attempts(crossing) for _ in range(2)]
    with ThreadPoolExecutor(2) as threads:
        run = [threads.submit(settled, unit, message(id)) for unit, id in zip(units, "12", strict=True)]
        assert [each.result() for each in run] == [PROCESSED] * 2
    assert sum(tried.values()) == 3  # one of them was the victim, once
    assert shop.effects() == ["row++", "row++"]
    assert shop.dead() == []


@on()
def test_a_handlers_own_database_errors_count_as_failures(shop: Shop) -> None:
    def failing(given: Message, session: Session) -> None:
        if given.id == "null":
            session.execute(insert(effects).values(mark=None))
        elif given.id == "unknown":
            session.execute(text("SELECT * FROM no_such_table"))
        else:
            session.execute(insert(effects).values(seq=1, mark="first"))
            session.execute(insert(effects).values(seq=1, mark="second"))

    attempts = shop.attempts(failing)
    for id in ("null", "unknown", "twice"):
        job = attempts.consumer.job(message(id))
        for count in (1, 2):
            verdict = attempts(job)
            assert isinstance(verdict, Release)
            assert verdict.failed, verdict
            assert job.failures == count
    assert (shop.effects(), shop.claims()) == ([], 0)


@on(("postgres", "psycopg"), ("postgres", "asyncpg"))
def test_a_constraint_that_fails_at_commit_counts_as_a_failure(shop: Shop) -> None:
    with shop.engine.begin() as connection:
        connection.execute(text("DROP TABLE IF EXISTS deferred"))
        connection.execute(text("CREATE TABLE deferred (n int UNIQUE DEFERRABLE INITIALLY DEFERRED)"))

    def failing(given: Message, session: Session) -> None:
        write(given, session)
        session.execute(text("INSERT INTO deferred VALUES (1), (1)"))

    attempts = shop.attempts(failing)
    job = attempts.consumer.job(message())
    for count in (1, 2):
        verdict = attempts(job)
        assert isinstance(verdict, Release)
        assert verdict.failed, verdict
        assert job.failures == count
    assert (shop.effects(), shop.claims(), shop.dead()) == ([], 0, [])


@on()
def test_a_handler_that_only_reads_or_does_nothing_is_processed(shop: Shop) -> None:
    def reading(given: Message, session: Session) -> None:
        if given.id != "nothing":
            session.execute(select(effects)).all()
            session.execute(text("SELECT 1")).all()

    attempts = shop.attempts(reading)
    for id in ("reading", "nothing", "again"):
        assert attempts(message(id)) == PROCESSED
        assert attempts(message(id)) == REPEATED


@on(("mariadb", "pymysql"), ("mariadb", "asyncmy"), ("postgres", "psycopg"), ("sqlite", "pysqlite"))
def test_a_handler_that_inserts_with_returning_is_processed(shop: Shop) -> None:
    def returning(given: Message, session: Session) -> None:
        query = text("INSERT INTO effects (mark) VALUES ('returned') RETURNING seq")
        assert session.execute(query).scalar_one()

    attempts = shop.attempts(returning)
    assert [attempts(message(id)) for id in "aab"] == [PROCESSED, REPEATED, PROCESSED]
    assert shop.effects() == ["returned"] * 2


@pytest.mark.hazard("H45")
@on()
def test_each_attempt_has_a_new_session_and_leaves_only_the_last_ones_writes(shop: Shop) -> None:
    sessions: list[Session] = []

    def third_time(given: Message, session: Session) -> None:
        assert not any(session is earlier for earlier in sessions)
        sessions.append(session)
        for part in range(3):
            session.execute(insert(effects).values(mark=f"attempt {len(sessions)} part {part}"))
            if len(sessions) < 3 and part == len(sessions):
                raise ValueError("half way")

    attempts = shop.attempts(third_time)
    job = attempts.consumer.job(message())
    for verdict in (attempts(job), attempts(job)):
        assert isinstance(verdict, Release)
        assert (verdict.failed, verdict.cause) == (True, "ValueError: half way")
    assert [attempts(job), attempts(job)] == [PROCESSED, REPEATED]
    assert shop.effects() == [f"attempt 3 part {part}" for part in range(3)]


@pytest.mark.hazard("H25")
@on(("sqlite", "pysqlite"), ("postgres", "psycopg"), ("mariadb", "pymysql"))
def test_whatever_stands_in_the_id_it_is_processed_or_has_no_id(shop: Shop) -> None:
    attempts = shop.attempts(id="id", fingerprint=None)

    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        st.text(st.characters(codec=None), max_size=1100)
        | st.binary(max_size=1100)
        | st.integers()
        | st.none()
        | st.floats()
        | st.lists(st.text())
    )
    def run(value: object) -> None:
        given = message(None, headers={"id": value, "other": "\ud800\x00"})
        job = attempts.consumer.job(given)
        verdict = attempts(job)
        if job.key is None:
            assert verdict == Dead("no id")
        else:
            assert isinstance(verdict, Ack)
            assert attempts(given) == REPEATED

    run()
    assert set(shop.reasons()) <= {"no id"}
    assert len(shop.effects()) == shop.claims()


def in_child(work: Callable[[], None]) -> int | None:
    """Run `work` in a forked process; its exit code, negative for a signal."""
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(90)
    return child.exitcode


@pytest.mark.hazard("H53")
@on(("postgres", "psycopg"), ("mariadb", "pymysql"), ("sqlite", "pysqlite"))
def test_a_unit_that_a_forked_child_inherits_is_refused_there_and_whole_in_the_parent(shop: Shop) -> None:
    attempts = shop.attempts()
    assert attempts(message("before")) == PROCESSED

    def child() -> None:
        verdict = attempts(message("child"))
        attempts.close()
        right = isinstance(verdict, Release) and "fork" in verdict.cause and not verdict.failed
        os._exit(0 if right else 1)

    assert in_child(child) == 0
    assert attempts(message("after")) == PROCESSED
    assert len(shop.effects()) == 2


@pytest.mark.hazard("H53")
@on(("postgres", "psycopg"), ("mariadb", "pymysql"))
def test_a_pooled_connection_that_a_forked_child_inherits_is_left_to_the_parent(shop: Shop) -> None:
    engine = shop.new_engine()
    assert isinstance(engine, Engine)
    App(engine)
    query = text("SELECT pg_backend_pid()" if shop.kind == "postgresql" else "SELECT CONNECTION_ID()")

    def connected() -> int:
        with engine.connect() as connection:
            return int(connection.execute(query).scalar_one())

    before = connected()
    assert in_child(lambda: os._exit(0 if connected() != before else 1)) == 0
    assert connected() == before
    engine.dispose()


_VOLATILE = (
    "timestamp",
    "last_insert_id",
    "identity",
    "rand_seed1",
    "rand_seed2",
    "error_count",
    "warning_count",
)


def session_settings(shop: Shop, engine: Engine) -> tuple[int, dict[str, str]]:
    with engine.connect() as connection:
        if shop.kind == "postgresql":
            pid = connection.execute(text("SELECT pg_backend_pid()")).scalar_one()
            query = "SELECT name, setting FROM pg_settings"
        else:
            pid = connection.execute(text("SELECT CONNECTION_ID()")).scalar_one()
            query = "SELECT variable_name, variable_value FROM information_schema.session_variables"
        found = {name.lower(): value for name, value in connection.execute(text(query))}
    return pid, {name: value for name, value in found.items() if name not in _VOLATILE}


@pytest.mark.hazard("H58")
@on(("postgres", "psycopg"), ("mariadb", "pymysql"))
def test_no_attempt_leaves_a_setting_behind_in_the_session(shop: Shop) -> None:
    def handler(given: Message, session: Session) -> None:
        write(given, session)
        if given.id == "failing":
            raise ValueError("on purpose")

    engine = shop.new_engine(pool_size=1, max_overflow=0)
    assert isinstance(engine, Engine)
    before = session_settings(shop, engine)
    attempts = shop.attempts(handler, engine=engine)
    for each in (message(), message(), message(body=b"other"), message("failing"), message(None)):
        attempts(each)
    attempts.close()
    assert session_settings(shop, engine) == before
    assert shop.reasons() == ["conflict", "no id"]


@pytest.mark.hazard("H58")
@on(("postgres", "psycopg"), ("postgres", "psycopg async"), ("postgres", "asyncpg"))
def test_the_path_needs_no_prepared_statements(shop: Shop) -> None:
    options: dict[str, Any] = {"prepare_threshold": None}
    if shop.driver == "asyncpg":
        options = {"statement_cache_size": 0, "prepared_statement_cache_size": 0}
    attempts = shop.attempts(engine=shop.new_engine(connect_args=options))
    for number in range(20):
        assert attempts(message(str(number))) == PROCESSED
        assert attempts(message(str(number))) == REPEATED


@pytest.mark.hazard("H4")
@on(("postgres", "psycopg"), ("postgres", "psycopg async"), ("mariadb", "pymysql"), ("mariadb", "asyncmy"))
def test_a_driver_in_autocommit_mode_runs_nothing(shop: Shop) -> None:
    attempts = shop.attempts(engine=shop.new_engine(connect_args={"autocommit": True}))
    verdict = attempts(message())
    assert isinstance(verdict, Release)
    assert "autocommit" in verdict.cause
    assert not verdict.failed
    assert (shop.effects(), shop.claims()) == ([], 0)


@pytest.mark.hazard("H42")
@pytest.mark.parametrize("apart", [False, True], ids=["in our task", "in its own task"])
@pytest.mark.parametrize("times", [1, 3])
@on(("sqlite", "aiosqlite"), ("postgres", "psycopg async"), ("postgres", "asyncpg"), ("mariadb", "asyncmy"))
def test_cancelled_at_random_points_claim_and_effect_stay_together(
    shop: Shop, times: int, apart: bool
) -> None:
    attempts = shop.attempts(apart=apart)
    unit, runner = attempts.unit, attempts.runner
    assert isinstance(unit, AsyncUnit)
    assert runner is not None
    chance = random.Random(times)
    acked: set[str] = set()

    async def storm() -> int:
        loop = asyncio.get_running_loop()
        cancelled = 0
        times_taken: list[float] = []
        for number in range(10):
            began = loop.time()
            await unit.run(attempts.consumer.job(message(f"warm {number}", f"warm {number}".encode())))
            times_taken.append(loop.time() - began)
        usual = min(times_taken)
        for number in range(100):
            id = str(number)
            task = loop.create_task(unit.run(attempts.consumer.job(message(id, id.encode()))))
            at = chance.uniform(0, usual * 1.5)
            for extra in range(times):
                loop.call_later(at + extra * usual * chance.uniform(0, 0.5), task.cancel)
            try:
                verdict = await task
            except asyncio.CancelledError:
                cancelled += 1
            else:
                assert verdict == PROCESSED, verdict
                acked.add(id)
        return cancelled

    assert runner.run(storm()) > 10
    there = shop.effects()
    assert len(there) == len(set(there)) == shop.claims()
    assert acked <= set(there)
    for number in range(100):
        verdict = settled(attempts, message(str(number), str(number).encode()))
        assert verdict == Ack(duplicate=str(number) in there)
    assert len(shop.effects()) == shop.claims() == 110
    assert shop.dead() == []
    if shop.kind == "postgresql":
        with shop.engine.connect() as connection:
            query = (
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
                "AND state LIKE 'idle in transaction%' AND pid <> pg_backend_pid()"
            )
            assert connection.execute(text(query)).scalar_one() == 0
    assert isinstance(attempts.engine, AsyncEngine)
    assert attempts.engine.sync_engine.pool.checkedout() == 1  # type: ignore[attr-defined]  # QueuePool's


@pytest.mark.hazard("H42")
@on(("postgres", "psycopg async"), ("postgres", "asyncpg"), ("mariadb", "asyncmy"))
def test_a_handler_that_cancels_its_task_in_a_query_has_failed(shop: Shop) -> None:
    query = text("SELECT pg_sleep(30)" if shop.kind == "postgresql" else "SELECT SLEEP(30)")
    cancels = [True]

    async def handler(session: AsyncSession) -> None:
        task = asyncio.current_task()
        assert task is not None
        if cancels[0]:
            asyncio.get_running_loop().call_later(0.1, task.cancel)
            await session.execute(query)

    app = App(shop.new_engine())
    app.consumer("shop", NOWHERE)(handler)
    attempts = shop.attempts(consumer=app.consumers["shop"].consumer, engine=app.async_engine, apart=True)
    job = attempts.consumer.job(message())
    verdict = attempts(job)
    assert isinstance(verdict, Release)
    assert (verdict.failed, verdict.cause) == (True, "CancelledError: the handler's task was cancelled")
    assert (job.failures, shop.effects(), shop.claims()) == (1, [], 0)
    cancels[0] = False
    assert attempts(job) == PROCESSED


def own_engine(url: Any, style: str) -> Engine:
    """SQLite engines as users make them."""
    engine = create_engine(url)
    if style.startswith("BEGIN"):

        @event.listens_for(engine, "connect")
        def _connect(connection: Any, _record: object) -> None:
            connection.isolation_level = None

        @event.listens_for(engine, "begin")
        def _begin(connection: Any) -> None:
            connection.exec_driver_sql(style)

    return engine


@pytest.mark.hazard("H40")
@pytest.mark.parametrize("style", ["plain", "BEGIN", "BEGIN IMMEDIATE"])
@on(("sqlite", "pysqlite"))
def test_four_processes_share_one_sqlite_file_without_failures(shop: Shop, style: str) -> None:
    def reading_first(given: Message, session: Session) -> None:
        session.execute(select(effects)).first()
        write(given, session)

    consumer = shop.consumer(reading_first)
    shop.number()

    def child() -> None:
        attempts = shop.attempts(consumer=consumer, engine=own_engine(shop.url, style))
        ids = [str(number) for number in range(500)]
        random.Random(os.getpid()).shuffle(ids)
        for id in ids:
            assert isinstance(settled(attempts, message(id, id.encode())), Ack)
        os._exit(0)

    shop.engine.dispose()
    children = [multiprocessing.get_context("fork").Process(target=child) for _ in range(4)]
    for each in children:
        each.start()
    for each in children:
        each.join(110)
    assert [each.exitcode for each in children] == [0] * 4
    assert len(shop.effects()) == len(set(shop.effects())) == shop.claims() == 500
    assert shop.dead() == []


@on(("postgres", "psycopg"), ("postgres", "asyncpg"))
def test_a_statement_that_takes_too_long_counts_as_a_failure(shop: Shop) -> None:
    def slow(given: Message, session: Session) -> None:
        session.execute(text("SET LOCAL statement_timeout = '20ms'"))
        session.execute(text("SELECT pg_sleep(30)"))

    verdict = shop.attempts(slow)(message())
    assert isinstance(verdict, Release)
    assert verdict.failed


@pytest.mark.hazard("H29")
@on(("mariadb", "pymysql"), ("mariadb", "asyncmy"))
def test_a_row_that_changed_since_the_snapshot_is_tried_again_and_not_counted(shop: Shop) -> None:
    engine = shop.new_engine(connect_args={"init_command": "SET innodb_snapshot_isolation = ON"})
    with shop.engine.begin() as connection:
        connection.execute(insert(effects).values(seq=1, mark="row"))
    tries: list[str] = []

    def overtaken(given: Message, session: Session) -> None:
        session.execute(select(effects)).all()
        if not tries:
            with shop.engine.begin() as connection:
                connection.execute(text("UPDATE effects SET mark = 'theirs'"))
        tries.append("again")
        session.execute(text("UPDATE effects SET mark = CONCAT(mark, ' and mine')"))

    assert settled(shop.attempts(overtaken, engine=engine), message()) == PROCESSED
    assert tries == ["again"] * 2
    assert shop.effects() == ["theirs and mine"]
