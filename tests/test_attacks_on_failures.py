"""Interleavings that once lost a message, stopped a consumer, or blamed an innocent."""

from __future__ import annotations

import time
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session
from tenacity import Retrying, stop_after_attempt, wait_fixed

from idemq import App, Message, RetryLater, SetupError, letters
from idemq.embedded import Embedded
from idemq.failures import RELEASED, Job, Outcome
from idemq.lanes import Item, Kept, Suspicion
from idemq.message import Ack, Dead, Parked, Release
from idemq.outage import Outage
from idemq.overtime import Timed
from tests.core_tools import OWNER, PROCESSED, Shop, message, on, write

LATER = Retrying(wait=wait_fixed(60), stop=stop_after_attempt(9))
ALONE = b"alone".ljust(16)


@pytest.mark.hazard("H44")
@on(("sqlite", "pysqlite"), ("postgres", "psycopg"), ("postgres", "asyncpg"), ("mariadb", "pymysql"))
def test_a_lane_that_comes_too_late_deletes_no_row_that_was_run_since(shop: Shop) -> None:
    broken = [True]

    def handler(given: Message, session: Session) -> None:
        if broken[0]:
            raise ValueError("not yet")
        write(given, session)

    attempts = shop.attempts(handler, retry=LATER)
    job = attempts.consumer.job(message())
    job.outcome = Outcome(RELEASED, None, 0.0)
    attempts(job)
    (stale,) = attempts.look(OWNER)  # one lane picks the row, which has no claim, and is busy for long
    shop.time_passes()
    assert attempts.look(OWNER) == []  # its lease ends; the row is a suspect
    assert len(attempts.again(ALONE, alone=True)) == 1  # it fails, and owns its claim from now on
    shop.time_passes()
    (again,) = attempts.look(OWNER)  # another lane of the same worker picks it
    broken[0] = False
    assert attempts(stale) == Ack(duplicate=True)
    assert attempts(again) == PROCESSED
    assert (shop.effects(), shop.claims(), shop.dead()) == (["effect"], 1, [])


@pytest.mark.hazard("H55")
@on(("postgres", "psycopg"), ("postgres", "asyncpg"))
def test_a_handler_that_makes_its_own_transaction_read_only_is_no_outage_for_ever(shop: Shop) -> None:
    def handler(given: Message, session: Session) -> None:
        session.execute(text("SET TRANSACTION READ ONLY"))
        write(given, session)

    attempts = shop.attempts(handler, retry=LATER)
    job = attempts.consumer.job(message())
    verdicts = [attempts(job) for _ in range(4)]
    assert [isinstance(verdict, Release) for verdict in verdicts] == [True, True, True, False]
    assert [row.reason for row in shop.dead()] == ["failed"]


@pytest.mark.hazard("H55")
def test_while_the_database_is_away_messages_take_turns_in_trying() -> None:
    outage = Outage()
    items = [Item(Kept(message(str(number)))) for number in range(3)]
    found = outage.found(items[0])
    assert found is not None
    assert found[1] is items[0]
    assert outage.holds(items[1])
    assert outage.holds(items[2])
    tried = []
    for _ in range(4):
        found = outage.found(found[1])
        assert found is not None
        tried.append(found[1])
    assert [items.index(item) for item in tried] == [1, 2, 0, 1]
    assert {items.index(item) for item in outage.over(tried[-1], answered=True)} == {0, 2}
    assert not outage.lasts


def wrong_options() -> list[dict[str, Any]]:
    async def key(given: Message) -> str:
        return "k"

    return [{"key": key, "ordered": True}, {"hold_dead": True}, {"key": "customer"}, {"ordered": "no"}]


@pytest.mark.parametrize("options", wrong_options(), ids=["async key", "held", "key alone", "no bool"])
def test_options_of_order_that_would_do_nothing_are_refused(options: dict[str, Any]) -> None:
    app = App("sqlite:///unused.db")
    with pytest.raises(SetupError, match="'shop'"):
        app.consumer("shop", Embedded("unused-broker.db").queue("queue"), **options)


