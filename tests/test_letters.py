from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from threading import Barrier
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import Connection, Row, create_engine, func, insert, select, text, update
from sqlalchemy.ext.asyncio import create_async_engine

from idemq import letters, migrate, names, schema
from idemq import status as status_module
from idemq.errors import SetupError
from idemq.failures import BROKE, CONFLICT, DEAD, WAITING
from idemq.ledger import clock
from idemq.message import key_of
from idemq.packing import packed
from idemq.status import status
from tests.core_tools import Shop, message, on

failed, processed, audit = (schema.table(f"idemq_{name}") for name in ("failed", "processed", "audit"))

SYNC = on(("sqlite", "pysqlite"), ("postgres", "psycopg"), ("mariadb", "pymysql"), ("mysql", "pymysql"))
AGO = timedelta(hours=1)


def bury(
    shop: Shop, id: str | None = "1", reason: str = "rejected", consumer: str = "shop", **values: Any
) -> UUID:
    """A row as the worker leaves it: dead, with its claim where it has an id of its own."""
    owns = id is not None and reason != CONFLICT
    then = datetime.now(UTC) - AGO
    pk = uuid4()
    row = {
        "pk": pk.bytes,
        "consumer": shop.number(consumer),
        "identity": key_of(id) if owns and id is not None else uuid4().bytes,
        "owns_claim": owns,
        "state": DEAD,
        "reason": reason,
        "attempts": 8,
        "starts": 3,
        "crashes": 2,
        "alone": True,
        "body": b"body\x00\xff",
        "headers": packed({"text": "t", "bytes": b"\xff"}),
        "properties": packed({"message_id": id, "key": b"k", "content_type": "text/plain", "type": "paid"}),
        "origin": packed({"queue": "payments"}),
        "error": "Traceback\nValueError: no",
        "first_at": then,
        "last_at": then,
        **values,
    }
    with shop.engine.begin() as connection:
        if owns:
            claim = {"consumer": row["consumer"], "id": row["identity"], "at": then}
            connection.execute(insert(processed).values(claim))
        connection.execute(insert(failed).values(row))
    return pk


def park(shop: Shop, id: str = "1", reason: str = "failed", **values: Any) -> UUID:
    due = datetime.now(UTC) + timedelta(minutes=5)
    return bury(shop, id, reason, **{"state": WAITING, "not_before": due, "alone": False, **values})


@contextmanager
def begun(shop: Shop) -> Iterator[Connection]:
    with shop.engine.begin() as connection:
        yield connection


def row_of(shop: Shop, pk: UUID) -> Row[Any]:
    with begun(shop) as connection:
        return connection.execute(select(failed).where(failed.c.pk == pk.bytes)).one()


def entries(shop: Shop) -> list[tuple[Any, ...]]:
    query = select(audit.c.who, audit.c.action, audit.c.pk, audit.c.reason, audit.c.why)
    with begun(shop) as connection:
        return [tuple(row) for row in connection.execute(query.order_by(audit.c.seq))]


# --- looking --------------------------------------------------------------------------------------------


@SYNC
def test_dead_and_parked_letters_are_told_apart_and_in_order(shop: Shop) -> None:
    first, second, waiting = bury(shop, "1"), bury(shop, None, "no id"), park(shop, "2")
    with begun(shop) as connection:
        dead, parked = letters.dead_letters(connection), letters.parked(connection)
    assert [(each.pk, each.id, each.state) for each in dead] == [
        (first, "1", "dead"),
        (second, None, "dead"),
    ]
    assert [(each.pk, each.id, each.state, each.held) for each in parked] == [
        (waiting, "2", "waiting", False)
    ]
    (letter, _) = dead
    assert (letter.consumer, letter.reason, letter.attempts, letter.crashes) == ("shop", "rejected", 8, 2)
    assert (letter.size, letter.origin, letter.message) == (6, {"queue": "payments"}, None)
    assert letter.error == "Traceback\nValueError: no"
    assert letter.first_at.tzinfo is not None


@SYNC
def test_a_letter_has_its_message_byte_for_byte(shop: Shop) -> None:
    pk = bury(shop, "1")
    with begun(shop) as connection:
        letter = letters.letter(connection, pk)
        assert letters.letter(connection, uuid4()) is None
    assert letter is not None
    assert letter.message is not None
    assert letter.message.body == b"body\x00\xff"
    assert letter.message.headers == {"text": "t", "bytes": b"\xff"}
    assert letter.message.properties == {"type": "paid"}
    assert (letter.message.id, letter.message.key, letter.message.content_type) == ("1", b"k", "text/plain")


