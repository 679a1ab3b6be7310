"""Failures are rows: what is parked or dead is there once, whole, and runs again at most once."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, event, insert, select, text, update
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session
from tenacity import Retrying, stop_after_attempt, stop_after_delay, wait_fixed

from idemq import App, letters, migrate, schema
from idemq.attempts import SyncUnit
from idemq.errors import Reject, RetryLater
from idemq.failures import RELEASED, Outcome
from idemq.ledger import clock
from idemq.message import Dead, Message, Parked, Release, Verdict, key_of
from idemq.packing import packed
from idemq.parking import Found
from idemq.process import CONTENDED
from tests.core_tools import (
    DRIVERS,
    NOWHERE,
    OWNER,
    PROCESSED,
    REPEATED,
    Attempts,
    Shop,
    effects,
    message,
    on,
    unpacked,
    write,
)
from tests.sins.handlers import Scene
from tests.test_process import backend, terminate

DATABASES = [("sqlite", "pysqlite"), ("postgres", "psycopg"), ("mariadb", "pymysql")]
SERVERS = [
    ("postgres", "psycopg"),
    ("postgres", "psycopg async"),
    ("postgres", "asyncpg"),
    ("mariadb", "pymysql"),
    ("mariadb", "asyncmy"),
]

#: Three attempts, a minute apart.
POLICY = Retrying(stop=stop_after_attempt(3), wait=wait_fixed(60))

OTHER = b"another owner..."
LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)


@dataclass
class Part:
    """A handler whose behaviour the test changes between attempts."""

    act: Callable[[Message, Session], object] = write
    calls: int = 0

    def __call__(self, given: Message, session: Session) -> object:
        self.calls += 1
        return self.act(given, session)


@dataclass
class Numbers:
    n: list[int]


def failing(given: Message, session: Session) -> None:
    write(given, session)
    raise ValueError("on purpose")


def commit_early(session: Session, shop: Shop) -> None:
    """COMMIT through the driver, where nothing can refuse it."""
    Scene(session, session.connection(), b"", shop.kind, shop.url).driver_sql("COMMIT")


def claim_row(shop: Shop, key: bytes) -> Any:
    """The claim's time and what names its attempt."""
    table = schema.table("idemq_processed")
    token = text("xmin::text AS token") if shop.kind == "postgresql" else table.c.token
    with shop.engine.connect() as connection:
        return connection.execute(select(table.c.at, token).where(table.c.id == key)).one()


WHOLE = Message(
    id="1",
    body=b"\x00\xff effect",
    key=b"\x00key",
    content_type="text/plain",
    content_encoding="identity",
    headers={
        "raw": b"\xff\x00",
        "nested": {"a": [1, None, True]},
    },
    properties={"correlation_id": "c", "priority": 3},
    origin={"queue": "q", "routing_key": "r"},
    sent_at=datetime(2031, 5, 6, 7, 8, 9, tzinfo=UTC),
    repeated=frozenset({"b", "a"}),
)


@pytest.mark.hazard("H44")
@pytest.mark.hazard("H23")
@on()
def test_a_long_wait_is_a_row_with_its_claim_that_absorbs_every_copy(shop: Shop) -> None:
    part = Part(failing)
    attempts, elsewhere = shop.attempts(part, retry=POLICY), shop.attempts(Part(), retry=POLICY)
    given = message("1", b"\x00\xff effect")
    part.act = lambda given, session: failing(message(body=b"undone"), session)
    parked = attempts(WHOLE)
    assert parked == Parked("failed", 60.0, "ValueError: on purpose")
    (row,) = shop.dead()
    assert (row.state, row.reason, row.attempts, row.starts, row.crashes) == (1, "failed", 1, 0, 0)
    assert (row.owns_claim, row.identity, row.owner, row.alone) == (True, key_of("1"), None, False)
    assert (row.body, row.headers) == (WHOLE.body, packed(WHOLE.headers))
    assert unpacked(row.properties).items() >= WHOLE.properties.items()
    assert unpacked(row.origin) == WHOLE.origin
    assert row.not_before - row.first_at == timedelta(seconds=60)
    assert "on purpose" in row.error
    assert (shop.claims(), shop.effects()) == (1, [])
    assert [attempts(given), elsewhere(given)] == [REPEATED] * 2
    assert attempts.again() == elsewhere.again() == []  # it is not due

    for count, reason in ((2, "failed"), (3, "retries used up")):
        shop.time_passes()
        (verdict,) = attempts.again(OTHER)
        assert verdict == (Dead(reason) if count == 3 else Parked(reason, 60.0, "ValueError: on purpose"))
        (later,) = shop.dead()
        assert (later.pk, later.reason, later.attempts, later.state) == (row.pk, reason, count, count - 1)
        assert (later.owner, later.body, later.headers) == (None, row.body, row.headers)
        assert [attempts(given), elsewhere(given)] == [REPEATED] * 2
    shop.time_passes()
    assert attempts.again() == elsewhere.again() == []
    assert (shop.claims(), shop.effects(), len(shop.dead())) == (1, [], 1)


@on(*DATABASES)
def test_a_parked_message_reaches_the_handler_as_it_came(shop: Shop) -> None:
    got: list[Message] = []

    def keeping(given: Message, session: Session) -> None:
        got.append(given)
        if len(got) == 1:
            raise ValueError("on purpose")

    attempts = shop.attempts(keeping, retry=POLICY)
    without = Message(id=None, body=None, headers={"message-id": "2"})
    for given in (WHOLE, without):
        got.clear()
        assert isinstance(attempts(given), Parked)
        shop.time_passes()
        assert attempts.again() == [PROCESSED]
        assert got[0] == got[1]


@pytest.mark.hazard("H44")
@on()
def test_a_retry_renews_the_claim_and_deletes_its_row_with_the_work(shop: Shop) -> None:
    part = Part(failing)
    attempts = shop.attempts(part, retry=POLICY)
    assert isinstance(attempts(message()), Parked)
    with shop.engine.begin() as connection:
        connection.execute(update(schema.table("idemq_processed")).values(at=LONG_AGO))
    before = claim_row(shop, key_of("1"))
    shop.time_passes()
    part.act = write
    assert attempts.again() == [PROCESSED]
    after = claim_row(shop, key_of("1"))
    assert after.token not in (None, before.token)
    assert (after.at - LONG_AGO).days > 365
    assert (shop.effects(), shop.claims(), shop.dead()) == (["effect"], 1, [])
    assert attempts(message()) == REPEATED


