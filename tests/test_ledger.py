from __future__ import annotations

import threading
import unicodedata
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, event, text
from sqlalchemy.engine import RootTransaction
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import Session

from idemq.drivers import begin
from idemq.errors import InFlight, RetryLater
from idemq.ledger import Claim, Ledger
from idemq.message import Ack, Message, Release, fingerprint_of, key_of
from tests.core_tools import PROCESSED, REPEATED, Body, Shop, message, on, write

#: Sync drivers are enough where the statement itself is tested.
DATABASES = [("sqlite", "pysqlite"), ("postgres", "psycopg"), ("mariadb", "pymysql"), ("mysql", "pymysql")]


def claim(shop: Shop, connection: Connection, id: str, fingerprint: int | None = None) -> Claim:
    ledger = Ledger(connection.dialect, None, 1.0)
    return ledger.claim(connection, 1, key_of(id), fingerprint, None)


@pytest.mark.hazard("H7")
@on()
def test_a_claim_says_fresh_once_and_duplicate_ever_after(shop: Shop) -> None:
    attempts = shop.attempts()
    assert [attempts(message(str(n % 3))) for n in range(9)] == [PROCESSED] * 3 + [REPEATED] * 6
    assert len(shop.effects()) == shop.claims() == 3


@pytest.mark.hazard("H7")
@on(*DATABASES)
def test_a_claim_names_the_transaction_that_wrote_it(shop: Shop) -> None:
    with shop.engine.connect() as connection:
        transaction = begin(connection)
        first = claim(shop, connection, "1", 5)
        assert first.state == "fresh"
        again = claim(shop, connection, "1", 5)
        assert (again.state, again.token) == ("duplicate", first.token)
        transaction.commit()
        transaction = begin(connection)
        assert claim(shop, connection, "1", 5).token == first.token
        assert claim(shop, connection, "1", 6).state == "conflict"
        assert claim(shop, connection, "1", None).state == "duplicate"
        transaction.rollback()


@pytest.mark.hazard("H4")
@on()
def test_a_handler_that_raises_leaves_neither_claim_nor_effect(shop: Shop) -> None:
    def failing(given: Message, session: Session) -> None:
        write(given, session)
        session.flush()
        raise RuntimeError("after the effect")

    attempts = shop.attempts(failing)
    verdict = attempts(message())
    assert isinstance(verdict, Release)
    assert (verdict.failed, verdict.cause) == (True, "RuntimeError: after the effect")
    assert (shop.effects(), shop.claims(), shop.dead()) == ([], 0, [])


@pytest.mark.hazard("H4")
@on(*DATABASES)
def test_negative_control_a_claim_in_its_own_transaction_loses(shop: Shop) -> None:
    def crashing_consumer(id: str) -> str:
        with shop.engine.connect() as connection:
            transaction = begin(connection)
            state = claim(shop, connection, id).state
            transaction.commit()
        if state == "fresh":
            return "crashed before the work"
        return "acked"

    assert [crashing_consumer("1"), crashing_consumer("1")] == ["crashed before the work", "acked"]
    assert shop.effects() == []  # acked, and lost: what the test above must never show


PAIRS = [
    ("Order-abc", "Order-ABC"),
    ("Order-abc", "Order-\u00e1bc"),
    ("Order-abc", "Order-abc "),
    ("Order-abc", "Order-abc\x00"),
    ("Order-abc", "Order-abc\t"),
    (unicodedata.normalize("NFC", "caf\u00e9"), unicodedata.normalize("NFD", "caf\u00e9")),
    ("stra\u00dfe", "strasse"),
    ("K-1", "\u212a-1"),
    ("\U0001f600", "\U0001f601"),
    ("a", "a\u200b"),
    ("\ud800", "\ud801"),
    ("1", "01"),
    ("0192a1b2-0000-7000-8000-00000000000a", "0192A1B2-0000-7000-8000-00000000000A"),
    ("0192a1b2-0000-7000-8000-00000000000a", "0192a1b20000700080000000000000" + "0a"),
]


@pytest.mark.hazard("H5")
@on(*DATABASES, ("postgres", "asyncpg"), ("mariadb", "asyncmy"))
def test_ids_that_look_alike_are_different(shop: Shop) -> None:
    attempts = shop.attempts(fingerprint=None)
    different = list(dict.fromkeys(id for pair in PAIRS for id in pair))
    assert [attempts(message(id)) for id in different] == [PROCESSED] * len(different)
    assert [attempts(message(id)) for id in different] == [REPEATED] * len(different)