@SYNC
def test_a_tombstone_has_no_size_and_an_empty_body_has_none_of_its_bytes(shop: Shop) -> None:
    bury(shop, "1", body=None)
    bury(shop, "2", body=b"")
    with begun(shop) as connection:
        assert [each.size for each in letters.dead_letters(connection)] == [None, 0]


@SYNC
def test_letters_are_chosen_by_consumer_reason_age_id_and_limit(shop: Shop) -> None:
    old = datetime.now(UTC) - timedelta(days=8)
    a = bury(shop, "a", last_at=old)
    b = bury(shop, "b", "crashed")
    c = bury(shop, "c", consumer="ledger")
    week = timedelta(days=7)
    with begun(shop) as connection:

        def chosen(**which: Any) -> list[UUID]:
            return [each.pk for each in letters.dead_letters(connection, **which)]

        assert chosen(consumer="shop") == [a, b]
        assert chosen(reason="crashed") == [b]
        assert chosen(older_than=week) == [a]
        assert chosen(newer_than=week) == [b, c]
        assert chosen(older_than=timedelta(minutes=5), newer_than=week, consumer="ledger") == [c]
        assert chosen(ids=[c, a]) == [a, c]
        assert chosen(ids=[]) == []
        assert chosen(limit=2) == [a, b]
        assert [each.pk for each in letters.matching(connection, reason="crashed")] == [b]
        with pytest.raises(SetupError, match="no consumer named 'nobody'"):
            chosen(consumer="nobody")


@SYNC
def test_letters_are_found_by_the_beginning_of_their_key(shop: Shop) -> None:
    one, two = UUID("abcdef00-0000-4000-8000-000000000001"), UUID("abcdef00-0000-4000-8000-000000000002")
    for pk in (one, two):
        bury(shop, str(pk.int), pk=pk.bytes)
    with begun(shop) as connection:

        def found(prefix: str) -> list[UUID]:
            return [each.pk for each in letters.find(connection, prefix)]

        assert found("ABC") == [one, two]
        assert found(str(two)) == [two]
        assert found("abd") == []
        for wrong in ("", "xyz", "%", "a" * 33):
            with pytest.raises(SetupError, match="is no id of a letter"):
                found(wrong)


# --- trying again ---------------------------------------------------------------------------------------


@pytest.mark.hazard("H44")
@SYNC
def test_a_retry_makes_a_dead_letter_wait_with_fresh_counts_and_its_own_id_and_claim(shop: Shop) -> None:
    pk = bury(shop, "1", owner=b"o" * 16)
    before = row_of(shop, pk)
    with begun(shop) as connection:
        assert letters.retry(connection, by="ann", why="fixed") == 1
        now = clock(connection)
    after = row_of(shop, pk)
    assert (after.state, after.reason, after.alone, after.owner) == (WAITING, "failed", False, None)
    assert (after.attempts, after.starts, after.crashes, after.lease_until) == (0, 0, 0, None)
    assert after.not_before <= now
    for column in ("seq", "pk", "identity", "owns_claim", "body", "headers", "properties", "origin", "error"):
        assert getattr(after, column) == getattr(before, column)
    assert shop.claims() == 1
    assert entries(shop) == [("ann", "retry", pk.bytes, "rejected", "fixed")]


@pytest.mark.hazard("H44")
@SYNC
def test_a_second_retry_changes_nothing_and_records_nothing(shop: Shop) -> None:
    pk = bury(shop, "1")
    with begun(shop) as connection:
        assert letters.retry(connection, by="ann") == 1
    with begun(shop) as connection:
        connection.execute(update(failed).values(attempts=5, owner=b"o" * 16))
    before = row_of(shop, pk)
    with begun(shop) as connection:
        assert letters.retry(connection, by="ben", ids=[pk]) == 0
        assert letters.drop(connection, by="ben", why="x", ids=[pk]) == 0
    assert row_of(shop, pk) == before
    assert len(entries(shop)) == 1


