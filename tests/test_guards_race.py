"""Guards while 32 workers, each with a connection of its own, work on the same row at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import TypeVar

import pytest
from sqlalchemy import Connection, insert, select, update
from sqlalchemy.exc import DBAPIError

from idemq import guards
from idemq.drivers import is_contention
from idemq.guards import Outcome
from tests.guard_tools import (
    CREATED,
    PAID,
    SHIPPED,
    SYNC_CONNECTIONS,
    Order,
    Place,
    Stock,
    on,
    orders,
    place,
    stock,
)

__all__ = ["place"]

T = TypeVar("T")

WORKERS = 32
SEVEN = {"number": "7"}
ONE = {"id": 1}


class Undo(Exception):
    """The worker's transaction is to be rolled back."""


def race(place: Place, work: Callable[[Connection, int], T], workers: int = WORKERS) -> list[T | None]:
    """What the workers were told whose transactions committed; None for one that was undone.

    A deadlock is tried again, as a consumer does.
    """
    together = Barrier(workers)

    def run(worker: int) -> T | None:
        together.wait()
        while True:
            try:
                with place.engine.begin() as connection:
                    return work(connection, worker)
            except Undo:
                return None
            except DBAPIError as error:
                if not is_contention(error):
                    raise

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(run, range(workers)))


@on(*SYNC_CONNECTIONS)
@pytest.mark.situation(2)
@pytest.mark.pattern("conditional-decrement")
def test_stock_falls_by_what_was_applied_and_never_below_zero(place: Place) -> None:
    place.put(stock, id=1, num=50)

    def take(connection: Connection, worker: int) -> int:
        by = worker % 3 + 1  # 63 in all
        answer = guards.decrement(connection, Stock, ONE, "num", by=by)
        assert answer.rest is None or answer.rest >= 0
        if worker % 8 == 0:
            raise Undo
        return by if answer.outcome is Outcome.APPLIED else 0

    taken = sum(each or 0 for each in race(place, take))
    assert place.rows(stock.c.num) == [50 - taken]
    taken += sum(each or 0 for each in race(place, take))
    assert place.rows(stock.c.num) == [50 - taken]
    assert 0 <= 50 - taken < 3  # nobody was refused who could have been served


@on(*SYNC_CONNECTIONS)
@pytest.mark.pattern("state-machine")
def test_a_move_is_applied_once_and_already_so_for_all_others(place: Place) -> None:
    place.put(orders, number="7", state=CREATED)

    def pay(connection: Connection, _worker: int) -> Outcome:
        return guards.transition(connection, Order, SEVEN, "state", to=PAID, allowed_from=[CREATED]).outcome

    assert Counter(race(place, pay)) == {Outcome.APPLIED: 1, Outcome.ALREADY_SO: WORKERS - 1}


@on(*SYNC_CONNECTIONS)
@pytest.mark.pattern("state-machine")
def test_of_two_moves_from_one_state_one_is_applied_and_the_other_refused(place: Place) -> None:
    place.put(orders, number="7", state=CREATED)

    def move(connection: Connection, worker: int) -> tuple[int, Outcome]:
        to = (PAID, SHIPPED)[worker % 2]
        answer = guards.transition(connection, Order, SEVEN, "state", to=to, allowed_from=[CREATED])
        return to, answer.outcome

    answers = Counter(race(place, move))
    [winner] = place.rows(orders.c.state)
    loser = PAID + SHIPPED - winner
    assert answers == {
        (winner, Outcome.APPLIED): 1,
        (winner, Outcome.ALREADY_SO): WORKERS // 2 - 1,
        (loser, Outcome.REFUSED): WORKERS // 2,
    }


@on(*SYNC_CONNECTIONS)
@pytest.mark.pattern("optimistic-lock")
def test_one_comparison_wins_and_all_others_are_refused(place: Place) -> None:
    place.put(orders, number="7", version=1)

    def swap(connection: Connection, worker: int) -> Outcome:
        changes = {"version": 2, "remark": str(worker)}
        return guards.compare_and_set(connection, Order, SEVEN, expected={"version": 1}, values=changes)

    answers = race(place, swap)
    assert Counter(answers) == {Outcome.APPLIED: 1, Outcome.REFUSED: WORKERS - 1}
    assert place.rows(orders.c.note) == [str(answers.index(Outcome.APPLIED))]