@on(*DATABASES)
def test_attempts_and_time_are_counted_over_parking(shop: Shop) -> None:
    short = Retrying(stop=stop_after_delay(100), wait=wait_fixed(2))
    attempts = shop.attempts(failing, retry=short)
    assert isinstance(attempts(message()), Parked)
    for count in (2, 3, 4):
        shop.time_passes()
        assert attempts.again() == [Parked("failed", 2.0, "ValueError: on purpose")]
        assert shop.dead()[0].attempts == count
    with shop.engine.connect() as connection:
        now = clock(connection)
    shop.change_rows(first_at=now - timedelta(seconds=101))
    shop.time_passes()
    assert attempts.again() == [Dead("retries used up")]


@on()
def test_short_waits_stay_in_the_worker_and_count(shop: Shop) -> None:
    quick = Retrying(stop=stop_after_attempt(3), wait=wait_fixed(0.5))
    attempts = shop.attempts(failing, retry=quick)
    job = attempts.consumer.job(message())
    for count in (1, 2):
        assert attempts(job) == Release("ValueError: on purpose", failed=True, delay=0.5)
        assert job.failures == count
        assert (shop.claims(), shop.dead()) == (0, [])
    assert attempts(job) == Dead("retries used up")
    (row,) = shop.dead()
    assert (row.attempts, row.owns_claim, shop.claims()) == (3, True, 1)


@on(*DATABASES)
def test_a_broken_policy_loses_nothing_and_pauses_nobody(shop: Shop) -> None:
    def broken(*_: object) -> float:
        raise RuntimeError("the policy's own fault")

    attempts = shop.attempts(failing, retry=Retrying(stop=stop_after_attempt(9), wait=broken))
    job = attempts.consumer.job(message())
    for _ in range(2):
        verdict = attempts(job)
        assert isinstance(verdict, Release)
        assert verdict.failed
        assert not verdict.outage
    assert isinstance(attempts(job), Parked)
    assert shop.dead()[0].attempts == 3


@on()
def test_later_counts_nothing_and_a_rejection_buries_the_same_row(shop: Shop) -> None:
    def not_yet(given: Message, session: Session) -> None:
        write(given, session)
        raise RetryLater(30, "no customer yet")

    def rejecting(given: Message, session: Session) -> None:
        write(given, session)
        raise Reject("never")

    part = Part(not_yet)
    attempts = shop.attempts(part, retry=POLICY)
    assert attempts(message()) == Parked("later", 30.0, "RetryLater: no customer yet")
    (row,) = shop.dead()
    for _ in range(5):
        shop.time_passes()
        assert attempts.again() == [Parked("later", 30.0, "RetryLater: no customer yet")]
    assert [(row.attempts, row.state, row.reason) for row in shop.dead()] == [(0, 1, "later")]
    shop.time_passes()
    part.act = rejecting
    assert attempts.again() == [Dead("rejected")]
    assert [(each.pk, each.state, each.owns_claim) for each in shop.dead()] == [(row.pk, 2, True)]
    assert (attempts(message()), shop.effects(), shop.claims()) == (REPEATED, [], 1)


def sync_engine(engine: Engine | AsyncEngine) -> Engine:
    return engine.sync_engine if isinstance(engine, AsyncEngine) else engine


class Fault:
    """Something goes wrong at one step of what the engine does, once."""

    def __init__(self, engine: Engine | AsyncEngine, how: str) -> None:
        self.left: int | None = None
        self.how = how
        target = sync_engine(engine)
        event.listen(target, "before_cursor_execute", lambda connection, *_: self._step(connection))
        event.listen(target, "after_cursor_execute", lambda connection, *_: self._step(connection))
        event.listen(target, "begin", self._step)
        event.listen(target, "commit", self._step)

    def _step(self, connection: Any) -> None:
        if self.left is None:
            return
        self.left -= 1
        if self.left < 0:
            self.left = None
            if self.how == "raise":
                raise RuntimeError("a fault on purpose")
            connection.invalidate()


@pytest.mark.hazard("H44")
@pytest.mark.parametrize("how", ["raise", "lose the connection"])
@on()
def test_a_fault_between_any_two_steps_leaves_one_row_or_the_work(shop: Shop, how: str) -> None:
    part = Part(failing)
    engine = shop.new_engine()
    fault = Fault(engine, how)
    attempts = shop.attempts(part, retry=POLICY, engine=engine)
    calm = shop.attempts(part, retry=POLICY)
    done = 0
    for step in range(60):
        given = message(str(step), str(step).encode())
        part.act, fault.left = failing, step
        first = attempts(given)
        faulty, fault.left = fault.left is None, None
        for again in (given, given):  # the broker delivers it once more, whatever became of it
            part.act = failing
            calm(again)
        assert (len(shop.dead()), shop.claims()) == (1, done + 1), (step, first)
        part.act = write
        shop.time_passes()
        fault.left = step
        with suppress(AssertionError):  # a look that failed finds nothing
            attempts.again()
        faulty, fault.left = faulty or fault.left is None, None
        for _ in range(3):  # whoever had it died with it
            shop.time_passes()
            calm.again(OTHER, inline=True)
        done += 1
        assert (shop.dead(), shop.claims()) == ([], done), step
        assert shop.effects() == [str(each) for each in range(done)], step
        if not faulty:
            break
    assert 8 < done < 60


@pytest.mark.hazard("H3")
@pytest.mark.hazard("H44")
@pytest.mark.parametrize("then", ["returns", "raises", "rejects"])
@on(*(pair for pair in DRIVERS if pair[1] != "asyncmy"))
def test_a_retry_that_commits_early_is_one_dead_letter_and_never_run_again(shop: Shop, then: str) -> None:
    def early(given: Message, session: Session) -> None:
        write(given, session)
        commit_early(session, shop)
        if then != "returns":
            raise (ValueError("after its early commit") if then == "raises" else Reject("never"))

    part = Part(failing)
    attempts = shop.attempts(part, retry=POLICY)
    released = attempts.consumer.job(message("2", b"other"))
    released.outcome = Outcome(RELEASED, None, 0.0)
    assert isinstance(attempts(message()), Parked)
    assert isinstance(attempts(released), Parked)
    first = shop.dead()
    part.act, part.calls = early, 0
    shop.time_passes()
    assert attempts.again() == [Dead("broke its transaction")] * 2
    rows = shop.dead()
    assert [(row.state, row.reason, row.owns_claim) for row in rows] == [
        (2, "broke its transaction", True)
    ] * 2
    assert [row.body for row in rows] == [row.body for row in first]
    assert [row.headers for row in rows] == [row.headers for row in first]
    assert rows[0].attempts >= 1
    assert (shop.effects(), shop.claims(), part.calls) == (["effect", "other"], 2, 2)
    shop.time_passes()
    assert [attempts(message()), attempts(message("2", b"other")), *attempts.again()] == [REPEATED] * 2
    assert part.calls == 2