@on(("sqlite", "pysqlite"))
def test_a_policy_without_a_wait_does_not_spin(shop: Shop) -> None:
    def handler(given: Message, session: Session) -> None:
        raise ValueError("always")

    attempts = shop.attempts(handler, retry=Retrying(wait=wait_fixed(0)))
    verdict = attempts(message())
    assert isinstance(verdict, Release)
    assert verdict.delay is not None
    assert verdict.delay >= 0.1


@pytest.mark.hazard("H21")
@pytest.mark.parametrize(
    ("origin", "most"),
    [({"queue": "q"}, 40), ({"topic": "t", "partition": 0}, 8)],
    ids=["queue", "partition"],
)
def test_a_backlog_that_is_delivered_again_as_a_whole_is_not_suspect_as_a_whole(
    origin: dict[str, Any], most: int
) -> None:
    suspicion = Suspicion(concurrency=1, prefetch=20)
    again = message(redelivered=True, origin=origin)
    parked = 0
    for _ in range(100):
        if suspicion.of(again):
            suspicion.parked(again)
            parked += 1
    assert parked == most
    assert not suspicion.of(message(origin=origin))
    assert suspicion.of(again)  # a later crash


@pytest.mark.hazard("H25")
@on(("sqlite", "pysqlite"), ("postgres", "asyncpg"), ("mariadb", "pymysql"))
def test_what_the_client_library_could_not_read_never_reaches_a_handler(shop: Shop) -> None:
    attempts = shop.attempts()
    given = message(unreadable="a header name is not UTF-8")
    assert attempts(given) == Dead("unreadable")
    (before,) = shop.dead()
    with shop.engine.begin() as connection:
        assert letters.retry(connection, by="me") == 1
    assert attempts.again() == [Dead("unreadable")]
    (after,) = shop.dead()
    assert (after.pk, after.owns_claim, after.body) == (before.pk, True, before.body)

    kept = attempts.consumer.job(message("2", unreadable="a header name is not UTF-8"))
    kept.outcome = Outcome(RELEASED, None, 0.0)  # its twin was in flight for too long
    assert attempts(kept) == Parked("released", 0.0)
    assert attempts.again() == [Dead("unreadable")]
    assert shop.effects() == []


@pytest.mark.hazard("H25")
@on(("sqlite", "pysqlite"))
def test_what_is_too_large_to_be_kept_beside_its_twin_is_judged_as_before(shop: Shop) -> None:
    attempts = shop.attempts(max_kept=1024)
    for id in ("1", None):
        job = attempts.consumer.job(message(id, b"x" * 2000, unreadable="a header name is not UTF-8"))
        job.outcome = Outcome(RELEASED, None, 0.0)
        verdicts = [attempts(job), attempts(job)]
        assert [isinstance(each, Release) and each.stop for each in verdicts] == [False, True]
    assert (shop.effects(), shop.claims()) == ([], 0)


@pytest.mark.hazard("H41")
def test_the_deadline_of_an_earlier_attempt_does_not_end_the_process() -> None:
    timed, item = Timed("shop"), Item(Kept(message()), Job(message(), b"key", None))
    assert item.job is not None
    item.job.deadline = time.monotonic() - 60.0  # it rested for a minute, while the database was away
    timed.begin(item)
    assert timed.late() is None


@pytest.mark.hazard("H23")
@on(("sqlite", "pysqlite"), ("postgres", "asyncpg"))
@pytest.mark.parametrize("error", [RetryLater(0, "never"), ValueError("always")], ids=["later", "failed"])
def test_short_waits_without_end_do_not_hold_a_place_among_the_deliveries(
    shop: Shop, error: Exception
) -> None:
    def handler(given: Message, session: Session) -> None:
        raise error

    attempts = shop.attempts(handler, retry=Retrying(wait=wait_fixed(0.5)))
    job = attempts.consumer.job(message())
    assert isinstance(attempts(job), Release)
    job.began -= 11.0  # it has been here for a while
    assert isinstance(attempts(job), Parked)
    shop.time_passes()
    assert [type(each) for each in attempts.again()] == [Parked]
    assert len(shop.dead()) == 1