@on(*SYNC_CONNECTIONS)
@pytest.mark.situation(4)
@pytest.mark.pattern("optimistic-lock")
def test_the_newest_version_stays_in_whatever_order_they_arrive(place: Place) -> None:
    place.put(orders, number="7")

    def write(connection: Connection, worker: int) -> Outcome:
        version = worker // 2 + 1  # each of them comes twice
        changes = {"remark": str(version)}
        return guards.update_if_newer(connection, Order, SEVEN, version=("version", version), values=changes)

    answers = Counter(race(place, write))
    assert place.rows(orders.c.version, orders.c.note) == [(WORKERS // 2, str(WORKERS // 2))]
    assert answers[Outcome.APPLIED] <= WORKERS // 2
    assert answers[Outcome.APPLIED] + answers[Outcome.STALE] == WORKERS


@on(*SYNC_CONNECTIONS)
@pytest.mark.situation(1)
@pytest.mark.pattern("upsert")
def test_of_many_who_create_one_order_one_is_told_that_it_inserted(place: Place) -> None:
    def create(connection: Connection, worker: int) -> Outcome:
        outcome = guards.upsert(connection, Order, SEVEN, {"remark": str(worker)})
        if worker % 8 == 0:
            raise Undo
        return outcome

    answers = Counter(race(place, create))
    assert answers == {Outcome.INSERTED: 1, Outcome.UPDATED: WORKERS - 5, None: 4}
    assert place.rows(orders.c.number) == ["7"]


@on(*SYNC_CONNECTIONS)
@pytest.mark.situation(1)
@pytest.mark.pattern("unique-index")
def test_of_many_who_create_one_order_all_but_one_were_too_late(place: Place) -> None:
    place.put(stock, id=1, num=100)

    def create(connection: Connection, _worker: int) -> bool:
        with guards.already_done(connection, "guarded_orders_number") as attempt:
            connection.execute(insert(orders).values(number="7"))
        if not attempt.done_before:
            guards.decrement(connection, Stock, ONE, "num", by=1)
        return attempt.done_before

    assert Counter(race(place, create)) == {False: 1, True: WORKERS - 1}
    assert (place.rows(orders.c.number), place.rows(stock.c.num)) == (["7"], [99])


@on(*SYNC_CONNECTIONS)
@pytest.mark.pattern("pessimistic-lock")
def test_what_is_read_under_the_lock_is_still_true_when_it_is_written(place: Place) -> None:
    place.put(stock, id=1, num=0)

    def add(connection: Connection, _worker: int) -> int:
        # A read before the lock sets the snapshot of MySQL and MariaDB, which the locked row must not be of.
        if place.kind != "sqlite":
            connection.execute(select(stock.c.num)).all()
        row = guards.locked(connection, stock, ONE, wait=60)
        assert row is not None
        connection.execute(update(stock).values(num=row.num + 1))
        return int(row.num)

    assert sorted(each for each in race(place, add) if each is not None) == list(range(WORKERS))
    assert place.rows(stock.c.num) == [WORKERS]


@on(*[each for each in SYNC_CONNECTIONS if each[0] != "sqlite"])
@pytest.mark.parametrize("how", ["already_done", "locked"])
def test_a_deadlock_stays_a_deadlock_whatever_became_of_the_savepoint(place: Place, how: str) -> None:
    """MySQL and MariaDB undo the whole transaction: the error must not be of a savepoint that is gone."""
    place.put(stock, id=0, num=0)
    place.put(stock, id=1, num=0)
    both_hold = Barrier(2)
    bounds: set[object] = set()

    def cross(connection: Connection, worker: int) -> None:
        connection.execute(update(stock).where(stock.c.id == worker).values(num=worker))
        both_hold.wait()
        if how == "locked":
            guards.locked(connection, stock, {"id": 1 - worker}, wait=60)
        else:
            with guards.already_done(connection, "guarded_orders_number"):
                connection.execute(update(stock).where(stock.c.id == 1 - worker).values(num=9))

    def run(worker: int) -> bool:
        """False: the one whom the deadlock was told."""
        with place.engine.connect() as connection:
            try:
                cross(connection, worker)
                connection.commit()
            except DBAPIError as error:
                connection.rollback()
                return not is_contention(error)
            finally:
                if place.kind != "postgresql":
                    query = "SELECT @@innodb_lock_wait_timeout - @@global.innodb_lock_wait_timeout"
                    bounds.add(connection.exec_driver_sql(query).scalar())
            return True

    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(run, range(2))) == [False, True]
    assert bounds <= {0}