@on(*DATABASES)
def test_a_broken_transaction_is_written_down_whatever_the_limit_is_now(shop: Shop) -> None:
    def early(given: Message, session: Session) -> None:
        write(given, session)
        commit_early(session, shop)

    given = message(headers={"h": b"x" * 3000})
    assert isinstance(shop.attempts(failing, retry=POLICY)(given), Parked)
    shop.time_passes()
    assert shop.attempts(early, retry=POLICY, max_kept=1024).again() == [Dead("broke its transaction")]


@on()
def test_without_its_lease_nothing_runs_and_nothing_is_written(shop: Shop) -> None:
    part = Part(failing)
    attempts, elsewhere = shop.attempts(part, retry=POLICY), shop.attempts(part, retry=POLICY)
    assert isinstance(attempts(message()), Parked)
    released = attempts.consumer.job(message("2"))
    released.outcome = Outcome(RELEASED, None, 0.0)
    assert isinstance(attempts(released), Parked)
    for act in (failing, write):
        shop.time_passes()
        shop.change_rows(starts=0)
        part.act, part.calls = act, 0
        late = attempts.look(OWNER)
        assert len(late) == 2
        shop.change_rows(owner=OTHER)
        before = shop.dead()
        assert [attempts(job) for job in late] == [REPEATED] * 2
        assert (part.calls, shop.dead(), shop.effects()) == (0, before, [])
        shop.change_rows(owner=None)
    shop.time_passes()
    assert elsewhere.again(OTHER) == [PROCESSED] * 2
    assert [attempts(job) for job in late] == [REPEATED] * 2
    assert (part.calls, shop.dead(), shop.claims()) == (2, [], 2)


@on(*DATABASES)
def test_an_outcome_without_its_lease_changes_nothing(shop: Shop) -> None:
    attempts = shop.attempts(failing, retry=POLICY)
    assert isinstance(attempts(message()), Parked)
    shop.time_passes()
    (job,) = attempts.look()
    job.outcome = Outcome("rejected", ValueError("too late"))
    shop.change_rows(owner=OTHER)
    before = shop.dead()
    assert (attempts(job), shop.dead()) == (REPEATED, before)


@pytest.mark.hazard("H29")
@on(*DATABASES, ("postgres", "asyncpg"), ("mariadb", "asyncmy"))
def test_many_who_pick_at_the_same_moment_run_each_message_once(shop: Shop) -> None:
    count = 40
    part = Part(failing)
    attempts = shop.attempts(part, retry=POLICY)
    for number in range(count):
        assert isinstance(attempts(message(str(number), str(number).encode())), Parked)
    part.act = write
    shop.time_passes()
    start = threading.Barrier(4)
    pickers = [shop.attempts(part, retry=POLICY) for _ in range(4)]

    def run(picker: Attempts, owner: bytes) -> list[Verdict]:
        start.wait(90)
        found: list[Verdict] = []
        for _ in range(200):
            for job in picker.look(owner, 3):
                verdict = picker(job)
                while isinstance(verdict, Release):  # they may be in each other's way
                    assert (verdict.failed, verdict.outage) == (False, False), verdict
                    verdict = picker(job)
                found.append(verdict)
            if not any(row.owner is None for row in shop.dead()):
                return found
        raise AssertionError("there is no end to it")

    with ThreadPoolExecutor(4) as threads:
        owners = [bytes([number]) * 16 for number in range(4)]
        verdicts = [verdict for found in threads.map(run, pickers, owners) for verdict in found]
    assert verdicts == [PROCESSED] * count
    assert sorted(shop.effects()) == sorted(str(number) for number in range(count))
    assert (shop.dead(), shop.claims()) == ([], count)


@on()
def test_what_is_given_back_is_due_at_once_and_no_suspect(shop: Shop) -> None:
    part = Part(failing)
    attempts = shop.attempts(part, retry=POLICY)
    assert isinstance(attempts(message()), Parked)
    shop.time_passes()
    (late,) = attempts.look()
    assert attempts.look(OTHER) == []
    attempts.give_back(OTHER)
    assert attempts.look(OTHER) == []
    attempts.give_back()
    part.act = write
    assert attempts.again(OTHER) == [PROCESSED]
    assert attempts(late) == REPEATED
    assert (part.calls, shop.dead()) == (2, [])


@pytest.mark.hazard("H21")
@on()
def test_a_lease_that_ends_makes_a_suspect_that_only_a_run_alone_can_take_up(shop: Shop) -> None:
    part = Part(failing)
    attempts = shop.attempts(part, retry=POLICY)
    assert isinstance(attempts(message()), Parked)
    shop.time_passes()
    assert len(attempts.look()) == 1
    assert attempts.look(OTHER) == []  # its lease lasts
    shop.time_passes()
    assert attempts.look(OTHER, reap=False) == []
    assert shop.dead()[0].owner == OWNER
    assert attempts.look(OTHER) == []
    (row,) = shop.dead()
    assert (row.starts, row.crashes, row.owner, row.reason) == (1, 0, None, "failed")
    assert attempts.look(OTHER) == []
    part.act = write
    assert attempts.again(OTHER, alone=True) == [PROCESSED]
    assert (shop.effects(), shop.dead()) == (["effect"], [])


@pytest.mark.hazard("H21")
@on()
def test_what_ends_its_process_again_and_again_while_alone_is_dead_with_its_claim(shop: Shop) -> None:
    part = Part(failing)
    attempts = shop.attempts(part, retry=POLICY, max_crashes=3)
    job = attempts.consumer.suspect(message(redelivered=True))
    innocent = message("innocent", b"innocent")
    assert attempts(job) == Parked("suspect", 0.0)
    for crashes in range(1, 4):
        (row,) = shop.dead()
        assert (row.starts > 0, row.crashes, row.state) == (True, crashes - 1, 1)
        assert len(attempts.look(alone=True)) == 1  # and its process dies
        assert shop.dead()[0].alone
        shop.time_passes()
        found = attempts.again(OTHER)
        assert found == ([Dead("crashed")] if crashes == 3 else [])
    (row,) = shop.dead()
    assert (row.state, row.reason, row.crashes, row.owns_claim, row.alone) == (2, "crashed", 3, True, False)
    assert (attempts(message()), shop.claims(), part.calls) == (REPEATED, 1, 0)
    part.act = write
    assert attempts(innocent) == PROCESSED


