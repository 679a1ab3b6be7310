"""Rows of `idemq_outgoing` on real databases: who picks what, in which order, and what is then known."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Connection, Engine, func, select, text, update
from sqlalchemy.exc import DBAPIError

from idemq import schema
from idemq.broker import Destination
from idemq.drivers import begin, is_contention
from idemq.effect_rows import LOOK, SEND, EffectRows, Repeats
from idemq.effects import Effects, declare
from idemq.embedded import Embedded
from idemq.errors import SetupError
from idemq.kafka import Kafka
from idemq.message import Message
from idemq.outbox import Outbox
from idemq.outgoing import FAILED, IN_DOUBT, LEASE, SENDING, WAITING, Messages, Row, lane_of, new_key
from idemq.rabbitmq import RabbitMQ
from tests import core_tools
from tests.core_tools import Shop

pytestmark = core_tools.on(("sqlite", "pysqlite"), ("postgres", "psycopg"), ("mariadb", "pymysql"))

TABLE = schema.table("idemq_outgoing")
A, B = b"a" * 16, b"b" * 16
QUEUE = Destination("rabbit", ("", "orders"))


def send_sms(payload: dict[str, str], key: str) -> None:
    raise AssertionError("the rows do not call it")


declare("sms", send_sms, repeat=None, key_lifetime=None, settle=0.0, retry=None, concurrency=1)


@pytest.fixture
def engine(shop: Shop) -> Iterator[Engine]:
    engine = shop.new_engine()
    assert isinstance(engine, Engine)
    with begun(engine) as connection:
        connection.execute(TABLE.delete())
    yield engine
    engine.dispose()


@contextmanager
def begun(engine: Engine) -> Iterator[Connection]:
    with engine.connect() as connection, begin(connection):
        yield connection


def publish(engine: Engine, *bodies: str, key: str | None = None) -> None:
    with begun(engine) as connection:
        for body in bodies:
            Outbox(connection).publish(QUEUE, body.encode(), key=key)


def plan(engine: Engine) -> UUID:
    with begun(engine) as connection:
        return Effects(connection).plan(send_sms, {"to": "1"})


def bodies(rows: list[Row]) -> list[str]:
    return [(row.message.body or b"").decode() for row in rows]


def pick(engine: Engine, owner: bytes = A, count: int = 100) -> list[Row]:
    with engine.connect() as connection:
        return Messages("rabbit", owner, None).pick(connection, count)


def rows(engine: Engine) -> list[Any]:
    with engine.connect() as connection:
        return list(connection.execute(select(TABLE).order_by(TABLE.c.seq)))


def leases_end(engine: Engine) -> None:
    """As if the time of all leases, and of what is to be tried later, had come."""
    with begun(engine) as connection:
        past = connection.execute(select(func.min(TABLE.c.at))).scalar_one() - timedelta(seconds=1)
        waits = TABLE.c.not_before.is_not(None)
        connection.execute(update(TABLE).where(waits).values(not_before=past, lease_until=past))


def test_a_key_is_a_uuid_of_version_7_and_grows_with_time(engine: Engine) -> None:
    keys = [new_key() for _ in range(100)]
    assert {key.version for key in keys} == {7}
    assert {key.variant for key in keys} == {"specified in RFC 4122"}
    assert len(set(keys)) == 100
    assert sorted(key.bytes[:6] for key in keys) == [key.bytes[:6] for key in keys]


@pytest.mark.hazard("H49")
def test_nothing_is_planned_by_a_transaction_that_is_rolled_back(engine: Engine) -> None:
    with engine.connect() as connection, begin(connection) as transaction:
        Outbox(connection).publish(QUEUE, b"1")
        Effects(connection).plan(send_sms, {"to": "1"})
        transaction.rollback()
    assert rows(engine) == []


def test_what_is_picked_is_what_was_published(engine: Engine) -> None:
    with begun(engine) as connection:
        id = Outbox(connection).publish(
            QUEUE, {"order": 1}, headers={"tenant": "a"}, key="k", properties={"correlation_id": "c"}
        )
        own = Outbox(connection).publish(QUEUE, b"\x00\xff", id="order-1", content_type=None)
    first, second = pick(engine)
    assert first.message == Message(
        body=b'{"order":1}',
        headers={"tenant": "a"},
        id=id,
        key=b"k",
        content_type="application/json",
        sent_at=first.message.sent_at,
        properties={"correlation_id": "c"},
    )
    assert (first.address, first.key, first.attempts) == (("", "orders"), id, 1)
    assert (own, second.message.id, second.message.body) == ("order-1", "order-1", b"\x00\xff")


@pytest.mark.hazard("H14")
def test_a_row_that_commits_late_is_found(engine: Engine, shop: Shop) -> None:
    if shop.kind == "sqlite":
        pytest.skip("SQLite has one writer: rows commit in their order")
    with begun(engine) as late:
        Outbox(late).publish(QUEUE, b"first number")
        publish(engine, "second number")
        assert bodies(pick(engine)) == ["second number"]
    assert bodies(pick(engine)) == ["first number"]


def test_two_never_pick_the_same_row(engine: Engine) -> None:
    publish(engine, *(str(number) for number in range(60)))
    picked: list[list[str]] = [[] for _ in range(4)]
    start = threading.Barrier(4)

    def run(number: int) -> None:
        start.wait()
        for _ in range(50):
            try:
                picked[number] += bodies(pick(engine, bytes([number]) * 16, 3))
            except DBAPIError as error:
                if not is_contention(error):
                    raise

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(int(each) for some in picked for each in some) == list(range(60))


def test_of_a_key_only_what_nothing_comes_before_is_picked(engine: Engine) -> None:
    publish(engine, "k1", "k2", key="k")
    publish(engine, "other", key="o")
    assert bodies(pick(engine, count=1)) == ["k1"]
    assert bodies(pick(engine, B)) == ["other"]  # k1 is being sent
    leases_end(engine)
    with engine.connect() as connection:
        Messages("rabbit", B, None).reap(connection)
    assert bodies(pick(engine, B)) == ["k1", "k2", "other"]


def test_what_is_refused_waits_and_holds_its_key(engine: Engine) -> None:
    publish(engine, "k1", "k2", key="k")
    messages, (first, second) = Messages("rabbit", A, None), pick(engine)
    with engine.connect() as connection:
        messages.unsent(connection, [(first, "no such queue", 30.0), (second, None, 0.0)])
    assert pick(engine) == []
    assert [(row.state, row.error, row.owner) for row in rows(engine)] == [
        (WAITING, "no such queue", None),
        (WAITING, None, None),
    ]
    leases_end(engine)
    assert bodies(pick(engine)) == ["k1", "k2"]


@pytest.mark.hazard("H52")
def test_a_message_whose_lease_was_lost_is_not_given_back_by_its_former_owner(engine: Engine) -> None:
    publish(engine, "1")
    (frozen,) = pick(engine, A)
    leases_end(engine)
    with engine.connect() as connection:
        Messages("rabbit", B, None).reap(connection)
    assert bodies(pick(engine, B)) == ["1"]
    with engine.connect() as connection:
        Messages("rabbit", A, None).unsent(connection, [(frozen, "late", 0.0)])
        assert [(row.state, row.owner) for row in rows(engine)] == [(SENDING, B)]
        Messages("rabbit", A, None).sent(
            connection, [frozen]
        )  # the broker has it: that is true for everybody
    assert rows(engine) == []


AMQP = RabbitMQ("amqp://guest:guest@127.0.0.1:1//").to("orders")
KAFKA = Kafka("127.0.0.1:1").to("orders")
IN_FILE = Embedded("/nowhere/at/all.db").to("orders")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"destination": "orders"}, "broker.to"),
        ({"id": "x" * 1025}, "1024"),
        ({"id": ""}, "1024"),
        ({"destination": AMQP, "id": "x" * 256}, "AMQP allows 255"),
        ({"destination": AMQP, "properties": {"expiration": 1000}}, "expiration must be a text"),
        ({"destination": KAFKA, "headers": {"n": 1}}, "must be text or bytes"),
        ({"destination": KAFKA, "properties": {"correlation_id": "1"}}, "make it a header"),
        ({"destination": IN_FILE, "properties": {"correlation_id": "1"}}, "use a header"),
    ],
)
def test_what_cannot_be_published_is_refused_at_once(
    engine: Engine, options: dict[str, Any], words: str
) -> None:
    given: dict[str, Any] = {"destination": QUEUE, "body": b"", **options}
    with begun(engine) as connection, pytest.raises((SetupError, ValueError), match=words):
        Outbox(connection).publish(given.pop("destination"), given.pop("body"), **given)


def test_what_is_too_large_is_refused_at_once(engine: Engine) -> None:
    with begun(engine) as connection, pytest.raises(ValueError, match="bytes are too many"):
        Outbox(connection).publish(QUEUE, b"x" * (16 * 1024 * 1024 + 1))


# Effects. Each test says what the provider can do by `Repeats`.

NOBODY, BY_KEY, BY_LOOK_UP = Repeats(), Repeats(key_lifetime=3600.0), Repeats(settle=5.0)
ERROR = RuntimeError("no answer")


class Process:
    """One relay process, as far as the rows of the effect go."""

    def __init__(self, engine: Engine, repeats: Repeats, owner: bytes = A) -> None:
        self.engine = engine
        self.rows = EffectRows("sms", owner, None, repeats)

    def pick(self) -> list[tuple[Row, str]]:
        with self.engine.connect() as connection:
            return list(self.rows.pick(connection, 10))

    def one(self) -> Row:
        ((row, step),) = self.pick()
        assert step == SEND
        return row

    def do(self, step: str, *arguments: Any) -> Any:
        with self.engine.connect() as connection:
            return getattr(self.rows, step)(connection, *arguments)


def state(engine: Engine) -> list[tuple[int, int, bool]]:
    """(state, attempts, whether it will be looked at again by itself)."""
    return [(row.state, row.attempts, row.not_before is not None) for row in rows(engine)]


@pytest.mark.hazard("H47")
def test_sending_is_committed_before_the_call(engine: Engine) -> None:
    key = plan(engine)
    row = Process(engine, NOBODY).one()
    assert row.key == str(key)
    assert state(engine) == [(SENDING, 1, True)]
    assert Process(engine, NOBODY, B).pick() == []


def test_what_is_done_is_gone(engine: Engine) -> None:
    plan(engine)
    process = Process(engine, NOBODY)
    row = process.one()
    assert process.do("done", row)
    assert not process.do("done", row)
    assert rows(engine) == []


@pytest.mark.hazard("H47")
@pytest.mark.parametrize(
    ("repeats", "again"),
    [(NOBODY, []), (BY_KEY, [SEND]), (BY_LOOK_UP, [LOOK])],
    ids=["none", "key", "look-up"],
)
def test_what_a_dead_process_was_sending_is_in_doubt(
    engine: Engine, repeats: Repeats, again: list[str]
) -> None:
    plan(engine)
    dead, other = Process(engine, repeats), Process(engine, repeats, B)
    dead.one()
    other.do("reap")
    assert state(engine) == [(SENDING, 1, True)]  # its lease has not ended
    leases_end(engine)
    other.do("reap")
    assert state(engine) == [(IN_DOUBT, 1, again != [])]
    leases_end(engine)
    assert [step for _, step in other.pick()] == again


@pytest.mark.hazard("H47")
def test_an_effect_in_doubt_that_only_a_person_can_resolve_is_never_repeated(engine: Engine) -> None:
    plan(engine)
    process = Process(engine, NOBODY)
    assert process.do("in_doubt", process.one(), ERROR, 1.0)
    leases_end(engine)
    assert process.pick() == []
    assert state(engine) == [(IN_DOUBT, 1, False)]


def test_under_the_same_key_it_is_repeated(engine: Engine) -> None:
    plan(engine)
    process = Process(engine, BY_KEY)
    first = process.one()
    process.do("in_doubt", first, ERROR, 1.0)
    assert process.pick() == []
    leases_end(engine)
    second = process.one()
    assert (second.key, second.message.body, second.attempts) == (first.key, first.message.body, 2)
    assert process.do("done", second)


@pytest.mark.hazard("H48")
def test_a_key_is_not_used_when_the_provider_may_have_forgotten_it(engine: Engine) -> None:
    plan(engine)
    process = Process(engine, BY_KEY)
    process.do("in_doubt", process.one(), ERROR, 1.0)
    leases_end(engine)
    with begun(engine) as connection:
        since = TABLE.c.first_sending_at
        begun_at = connection.execute(select(since)).scalar_one()
        earlier = timedelta(seconds=3600.0 - LEASE + 1)  # a call takes up to a lease to arrive
        connection.execute(update(TABLE).values(first_sending_at=begun_at - earlier))
    assert process.pick() == []
    assert state(engine) == [(IN_DOUBT, 1, False)]


def test_what_the_look_up_finds_is_done_and_what_it_does_not_find_is_sent_again(engine: Engine) -> None:
    for there in (True, False):
        plan(engine)
        process = Process(engine, BY_LOOK_UP)
        process.do("in_doubt", process.one(), ERROR, 1.0)
        assert process.pick() == []  # it settles
        leases_end(engine)
        ((row, step),) = process.pick()
        assert step == LOOK
        assert process.do("done" if there else "absent", row)
        assert state(engine) == ([] if there else [(WAITING, 1, True)])
    assert process.one().attempts == 2


def test_a_look_up_that_cannot_tell_is_made_again(engine: Engine) -> None:
    plan(engine)
    process = Process(engine, BY_LOOK_UP)
    process.do("in_doubt", process.one(), ERROR, 1.0)
    for _ in range(3):
        leases_end(engine)
        ((row, step),) = process.pick()
        assert step == LOOK
        assert process.do("unknown", row, ERROR, 5.0)
        assert process.pick() == []


def test_what_was_not_sent_is_sent_again_or_has_failed(engine: Engine) -> None:
    plan(engine)
    process = Process(engine, NOBODY)
    assert process.do("not_sent", process.one(), ERROR, 0.0)
    assert state(engine) == [(WAITING, 1, True)]
    assert process.do("not_sent", process.one(), ERROR, None)
    assert state(engine) == [(FAILED, 2, False)]
    assert process.pick() == []


def test_not_sent_says_nothing_of_the_call_before(engine: Engine) -> None:
    plan(engine)
    process = Process(engine, BY_KEY)
    process.do("in_doubt", process.one(), ERROR, 0.0)
    assert process.do("not_sent", process.one(), ERROR, None)
    assert state(engine) == [(IN_DOUBT, 2, True)]  # the provider's key goes on protecting
    assert process.pick() == []  # for a while


def test_what_is_refused_has_failed(engine: Engine) -> None:
    plan(engine)
    process = Process(engine, BY_KEY)
    assert process.do("refused", process.one(), ERROR)
    assert state(engine) == [(FAILED, 1, False)]
    assert "no answer" in rows(engine)[0].error


@pytest.mark.hazard("H52")
def test_a_process_that_thaws_after_its_lease_may_say_what_it_knows_and_nothing_else(engine: Engine) -> None:
    plan(engine)
    frozen, other = Process(engine, NOBODY), Process(engine, NOBODY, B)
    row = frozen.one()
    leases_end(engine)
    other.do("reap")
    assert not frozen.do("in_doubt", row, ERROR, 0.0)
    assert frozen.do("done", row)  # true, whoever owns it
    assert rows(engine) == []


@pytest.mark.hazard("H52")
def test_what_is_known_of_an_attempt_is_no_news_once_the_next_has_begun(engine: Engine) -> None:
    plan(engine)
    frozen, other = Process(engine, BY_KEY), Process(engine, BY_KEY, B)
    first = frozen.one()
    leases_end(engine)
    other.do("reap")
    second = other.one()
    assert not frozen.do("not_sent", first, ERROR, 0.0)
    assert not frozen.do("refused", first, ERROR)
    assert not frozen.do("done", first)
    assert state(engine) == [(SENDING, 2, True)]
    assert other.do("done", second)


def test_a_live_call_keeps_its_lease(engine: Engine) -> None:
    plan(engine)
    process = Process(engine, NOBODY)
    row = process.one()
    leases_end(engine)
    process.do("renew", [row.seq])
    Process(engine, NOBODY, B).do("reap")
    assert state(engine) == [(SENDING, 1, True)]


def test_a_webhook_confirms_once(engine: Engine) -> None:
    key = plan(engine)
    process = Process(engine, NOBODY)
    row = process.one()
    with begun(engine) as connection:
        assert Effects(connection).confirm(str(key))
        assert not Effects(connection).confirm(key)
    assert not process.do("done", row)


def test_lanes_of_two_brokers_are_apart(engine: Engine) -> None:
    assert lane_of("a", "k") == lane_of("a", b"k")
    assert len({lane_of("a", "k"), lane_of("b", "k"), lane_of("a", "l"), lane_of("ak", "")}) == 4


def test_missing_tables_are_named(engine: Engine) -> None:
    with begun(engine) as connection:
        connection.execute(text("ALTER TABLE idemq_outgoing RENAME TO idemq_gone"))
    try:
        with begun(engine) as connection, pytest.raises(Exception, match="idemq db upgrade"):
            Outbox(connection).publish(QUEUE, b"1")
    finally:
        with begun(engine) as connection:
            connection.execute(text("ALTER TABLE idemq_gone RENAME TO idemq_outgoing"))
