"""Guards: what each answers, and that it changes nothing when it says so."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from decimal import Decimal
from pathlib import Path
from time import monotonic
from typing import Any, assert_type, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import (
    Column,
    Connection,
    Index,
    Integer,
    MetaData,
    Numeric,
    Row,
    String,
    Table,
    UniqueConstraint,
    create_engine,
    delete,
    insert,
    select,
    text,
    update,
)
from sqlalchemy.dialects import mysql
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from idemq import guards
from idemq.errors import LockTimeout, SetupError
from idemq.guards import Outcome
from idemq.message import Message, Release
from tests import core_tools
from tests.core_tools import Shop
from tests.guard_tools import (
    CREATED,
    PAID,
    SHIPPED,
    SYNC_CONNECTIONS,
    SYNC_SESSIONS,
    Base,
    Lent,
    Order,
    Place,
    Stock,
    empty,
    on,
    orders,
    place,
    stock,
)

__all__ = ["place"]

SEVEN = {"number": "7"}


@on()
@pytest.mark.situation(1)
@pytest.mark.pattern("upsert")
def test_an_order_that_is_created_twice_is_one_order(place: Place) -> None:
    assert place(lambda t: guards.upsert(t, Order, SEVEN, {"remark": "a"})) is Outcome.INSERTED
    assert place(lambda t: guards.upsert(t, Order, SEVEN, {"remark": "b"})) is Outcome.UPDATED
    assert place(lambda t: guards.upsert(t, Order, SEVEN, {"remark": "b"})) is Outcome.UPDATED
    assert place(lambda t: guards.upsert(t, orders, SEVEN, {"note": "c"})) is Outcome.UPDATED
    assert place(lambda t: guards.upsert(t, orders, {"number": "8"}, {})) is Outcome.INSERTED
    assert place(lambda t: guards.upsert(t, orders, {"number": "8"}, {})) is Outcome.UPDATED
    assert place.rows(orders.c.number, orders.c.note) == [("7", "c"), ("8", None)]


@on()
@pytest.mark.situation(4)
@pytest.mark.pattern("optimistic-lock")
def test_an_older_version_changes_nothing(place: Place) -> None:
    def paid(target: Lent, version: int, remark: str) -> Outcome:
        return guards.update_if_newer(
            target, Order, SEVEN, version=("version", version), values={"remark": remark}
        )

    assert place(lambda t: paid(t, 1, "too early")) is Outcome.MISSING
    place.put(orders, number="7")
    assert place(lambda t: paid(t, 2, "paid")) is Outcome.APPLIED  # newer than null
    assert place(lambda t: paid(t, 2, "again")) is Outcome.STALE
    assert place(lambda t: paid(t, 1, "created")) is Outcome.STALE
    assert place(lambda t: paid(t, 3, "shipped")) is Outcome.APPLIED
    assert place.rows(orders.c.version, orders.c.note) == [(3, "shipped")]


@on()
@pytest.mark.pattern("optimistic-lock")
def test_compare_and_set_writes_only_over_what_was_expected(place: Place) -> None:
    def swap(target: Lent, before: Any, after: Any) -> Outcome:
        return guards.compare_and_set(
            target, Order, SEVEN, expected={"remark": before, "state": CREATED}, values={"remark": after}
        )

    assert place(lambda t: swap(t, None, "a")) is Outcome.MISSING
    place.put(orders, number="7", state=CREATED)
    assert place(lambda t: swap(t, "a", "b")) is Outcome.REFUSED
    assert place(lambda t: swap(t, None, "a")) is Outcome.APPLIED
    assert place(lambda t: swap(t, None, "b")) is Outcome.REFUSED
    assert place(lambda t: swap(t, "a", "a")) is Outcome.APPLIED  # the values that it has already
    assert place(lambda t: swap(t, "a", "b")) is Outcome.APPLIED
    assert place.rows(orders.c.note) == ["b"]


@on()
@pytest.mark.situation(4)
@pytest.mark.pattern("state-machine")
def test_a_created_that_comes_after_paid_changes_nothing(place: Place) -> None:
    def move(target: Lent, to: int, *allowed: int | None) -> guards.Transition:
        return guards.transition(
            target, Order, SEVEN, "state", to=to, allowed_from=allowed, values={"remark": str(to)}
        )

    assert place(lambda t: move(t, CREATED, None)) == guards.Transition(Outcome.MISSING, None)
    place.put(orders, number="7", state=None)
    assert place(lambda t: move(t, PAID, None, CREATED)) == guards.Transition(Outcome.APPLIED, PAID)
    assert place(lambda t: move(t, CREATED, None)) == guards.Transition(Outcome.REFUSED, PAID)
    assert place(lambda t: move(t, PAID, None, CREATED)) == guards.Transition(Outcome.ALREADY_SO, PAID)
    assert place(lambda t: move(t, SHIPPED, PAID)) == guards.Transition(Outcome.APPLIED, SHIPPED)
    assert place(lambda t: move(t, PAID, CREATED)) == guards.Transition(Outcome.REFUSED, SHIPPED)
    assert place.rows(orders.c.state, orders.c.note) == [(SHIPPED, str(SHIPPED))]


@on()
@pytest.mark.situation(2)
@pytest.mark.pattern("conditional-decrement")
def test_stock_never_falls_below_its_floor(place: Place) -> None:
    def take(target: Lent, by: int, floor: int = 0) -> guards.Decrement:
        return guards.decrement(target, Stock, {"id": 1}, "num", by=by, floor=floor)

    returns = place.kind in ("postgresql", "sqlite")
    assert place(lambda t: take(t, 1)) == guards.Decrement(Outcome.MISSING, None)
    place.put(stock, id=1, num=10)
    assert place(lambda t: take(t, 6)) == guards.Decrement(Outcome.APPLIED, 4 if returns else None)
    assert place(lambda t: take(t, 6)) == guards.Decrement(Outcome.NOT_ENOUGH, 4)
    assert place(lambda t: take(t, 4, floor=1)) == guards.Decrement(Outcome.NOT_ENOUGH, 4)
    assert place(lambda t: take(t, 4)) == guards.Decrement(Outcome.APPLIED, 0 if returns else None)
    assert place(lambda t: take(t, 1)) == guards.Decrement(Outcome.NOT_ENOUGH, 0)
    assert place.rows(stock.c.num) == [0]


@on()
@pytest.mark.situation(1)
@pytest.mark.pattern("unique-index")
def test_a_violation_of_the_named_constraint_means_already_done(place: Place) -> None:
    def create(target: Lent, remark: str) -> bool:
        target.execute(insert(stock).values(id=len(place.rows(stock.c.id)), note=remark))
        with guards.already_done(target, "guarded_orders_number") as attempt:
            target.execute(insert(stock).values(id=99, note="of the block"))
            target.execute(insert(orders).values(number="7", note=remark))
            target.execute(delete(stock).where(stock.c.id == 99))
        target.execute(update(stock).where(stock.c.note == remark).values(num=1))
        return attempt.done_before

    assert [place(lambda t: create(t, "first")), place(lambda t: create(t, "second"))] == [False, True]
    assert place.rows(orders.c.note) == ["first"]
    # What came before and after the block is there; nothing of the block is.
    assert place.rows(stock.c.note, stock.c.num) == [("first", 1), ("second", 1)]


def test_already_done_knows_the_columns_of_a_table_in_an_attached_database(tmp_path: Path) -> None:
    engine = create_engine(f"sqlite:///{tmp_path / 'shop.db'}")
    with engine.connect() as connection:
        connection.exec_driver_sql(f"ATTACH '{tmp_path / 'other.db'}' AS other")
        connection.exec_driver_sql("CREATE TABLE other.orders (number INTEGER UNIQUE)")
        for done in (False, True):
            with guards.already_done(connection, "orders.number") as attempt:
                connection.exec_driver_sql("INSERT INTO other.orders VALUES (1)")
            assert attempt.done_before is done
        connection.rollback()
    engine.dispose()


@on()
def test_already_done_knows_indexes_keys_and_on_sqlite_columns(place: Place) -> None:
    def done(target: Lent, table: Table, values: Mapping[str, Any], *constraints: str) -> bool:
        with guards.already_done(target, *constraints) as attempt:
            target.execute(insert(table).values(values))
        return attempt.done_before

    ticket = {"shop": "a", "ticket": "1"}
    place.put(orders, number="1", **ticket)
    place.put(stock, id=1)
    assert place(lambda t: done(t, orders, {"number": "2", **ticket}, "guarded_orders_ticket"))
    key = {"postgresql": "guarded_stock_pkey", "sqlite": "guarded_stock.id"}.get(place.kind, "PRIMARY")
    assert place(lambda t: done(t, stock, {"id": 1}, "another", key))
    if place.kind == "sqlite":
        columns = "guarded_orders.shop, guarded_orders.ticket"
        assert place(lambda t: done(t, orders, {"number": "2", **ticket}, columns))


@on()
def test_any_other_error_in_the_block_goes_on_and_leaves_the_transaction_usable(place: Place) -> None:
    def violate(target: Lent, constraint: str, number: str | None) -> None:
        with guards.already_done(target, constraint):
            target.execute(insert(stock).values(id=3))
            target.execute(insert(orders).values(number=number))
            raise ZeroDivisionError

    def work(target: Lent) -> None:
        target.execute(insert(stock).values(id=2))
        with pytest.raises(IntegrityError):
            violate(target, "guarded_orders_ticket", "7")
        with pytest.raises(IntegrityError):  # of another kind
            violate(target, "guarded_orders_number", None)
        with pytest.raises(ZeroDivisionError):
            violate(target, "guarded_orders_number", "8")
        target.execute(insert(stock).values(id=5))

    place.put(orders, number="7")
    place(work)
    assert place.rows(stock.c.id) == [2, 5]


@on(*SYNC_SESSIONS)
@pytest.mark.pattern("unique-index")
def test_a_session_can_be_used_on_after_its_object_was_there_before(place: Place) -> None:
    def work(session: Session) -> tuple[bool, bool]:
        kept = Stock(id=1, num=1)
        session.add(kept)
        answers = []
        for _ in range(2):
            with guards.already_done(session, "guarded_orders_number") as attempt:
                session.add(Order(number="7"))  # flushed by nobody but the block's end
            answers.append(attempt.done_before)
        kept.num = 2
        return answers[0], answers[1]

    assert place(work) == (False, True)
    assert (place.rows(orders.c.number), place.rows(stock.c.num)) == (["7"], [2])


@on()
@pytest.mark.pattern("pessimistic-lock")
def test_a_row_is_given_under_its_lock(place: Place) -> None:
    def work(target: Lent) -> tuple[Any, Any]:
        found = guards.locked(target, Order, SEVEN)
        assert guards.locked(target, Order, {"number": "8"}) is None
        row = guards.locked(target, orders, SEVEN)
        assert found is not None
        assert row is not None
        return found.state, row.state

    place.put(orders, number="7", state=PAID)
    assert place(work) == (PAID, PAID)


@on()
@pytest.mark.pattern("pessimistic-lock")
def test_a_lock_is_waited_for_no_longer_than_said_and_the_transaction_goes_on(place: Place) -> None:
    def bound(target: Lent) -> Any:
        connection = target.connection() if isinstance(target, Session) else target
        queries = {"postgresql": "SHOW lock_timeout", "sqlite": "PRAGMA busy_timeout"}
        query = queries.get(place.kind, "SELECT @@innodb_lock_wait_timeout")
        return connection.exec_driver_sql(query).scalar()

    def work(target: Lent) -> None:
        if place.kind != "sqlite":  # whose other writer holds everything
            target.execute(insert(stock).values(id=1))
        before = bound(target)
        began = monotonic()
        with pytest.raises(LockTimeout):
            guards.locked(target, Order, SEVEN, wait=0.05)
        assert monotonic() - began < 30  # the usual bounds are from 50 s up
        assert bound(target) == before
        holder.rollback()
        assert guards.locked(target, Order, SEVEN, wait=60) is not None
        assert bound(target) == before

    place.put(orders, number="7")
    with place.engine.connect() as holder:
        if place.kind == "sqlite":
            holder.exec_driver_sql("BEGIN IMMEDIATE")
        holder.execute(select(orders).with_for_update()).all()
        place(work)
    assert place.rows(stock.c.id) == ([] if place.kind == "sqlite" else [1])


@on(*[each for each in SYNC_CONNECTIONS if each[0] == "sqlite"])
def test_sqlite_refuses_a_lock_on_what_was_read_before_another_wrote(place: Place) -> None:
    place.put(orders, number="7")
    with place.engine.connect() as connection:
        connection.exec_driver_sql("BEGIN")
        connection.execute(select(orders)).all()
        place.put(orders, number="8")
        with pytest.raises(LockTimeout, match="first read"):
            guards.locked(connection, Order, SEVEN, wait=60)
        connection.rollback()
        assert guards.locked(connection, Order, SEVEN) is not None


@on(*SYNC_CONNECTIONS)
def test_a_refusal_is_judged_by_what_is_there_now_not_by_an_older_snapshot(place: Place) -> None:
    """MySQL's plain reads answer from the snapshot of the transaction's first read."""
    if place.kind == "sqlite":
        pytest.skip("refuses to write on an older snapshot")
    place.put(orders, number="7", state=CREATED)
    with place.engine.connect() as connection:
        connection.execute(select(orders)).all()
        with place.engine.begin() as other:
            other.execute(update(orders).values(state=SHIPPED))
            other.execute(insert(orders).values(number="8", state=SHIPPED))
        for number in ("7", "8"):
            answer = guards.transition(
                connection, Order, {"number": number}, "state", to=PAID, allowed_from=[CREATED]
            )
            assert answer == guards.Transition(Outcome.REFUSED, SHIPPED)


@on(*SYNC_SESSIONS)
def test_a_session_is_flushed_before_and_its_object_shows_the_row_afterwards(place: Place) -> None:
    def work(session: Session) -> None:
        order, other = Order(number="7", state=CREATED), Order(number="8")
        session.add_all([order, other])
        move = guards.transition(session, Order, SEVEN, "state", to=PAID, allowed_from=[CREATED])
        assert (move.outcome, order.state) == (Outcome.APPLIED, PAID)
        order.state = SHIPPED
        move = guards.transition(session, orders, SEVEN, "state", to=PAID, allowed_from=[CREATED])
        assert (move.outcome, order.state) == (Outcome.REFUSED, SHIPPED)
        guards.update_if_newer(
            session, Order, {"id": order.id}, version=("version", 5), values={"remark": "x"}
        )
        assert (order.version, order.remark) == (5, "x")
        guards.compare_and_set(session, Order, SEVEN, expected={"version": 5}, values={"version": 6})
        assert order.version == 6
        guards.upsert(session, Order, SEVEN, {"remark": "y"})
        assert order.remark == "y"
        assert (other.remark, other.state) == (None, CREATED)

    place(work)


@on(*SYNC_SESSIONS)
def test_a_locked_object_shows_what_was_committed_meanwhile(place: Place) -> None:
    if place.kind == "sqlite":
        pytest.skip("refuses to lock on an older snapshot")
    place.put(orders, number="7", state=CREATED)
    with Session(place.engine) as session:
        known = session.scalars(select(Order)).one()
        with place.engine.begin() as other:
            other.execute(update(orders).values(state=PAID))
            other.execute(insert(orders).values(number="8", state=SHIPPED))
        assert guards.locked(session, Order, SEVEN) is known
        assert known.state == PAID
        unknown = guards.locked(session, Order, {"number": "8"})
        assert unknown is not None
        assert unknown.state == SHIPPED


@on(*[(kind, driver, "session") for kind, driver in (("postgres", "asyncpg"), ("mariadb", "asyncmy"))])
def test_an_object_of_an_async_session_can_be_read_after_a_guard(place: Place) -> None:
    async def work() -> list[Any]:
        async with AsyncSession(place.tested) as session:  # type: ignore[arg-type]  # an AsyncEngine here
            order = (await session.scalars(select(Order))).one()
            answer = await session.run_sync(
                lambda sync: guards.transition(sync, Order, SEVEN, "state", to=PAID, allowed_from=[CREATED])
            )
            return [answer.outcome, order.state, order.number]

    place.put(orders, number="7", state=CREATED)
    assert place.runner.run(work()) == [Outcome.APPLIED, PAID, "7"]


@on(*[each for each in SYNC_CONNECTIONS if each[0] in ("mariadb", "mysql")])
def test_a_driver_that_counts_only_changed_rows_changes_no_answer(place: Place) -> None:
    """SQLAlchemy sets CLIENT.FOUND_ROWS; an engine with a `creator` of the user's may not."""
    import pymysql

    url = place.engine.url

    def connect() -> Any:
        return pymysql.connect(
            host=url.host,
            port=url.port or 3306,
            user=url.username,
            password=url.password,
            database=url.database,
        )

    place.put(orders, number="7", note="a", version=1)
    engine = create_engine("mysql+pymysql://", creator=connect)
    with engine.begin() as connection:
        same = connection.execute(update(orders).values(note="a"))
        assert same.rowcount == 0  # the trap: no row was changed by this UPDATE
        swap = guards.compare_and_set(
            connection, Order, SEVEN, expected={"version": 1}, values={"remark": "a"}
        )
        assert swap is Outcome.APPLIED
        assert guards.upsert(connection, Order, SEVEN, {"remark": "a"}) is Outcome.UPDATED
    engine.dispose()