@on(*SERVERS)
def test_a_message_that_is_being_run_is_not_taken_away_although_its_lease_has_ended(shop: Shop) -> None:
    part = Part(failing)
    attempts, elsewhere = shop.attempts(part, retry=POLICY), shop.attempts(part, retry=POLICY)
    assert isinstance(attempts(message()), Parked)
    shop.time_passes()
    (job,) = attempts.look()
    shop.time_passes()

    def running(given: Message, session: Session) -> None:
        for how in ({}, {"alone": True}, {"inline": True}):
            assert threads.submit(elsewhere.look, OTHER, **how).result(20) == []
        write(given, session)

    part.act = running
    with ThreadPoolExecutor(1) as threads:
        assert attempts(job) == PROCESSED
    assert (shop.effects(), shop.dead()) == (["effect"], [])


@on()
def test_a_suspect_that_fails_in_order_is_no_suspect_any_more(shop: Shop) -> None:
    part = Part(failing)
    attempts = shop.attempts(part, retry=POLICY)
    assert isinstance(attempts(attempts.consumer.suspect(message())), Parked)
    assert attempts.again(alone=True) == [Parked("failed", 60.0, "ValueError: on purpose")]
    (row,) = shop.dead()
    assert (row.starts, row.attempts, row.owner) == (0, 1, None)
    shop.time_passes()
    part.act = write
    assert attempts.again() == [PROCESSED]


@pytest.mark.hazard("H21")
@on()
def test_a_redelivered_message_is_parked_unread_with_its_claim(shop: Shop) -> None:
    engine = shop.new_engine()
    app, reached = App(engine), []

    def handler(given: Numbers) -> None:
        reached.append(given)

    async def async_handler(given: Numbers) -> None:
        reached.append(given)

    app.consumer("shop", NOWHERE, max_kept=1024)(async_handler if shop.asynchronous else handler)
    consumer = app.consumers["shop"].consumer
    attempts = shop.attempts(consumer=consumer, engine=engine)
    assert attempts(message("done", b'{"n": [0]}')) == PROCESSED
    unread = message("1", b"{\xff", redelivered=True)
    assert attempts(consumer.suspect(unread)) == Parked("suspect", 0.0)
    assert (shop.dead()[0].body, shop.dead()[0].starts, shop.claims()) == (b"{\xff", 1, 2)
    assert [attempts(consumer.suspect(unread)), attempts(unread)] == [REPEATED] * 2
    assert attempts(consumer.suspect(message("done", b'{"n": [0]}'))) == REPEATED
    assert attempts(consumer.suspect(message("done", b'{"n": [9]}'))) == Dead("conflict")
    assert attempts.again() == []  # only alone
    assert attempts.again(alone=True) == [Dead("unreadable")]
    large = message("large", b'{"n": [' + b"1," * 600 + b"1]}")
    assert attempts(consumer.suspect(large)) == PROCESSED
    assert attempts(consumer.suspect(message(None))) == Dead("no id")
    assert sorted(shop.reasons()) == ["conflict", "no id", "unreadable"]
    assert len(reached) == 2


def release(attempts: Attempts, given: Message) -> Verdict:
    """Park it without a claim, as the worker does whose twin keeps it too long."""
    job = attempts.consumer.job(given)
    job.outcome = Outcome(RELEASED, None, 0.0)
    return attempts(job)


@pytest.mark.hazard("H26")
@on()
def test_a_message_parked_without_its_claim_takes_it_when_it_runs(shop: Shop) -> None:
    part = Part()
    attempts, elsewhere = shop.attempts(part, retry=POLICY), shop.attempts(part, retry=POLICY)
    for _ in range(2):
        assert release(attempts, message()) == Parked("released", 0.0)
    assert [(row.copies, row.owns_claim, row.reason) for row in shop.dead()] == [(2, False, "released")]
    assert shop.claims() == 0
    assert attempts.again() == [PROCESSED]
    assert (shop.dead(), shop.claims(), shop.effects()) == ([], 1, ["effect"])

    assert release(attempts, message()) == Parked("released", 0.0)
    assert attempts.again() == [REPEATED]
    assert release(attempts, message("2", b"theirs")) == Parked("released", 0.0)
    (late,) = attempts.look()
    assert elsewhere(message("2", b"theirs")) == PROCESSED
    assert attempts(late) == REPEATED
    assert (shop.dead(), shop.effects()) == ([], ["effect", "theirs"])

    assert release(attempts, message("2", b"mine")) == Parked("released", 0.0)
    for _ in range(2):
        assert attempts.again() in ([Dead("conflict")], [])
    assert elsewhere(message("2", b"mine")) == Dead("conflict")
    assert [(row.reason, row.body, row.copies) for row in shop.dead()] == [("conflict", b"mine", 2)]
    assert (part.calls, shop.effects()) == (2, ["effect", "theirs"])


@on()
def test_its_failure_makes_it_the_owner_of_its_claim(shop: Shop) -> None:
    part = Part(failing)
    attempts = shop.attempts(part, retry=POLICY)
    assert release(attempts, message()) == Parked("released", 0.0)
    assert attempts.again() == [Parked("failed", 60.0, "ValueError: on purpose")]
    (row,) = shop.dead()
    assert (row.owns_claim, row.identity, row.attempts, shop.claims()) == (True, key_of("1"), 1, 1)
    assert attempts(message()) == REPEATED
    shop.time_passes()
    part.act = write
    assert attempts.again() == [PROCESSED]
    assert (shop.effects(), shop.dead()) == (["effect"], [])


@pytest.mark.hazard("H25")
@on(*DATABASES)
def test_a_letter_without_id_is_judged_anew_by_the_consumers_rule(shop: Shop) -> None:
    part = Part()
    before = shop.attempts(part)
    given = message(None, headers={"order": "A-1", "x": b"\xff"})
    assert before(given) == Dead("no id")
    (row,) = shop.dead()

    def retried() -> None:
        with shop.engine.begin() as connection:
            assert letters.retry(connection, by="me") == 1

    retried()
    assert before.again() == [Dead("no id")]
    assert [(each.pk, each.state, each.owns_claim) for each in shop.dead()] == [(row.pk, 2, False)]
    retried()
    after = shop.attempts(part, id="order")
    assert after.again() == [PROCESSED]
    assert (shop.dead(), shop.claims(), part.calls) == ([], 1, 1)
    assert claim_row(shop, key_of("A-1"))
    assert after(given) == REPEATED
    assert before(given) == Dead("no id")
    retried()
    assert after.again() == [REPEATED]
    assert (shop.dead(), shop.effects()) == ([], ["effect"])


@pytest.mark.hazard("H30")
@on(*DATABASES)
def test_a_conflict_is_never_run_under_its_old_id(shop: Shop) -> None:
    attempts = shop.attempts()
    assert [attempts(message(body=body)) for body in (b"a", b"b")] == [PROCESSED, Dead("conflict")]
    with shop.engine.begin() as connection:
        assert letters.retry(connection, by="me", force=True) == 0
    shop.change_rows(state=1, not_before=LONG_AGO)
    assert attempts.again() == [Dead("conflict")]
    assert (shop.effects(), shop.reasons()) == (["a"], ["conflict"])