@pytest.mark.hazard("H44")
@SYNC
def test_of_two_people_at_once_one_wins_each_letter(shop: Shop) -> None:
    pks = [bury(shop, str(number)) for number in range(40)]
    together = Barrier(2)

    def act(name: str) -> int:
        together.wait(90)
        with begun(shop) as connection:
            if name == "ann":
                return letters.retry(connection, by=name, ids=pks)
            return letters.drop(connection, by=name, why="old", ids=list(reversed(pks)))

    with ThreadPoolExecutor(2) as pool:
        done = dict(zip(("ann", "ben"), pool.map(act, ("ann", "ben")), strict=True))
    assert sorted(done.values()) == [0, 40]
    assert len(shop.dead()) == done["ann"]
    winner = max(done, key=lambda name: done[name])
    assert {(who, pk) for who, _, pk, _, _ in entries(shop)} == {(winner, pk.bytes) for pk in pks}


@pytest.mark.hazard("H44")
@pytest.mark.hazard("S8")
@SYNC
def test_what_the_caller_rolls_back_was_neither_retried_nor_recorded(shop: Shop) -> None:
    pk = bury(shop, "1")
    before = row_of(shop, pk)
    with shop.engine.connect() as connection:
        assert letters.retry(connection, by="ann") == 1
        connection.rollback()
    assert row_of(shop, pk) == before
    assert entries(shop) == []


@pytest.mark.hazard("S8")
@on(("postgres", "psycopg"), ("sqlite", "pysqlite"))
def test_a_connection_that_commits_every_statement_is_refused(shop: Shop) -> None:
    bury(shop, "1")
    engine = create_engine(shop.url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection, pytest.raises(SetupError, match="AUTOCOMMIT"):
        letters.drop(connection, by="ann", why="old")
    engine.dispose()
    assert len(shop.dead()) == 1


@pytest.mark.hazard("H30")
@SYNC
def test_a_conflict_is_never_run_under_its_old_id(shop: Shop) -> None:
    conflict, other = bury(shop, "1", CONFLICT), bury(shop, "2")
    before = row_of(shop, conflict)
    with begun(shop) as connection:
        assert letters.retry(connection, by="ann", force=True, ids=[conflict]) == 0
        assert letters.retry(connection, by="ann", force=True) == 1
    assert row_of(shop, conflict) == before
    assert row_of(shop, other).state == WAITING
    assert letters.refusal(CONFLICT, force=True) is not None


@SYNC
def test_what_broke_its_transaction_is_retried_only_by_force(shop: Shop) -> None:
    pk = bury(shop, "1", BROKE)
    with begun(shop) as connection:
        assert letters.retry(connection, by="ann") == 0
        assert letters.retry(connection, by="ann", force=True) == 1
    assert row_of(shop, pk).owns_claim
    assert letters.refusal(BROKE) is not None
    assert letters.refusal(BROKE, force=True) is None


@SYNC
def test_what_has_no_id_waits_without_a_claim(shop: Shop) -> None:
    for reason in ("no id", "unreadable", "too old", "undated"):
        bury(shop, None, reason)
    with begun(shop) as connection:
        assert letters.retry(connection, by="ann") == 4
    assert [(row.state, row.owns_claim) for row in shop.dead()] == [(WAITING, False)] * 4
    assert shop.claims() == 0


@SYNC
def test_a_limit_retries_those_that_came_first_and_many_are_done_in_one_transaction(shop: Shop) -> None:
    pk = bury(shop, "0")
    first = {**row_of(shop, pk)._mapping}
    del first["seq"]
    copies = [{**first, "pk": uuid4().bytes, "identity": uuid4().bytes} for _ in range(1_200)]
    with begun(shop) as connection:
        connection.execute(insert(failed), copies)
        assert letters.retry(connection, by="ann", limit=1) == 1
    assert row_of(shop, pk).state == WAITING
    with begun(shop) as connection:
        assert letters.retry(connection, by="ann", consumer="shop") == 1_200
        assert connection.scalar(select(func.count()).select_from(audit)) == 1_201


def test_the_same_through_an_async_engine(tmp_path: Any) -> None:
    async def work() -> int:
        engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path / 'shop.db'}")
        async with engine.begin() as connection:
            await connection.run_sync(migrate.upgrade)
            await connection.run_sync(lambda sync: names.register(sync, "shop"))
        async with engine.begin() as connection:
            done = await connection.run_sync(lambda sync: letters.retry(sync, by="ann", consumer="shop"))
        await engine.dispose()
        return done

    assert asyncio.run(work()) == 0


# --- dropping -------------------------------------------------------------------------------------------