@on(*SYNC_CONNECTIONS)
def test_an_upsert_never_overwrites_a_row_with_another_key(place: Place) -> None:
    place.put(orders, number="1", shop="a", ticket="1", note="kept")
    values = {"shop": "a", "ticket": "1", "remark": "other"}
    expected = SetupError if place.kind in ("mysql", "mariadb") else IntegrityError
    with pytest.raises(expected, match="ticket"):
        place(lambda t: guards.upsert(t, Order, {"number": "2"}, values))
    assert place.rows(orders.c.number, orders.c.note) == [("1", "kept")]


@on(*[each for each in SYNC_CONNECTIONS if each[0] == "postgres"])
def test_an_upsert_works_on_a_partitioned_table(place: Place) -> None:
    parts = Table("guarded_parts", MetaData(), Column("id", Integer, primary_key=True), Column("n", Integer))
    with place.engine.begin() as connection:
        connection.execute(
            text("CREATE TABLE guarded_parts (id int PRIMARY KEY, n int) PARTITION BY RANGE (id)")
        )
        connection.execute(text("CREATE TABLE part_1 PARTITION OF guarded_parts FOR VALUES FROM (0) TO (9)"))
        for outcome in (Outcome.INSERTED, Outcome.UPDATED):
            assert guards.upsert(connection, parts, {"id": 1}, {"n": 1}) is outcome
        connection.execute(text("DROP TABLE guarded_parts"))