def set_horizon(shop: Shop, moment: datetime) -> None:
    with shop.engine.begin() as connection:
        connection.execute(update(schema.table("idemq_consumers")).values(horizon=moment))


@pytest.mark.hazard("H15")
@on()
def test_what_may_have_been_forgotten_is_not_run_whichever_way_it_comes(shop: Shop) -> None:
    part = Part()
    attempts = shop.attempts(part)
    horizon = datetime.now(UTC).replace(microsecond=0) - timedelta(days=8)
    assert attempts(message("claimed", sent_at=horizon)) == PROCESSED
    set_horizon(shop, horizon)
    assert attempts(message("claimed", sent_at=horizon)) == REPEATED
    assert attempts(message("newer", sent_at=horizon + timedelta(seconds=1))) == PROCESSED
    assert attempts(message("without")) == PROCESSED
    assert part.calls == 3
    for id, sent_at in (("equal", horizon), ("older", horizon - timedelta(days=100))):
        assert attempts(message(id, sent_at=sent_at)) == Dead("too old")
        assert attempts(message(id, sent_at=sent_at)) == REPEATED
    suspect = message("suspect", sent_at=horizon, redelivered=True)
    assert attempts(attempts.consumer.suspect(suspect)) == Dead("too old")
    claimed = message("claimed", sent_at=horizon, redelivered=True)
    assert attempts(attempts.consumer.suspect(claimed)) == REPEATED
    assert release(attempts, message("released", sent_at=horizon)) == Parked("released", 0.0)
    assert attempts.again() == [Dead("too old")]
    assert shop.reasons() == ["too old"] * 4
    assert all(row.owns_claim and row.state == 2 for row in shop.dead())
    assert (part.calls, shop.claims()) == (3, 7)
    with shop.engine.begin() as connection:  # somebody looked at them and knows better
        assert letters.retry(connection, by="me", limit=1) == 1
    assert attempts.again() == [PROCESSED]


@pytest.mark.hazard("H15")
@on(*DATABASES)
def test_what_does_not_say_when_it_was_sent_runs_or_is_kept_as_the_consumer_says(shop: Shop) -> None:
    part = Part()
    runs = shop.attempts(part, name="runs")
    keeps = shop.attempts(part, name="keeps", undated="park")
    now = datetime.now(UTC)
    sent = {"no": None, "future": now + timedelta(minutes=10), "soon": now + timedelta(minutes=4), "now": now}
    for id, sent_at in sent.items():
        given = message(id, sent_at=sent_at)
        assert runs(given) == PROCESSED
        assert keeps(given) == (PROCESSED if id in ("soon", "now") else Dead("undated"))
        assert keeps(given) == REPEATED
    assert keeps(keeps.consumer.suspect(message("suspect"))) == Dead("undated")
    assert release(keeps, message("released")) == Parked("released", 0.0)
    assert keeps.again() == [Dead("undated")]
    assert (shop.reasons(), part.calls) == (["undated"] * 4, 6)
    assert all(row.owns_claim for row in shop.dead())


MOMENTS = [datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC), datetime(2020, 1, 1)]


@pytest.mark.parametrize("moment", MOMENTS, ids=["first", "last", "without a zone"])
@on()
def test_whatever_time_a_message_says_it_was_sent_at_it_is_kept(shop: Shop, moment: datetime) -> None:
    part = Part(failing)
    attempts = shop.attempts(part, retry=POLICY)
    assert isinstance(attempts(message(sent_at=moment)), Parked)
    shop.time_passes()
    part.act = write
    assert attempts.again() == [PROCESSED]


@on(*DATABASES)
def test_a_message_over_the_limit_is_never_cut_and_stays_with_the_broker(shop: Shop) -> None:
    attempts = shop.attempts(failing, retry=POLICY, max_kept=1024)
    for given in (message(body=b"x" * 1100), message(headers={"h": "x" * 1100}), message(None, b"x" * 1100)):
        for _ in range(2):
            verdict = attempts(given)
            assert isinstance(verdict, Release)
            assert verdict.stop
            assert "max_kept" in verdict.cause
    assert (shop.dead(), shop.claims()) == ([], 0)
    assert attempts(message()) == Parked("failed", 60.0, "ValueError: on purpose")


@on()
def test_a_large_message_is_kept_whole_or_named_as_too_large(shop: Shop) -> None:
    def large(given: Message, session: Session) -> None:
        raise Reject("large")

    attempts = shop.attempts(large, retry=POLICY)
    for id, body in (
        ("1", bytes(5 << 20)),
        ("2", b"'\\" * (3 << 20)),
        ("3", b"\xff" * (15 << 20)),
        ("4", b"x" * (7 << 20)),
    ):
        verdict = attempts(message(id, body))
        if isinstance(verdict, Release):
            assert verdict.stop, verdict
            assert "max_allowed_packet" in verdict.cause
            assert shop.kind == "mysql"
            assert id != "4"
        else:
            assert verdict == Dead("rejected")
            assert shop.dead()[-1].body == body


@pytest.mark.hazard("H3")
@on(("postgres", "psycopg"), ("postgres", "psycopg async"), ("postgres", "asyncpg"), own=True)
def test_the_strict_trigger_lets_parking_and_retries_commit_and_no_handler(shop: Shop) -> None:
    with shop.engine.begin() as connection:
        migrate.upgrade(connection, strict=True)

    def early(given: Message, session: Session) -> None:
        write(given, session)
        commit_early(session, shop)

    part = Part(failing)
    attempts = shop.attempts(part, retry=POLICY, trigger=True)
    assert isinstance(attempts(message()), Parked)
    assert release(attempts, message("2", b"second")) == Parked("released", 0.0)
    assert isinstance(attempts(attempts.consumer.suspect(message("3", b"third"))), Parked)
    part.act = early
    shop.time_passes()
    for verdict in attempts.again(inline=True):
        assert isinstance(verdict, Parked), verdict
        assert verdict.reason == "failed"
    assert (shop.effects(), shop.claims(), len(shop.dead())) == ([], 3, 3)
    part.act = write
    shop.time_passes()
    assert attempts.again(inline=True) == [PROCESSED] * 3
    assert (sorted(shop.effects()), shop.dead()) == (["effect", "second", "third"], [])
    assert attempts(message(None)) == Dead("no id")