@pytest.mark.hazard("H6")
@on(*DATABASES)
def test_long_ids_with_a_common_prefix_are_different_and_too_long_ones_dead(shop: Shop) -> None:
    attempts = shop.attempts()
    lengths = [255, 256, 257, 1000, 1023, 1024]
    assert [attempts(message("x" * length)) for length in lengths] == [PROCESSED] * len(lengths)
    assert attempts(message("x" * 1023 + "y")) == PROCESSED
    for unusable in ("x" * 1025, "\u00e9" * 513, "", None):
        attempts(message(unusable))
    assert shop.reasons() == ["no id"] * 4
    assert len(shop.effects()) == shop.claims() == 7


@pytest.mark.hazard("H16")
@on(("postgres", "psycopg"), ("postgres", "psycopg async"), ("postgres", "asyncpg"), own=True)
def test_a_claim_waits_for_the_disk_whatever_the_session_says(shop: Shop) -> None:
    seen: list[str] = []

    def look(given: Message, session: Session) -> None:
        seen.append(session.execute(text("SHOW synchronous_commit")).scalar_one())

    with shop.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        for default in ("off", "on", "local"):
            name = shop.engine.url.database
            connection.execute(text(f"ALTER DATABASE {name} SET synchronous_commit = {default}"))
            assert shop.attempts(look)(message(default)) == PROCESSED
    assert seen == ["on", "on", "local"]


@pytest.mark.hazard("H16")
@on(("postgres", "psycopg"), ("postgres", "asyncpg"), own=True)
def test_what_is_written_down_of_a_failure_waits_for_the_disk_as_well(shop: Shop) -> None:
    seen: list[str] = []

    def fail_first(given: Message, session: Session) -> None:
        seen.append(session.execute(text("SHOW synchronous_commit")).scalar_one())
        if len(seen) == 1:
            raise RetryLater(60)

    with shop.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        name = shop.engine.url.database
        connection.execute(text(f"ALTER DATABASE {name} SET synchronous_commit = off"))
        connection.execute(text(WATCH))
    attempts = shop.attempts(fail_first)
    attempts(message("parked"))
    attempts(message(None))  # a dead letter without a claim
    shop.time_passes()
    assert attempts.again() == [PROCESSED]
    assert seen == ["on", "on"]
    with shop.engine.connect() as connection:
        assert set(connection.scalars(text("SELECT setting FROM seen_at_commit"))) == {"on"}


#: What holds at the COMMIT of every row that lets a message be acknowledged.
WATCH = """
CREATE TABLE seen_at_commit (setting text);
CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS
  $$ BEGIN INSERT INTO seen_at_commit VALUES (current_setting('synchronous_commit')); RETURN NULL; END $$;
CREATE CONSTRAINT TRIGGER note AFTER INSERT OR UPDATE ON idemq_failed
  DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION note();
"""


@contextmanager
def twin(shop: Shop, id: str = "1") -> Iterator[RootTransaction]:
    """A claim in a transaction of its own, as a worker in the middle of its handler holds it."""
    number = shop.number()
    with shop.engine.connect() as connection:
        transaction = begin(connection)
        ledger = Ledger(connection.dialect, None, 1.0)
        claimed = ledger.claim(connection, number, key_of(id), fingerprint_of(b"effect"), None)
        assert claimed.state == "fresh"
        yield transaction


@pytest.mark.hazard("H26")
@pytest.mark.parametrize("commit", [True, False], ids=["committed", "rolled back"])
@on()
def test_a_twin_in_flight_is_waited_for_and_then_released_without_counting(shop: Shop, commit: bool) -> None:
    attempts = shop.attempts(wait=0.2)
    if shop.kind == "sqlite":
        _impatient(attempts.engine)
    job = attempts.consumer.job(message())
    with twin(shop) as transaction:
        verdict = attempts(job)
        assert isinstance(verdict, Release)
        assert not verdict.failed
        assert job.failures == 0
        if commit:
            transaction.commit()
        else:
            transaction.rollback()
        assert attempts(job) == Ack(duplicate=commit)
    assert shop.claims() == 1
    assert shop.dead() == []