@on(*[each for each in SYNC_CONNECTIONS if each[0] == "postgres"])
def test_a_trigger_that_keeps_the_guard_from_its_row_is_not_taken_for_success(place: Place) -> None:
    place.put(stock, id=1, num=1)
    with place.engine.connect() as connection:
        body = "LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'"
        connection.execute(text(f"CREATE FUNCTION pg_temp.refuse() RETURNS trigger {body}"))
        trigger = "BEFORE UPDATE ON guarded_stock FOR EACH ROW EXECUTE FUNCTION pg_temp.refuse()"
        connection.execute(text(f"CREATE TRIGGER refuse {trigger}"))
        with pytest.raises(SetupError, match="trigger"):
            guards.decrement(connection, Stock, {"id": 1}, "num", by=1)


@on(*SYNC_CONNECTIONS)
def test_a_value_of_another_type_names_no_other_rows(place: Place) -> None:
    """For MySQL the number 0 equals every text that begins with no digit, and the text "7x" the number 7."""
    place.put(orders, number="a", state=CREATED)
    place.put(orders, number="b", state=CREATED)
    place.put(stock, id=7, num=7, note="note")
    calls: list[Callable[[Lent], object]] = [
        lambda t: guards.upsert(t, Order, {"number": 0}, {"remark": "all"}),
        lambda t: guards.decrement(t, Stock, {"id": "7x"}, "num", by=1),
        lambda t: guards.compare_and_set(t, Stock, {"id": 7}, expected={"note": 0}, values={"num": 1}),
        lambda t: guards.transition(t, Stock, {"id": 7}, "note", to="b", allowed_from=[0]),
        lambda t: guards.transition(t, Stock, {"id": 7}, "note", to=0, allowed_from=["a"]),
        lambda t: guards.update_if_newer(t, Stock, {"id": 7}, version=("num", "8x"), values={}),
        lambda t: guards.locked(t, Stock, {"id": b"7"}),
    ]
    for call in calls:
        with pytest.raises(SetupError, match="must be"):
            place(call)
    assert place.rows(orders.c.note) == [None, None]
    assert place.rows(stock.c.num, stock.c.note) == [(7, "note")]