def asked(verdict: Verdict) -> tuple[bool, bool]:
    """Whether it was counted as a failure, and taken for an outage."""
    assert isinstance(verdict, Release), verdict
    assert not verdict.stop
    return verdict.failed, verdict.outage


def nothing_is_known_of(shop: Shop) -> bool:
    return (shop.claims(), shop.dead(), shop.effects()) == (0, [], [])


@pytest.mark.hazard("H55")
@on(*SERVERS)
def test_a_database_that_cannot_be_reached_is_no_failure_of_the_message(shop: Shop) -> None:
    url, shop.url = shop.url, shop.url.set(port=1)
    engine = shop.new_engine()
    shop.url = url
    attempts = shop.attempts(engine=engine, retry=POLICY)
    for given in (message(), message(None)):
        job = attempts.consumer.job(given)
        for _ in range(3):
            assert asked(attempts(job)) == (False, True)
        assert job.failures == 0
    assert nothing_is_known_of(shop)


@pytest.mark.hazard("H55")
@on(*SERVERS)
def test_a_database_without_a_connection_to_spare_is_no_failure_of_the_message(shop: Shop) -> None:
    engine = shop.new_engine(pool_size=1, max_overflow=0, pool_timeout=0.1)
    attempts = shop.attempts(engine=engine, retry=POLICY)
    job = attempts.consumer.job(message())
    if isinstance(engine, Engine):
        with engine.connect():
            assert asked(attempts(job)) == (False, True)
    else:
        assert attempts.runner is not None
        holder = attempts.runner.run(engine.connect().start())
        assert asked(attempts(job)) == (False, True)
        attempts.runner.run(holder.close())
    assert attempts(job) == PROCESSED
    assert (job.failures, shop.dead()) == (0, [])


@pytest.mark.hazard("H55")
@on(*SERVERS, own=True)
def test_a_database_that_only_reads_is_no_failure_of_the_message(shop: Shop) -> None:
    attempts = shop.attempts(failing, retry=POLICY)
    assert isinstance(attempts(message("0")), Parked)
    shop.time_passes()
    engine = shop.new_engine()
    options = {"postgresql": "default_transaction_read_only = on", "mysql": "SESSION TRANSACTION READ ONLY"}

    @event.listens_for(sync_engine(engine), "connect")
    def _connect(connection: Any, _record: object) -> None:
        cursor = connection.cursor()
        cursor.execute(f"SET {options[shop.kind]}")
        cursor.close()
        connection.commit()

    readonly = shop.attempts(engine=engine, retry=POLICY)
    for given in (message(), message(None)):
        job = readonly.consumer.job(given)
        for _ in range(3):
            assert asked(readonly(job)) == (False, True)
        assert job.failures == 0
    with pytest.raises(AssertionError, match="outage=True"):
        readonly.look()
    assert (shop.claims(), len(shop.dead()), shop.effects()) == (1, 1, [])


def kill_its_connection(shop: Shop, session: Session) -> None:
    terminate(shop, backend(session))
    session.execute(text("SELECT 1"))


@pytest.mark.hazard("H55")
@on(*SERVERS)
def test_a_connection_that_is_killed_in_the_handler_is_no_failure_of_the_message(shop: Shop) -> None:
    def killed(given: Message, session: Session) -> None:
        write(given, session)
        kill_its_connection(shop, session)

    part = Part(killed)
    attempts = shop.attempts(part, retry=POLICY)
    job = attempts.consumer.job(message())
    assert asked(attempts(job)) == (False, True)
    assert (job.failures, nothing_is_known_of(shop)) == (0, True)
    part.act = write
    assert attempts(job) == PROCESSED


@pytest.mark.hazard("H55")
@on(*SERVERS)
def test_a_message_that_loses_its_connection_each_time_is_not_for_ever_an_outage(shop: Shop) -> None:
    attempts = shop.attempts(lambda given, session: kill_its_connection(shop, session), retry=POLICY)
    job = attempts.consumer.job(message())
    for _ in range(3):
        assert asked(attempts(job)) == (False, True)
    verdict = attempts(job)
    assert isinstance(verdict, Parked), verdict
    assert (job.failures, verdict.reason, shop.claims()) == (1, "failed", 1)


@pytest.mark.hazard("H55")
@pytest.mark.parametrize("how", ["refused", "killed", "exhausted"])
@on(*SERVERS)
def test_the_handlers_own_other_database_is_its_own_affair(shop: Shop, how: str) -> None:
    url = shop.url.set(port=1) if how == "refused" else shop.url
    theirs = create_engine(url, pool_size=1, max_overflow=0, pool_timeout=0.1)

    def failing_elsewhere(given: Message, session: Session) -> None:
        write(given, session)
        with theirs.connect() as connection:
            if how == "exhausted":
                theirs.connect()
            with Session(connection) as other:
                kill_its_connection(shop, other)

    attempts = shop.attempts(failing_elsewhere, retry=POLICY)
    job = attempts.consumer.job(message())
    verdict = attempts(job)
    theirs.dispose()
    assert isinstance(verdict, Parked), verdict
    assert (job.failures, verdict.reason, shop.effects()) == (1, "failed", [])


@pytest.mark.hazard("H28")
@pytest.mark.hazard("H27")
@on(*SERVERS)
def test_what_others_hold_is_no_failure_until_it_never_ends(shop: Shop) -> None:
    def contending(given: Message, session: Session) -> None:
        session.execute(text("SELECT * FROM effects WHERE mark = 'held' FOR UPDATE NOWAIT"))
        write(given, session)

    attempts = shop.attempts(contending, retry=POLICY)
    job = attempts.consumer.job(message())
    with shop.engine.begin() as connection:
        connection.execute(insert(effects).values(mark="held"))
    with shop.engine.begin() as connection:
        connection.execute(text("SELECT * FROM effects FOR UPDATE"))
        for count in range(1, CONTENDED + 1):
            verdict = attempts(job)
            assert asked(verdict) == (False, False)
            assert isinstance(verdict, Release)
            assert verdict.delay is not None
            assert 0 <= verdict.delay <= 1
            assert (job.failures, job.contended) == (0, count)
        assert isinstance(attempts(job), Parked)
        assert (job.failures, shop.dead()[0].attempts) == (1, 1)
        shop.time_passes()
        (parked,) = attempts.look()
        assert isinstance(attempts(parked), Release)  # it stays where it was picked
        assert (shop.dead()[0].attempts, shop.dead()[0].reason) == (1, "failed")
    assert attempts(parked) == PROCESSED


ASYNC = [
    ("sqlite", "aiosqlite"),
    ("postgres", "psycopg async"),
    ("postgres", "asyncpg"),
    ("mariadb", "asyncmy"),
]


