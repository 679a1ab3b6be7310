"""One-time tokens, in SQL and in Redis: of all who redeem one, exactly one is told True."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

import pytest
import redis
import redis.asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, create_engine, event, func, insert, select, text, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import scoped_session, sessionmaker

from idemq import SchemaError, SetupError, schema
from idemq.errors import LockTimeout
from idemq.redis_tokens import AsyncRedisTokens, RedisTokens
from idemq.tokens import issue, purge, redeem
from tests.core_tools import Shop, effects, on
from tests.servers import PATIENCE, eventually

pytestmark = pytest.mark.pattern("token")

PAIRS = [("sqlite", "pysqlite"), ("postgres", "psycopg"), ("mariadb", "pymysql"), ("mysql", "pymysql")]
SERVERS = PAIRS[1:]
TABLE = schema.table("idemq_tokens")
LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)


def issued(shop: Shop, scope: str = "form", lifetime: float | None = None) -> str:
    with shop.engine.begin() as connection:
        return issue(connection, scope, lifetime=lifetime)


def redeemed(shop: Shop, token: str | None, scope: str = "form") -> bool:
    with shop.engine.begin() as connection:
        return redeem(connection, scope, token)


def kept(shop: Shop) -> int:
    with shop.engine.connect() as connection:
        return connection.scalar(select(func.count()).select_from(TABLE)) or 0


def expire(shop: Shop) -> None:
    with shop.engine.begin() as connection:
        connection.execute(update(TABLE).values(expires_at=LONG_AGO))


def sync_engine(shop: Shop, pool_size: int) -> Engine:
    engine = shop.new_engine(pool_size=pool_size)
    assert isinstance(engine, Engine)
    return engine


@on(*PAIRS)
@pytest.mark.situation(1)
def test_a_token_is_redeemed_once(shop: Shop) -> None:
    token = issued(shop)
    assert [redeemed(shop, token) for _ in range(3)] == [True, False, False]
    assert kept(shop) == 0


@on(*PAIRS)
def test_tokens_are_different_and_the_table_holds_no_token(shop: Shop) -> None:
    tokens = {issued(shop) for _ in range(20)}
    assert len(tokens) == 20
    assert all(len(token) >= 32 for token in tokens)
    with shop.engine.connect() as connection:
        stored = repr(connection.execute(select(TABLE)).all())
    assert not any(token in stored or token.encode().hex() in stored for token in tokens)


@on(*PAIRS)
def test_another_scope_is_refused_and_the_token_stays_good_for_its_own(shop: Shop) -> None:
    token = issued(shop, "form 1")
    for other in ("form 2", "FORM 1", "form 1 ", "form"):
        assert not redeemed(shop, token, other)
    assert redeemed(shop, token, "form 1")


@on(*PAIRS)
@pytest.mark.parametrize("wrong", [None, "", "x", "x" * 10_000, "\ud800", "\x00", "é'; --"])
def test_what_was_never_issued_is_refused(shop: Shop, wrong: str | None) -> None:
    issued(shop)
    assert not redeemed(shop, wrong)
    assert kept(shop) == 1


@on(*PAIRS)
def test_a_token_is_good_within_its_lifetime_and_refused_after_it(shop: Shop) -> None:
    good, late = issued(shop, lifetime=3600), issued(shop, lifetime=3600)
    assert redeemed(shop, good)
    expire(shop)
    assert not redeemed(shop, late)


@on(*PAIRS)
def test_the_lifetime_is_counted_by_the_clock_of_the_database(shop: Shop) -> None:
    issued(shop, lifetime=0.001)
    assert kept(shop) == 1
    eventually(lambda: purge(shop.engine) == 1, "the token has expired")


@on(*PAIRS)
def test_a_rollback_gives_the_token_back(shop: Shop) -> None:
    token = issued(shop)
    with shop.engine.connect() as connection:
        assert redeem(connection, "form", token)
        assert not redeem(connection, "form", token)
        connection.rollback()
    assert redeemed(shop, token)


@on(*PAIRS)
def test_a_token_whose_issue_was_rolled_back_is_refused(shop: Shop) -> None:
    with shop.engine.connect() as connection:
        token = issue(connection, "form")
        connection.rollback()
    assert not redeemed(shop, token)


@on(*PAIRS)
def test_token_and_work_are_one_transaction_of_a_session(shop: Shop) -> None:
    maker = sessionmaker(shop.engine)
    with maker.begin() as session:
        token = issue(session, "form")
    for _ in range(2):
        with maker.begin() as session:
            if redeem(session, "form", token):
                session.execute(insert(effects).values(mark="order"))
    assert shop.effects() == ["order"]
    scoped = scoped_session(maker)
    again = issue(scoped, "form")
    assert redeem(scoped, "form", again)
    scoped.remove()


@on(("postgres", "asyncpg"), ("postgres", "psycopg async"), ("mariadb", "asyncmy"), ("sqlite", "aiosqlite"))
def test_async_sessions_redeem_through_run_sync(shop: Shop) -> None:
    async def run() -> list[bool]:
        engine = create_async_engine(shop.url_of_driver())
        async with AsyncSession(engine) as session:
            token = await session.run_sync(issue, "form", lifetime=60)
            await session.commit()
            answers = []
            for _ in range(2):
                answers.append(await session.run_sync(redeem, "form", token))
                await session.commit()
        await engine.dispose()
        return answers

    assert asyncio.run(run()) == [True, False]


def race(count: int, redeemer: Callable[[], Callable[[], bool]]) -> list[bool]:
    """What `count` threads are told that redeem at the same time."""
    gate = threading.Barrier(count)

    def run() -> bool:
        each = redeemer()
        gate.wait(PATIENCE)
        return each()

    with ThreadPoolExecutor(count) as pool:
        return [each.result() for each in [pool.submit(run) for _ in range(count)]]


@on(*PAIRS)
@pytest.mark.situation(1)
def test_of_32_concurrent_redeemers_exactly_one_wins(shop: Shop) -> None:
    engine = sync_engine(shop, 32)
    token = issued(shop)

    def redeemer() -> Callable[[], bool]:
        connection = engine.connect()

        def run() -> bool:
            with connection, connection.begin():
                return redeem(connection, "form", token, wait=PATIENCE)

        return run

    assert sorted(race(32, redeemer)) == [False] * 31 + [True]
    engine.dispose()


@on(*PAIRS)
def test_a_thousand_races_have_one_winner_each(shop: Shop) -> None:
    racers, races = 3, 1000
    engine = sync_engine(shop, racers)
    with shop.engine.begin() as connection:
        tokens = [issue(connection, "form") for _ in range(races)]
    gate = threading.Barrier(racers)

    def run() -> list[bool]:
        answers = []
        with engine.connect() as connection:
            for token in tokens:
                gate.wait(PATIENCE)
                with connection.begin():
                    answers.append(redeem(connection, "form", token, wait=PATIENCE))
        return answers

    with ThreadPoolExecutor(racers) as pool:
        columns = [each.result() for each in [pool.submit(run) for _ in range(racers)]]
    engine.dispose()
    assert [sum(answers) for answers in zip(*columns, strict=True)] == [1] * races


@on(*SERVERS)
@pytest.mark.parametrize("commits", [True, False])
def test_who_comes_second_waits_for_the_first_and_wins_when_that_is_rolled_back(
    shop: Shop, commits: bool
) -> None:
    token = issued(shop)
    with ThreadPoolExecutor(1) as pool, shop.engine.connect() as first:
        assert redeem(first, "form", token)

        def second() -> bool:
            with shop.engine.begin() as connection:
                return redeem(connection, "form", token, wait=PATIENCE)

        later = pool.submit(second)
        eventually(lambda: waits(shop), "the second waits")
        assert not later.done()
        if commits:
            first.commit()
        else:
            first.rollback()
        assert later.result(PATIENCE) is not commits


def waits(shop: Shop) -> bool:
    """Whether a redeeming is under way that does not end."""
    query = {
        "postgresql": "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
        " AND wait_event_type = 'Lock'",
        "mysql": "SELECT count(*) FROM information_schema.processlist WHERE info LIKE 'DELETE %'",
    }[shop.kind]
    with shop.engine.connect() as connection:
        return bool(connection.scalar(text(query)))


@on(*PAIRS)
@pytest.mark.hazard("H26")
def test_the_wait_for_another_redeemer_is_bounded_and_leaves_the_session_as_it_was(shop: Shop) -> None:
    token = issued(shop)
    with shop.engine.connect() as first, shop.engine.connect() as second:
        assert redeem(first, "form", token)
        if shop.kind == "sqlite":
            second.exec_driver_sql("PRAGMA busy_timeout = 50")
        before = lock_timeout(shop, second)
        with pytest.raises(LockTimeout, match="redeemed by somebody else"):
            redeem(second, "form", token, wait=0.05)
        second.rollback()
        assert lock_timeout(shop, second) == before
        second.rollback()
        first.commit()
        assert not redeem(second, "form", token)
        assert lock_timeout(shop, second) == before  # still in the transaction
        second.rollback()


def lock_timeout(shop: Shop, connection: Any) -> Any:
    query = {
        "postgresql": "SHOW lock_timeout",
        "mysql": "SELECT @@innodb_lock_wait_timeout",
        "sqlite": "SELECT 0",
    }[shop.kind]
    return connection.scalar(text(query))


@on(*PAIRS)
def test_purging_deletes_what_has_expired_in_batches_and_nothing_else(shop: Shop) -> None:
    for _ in range(25):
        issued(shop, lifetime=3600)
    expire(shop)
    good = [issued(shop), issued(shop, lifetime=3600)]
    sizes: list[int] = []

    @event.listens_for(shop.engine, "after_cursor_execute")
    def _look(_c: Any, cursor: Any, statement: str, *_rest: Any) -> None:
        if statement.startswith("DELETE"):
            sizes.append(cursor.rowcount)

    assert purge(shop.engine, batch=10) == 25
    assert sizes == [10, 10, 5]
    assert purge(shop.engine) == 0
    assert [redeemed(shop, token) for token in good] == [True, True]


@on(*SERVERS)
def test_purging_does_not_wait_for_those_who_redeem_good_tokens(shop: Shop) -> None:
    issued(shop, lifetime=3600)
    expire(shop)
    token = issued(shop, lifetime=3600)
    with shop.engine.connect() as open_one:
        assert redeem(open_one, "form", token)
        assert purge(shop.engine) == 1
        open_one.commit()


#: What is done, to which of four tokens, in which of two scopes.
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["issue", "issue", "redeem", "redeem", "expire", "purge", "commit", "rollback"]),
        st.integers(0, 3),
        st.sampled_from(["a", "b"]),
    ),
    max_size=25,
)


@on(*PAIRS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
def test_tokens_behave_like_a_plain_dictionary(shop: Shop, steps: list[tuple[str, int, str]]) -> None:
    committed: dict[str, tuple[str, bool]] = {}  # token -> scope, expired
    current = dict(committed)
    given_out = ["never issued"]
    with shop.engine.connect() as connection:
        for action, number, scope in steps:
            token = given_out[-1 - number] if number < len(given_out) else "unknown"
            if action == "issue":
                given_out.append(issue(connection, scope, lifetime=3600))
                current[given_out[-1]] = (scope, False)
            elif action == "redeem":
                good = current.get(token) == (scope, False)
                assert redeem(connection, scope, token) is good
                if good:
                    del current[token]
            elif action == "expire":
                connection.execute(update(TABLE).where(TABLE.c.scope == b"a").values(expires_at=LONG_AGO))
                current = {each: (of, old or of == "a") for each, (of, old) in current.items()}
            elif action == "rollback":
                connection.rollback()
                current = dict(committed)
            else:
                connection.commit()
                if action == "purge":
                    assert purge(shop.engine) == sum(old for _, old in current.values())
                    current = {each: (of, old) for each, (of, old) in current.items() if not old}
                committed = dict(current)
        connection.commit()
        assert kept(shop) == len(current)
        connection.execute(TABLE.delete())
        connection.commit()


@pytest.mark.parametrize("database_url", ["sqlite", "postgres", "mariadb"], indirect=True)
def test_missing_tables_are_named(database_url: Any) -> None:
    engine = create_engine(database_url)
    with engine.connect() as connection:
        with pytest.raises(SchemaError, match="idemq db upgrade"):
            issue(connection, "form")
        connection.rollback()
        with pytest.raises(SchemaError, match="idemq db upgrade"):
            redeem(connection, "form", "x")
        connection.rollback()
    with pytest.raises(SchemaError, match="idemq db upgrade"):
        purge(engine)
    engine.dispose()


@on(("sqlite", "pysqlite"))
def test_bad_arguments_are_refused_and_named(shop: Shop) -> None:
    wrong: Any
    with shop.engine.connect() as connection:
        for wrong in ("", "x" * 256, None, 7):
            with pytest.raises(SetupError, match="scope="):
                issue(connection, wrong)
            with pytest.raises(SetupError, match="scope="):
                redeem(connection, wrong, "x")
        for wrong in (0, -1, "60", True, float("nan"), float("inf"), 1e12):
            with pytest.raises(SetupError, match="lifetime="):
                issue(connection, "form", lifetime=wrong)
        for wrong in (-1, "1", True, 3601, None):
            with pytest.raises(SetupError, match="wait="):
                redeem(connection, "form", "x", wait=wrong)
        with pytest.raises(SetupError, match="plain identifier"):
            issue(connection, "form", schema="no-name")
    for wrong in (0, 10_001, 1.5, True, None):
        with pytest.raises(SetupError, match="batch="):
            purge(shop.engine, batch=wrong)
    with pytest.raises(SetupError, match="Engine"):
        purge(wrong)
    for wrong in (shop.engine, None, "sqlite://"):
        with pytest.raises(SetupError, match="Session or Connection"):
            issue(wrong, "form")


@on(*SERVERS)
def test_a_connection_that_commits_by_itself_is_refused(shop: Shop) -> None:
    token = issued(shop)
    by_itself = shop.engine.connect().execution_options(isolation_level="AUTOCOMMIT")
    with by_itself as connection, pytest.raises(SetupError, match="autocommit"):
        redeem(connection, "form", token)
    assert redeemed(shop, token)


@on(("postgres", "psycopg"))
@pytest.mark.hazard("H29")
def test_at_a_higher_isolation_level_the_loser_is_refused_or_must_run_again(shop: Shop) -> None:
    token = issued(shop)
    with shop.engine.connect().execution_options(isolation_level="REPEATABLE READ") as connection:
        connection.execute(select(TABLE)).all()  # the snapshot is taken
        assert redeemed(shop, token)
        with pytest.raises(DBAPIError, match="serialize"):
            redeem(connection, "form", token)
        connection.rollback()
        assert not redeem(connection, "form", token)


@pytest.fixture
def client(redis_url: str, unique: str) -> Iterator[tuple[redis.Redis, str]]:
    """A client, and a prefix that no other test uses."""
    client = redis.Redis.from_url(redis_url)
    prefix = f"{unique}:"
    yield client, prefix
    for key in client.scan_iter(f"{prefix}*"):
        client.delete(key)
    client.close()


def test_redis_redeems_a_token_once_and_only_in_its_scope(client: tuple[redis.Redis, str]) -> None:
    tokens = RedisTokens(*client)
    token = tokens.issue("form 1")
    assert not tokens.redeem("form 2", token)
    assert [tokens.redeem("form 1", token) for _ in range(3)] == [True, False, False]
    for wrong in (None, "", "x", "\ud800"):
        assert not tokens.redeem("form 1", wrong)


def test_redis_forgets_a_token_when_its_lifetime_is_over(client: tuple[redis.Redis, str]) -> None:
    connection, prefix = client
    tokens = RedisTokens(connection, prefix)
    token = tokens.issue("form", lifetime=3600)
    (key,) = connection.scan_iter(f"{prefix}*")
    assert token.encode() not in key
    assert 0 < connection.pttl(key) <= 3_600_000
    assert connection.pexpire(key, 1)
    eventually(lambda: not connection.exists(key), "the key has expired")
    assert not tokens.redeem("form", token)
    forever = tokens.issue("form")
    assert connection.pttl(next(connection.scan_iter(f"{prefix}*"))) == -1
    assert tokens.redeem("form", forever)


@pytest.mark.parametrize("lifetime", [0, -1, "60", True, float("inf")])
def test_redis_refuses_bad_arguments_as_sql_does(client: tuple[redis.Redis, str], lifetime: Any) -> None:
    tokens = RedisTokens(*client)
    with pytest.raises(SetupError, match="lifetime="):
        tokens.issue("form", lifetime=lifetime)
    with pytest.raises(SetupError, match="scope="):
        tokens.issue("")


def test_redis_tokens_of_32_concurrent_redeemers_exactly_one_wins(client: tuple[redis.Redis, str]) -> None:
    tokens = RedisTokens(*client)
    token = tokens.issue("form")
    answers = race(32, lambda: lambda: tokens.redeem("form", token))
    assert sorted(answers) == [False] * 31 + [True]


def test_redis_a_thousand_races_have_one_winner_each(client: tuple[redis.Redis, str]) -> None:
    tokens = RedisTokens(*client)
    issued = [tokens.issue("form", lifetime=600) for _ in range(1000)]
    gate = threading.Barrier(3)

    def run() -> list[bool]:
        answers = []
        for token in issued:
            gate.wait(PATIENCE)
            answers.append(tokens.redeem("form", token))
        return answers

    with ThreadPoolExecutor(3) as pool:
        columns = [each.result() for each in [pool.submit(run) for _ in range(3)]]
    assert [sum(answers) for answers in zip(*columns, strict=True)] == [1] * 1000


def test_redis_tokens_of_asyncio_clients(redis_url: str, unique: str) -> None:
    async def run() -> list[bool]:
        async with redis.asyncio.Redis.from_url(redis_url) as client:
            tokens = AsyncRedisTokens(client, f"{unique}:")
            token = await tokens.issue("form", lifetime=600)
            assert not await tokens.redeem("other", token)
            return list(await asyncio.gather(*(tokens.redeem("form", token) for _ in range(32))))

    assert sorted(asyncio.run(run())) == [False] * 31 + [True]