@on(*SYNC_CONNECTIONS)
def test_a_guard_refuses_a_connection_that_commits_by_itself(place: Place) -> None:
    place.put(stock, id=1, num=1)
    with place.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        with pytest.raises(SetupError, match="AUTOCOMMIT"):
            guards.decrement(connection, Stock, {"id": 1}, "num", by=1)
        with pytest.raises(SetupError, match="AUTOCOMMIT"):
            guards.locked(connection, Stock, {"id": 1})


@on(*SYNC_CONNECTIONS)
@pytest.mark.pattern("conditional-decrement")
def test_amounts_of_money_and_unsigned_numbers_fall_exactly(place: Place) -> None:
    amounts = Table(
        "guarded_amounts",
        MetaData(),
        Column("id", Integer, primary_key=True),
        Column("money", Numeric(12, 2).with_variant(Integer(), "sqlite")),
        Column("pieces", Integer().with_variant(mysql.INTEGER(unsigned=True), "mysql", "mariadb")),
    )
    by: Any = 7 if place.kind == "sqlite" else Decimal("7.05")

    def pay(target: Lent) -> Outcome:
        return guards.decrement(target, amounts, {"id": 1}, "money", by=by).outcome

    def take(target: Lent) -> Outcome:
        return guards.decrement(target, amounts, {"id": 1}, "pieces", by=2).outcome

    amounts.create(place.engine)
    try:
        place.put(amounts, id=1, money=2 * by, pieces=3)
        assert [place(pay) for _ in range(3)] == [Outcome.APPLIED, Outcome.APPLIED, Outcome.NOT_ENOUGH]
        assert [place(take) for _ in range(2)] == [Outcome.APPLIED, Outcome.NOT_ENOUGH]
        assert place.rows(amounts.c.money, amounts.c.pieces) == [(0, 1)]
    finally:
        amounts.drop(place.engine)