def deadlined(shop: Shop, handler: Callable[[AsyncSession], Awaitable[object]], deadline: float) -> Attempts:
    """An async consumer that may run so many seconds."""
    engine = shop.new_engine()
    app = App(engine)

    @app.consumer("shop", NOWHERE, deadline=deadline, retry=POLICY)
    async def async_handler(given: Message, session: AsyncSession) -> None:
        await session.execute(insert(effects).values(mark="effect"))
        await handler(session)

    return shop.attempts(consumer=app.consumers["shop"].consumer, engine=engine)


@pytest.mark.hazard("H22")
@pytest.mark.hazard("H42")
@pytest.mark.parametrize("where", ["in a query", "outside", "in a query it swallows", "outside it swallows"])
@on(*ASYNC)
def test_an_async_handler_is_cancelled_at_its_deadline_and_that_is_a_failure(shop: Shop, where: str) -> None:
    sleeping = {"postgresql": "SELECT pg_sleep(30)", "mysql": "SELECT SLEEP(2)"}
    slow = [True]

    async def handler(session: AsyncSession) -> None:
        if not slow[0]:
            return
        query = sleeping.get(shop.kind) if "query" in where else None
        try:
            await (session.execute(text(query)) if query is not None else asyncio.sleep(30))
        except BaseException:
            if "swallows" not in where:
                raise

    attempts = deadlined(shop, handler, 0.3)
    job = attempts.consumer.job(message())
    began = time.monotonic()
    verdict = attempts(job)
    while isinstance(verdict, Release) and verdict.twin:  # the server goes on with what asyncmy has left
        verdict = attempts(job)
    assert time.monotonic() - began < 10
    assert isinstance(verdict, Parked), verdict
    assert verdict.cause == "DeadlinePassed: the handler ran longer than its 0.3 s"
    assert (job.failures, shop.effects(), shop.claims()) == (1, [], 1)
    slow[0] = False
    assert attempts(message("2")) == PROCESSED  # the connection can be used, or is a new one
    shop.time_passes()
    assert attempts.again() == [PROCESSED]
    assert shop.effects() == ["effect"] * 2


@pytest.mark.hazard("H22")
@on(*ASYNC)
def test_a_handlers_own_time_out_is_not_its_deadline(shop: Shop) -> None:
    async def handler(session: AsyncSession) -> None:
        async with asyncio.timeout(0.01):
            await asyncio.sleep(30)

    verdict = deadlined(shop, handler, 20)(message())
    assert isinstance(verdict, Parked)
    assert verdict.cause.startswith("TimeoutError")


@pytest.mark.hazard("H22")
@on(("sqlite", "pysqlite"), ("postgres", "psycopg"), ("mariadb", "pymysql"))
def test_a_sync_handler_that_returns_after_its_deadline_is_not_committed(shop: Shop) -> None:
    def late(given: Message, session: Session) -> None:
        write(given, session)
        time.sleep(0.2)  # nothing could end it

    part = Part(late)
    attempts = shop.attempts(part, deadline=0.1, retry=POLICY)
    job = attempts.consumer.job(message())
    verdict = attempts(job)
    assert isinstance(verdict, Parked), verdict
    assert verdict.cause == "DeadlinePassed: the handler ran longer than its 0.1 s"
    assert (job.failures, shop.effects(), shop.claims()) == (1, [], 1)
    shop.time_passes()
    part.act = write
    assert attempts.again() == [PROCESSED]


@on(*ASYNC)
def test_a_cancellation_that_comes_from_inside_the_handler_is_tried_again(shop: Shop) -> None:
    async def handler(session: AsyncSession) -> None:
        raise asyncio.CancelledError("by a library")

    attempts = deadlined(shop, handler, 20)
    for count in (1, 2):
        shop.time_passes()
        (verdict,) = attempts.again() if count > 1 else [attempts(message())]
        assert isinstance(verdict, Parked)
        assert (shop.dead()[0].attempts, shop.effects()) == (count, [])


@on(*DATABASES)
def test_a_suspect_whose_twin_is_in_flight_stays_a_suspect(shop: Shop) -> None:
    attempts = shop.attempts()
    assert release(attempts, message()) == Parked("released", 0.0)
    shop.change_rows(starts=1)
    (job,) = attempts.look(alone=True)
    job.outcome = Outcome(RELEASED, None, 0.0)
    assert attempts(job) == Parked("released", 0.0)
    (row,) = shop.dead()
    assert (row.starts, row.alone, row.owner, row.owns_claim) == (1, False, None, False)


@pytest.mark.hazard("H44")
@on(*DATABASES)
def test_killed_between_any_two_steps_a_message_is_parked_once_or_done_once(shop: Shop) -> None:
    part = Part()
    consumer, number = shop.consumer(part, retry=POLICY, max_crashes=100), shop.number()
    shop.engine.dispose()

    def child(act: Callable[[Message, Session], object], given: Message | None, step: int) -> None:
        part.act = act
        engine = shop.new_engine()
        assert isinstance(engine, Engine)
        left = [step]

        def count(*_: object) -> None:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

        for place in ("before_cursor_execute", "after_cursor_execute", "commit"):
            event.listen(engine, place, count)
        unit = SyncUnit(engine, consumer, number)
        if given is not None:
            unit.run(consumer.job(given))
        for _ in range(3 if given is None else 0):  # the first look makes a suspect of it
            found = unit.look(OTHER, 10, inline=True)
            assert isinstance(found, Found)
            for job in found.jobs:
                unit.run(job)
        count()
        os._exit(0)

    def run(act: Callable[[Message, Session], object], given: Message | None, step: int) -> bool:
        process = multiprocessing.get_context("fork").Process(target=child, args=(act, given, step))
        process.start()
        process.join(90)
        assert process.exitcode in (0, -signal.SIGKILL)
        return process.exitcode != 0

    step = 0
    while run(failing, message(), step):
        step += 1
    assert [(row.reason, row.copies) for row in shop.dead()] == [("failed", 1)]
    assert (shop.claims(), shop.effects(), 4 < step < 40) == (1, [], True)
    step = 0
    shop.time_passes()
    while run(write, None, step):
        step += 1
        assert len(shop.dead()) + len(shop.effects()) == 1
        shop.time_passes()
    assert (shop.effects(), shop.claims(), shop.dead(), 6 < step < 60) == (["effect"], 1, [], True)