@SYNC
def test_a_drop_deletes_the_letter_and_leaves_its_claim(shop: Shop) -> None:
    dropped, kept, waiting = bury(shop, "1"), bury(shop, "2", "crashed"), park(shop, "3")
    with begun(shop) as connection:
        assert letters.drop(connection, by="ann", why="spam\0\udc80", reason="rejected") == 1
        (entry,) = letters.history(connection, dropped)
    assert {UUID(bytes=row.pk) for row in shop.dead()} == {kept, waiting}
    assert shop.claims() == 3
    assert (entry.who, entry.action, entry.reason, entry.why) == ("ann", "drop", "rejected", "spam ?")


@SYNC
@pytest.mark.parametrize("empty", ["", "  ", "\0"])
def test_a_drop_without_a_reason_and_anything_by_nobody_is_refused(shop: Shop, empty: str) -> None:
    bury(shop, "1")
    with begun(shop) as connection:
        with pytest.raises(SetupError, match="say why"):
            letters.drop(connection, by="ann", why=empty)
        with pytest.raises(SetupError, match="say who"):
            letters.retry(connection, by=empty)
    assert len(shop.dead()) == 1


# --- the overview ---------------------------------------------------------------------------------------


@SYNC
def test_status_counts_each_consumer_by_itself(shop: Shop) -> None:
    attempts = shop.attempts()
    for number in range(3):
        attempts(message(f"done {number}"))
    bury(shop, "dead")
    bury(shop, "other", CONFLICT)
    old = datetime.now(UTC) - timedelta(days=2)
    due = datetime.now(UTC) + timedelta(minutes=1)
    park(shop, "first", first_at=old, starts=0)
    park(shop, "second", not_before=due)
    park(shop, "run now", not_before=due - AGO, owner=b"o" * 16, starts=0)
    shop.number("idle")
    with begun(shop) as connection:
        idle, here = status(connection)
    assert (here.consumer, here.processed, here.precision) == ("shop", 3, "exact")
    assert (here.parked, here.suspects, here.dead) == (3, 1, 2)
    assert here.oldest_waiting is not None
    assert abs(here.oldest_waiting - old) < timedelta(seconds=1)
    assert here.next_due is not None
    assert abs(here.next_due - due) < timedelta(seconds=1)
    assert idle == replace(
        here,
        consumer="idle",
        processed=0,
        parked=0,
        suspects=0,
        dead=0,
        oldest_waiting=None,
        next_due=None,
    )


@SYNC
def test_what_was_dropped_does_not_count_as_processed(shop: Shop) -> None:
    bury(shop, "1")
    with begun(shop) as connection:
        letters.drop(connection, by="ann", why="spam")
        (here,) = status(connection)
    assert (here.processed, here.dead, shop.claims()) == (0, 0, 1)


@on(("sqlite", "pysqlite"), ("mariadb", "pymysql"), ("mysql", "pymysql"))
def test_too_many_claims_to_count_are_a_lower_bound(shop: Shop) -> None:
    for number in range(5):
        bury(shop, str(number))
    with begun(shop) as connection:
        connection.execute(failed.delete())
        (here,) = status(connection, counted=3)
    assert (here.processed, here.precision) == (4, "at least")


@pytest.mark.parametrize("parts", ["", " PARTITION BY HASH (id)"])
@on(("postgres", "psycopg"), own=True)
def test_too_many_claims_to_count_are_estimated_from_a_part(
    shop: Shop, parts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    many, few = shop.number("many"), shop.number("few")
    with begun(shop) as connection:
        if parts:
            connection.execute(text("ALTER TABLE idemq_processed RENAME TO old"))
            connection.execute(text(f"CREATE TABLE idemq_processed (LIKE old){parts}"))
            for rest in (0, 1):
                connection.execute(
                    text(
                        f"CREATE TABLE part{rest} PARTITION OF idemq_processed"
                        f" FOR VALUES WITH (MODULUS 2, REMAINDER {rest})"
                    )
                )
        connection.execute(
            text(
                "INSERT INTO idemq_processed (consumer, id, at) SELECT CASE WHEN n % 10 = 0 THEN :few ELSE"
                " :many END, gen_random_uuid(), now() FROM generate_series(1, 100000) n"
            ),
            {"many": many, "few": few},
        )
    monkeypatch.setattr(status_module, "SAMPLED_PAGES", 300)
    with begun(shop) as connection:
        found = {each.consumer: each for each in status(connection, counted=1_000)}
        exact = {each.consumer: each for each in status(connection)}
    assert {each.precision for each in found.values()} == {"estimate"}
    assert (exact["many"].processed, exact["few"].processed) == (90_000, 10_000)
    assert 60_000 < found["many"].processed < 120_000
    assert 6_000 < found["few"].processed < 14_000
