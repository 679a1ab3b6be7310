"""What becomes of a failure, on every broker and with both kinds of handlers: tried again, or kept whole."""

from __future__ import annotations

import asyncio
import inspect
import logging
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import URL, create_engine, text
from sqlalchemy.orm import Session
from sqlalchemy.util import await_only
from tenacity import Retrying, stop_after_attempt, wait_fixed

from idemq import Message, Reject, RetryLater, consuming, overtime
from idemq.failures import DEAD, WAITING
from idemq.packing import unpacked
from idemq.worker import Worker
from tests import kafka_tools
from tests.contract.brokers import TYPED, Broker, KafkaBroker, RabbitBroker, another, spec
from tests.contract.running import Make, once_each, sent
from tests.proxy import Proxy, proxy
from tests.servers import eventually

pytestmark = [
    pytest.mark.hazard("H43"),
    pytest.mark.parametrize("broker", ["embedded", "rabbitmq", "kafka"], indirect=True),
]


def policy(attempts: int, seconds: float) -> Retrying:
    return Retrying(stop=stop_after_attempt(attempts), wait=wait_fixed(seconds))


#: Every failure is parked, and not due again before the test says so.
PARKED = policy(5, 60.0)


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consuming, "LOOK_EVERY", 0.1)


@pytest.mark.hazard("H22")
@pytest.mark.hazard("H23")
@pytest.mark.hazard("H26")
def test_what_waits_is_a_row_that_holds_nothing_and_any_worker_takes_it_up(
    broker: Broker, make: Make
) -> None:
    calls: Counter[str | None] = Counter()

    def fail(message: Message) -> None:
        calls[message.id] += 1
        if message.id in ("m1", "m2"):
            raise RuntimeError("not now")

    shop = make(fail, retry=PARKED)
    broker.publish(sent(1, 2, 3, 4))
    with shop.running():
        eventually(lambda: shop.counts() == once_each(3, 4))
        broker.publish(sent(1, 5))  # one lane: the copy is settled before the one behind it
        eventually(lambda: shop.counts() == once_each(3, 4, 5))
    assert broker.left() == 0
    assert calls == {"m1": 1, "m2": 1, "m3": 1, "m4": 1, "m5": 1}
    assert shop.claims() == 5
    for row in shop.failed():
        assert (row.state, row.reason, row.attempts) == (WAITING, "failed", 1)
        assert row.owns_claim
        assert row.owner is None
        assert 40 < (row.not_before - row.last_at).total_seconds() <= 60
    other = make(retry=PARKED)
    shop.make_due()
    broker.publish(sent(2))
    with other.running():
        eventually(lambda: other.counts() == once_each(1, 2, 3, 4, 5))
        broker.publish(sent(1, 6))
        eventually(lambda: other.counts()["m6"])
    assert shop.counts() == once_each(1, 2, 3, 4, 5, 6)
    assert shop.failed() == []
    assert broker.left() == 0


@pytest.mark.hazard("H20")
@pytest.mark.hazard("H41")
@pytest.mark.hazard("H45")
def test_each_message_is_tried_as_its_failures_ask_for_and_ends_once(broker: Broker, make: Make) -> None:
    calls: dict[str, list[float]] = defaultdict(list)

    def act(message: Message) -> None:
        assert message.id is not None
        calls[message.id].append(time.monotonic())
        count = len(calls[message.id])
        match message.id:
            case "m1" if count < 3:  # parked twice
                raise RuntimeError("not now")
            case "m2":
                raise RuntimeError("never")
            case "m3":
                raise Reject("the amount must be positive")
            case "m4" if count < 6:  # more often than failures are allowed, and within the worker
                raise RetryLater(0.05)
            case "m5" if count < 2:  # parked
                raise RetryLater(1.5)
            case "m6" if count < 2:
                raise RetryLater(0.2)

    shop = make(act, retry=policy(3, 1.1), concurrency=2)
    broker.publish(sent(*range(1, 10), *range(1, 10)))
    with shop.running():
        eventually(lambda: shop.counts() == once_each(1, 4, 5, 6, 7, 8, 9) and not shop.waiting())
        broker.publish(sent(*range(1, 11)))
        eventually(lambda: shop.counts()["m10"])
    assert shop.counts() == once_each(1, 4, 5, 6, 7, 8, 9, 10)
    times = {id: len(each) for id, each in calls.items()}
    assert times == {**once_each(*range(1, 11)), "m1": 3, "m2": 3, "m4": 6, "m5": 2, "m6": 2}
    for id, gap in ("m1", 1.1), ("m2", 1.1), ("m5", 1.5), ("m6", 0.2):
        begun = calls[id]
        assert all(later - sooner >= gap for sooner, later in pairwise(begun)), id
    neighbours = max(calls[f"m{n}"][-1] for n in (7, 8, 9))
    assert neighbours < min(calls[id][1] for id in ("m1", "m2", "m5"))
    rejected, used_up = sorted(shop.failed(), key=lambda row: row.reason)
    assert (rejected.reason, rejected.attempts, rejected.body) == ("rejected", 0, b'{"n": 3}')
    assert "the amount must be positive" in rejected.error
    assert (used_up.reason, used_up.attempts, used_up.body) == ("retries used up", 3, b'{"n": 2}')
    assert broker.left() == 0