@core_tools.on()
@pytest.mark.pattern("unique-index")
def test_a_handler_whose_work_is_already_done_is_done(shop: Shop) -> None:
    def handler(message: Message, session: Session) -> None:
        core_tools.write(message, session)
        with guards.already_done(session, "guarded_orders_number") as attempt:
            session.add(Order(number="7"))
        if attempt.done_before:
            guards.upsert(session, Order, SEVEN, {"remark": "again"})

    Base.metadata.create_all(shop.engine)
    with shop.engine.begin() as connection:
        empty(connection)
    attempts = shop.attempts(handler)
    assert [attempts(core_tools.message(id, b"seen")) for id in ("1", "2", "2")] == [
        core_tools.PROCESSED,
        core_tools.PROCESSED,
        core_tools.REPEATED,
    ]
    with shop.engine.connect() as connection:
        assert connection.execute(select(orders.c.number, orders.c.note)).all() == [("7", "again")]
    assert shop.effects() == ["seen", "seen"]


@core_tools.on(*[pair for pair in core_tools.DRIVERS if pair[0] != "sqlite"])
def test_a_lock_that_a_handler_does_not_get_is_no_failure_of_the_message(shop: Shop) -> None:
    def handler(message: Message, session: Session) -> None:
        core_tools.write(message, session)
        try:
            guards.locked(session, Order, SEVEN, wait=0.05)
        finally:
            holder.rollback()

    Base.metadata.create_all(shop.engine)
    with shop.engine.begin() as connection:
        empty(connection)
        connection.execute(insert(orders).values(number="7"))
    attempts = shop.attempts(handler)
    with shop.engine.connect() as holder:
        holder.execute(select(orders).with_for_update()).all()
        verdict = attempts(core_tools.message("1"))
        assert isinstance(verdict, Release)
        assert not verdict.failed
        assert attempts(core_tools.message("1")) == core_tools.PROCESSED
    assert (shop.effects(), shop.dead()) == (["effect"], [])