@pytest.mark.hazard("H26")
@on(*SERVERS)
def test_a_copy_that_comes_while_its_message_runs_again_waits_and_is_absorbed(shop: Shop) -> None:
    part = Part(failing)
    attempts, elsewhere = (shop.attempts(part, retry=POLICY, wait=0.1) for _ in range(2))
    assert isinstance(attempts(message()), Parked)
    assert release(attempts, message("2")) == Parked("released", 0.0)
    shop.time_passes()
    during: list[Verdict] = []

    def running(given: Message, session: Session) -> None:
        write(given, session)
        copy = message(given.id)
        during.append(threads.submit(elsewhere, copy).result(20))

    part.act = running
    with ThreadPoolExecutor(1) as threads:
        assert attempts.again() == [PROCESSED] * 2
    assert [isinstance(each, Release) and each.twin for each in during] == [True] * 2
    assert [elsewhere(message(id)) for id in "12"] == [REPEATED] * 2
    assert (shop.effects(), shop.dead(), part.calls) == (["effect"] * 2, [], 3)


@pytest.mark.hazard("H26")
@on(*SERVERS)
def test_a_parked_message_whose_twin_is_in_flight_is_due_later_and_nothing_is_counted(shop: Shop) -> None:
    part = Part()
    attempts, elsewhere = (shop.attempts(part, retry=POLICY, wait=0.1) for _ in range(2))
    assert release(attempts, message()) == Parked("released", 0.0)

    def holding(given: Message, session: Session) -> None:
        write(given, session)
        (job,) = threads.submit(attempts.look).result(20)
        verdict = threads.submit(attempts, job).result(20)
        assert isinstance(verdict, Release)
        assert verdict.twin
        job.outcome = Outcome(RELEASED, None, 5.0, verdict.cause)
        assert threads.submit(attempts, job).result(20) == Parked("released", 5.0, verdict.cause)

    part.act = holding
    with ThreadPoolExecutor(1) as threads:
        assert elsewhere(message()) == PROCESSED
    (row,) = shop.dead()
    assert (row.attempts, row.starts, row.owner, row.owns_claim) == (0, 0, None, False)
    shop.time_passes()
    assert attempts.again() == [REPEATED]
    assert (shop.effects(), shop.dead(), part.calls) == (["effect"], [], 1)


@pytest.mark.hazard("H29")
@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
@on(("postgres", "psycopg"), ("postgres", "asyncpg"), ("mariadb", "pymysql"))
def test_at_any_isolation_level_many_pickers_run_each_message_once(shop: Shop, level: str) -> None:
    part = Part(failing)
    pickers = [
        shop.attempts(part, retry=POLICY, engine=shop.new_engine(isolation_level=level)) for _ in range(3)
    ]
    for number in range(15):
        verdict = pickers[0](message(str(number), str(number).encode()))
        assert isinstance(verdict, Parked), verdict
    part.act = write
    shop.time_passes()
    start = threading.Barrier(len(pickers))

    def run(picker: Attempts, owner: bytes) -> list[Verdict]:
        start.wait(90)
        found: list[Verdict] = []
        for _ in range(300):
            with suppress(AssertionError):  # what was released by a look is looked for again
                for job in picker.look(owner, 2):
                    verdict = picker(job)
                    while isinstance(verdict, Release):
                        assert (verdict.failed, verdict.outage) == (False, False), verdict
                        verdict = picker(job)
                    found.append(verdict)
            if not any(row.owner is None for row in shop.dead()):
                return found
        raise RuntimeError("there is no end to it")

    with ThreadPoolExecutor(len(pickers)) as threads:
        owners = [bytes([number]) * 16 for number in range(len(pickers))]
        verdicts = [verdict for found in threads.map(run, pickers, owners) for verdict in found]
    assert verdicts.count(PROCESSED) == 15
    assert sorted(shop.effects(), key=int) == [str(number) for number in range(15)]
    assert (shop.dead(), shop.claims()) == ([], 15)


@pytest.mark.hazard("H23")
@on(*DATABASES)
def test_later_is_never_at_once(shop: Shop) -> None:
    def not_yet(given: Message, session: Session) -> None:
        raise RetryLater(0)

    attempts = shop.attempts(not_yet, retry=POLICY)
    verdict = attempts(message())
    assert isinstance(verdict, Release)
    assert verdict.delay is not None
    assert verdict.delay >= 0.05
    assert not verdict.failed


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit(), RecursionError()])
@on(("sqlite", "pysqlite"), ("postgres", "psycopg"))
def test_what_a_handler_raises_is_a_failure_whatever_it_is(shop: Shop, error: BaseException) -> None:
    def raising(given: Message, session: Session) -> None:
        write(given, session)
        raise error

    attempts = shop.attempts(raising, retry=POLICY)
    for count in (1, 2):
        shop.time_passes()
        (verdict,) = attempts.again() if count > 1 else [attempts(message())]
        assert isinstance(verdict, Parked), verdict
        assert (shop.dead()[0].attempts, shop.effects()) == (count, [])


@pytest.mark.hazard("H21")
@on(*DATABASES)
def test_a_crash_that_nobody_could_bury_is_buried_by_the_next_one(shop: Shop) -> None:
    part = Part(failing)
    attempts = shop.attempts(part, retry=POLICY, max_crashes=1)
    assert isinstance(attempts(message()), Parked)
    shop.time_passes()
    assert len(attempts.look(inline=True)) == 1
    shop.change_rows(starts=1, alone=True)
    shop.time_passes()
    (job,) = attempts.look(OTHER)  # it is to be buried, and who would do that dies as well
    assert job.outcome is not None
    shop.time_passes()
    found = [verdict for _ in range(3) for verdict in attempts.again(OWNER, inline=True)]
    assert (found, part.calls) == ([Dead("crashed")], 1)


@pytest.mark.hazard("H26")
@on(*SERVERS)
def test_a_message_that_somebody_runs_for_long_keeps_no_lane_that_has_its_copy(shop: Shop) -> None:
    part = Part()
    attempts, elsewhere = shop.attempts(part, id="id"), shop.attempts(part)
    without = message(None, headers={"id": "2"})
    assert elsewhere(without) == Dead("no id")
    shop.change_rows(state=1, not_before=LONG_AGO)
    assert release(attempts, message(None, headers={"id": "1"})) == Parked("released", 0.0)
    copies: list[Verdict] = []

    def running(given: Message, session: Session) -> None:
        write(given, session)
        copy = elsewhere.consumer.job(without if given.id == "2" else message("1", headers={"id": "1"}))
        if given.id == "1":
            copy.outcome = Outcome(RELEASED, None, 0.0)
        for _ in range(2):
            copies.append(threads.submit(elsewhere, copy).result(5))

    part.act = running
    with ThreadPoolExecutor(1) as threads:
        assert attempts.again() == [PROCESSED] * 2
    assert [asked(each) for each in copies] == [(False, False)] * 4
    assert (shop.dead(), shop.claims()) == ([], 2)
    assert elsewhere(without) == Dead("no id")