@pytest.mark.hazard("H44")
def test_a_dead_letter_is_the_message_byte_for_byte_with_its_origin_and_its_error(
    broker: Broker, make: Make
) -> None:
    body = b'\t{"n": 1,  "text": "\\u0000 \xc3\xbc \xe2\x98\x83"}\r\n'
    headers: dict[str, Any] = {"trace": "ü ☃ \x00", "empty": ""}
    headers |= {"table": {"deep": [1, 2**40, None, True]}} if TYPED in broker.features else {}
    headers |= {"bytes": b"\x00\xff\xfe"} if broker.kind == "kafka" else {}

    def fail(message: Message) -> None:
        raise LookupError("no such product: \x00 \ud800")

    shop = make(fail, retry=policy(2, 0.05))
    broker.publish([("m1", body)], headers)
    with shop.running():
        eventually(lambda: shop.failed())
        broker.publish([("m1", body)], headers)
    (row,) = shop.failed()
    assert (row.state, row.reason, row.attempts) == (DEAD, "retries used up", 2)
    assert bytes(row.body) == body
    kept = unpacked(row.headers)
    assert {name: kept[name] for name in headers} == headers
    assert unpacked(row.properties)["message_id"] == "m1"
    assert unpacked(row.origin).items() >= place(broker).items()
    assert "Traceback" in row.error
    assert "LookupError: no such product: \\x00 ?" in row.error
    assert row.first_at <= row.last_at
    assert row.owns_claim
    assert shop.counts() == {}
    with shop.running():
        broker.publish([("m1", body), ("m2", body)])
        eventually(lambda: len(shop.failed()) == 2)
    assert shop.failed()[0] == row
    assert broker.left() == 0


def place(broker: Broker) -> dict[str, Any]:
    """Where its first message came from."""
    if broker.kind == "kafka":
        return {"topic": broker.name, "partition": 0, "offset": 0}
    if broker.kind == "embedded":
        return {"queue": broker.name}
    return {"queue": broker.name, "exchange": "", "routing_key": broker.name}


@pytest.mark.hazard("H15")
def test_what_may_have_been_forgotten_or_says_no_time_is_not_guessed_at(broker: Broker, make: Make) -> None:
    now = datetime.now(UTC)
    ancient, old, ahead = now - timedelta(days=3), now - timedelta(hours=2), now + timedelta(minutes=30)
    shop = make(undated="park")
    broker.publish(sent(1), sent_at=ancient)
    with shop.running():
        eventually(lambda: shop.counts())
        shop.forget(now - timedelta(days=1))
        broker.publish(sent(1, 2), sent_at=ancient)  # the first is still remembered
        broker.publish(sent(3), sent_at=old)
        broker.publish(sent(4), sent_at=ahead)
        if isinstance(broker, RabbitBroker):
            broker.publish(sent(5))  # the others' clients always say a time
        broker.publish(sent(6), sent_at=now)
        eventually(lambda: shop.counts() == once_each(1, 3, 6))
    dead = [("too old", b'{"n": 2}'), ("undated", b'{"n": 4}'), ("undated", b'{"n": 5}')]
    assert shop.dead() == dead[: 3 if isinstance(broker, RabbitBroker) else 2]
    lenient = make(name="lenient")
    broker.publish(sent(7), sent_at=ahead)
    with lenient.running():
        eventually(lambda: shop.counts() == once_each(1, 3, 6, 7))
    assert broker.left() == 0