def _memory() -> Connection:
    connection = create_engine("sqlite://").connect()
    connection.execute(text("CREATE TABLE t (id INTEGER PRIMARY KEY)"))
    return connection


T = Table(
    "t",
    MetaData(),
    Column("id", Integer, primary_key=True),
    Column("a", Integer, unique=True),
    Column("b", Integer),
    Column("c", Integer),
    Column("text", String),
    UniqueConstraint("b", "c"),
    Index("partial", "c", unique=True, sqlite_where=text("c > 0")),
    Index("plain", "text"),
)
KEY = {"id": 1}

WRONG: dict[str, tuple[Any, str]] = {
    "no key": (lambda c: guards.upsert(c, T, {}, {}), "several rows"),
    "not unique": (lambda c: guards.upsert(c, T, {"text": "x"}, {}), "unique constraint"),
    "half of a key": (lambda c: guards.upsert(c, T, {"b": 1}, {}), "several rows"),
    "partial index": (lambda c: guards.upsert(c, T, {"c": 1}, {}), "several rows"),
    "null key": (lambda c: guards.upsert(c, T, {"a": None}, {}), "None"),
    "unknown key": (lambda c: guards.upsert(c, T, {"z": 1}, {}), "it has a, b, c, id, text"),
    "unknown value": (lambda c: guards.upsert(c, T, KEY, {"z": 1}), "no column 'z'"),
    "key in values": (lambda c: guards.upsert(c, T, KEY, {"id": 2}), "twice"),
    "no table": (lambda c: guards.upsert(c, cast(Any, "t"), KEY, {}), "neither a Table"),
    "no target": (lambda c: guards.upsert(c.engine, T, KEY, {}), "run_sync"),
    "version None": (lambda c: guards.update_if_newer(c, T, KEY, version=("b", None), values={}), "None"),
    "version twice": (
        lambda c: guards.update_if_newer(c, T, KEY, version=("b", 1), values={"b": 1}),
        "twice",
    ),
    "nothing expected": (
        lambda c: guards.compare_and_set(c, T, KEY, expected={}, values={"b": 1}),
        "at least",
    ),
    "nothing to set": (lambda c: guards.compare_and_set(c, T, KEY, expected={"b": 1}, values={}), "at least"),
    "from nowhere": (lambda c: guards.transition(c, T, KEY, "b", to=1, allowed_from=[]), "list of states"),
    "from itself": (lambda c: guards.transition(c, T, KEY, "b", to=1, allowed_from=[0, 1]), "list of states"),
    "from a text": (
        lambda c: guards.transition(c, T, KEY, "text", to="b", allowed_from="a"),
        "list of states",
    ),
    "state twice": (
        lambda c: guards.transition(c, T, KEY, "b", to=1, allowed_from=[0], values={"b": 1}),
        "twice",
    ),
    "by nothing": (lambda c: guards.decrement(c, T, KEY, "b", by=0), "more than 0"),
    "by less": (lambda c: guards.decrement(c, T, KEY, "b", by=-1), "more than 0"),
    "by True": (lambda c: guards.decrement(c, T, KEY, "b", by=True), "more than 0"),
    "by nan": (lambda c: guards.decrement(c, T, KEY, "b", by=Decimal("nan")), "more than 0"),
    "by a part": (lambda c: guards.decrement(c, T, KEY, "b", by=0.5), "whole numbers"),
    "for ever": (lambda c: guards.locked(c, T, KEY, wait=float("inf")), "wait"),
    "no constraint": (lambda c: guards.already_done(c).__enter__(), "at least one"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_of_the_caller_is_named(name: str) -> None:
    call, words = WRONG[name]
    connection = _memory()
    with pytest.raises(SetupError, match=words):
        call(connection)
    connection.close()
    connection.engine.dispose()


@on(*[each for each in SYNC_SESSIONS if each[0] == "sqlite"])
def test_a_scoped_session_is_the_session_of_its_thread(place: Place) -> None:
    scoped = scoped_session(sessionmaker(place.engine))
    scoped.add(Order(number="7", state=CREATED))
    answer = guards.transition(scoped, Order, SEVEN, "state", to=PAID, allowed_from=[CREATED])
    assert answer.outcome is Outcome.APPLIED
    with guards.already_done(scoped, "guarded_orders_number") as attempt:
        scoped.add(Order(number="7"))
    assert attempt.done_before
    scoped.commit()
    scoped.remove()
    assert place.rows(orders.c.state) == [PAID]


def test_a_locked_row_has_the_type_of_what_was_asked_for() -> None:
    def asked(session: Session, connection: Connection) -> None:
        assert_type(guards.locked(session, Order, SEVEN), Order | None)
        assert_type(guards.locked(session, orders, SEVEN), Row[Any] | None)
        assert_type(guards.locked(connection, Order, SEVEN), Row[Any] | None)

    assert callable(asked)  # the type checker has been asked


def test_an_answer_is_no_truth_value() -> None:
    for answer in (Outcome.REFUSED, Outcome.APPLIED, guards.Decrement(Outcome.NOT_ENOUGH, 1)):
        with pytest.raises(TypeError, match="compare"):
            bool(answer)


# Each guard against a plain Python model: sequences of calls, other people's changes and rollbacks.

_small = st.integers(0, 3)
_maybe = st.none() | _small
Step = tuple[str, Any, Any]
#: A row of the model: `num` (also the state and the version) and `note`.
Model = dict[int, tuple[int | None, str | None]]


def _upsert(connection: Connection, model: Model, id: int, num: Any, other: Any) -> tuple[Any, Any]:
    expected = Outcome.UPDATED if id in model else Outcome.INSERTED
    model[id] = (num, str(other))
    return guards.upsert(connection, Stock, {"id": id}, {"num": num, "note": str(other)}), expected


def _update_if_newer(connection: Connection, model: Model, id: int, num: Any, other: Any) -> tuple[Any, Any]:
    version = num or 0
    answer = guards.update_if_newer(
        connection, Stock, {"id": id}, version=("num", version), values={"note": str(other)}
    )
    if id not in model:
        return answer, Outcome.MISSING
    stored = model[id][0]
    if stored is not None and stored >= version:
        return answer, Outcome.STALE
    model[id] = (version, str(other))
    return answer, Outcome.APPLIED


def _compare_and_set(connection: Connection, model: Model, id: int, num: Any, other: Any) -> tuple[Any, Any]:
    answer = guards.compare_and_set(
        connection, Stock, {"id": id}, expected={"num": num}, values={"num": other, "note": "set"}
    )
    if id not in model:
        return answer, Outcome.MISSING
    if model[id][0] != num:
        return answer, Outcome.REFUSED
    model[id] = (other, "set")
    return answer, Outcome.APPLIED


def _transition(connection: Connection, model: Model, id: int, num: Any, other: Any) -> tuple[Any, Any]:
    allowed = [each for each in (None, 0, 1, other) if each != num]
    answer = guards.transition(
        connection, Stock, {"id": id}, "num", to=num, allowed_from=allowed, values={"note": "moved"}
    )
    if id not in model:
        return answer, guards.Transition(Outcome.MISSING, None)
    state = model[id][0]
    if state == num:
        return answer, guards.Transition(Outcome.ALREADY_SO, num)
    if state not in allowed:
        return answer, guards.Transition(Outcome.REFUSED, state)
    model[id] = (num, "moved")
    return answer, guards.Transition(Outcome.APPLIED, num)


def _decrement(connection: Connection, model: Model, id: int, num: Any, other: Any) -> tuple[Any, Any]:
    by, floor = (num or 0) + 1, other or 0
    answer = guards.decrement(connection, Stock, {"id": id}, "num", by=by, floor=floor)
    if id not in model:
        return answer, guards.Decrement(Outcome.MISSING, None)
    stored, note = model[id]
    if stored is None or stored - by < floor:
        return answer, guards.Decrement(Outcome.NOT_ENOUGH, stored)
    model[id] = (stored - by, note)
    rest = stored - by if connection.dialect.name in ("sqlite", "postgresql") else None
    return answer, guards.Decrement(Outcome.APPLIED, rest)


def _locked(connection: Connection, model: Model, id: int, _num: Any, _other: Any) -> tuple[Any, Any]:
    row = guards.locked(connection, Stock, {"id": id})
    return (tuple(row) if row is not None else None), ((id, *model[id]) if id in model else None)


def _already_done(connection: Connection, model: Model, id: int, num: Any, _other: Any) -> tuple[Any, Any]:
    names = ("guarded_stock_pkey", "PRIMARY", "guarded_stock.id")
    with guards.already_done(connection, *names) as attempt:
        connection.execute(insert(stock).values(id=9))
        connection.execute(insert(stock).values(id=id, num=num))
        connection.execute(delete(stock).where(stock.c.id == 9))
    expected = id in model
    model.setdefault(id, (num, None))
    return attempt.done_before, expected


GUARDS = {
    "upsert": _upsert,
    "update_if_newer": _update_if_newer,
    "compare_and_set": _compare_and_set,
    "transition": _transition,
    "decrement": _decrement,
    "locked": _locked,
    "already_done": _already_done,
}
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["guard", "guard", "guard", "guard", "put", "delete", "commit", "rollback"]),
        st.integers(1, 2),
        _maybe,
        _maybe,
    ),
    max_size=25,
)