def _impatient(engine: Engine | AsyncEngine) -> None:
    """On SQLite the wait for the one writer is a setting of the connection."""

    @event.listens_for(engine.sync_engine if isinstance(engine, AsyncEngine) else engine, "connect")
    def _connect(connection: Any, _record: object) -> None:
        cursor = connection.cursor()
        cursor.execute("PRAGMA busy_timeout = 200")
        cursor.close()


@pytest.mark.hazard("H26")
@on(
    ("postgres", "psycopg"), ("postgres", "asyncpg"), ("mariadb", "pymysql"), ("mariadb", "asyncmy"), own=True
)
def test_the_handler_has_its_own_lock_timeout_back(shop: Shop) -> None:
    postgresql = shop.kind == "postgresql"
    name = "lock_timeout" if postgresql else "innodb_lock_wait_timeout"
    seen: list[object] = []

    def look(given: Message, session: Session) -> None:
        seen.append(session.execute(text(f"SHOW {name}" if postgresql else f"SELECT @@{name}")).scalar_one())

    attempts = shop.attempts(look)
    assert attempts(message("1")) == PROCESSED
    with shop.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        if postgresql:
            connection.execute(text(f"ALTER DATABASE {shop.engine.url.database} SET lock_timeout = '7s'"))
    assert shop.attempts(look)(message("2")) == PROCESSED
    assert seen == (["0", "7s"] if postgresql else [50, 50])


@pytest.mark.hazard("H29")
@pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
@on(*DATABASES[1:], ("sqlite", "pysqlite"))
def test_sixteen_threads_with_one_id_have_one_effect_on_every_isolation_level(shop: Shop, level: str) -> None:
    if shop.kind == "sqlite" and level != "SERIALIZABLE":
        pytest.skip("SQLite has no such level")
    engine = shop.new_engine(isolation_level=level, pool_size=16)
    units = [shop.attempts(engine=engine) for _ in range(16)]
    ids = [str(number) for number in range(5)]
    for id in ids:
        start = threading.Barrier(16)

        def run(number: int, id: str = id, start: threading.Barrier = start) -> tuple[Ack, bool]:
            job = units[number].consumer.job(message(id, id.encode()))
            start.wait()
            while isinstance(verdict := units[number](job), Release):
                assert not verdict.failed, verdict
            assert isinstance(verdict, Ack)
            return verdict, job.failures == 0

        with ThreadPoolExecutor(16) as threads:
            ended = Counter(threads.map(run, range(16)))
        assert ended == {(PROCESSED, True): 1, (REPEATED, True): 15}
    assert sorted(shop.effects()) == ids
    assert shop.dead() == []


@pytest.mark.hazard("H56")
@on(*DATABASES, own=True)
def test_without_its_unique_key_the_table_is_refused_by_the_claim_itself(shop: Shop) -> None:
    attempts = shop.attempts()
    with shop.engine.begin() as connection:
        if shop.kind == "postgresql":
            connection.execute(text("ALTER TABLE idemq_processed DROP CONSTRAINT idemq_processed_pkey"))
        elif shop.kind == "sqlite":
            connection.execute(text("ALTER TABLE idemq_processed RENAME TO old"))
            connection.execute(text("CREATE TABLE idemq_processed AS SELECT * FROM old"))
        else:
            connection.execute(text("ALTER TABLE idemq_processed DROP PRIMARY KEY"))
    verdicts = [attempts(message()) for _ in range(2)]
    assert all(isinstance(verdict, Release) for verdict in verdicts), verdicts
    assert shop.effects() == []


@on(*DATABASES, own=True)
def test_a_claim_on_a_missing_table_is_an_error_and_no_answer(shop: Shop) -> None:
    with shop.engine.begin() as connection:
        connection.execute(text("DROP TABLE idemq_processed"))
    with shop.engine.connect() as connection:
        transaction = begin(connection)
        with pytest.raises(DBAPIError) as caught:
            claim(shop, connection, "1")
        assert not isinstance(caught.value, InFlight)
        transaction.rollback()


@pytest.mark.hazard("H1")
@on()
def test_two_consumers_never_share_an_id(shop: Shop) -> None:
    def body_of(name: str) -> Body:
        def handler(given: Message, session: Session) -> None:
            write(Message(body=f"{name} {given.id}".encode()), session)

        return handler

    consumers = [shop.attempts(body_of(name), name) for name in ("receipts", "ledger")]
    for _ in range(2):
        for each in consumers:
            for number in range(20):
                assert isinstance(each(message(str(number))), Ack)
    assert len(shop.effects()) == len(set(shop.effects())) == shop.claims() == 40