def test_twenty_bad_messages_in_a_row_stop_their_consumer_and_no_other(broker: Broker, make: Make) -> None:
    with another(broker) as second:
        shop, other = make(), make(source=second.source(), name="other")
        bad = [(f"bad{n}", b"not json") for n in range(60)]
        broker.publish([*bad[:19], *sent(1), *bad[19:], *sent(2)])  # a good one begins the row anew
        with shop.running(other) as worker:
            consumer = worker.consumers[0]
            eventually(lambda: consumer.stopped)
            assert consumer.stopped is not None
            assert "20 messages in a row" in consumer.stopped
            assert "unreadable" in consumer.stopped
            second.publish(sent(3))
            eventually(lambda: shop.counts() == once_each(1, 3))
            assert worker.consumers[1].stopped is None
        assert worker.failure is None
        assert second.left() == 0
    dead = len(shop.dead())
    assert 39 <= dead < 60
    assert broker.left() == 61 - dead


def test_a_failed_message_that_is_too_large_to_keep_stays_in_the_broker_uncut(
    broker: Broker, make: Make
) -> None:
    seen: list[bytes | None] = []

    def fail(message: Message) -> None:
        if message.id == "large":
            raise RuntimeError("not now")

    body = b'{"n": 1, "text": "%s"}' % (b"x" * 3000)
    shop = make(fail, retry=PARKED, max_kept=1024)
    broker.publish([*sent(1), ("large", body)])
    with shop.running() as worker:
        eventually(lambda: worker.failure)
    assert "max_kept=1024" in str(worker.failure)
    assert "max_kept=1024" in str(worker.consumers[0].stopped)
    assert shop.failed() == []
    assert broker.left() == 1
    patient = make(lambda message: seen.append(message.body))
    with patient.running():
        eventually(lambda: shop.counts() == once_each(1) + Counter(["large"]))
    assert seen == [body]
    assert broker.left() == 0


@pytest.mark.hazard("H21")
@pytest.mark.hazard("H24")
def test_what_a_killed_worker_had_is_parked_undecoded_and_then_run_once(broker: Broker, make: Make) -> None:
    shop = make()
    broker.publish([*sent(1, 2), ("bad", b"not json"), *sent(3)])
    hold_and_die(broker, 4)
    with shop.running() as worker:
        eventually(lambda: shop.counts() == once_each(1, 2, 3) and shop.dead())
    assert worker.consumers[0].counts["parked"] == 4
    assert shop.dead() == [("unreadable", b"not json")]
    assert shop.claims() == 4
    assert broker.left() == 0
    broker.publish(sent(1, 2, 3, 4))
    hold_and_die(broker, 4)
    with shop.running() as worker:  # three of them are known, for all that they are redelivered
        eventually(lambda: shop.counts() == once_each(1, 2, 3, 4))
    assert worker.consumers[0].counts["parked"] == 1
    assert worker.consumers[0].counts["duplicates"] == 3
    assert not shop.waiting()
    assert broker.left() == 0