def _play(connection: Connection, guard: str, steps: list[tuple[str, int, Any, Any]]) -> None:
    empty(connection)
    connection.commit()
    model: Model = {}
    kept: Model = {}
    for step, id, num, other in steps:
        if step == "guard":
            answer, expected = GUARDS[guard](connection, model, id, num, other)
            assert answer == expected
        elif step == "commit":
            connection.commit()
            kept = dict(model)
        elif step == "rollback":
            connection.rollback()
            model = dict(kept)
        else:
            connection.execute(delete(stock).where(stock.c.id == id))
            model.pop(id, None)
            if step == "put":
                value = None if num is None else num * 3
                connection.execute(insert(stock).values(id=id, num=value))
                model[id] = (value, None)
        rows = connection.execute(select(stock).order_by(stock.c.id))
        assert {row.id: (row.num, row.note) for row in rows} == model
    connection.rollback()


@on(*SYNC_CONNECTIONS)
@pytest.mark.parametrize("guard", GUARDS)
def test_a_guard_answers_like_its_model_whatever_came_before(place: Place, guard: str) -> None:
    with place.engine.connect() as connection:

        @settings(
            max_examples=60 if place.kind == "sqlite" else 12,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(steps=STEPS)
        def check(steps: list[tuple[str, int, Any, Any]]) -> None:
            _play(connection, guard, steps)

        check()