def hold_and_die(broker: Broker, count: int) -> None:
    """A consumer takes that many messages, settles none, and is killed."""
    command = [sys.executable, "-m", "tests.contract.child", spec(broker)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        try:
            assert child.stdout is not None
            for _ in range(count):
                assert child.stdout.readline()
        finally:
            child.kill()
    if isinstance(broker, KafkaBroker):
        kafka_tools.evict(broker.address, broker.name)


@pytest.mark.hazard("H3")
def test_what_a_failed_handler_had_committed_too_early_is_a_dead_letter_and_not_tried_again(
    broker: Broker, make: Make
) -> None:
    def commit_and_fail(message: Message, session: Session) -> None:
        if message.id == "m1":
            raw: Any = session.connection().connection.driver_connection
            if inspect.isawaitable(executing := raw.execute("COMMIT")):
                await_only(executing)
            raise RuntimeError("too late")

    shop = make(sin=commit_and_fail, retry=PARKED)
    broker.publish(sent(1, 2, 1))
    with shop.running():
        eventually(lambda: shop.counts()["m2"])
        broker.publish(sent(3))
        eventually(lambda: shop.counts()["m3"])
    assert shop.dead() == [("broke its transaction", b'{"n": 1}')]
    assert shop.counts() == once_each(1, 2, 3)
    assert broker.left() == 0


def test_a_handler_past_its_deadline_has_failed_and_leaves_nothing(
    broker: Broker, make: Make, kind: str
) -> None:
    attempts: Counter[str | None] = Counter()
    ended: list[str] = []

    def act(message: Message) -> Awaitable[None] | None:
        attempts[message.id] += 1
        if message.id != "m1" or attempts["m1"] > 1:
            return None
        if kind == "async":
            return cancelled()
        threading.Event().wait(0.6)  # a thread cannot be stopped
        ended.append("by itself")
        return None

    async def cancelled() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    shop = make(act, retry=policy(2, 0.05), deadline=0.4)
    broker.publish(sent(1, 2))
    with shop.running() as worker:
        eventually(lambda: shop.counts() == once_each(1, 2))
    assert ended == ["cancelled" if kind == "async" else "by itself"]
    assert attempts == {"m1": 2, "m2": 1}
    assert worker.consumers[0].counts["failures"] == 1
    assert worker.failure is None
    assert broker.left() == 0


def test_a_handler_that_never_returns_ends_its_worker_and_commits_nothing(
    broker: Broker, make: Make, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overtime, "OVERTIME", 0.2)
    release = threading.Event()

    def hang(message: Message) -> Awaitable[None] | None:
        if message.id != "m2":
            return None
        if kind == "async":
            return stubborn()
        release.wait(90)
        return None

    async def stubborn() -> None:
        while not release.is_set():
            try:
                await asyncio.sleep(0.02)
            except asyncio.CancelledError:
                pass

    shop = make(hang, deadline=0.2)
    broker.publish(sent(1, 2, 3))
    with shop.running() as worker:
        eventually(lambda: worker.failure)
        release.set()  # `idemq run` ends the process here
    assert "past its deadline" in str(worker.failure)
    assert shop.counts() == once_each(1)
    with make(deadline=20.0).running():
        eventually(lambda: shop.counts() == once_each(1, 2, 3))
    assert broker.left() == 0


@pytest.fixture
def database(postgres_url: URL) -> Iterator[tuple[Proxy, URL]]:
    """A way to the database that can be cut."""
    assert postgres_url.host is not None
    with proxy(postgres_url.host, postgres_url.port or 5432) as between:
        through = postgres_url.set(host="127.0.0.1", port=between.port)
        yield between, through.update_query_dict({"sslmode": "disable"})


@pytest.mark.hazard("H55")
def test_while_the_database_is_away_nothing_is_settled_and_then_it_goes_on_by_itself(
    broker: Broker,
    make: Make,
    postgres_url: URL,
    database: tuple[Proxy, URL],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "idemq")
    between, through = database
    calls: Counter[str | None] = Counter()

    def act(message: Message) -> None:
        calls[message.id] += 1
        if message.id == "m1" and calls["m1"] == 1:
            raise RetryLater(1.2)  # it becomes due while the database is away
        if message.id == "m3" and calls["m3"] == 1:
            between.away()  # in the middle of the handler's transaction

    observer = make(at=postgres_url)
    shop = make(act, at=through, retry=policy(1, 0.0), concurrency=2)
    broker.publish(sent(1, 2, 3))
    with shop.running() as worker:
        (consumer,) = worker.consumers
        eventually(lambda: calls["m3"])
        broker.publish(sent(3, *range(4, 30)))  # a copy of the one that asks for the database
        eventually(lambda: "the database is away" in caplog.text)
        eventually(lambda: all(row.not_before < datetime.now(UTC) for row in observer.failed()))
        before = observer.counts(), observer.failed(), settled(worker)
        eventually(lambda: caplog.text.count("the database is away") >= 3)
        assert (observer.counts(), observer.failed(), settled(worker)) == before
        assert consumer.counts["failures"] == consumer.counts["dead"] == 0
        between.back()
        eventually(lambda: observer.counts() == once_each(*range(1, 30)))
    assert observer.failed() == []
    assert consumer.counts["failures"] == 0
    assert "the database answers again" in caplog.text
    assert broker.left() == 0


@pytest.mark.hazard("H55")
def test_while_the_database_is_read_only_nothing_is_settled_and_then_it_goes_on_by_itself(
    broker: Broker, make: Make, postgres_url: URL, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "idemq")
    observer = make(at=postgres_url)
    shop = make(at=postgres_url.update_query_dict({"application_name": "worker"}), retry=policy(1, 0.0))

    def say(setting: str) -> None:
        """For new connections; those of the worker end."""
        ends = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'worker'"
        with observer.engine.begin() as connection:
            connection.execute(text("SET LOCAL transaction_read_only = off"))
            connection.execute(text(f"ALTER DATABASE {postgres_url.database} {setting}"))
        with observer.engine.connect() as connection:
            connection.execute(text(ends))

    broker.publish(sent(1, 2, 3))
    with shop.running() as worker:
        eventually(lambda: observer.counts() == once_each(1, 2, 3))
        say("SET default_transaction_read_only = on")
        broker.publish(sent(*range(4, 10)))
        eventually(lambda: caplog.text.count("the database is away") >= 3)
        assert (observer.counts(), settled(worker)) == (once_each(1, 2, 3), 3)
        say("RESET default_transaction_read_only")
        eventually(lambda: observer.counts() == once_each(*range(1, 10)))
    assert observer.failed() == []
    assert worker.consumers[0].counts["failures"] == 0
    assert broker.left() == 0


@pytest.mark.hazard("H29")
def test_what_another_transaction_causes_is_tried_again_and_is_no_failure(
    broker: Broker, make: Make, url: URL, tmp_path: Path
) -> None:
    """A lock that somebody else holds; also where one failure would be the end."""
    if url.get_backend_name() == "sqlite":
        other = create_engine(f"sqlite:///{tmp_path / 'other.db'}", connect_args={"timeout": 0})
    else:
        other = create_engine(url.update_query_dict({"options": "-c lock_timeout=20"}))
    with other.begin() as connection:
        connection.execute(text("CREATE TABLE counter (n INTEGER)"))
        connection.execute(text("INSERT INTO counter VALUES (0)"))
    count, calls = text("UPDATE counter SET n = n + 1"), Counter[str | None]()

    def sin(message: Message, session: Session) -> None:
        calls[message.id] += 1
        with other.begin() as connection:
            connection.execute(count)

    shop = make(sin=sin, retry=policy(1, 0.0))
    with other.connect() as holder:
        holder.execute(count)
        broker.publish(sent(1, 2, 3))
        with shop.running() as worker:
            eventually(lambda: min(calls[f"m{n}"] for n in (1, 2, 3)) >= 3)
            assert shop.counts() == Counter()
            holder.rollback()
            eventually(lambda: shop.counts() == once_each(1, 2, 3))
    assert shop.failed() == []
    assert worker.consumers[0].counts["failures"] == 0
    assert broker.left() == 0
    other.dispose()


def settled(worker: Worker) -> int:
    (consumer,) = worker.consumers
    return sum(consumer.counts[name] for name in ("processed", "duplicates", "parked", "dead"))


@pytest.mark.hazard("H12")
@pytest.mark.hazard("H19")
def test_a_lost_reply_to_commit_is_no_failure_and_no_second_effect(
    broker: Broker, make: Make, postgres_url: URL, database: tuple[Proxy, URL]
) -> None:
    between, through = database
    calls: Counter[str | None] = Counter()

    def act(message: Message) -> None:
        calls[message.id] += 1
        if message.id == "m2" and calls["m2"] == 1:
            between.cut(b"COMMIT", "reply")

    observer = make(at=postgres_url)
    shop = make(act, at=through, retry=policy(1, 0.0))
    broker.publish(sent(1, 2, 3))
    with shop.running() as worker:
        eventually(lambda: observer.counts() == once_each(1, 2, 3))
        assert between.cut_done.is_set()
        broker.publish(sent(4))
        eventually(lambda: observer.counts() == once_each(1, 2, 3, 4))
    assert calls == {"m1": 1, "m2": 1, "m3": 1, "m4": 1}
    assert observer.failed() == []
    assert worker.consumers[0].counts["failures"] == 0
    assert broker.left() == 0


@pytest.mark.hazard("H54")
def test_a_stop_leaves_no_parked_message_with_an_owner(broker: Broker, make: Make) -> None:
    entered, release = threading.Event(), threading.Event()

    def park(message: Message) -> None:
        raise RetryLater(60.0)

    def hold(message: Message) -> None:
        entered.set()
        assert release.wait(90)

    numbers = range(1, 16)
    first = make(park)
    broker.publish(sent(*numbers))
    with first.running():
        eventually(lambda: first.waiting() == 15)
    first.make_due()
    shop = make(hold)
    with shop.running() as worker:
        assert entered.wait(90)
        assert sum(row.owner is not None for row in shop.failed()) > 1
        worker.stop()
        eventually(lambda: all(each._stopping for each in worker.consumers))
        release.set()
    assert len(shop.counts()) == 1
    rows = shop.failed()
    assert [(row.state, row.owner, row.lease_until, row.starts) for row in rows] == [
        (WAITING, None, None, 0)
    ] * 14
    with make().running():
        eventually(lambda: shop.counts() == once_each(*numbers))
    assert shop.failed() == []
    assert broker.left() == 0
