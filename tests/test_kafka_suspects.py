"""On Kafka, which marks nothing as redelivered: which records an owner that died may have had in hand."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer
from aiokafka.errors import CommitFailedError

from idemq import kafka_epochs
from idemq.broker import Delivery
from idemq.kafka import Kafka, Topic
from idemq.kafka_consumer import KafkaSubscription
from idemq.offsets import CAP
from tests import kafka_tools as tools
from tests.attacked import freeze
from tests.servers import eventually

pytestmark = pytest.mark.hazard("H20")


class Inbox:
    def __init__(self) -> None:
        self.deliveries: list[Delivery] = []

    def __call__(self, deliveries: Sequence[Delivery]) -> None:
        self.deliveries += deliveries

    def take(self, count: int) -> list[Delivery]:
        """All deliveries, once there are so many."""
        eventually(lambda: len(self.deliveries) >= count, what=f"{count} of {len(self.deliveries)}")
        return list(self.deliveries)


def topic_of(servers: str, name: str, **options: Any) -> Topic:
    return Kafka(servers).topic(name, group=name, session_timeout=6.0, **options)


@contextmanager
def owning(servers: str, name: str, **options: Any) -> Iterator[Inbox]:
    """An owner that leaves in order. It settles nothing by itself."""
    inbox = Inbox()
    subscription = topic_of(servers, name, **options).subscribe("test", inbox, 5_000)
    try:
        yield inbox
    finally:
        subscription.close(10)


@contextmanager
def holding(
    servers: str, name: str, records: int, *finish: int, committed: int = 0
) -> Iterator[subprocess.Popen[str]]:
    """An owner in a process of its own that has started so many records, and finished some of them."""
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.kafka_tools", servers, name, name, *map(str, finish)],
        stdout=subprocess.PIPE,
        text=True,
    )
    with child:
        try:
            assert child.stdout is not None
            assert [int(child.stdout.readline()) for _ in range(records)] == list(range(records))
            eventually(lambda: tools.committed(servers, name, name) == {0: committed}, what="the commit")
            yield child
        finally:
            child.kill()


def killed(servers: str, name: str, records: int, *finish: int, committed: int = 0) -> None:
    with holding(servers, name, records, *finish, committed=committed):
        pass
    tools.evict(servers, name)


def numbers(count: int) -> list[bytes]:
    return [b"%d" % number for number in range(count)]


def topic_with(servers: str, name: str, count: int, partitions: int = 1) -> None:
    tools.create_topic(servers, name, partitions)
    tools.produce(servers, name, numbers(count))


def suspects(deliveries: Sequence[Delivery]) -> list[int]:
    return [d.message.origin["offset"] for d in deliveries if d.message.redelivered]


def finish(deliveries: Sequence[Delivery]) -> None:
    for delivery in deliveries:
        assert delivery.start()
        delivery.ack()


def mark(servers: str, name: str) -> tuple[int, str]:
    return tools.marks(servers, name, name)[0]


def test_what_a_killed_owner_may_have_had_in_hand_is_suspect(kafka_servers: str, unique: str) -> None:
    topic_with(kafka_servers, unique, 30)
    killed(kafka_servers, unique, 30, *range(10), 20, committed=10)

    with owning(kafka_servers, unique) as inbox:
        assert suspects(inbox.take(20)) == list(range(10, 30))
        tools.produce(kafka_servers, unique, numbers(5))  # nobody can have had these
        assert suspects(inbox.take(25)) == list(range(10, 30))
        finish(inbox.deliveries)
    assert mark(kafka_servers, unique) == (35, "left")


def test_only_so_many_records_are_suspect_as_an_owner_may_have_uncommitted(
    kafka_servers: str, unique: str
) -> None:
    topic_with(kafka_servers, unique, CAP + 200)
    killed(kafka_servers, unique, CAP)  # before its first ordinary commit

    with owning(kafka_servers, unique) as inbox:
        finish(inbox.take(CAP))
        assert suspects(inbox.take(CAP + 200)) == list(range(CAP))


def test_an_epoch_is_marked_open_before_its_first_record_and_by_every_commit(
    kafka_servers: str, unique: str
) -> None:
    topic_with(kafka_servers, unique, 3)
    with owning(kafka_servers, unique) as inbox:
        deliveries = inbox.take(3)
        offset, first = mark(kafka_servers, unique)
        assert (offset, first[:4]) == (0, "open")
        finish(deliveries[:2])
        eventually(lambda: mark(kafka_servers, unique) == (2, first), what="the mark on an ordinary commit")
        finish(deliveries[2:])
        assert suspects(deliveries) == [], "there was no owner before"
    assert mark(kafka_servers, unique) == (3, "left")


def test_what_was_never_started_or_is_resting_is_not_suspect_after_an_orderly_end(
    kafka_servers: str, unique: str
) -> None:
    topic_with(kafka_servers, unique, 4)
    with owning(kafka_servers, unique) as inbox:
        _untouched, rested, dropped, finished = inbox.take(4)
        for delivery in (rested, dropped, finished):
            assert delivery.start()
        rested.rest()
        dropped.drop()
        finished.ack()
    assert mark(kafka_servers, unique) == (0, "left")
    with owning(kafka_servers, unique) as inbox:
        assert suspects(inbox.take(4)) == []


def test_what_was_under_way_at_the_end_is_suspect_and_what_came_after_it_is_not(
    kafka_servers: str, unique: str
) -> None:
    topic_with(kafka_servers, unique, 20)
    with owning(kafka_servers, unique) as inbox:
        assert inbox.take(20)[7].start()
    with owning(kafka_servers, unique) as inbox:
        assert suspects(inbox.take(20)) == list(range(8))


def test_suspicion_outlives_an_owner_that_left_before_it_had_settled_the_suspects(
    kafka_servers: str, unique: str
) -> None:
    topic_with(kafka_servers, unique, 30)
    killed(kafka_servers, unique, 30)
    with owning(kafka_servers, unique) as inbox:
        finish(inbox.take(30)[:5])
    with owning(kafka_servers, unique) as inbox:
        assert suspects(inbox.take(25)) == list(range(5, 30))


@pytest.mark.parametrize("metadata", ["", "left", "opened by hand", "open to x", "öffen", "x" * 3_000])
def test_what_other_clients_committed_makes_no_suspects(
    kafka_servers: str, unique: str, metadata: str
) -> None:
    topic_with(kafka_servers, unique, 3)
    tools.commit(kafka_servers, unique, unique, 1, metadata)
    with owning(kafka_servers, unique) as inbox:
        deliveries = inbox.take(2)
        assert [delivery.message.body for delivery in deliveries] == [b"1", b"2"]
        assert suspects(deliveries) == []


def test_an_owner_that_lives_on_does_not_suspect_what_it_had_itself(kafka_servers: str, unique: str) -> None:
    topic_with(kafka_servers, unique, 10)
    inbox = Inbox()
    subscription = topic_of(kafka_servers, unique).subscribe("test", inbox, 100)
    assert isinstance(subscription, KafkaSubscription)
    try:
        started = inbox.take(10)
        assert all(delivery.start() for delivery in started)
        first = mark(kafka_servers, unique)
        assert subscription._loop is not None
        subscription._loop.call_soon_threadsafe(_break_the_session)
        again = inbox.take(20)[10:]
        assert not started[0].start(), "a new epoch"
        assert suspects(again) == []
        assert mark(kafka_servers, unique) == first
    finally:
        subscription.close(10)


@pytest.mark.hazard("H34")
def test_what_was_not_drained_in_time_is_suspect_for_the_next_owner_and_not_for_the_same(
    kafka_servers: str, unique: str
) -> None:
    tools.create_topic(kafka_servers, unique, partitions=2)
    for partition in (0, 1):
        tools.produce(kafka_servers, unique, numbers(20), partition=partition)
    topic = topic_of(kafka_servers, unique, rebalance_timeout=2.0)
    first, second = Inbox(), Inbox()
    staying = topic.subscribe("first", first, 100)
    try:
        for delivery in first.take(40):
            if delivery.message.origin["offset"] == 7:
                assert delivery.start()
        coming = topic.subscribe("second", second, 100)
        try:
            assert suspects(second.take(20)) == list(range(8))
            assert suspects(first.take(60)) == []
        finally:
            coming.close(10)
    finally:
        staying.close(10)


def test_a_partition_that_does_not_tell_its_end_has_more_suspects_but_is_read(
    kafka_servers: str, unique: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hang(*_: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(kafka_epochs, "END_SECONDS", 0.2)
    monkeypatch.setattr(AIOKafkaConsumer, "end_offsets", hang)
    topic_with(kafka_servers, unique, 3)
    tools.commit(kafka_servers, unique, unique, 0, "open")
    with owning(kafka_servers, unique) as inbox:
        assert suspects(inbox.take(3)) == [0, 1, 2]
    assert mark(kafka_servers, unique)[1].startswith("open to ")


def test_an_owner_that_was_frozen_makes_suspects_and_its_return_changes_nothing(
    kafka_servers: str, unique: str
) -> None:
    topic_with(kafka_servers, unique, 30)
    with holding(kafka_servers, unique, 30) as frozen:
        freeze(frozen.pid)
        tools.evict(kafka_servers, unique)
        with owning(kafka_servers, unique) as inbox:
            deliveries = inbox.take(30)
            assert suspects(deliveries) == list(range(30))
            finish(deliveries[:10])
            eventually(lambda: mark(kafka_servers, unique) == (10, "open"), what="the commit")
            frozen.send_signal(signal.SIGCONT)
            # It joins again, and the topic has one partition: one of the two gets it.
            eventually(lambda: len(tools.members(kafka_servers, unique)[1]) == 2, what="its return")
            assert mark(kafka_servers, unique)[0] == 10
            assert mark(kafka_servers, unique)[1].startswith("open")


def _break_the_session() -> None:
    """On the loop of the consumer: it is built anew after that."""
    next(task for task in asyncio.all_tasks() if task.get_name() == "the fetch loop").cancel()


@pytest.mark.hazard("H34")
def test_nothing_is_handed_out_before_the_mark_is_committed(
    kafka_servers: str, unique: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    topic_with(kafka_servers, unique, 3)
    commit, refusals, seen = AIOKafkaConsumer.commit, 3, list[int]()
    inbox = Inbox()

    async def refused(self: AIOKafkaConsumer, offsets: Any) -> None:
        seen.append(len(inbox.deliveries))
        if len(seen) <= refusals:
            raise CommitFailedError("a rebalance is under way")
        await commit(self, offsets)

    monkeypatch.setattr(AIOKafkaConsumer, "commit", refused)
    subscription = topic_of(kafka_servers, unique).subscribe("test", inbox, 100)
    try:
        inbox.take(3)
        assert seen[: refusals + 1] == [0] * (refusals + 1)
    finally:
        subscription.close(10)


class Worker:
    """Works on several records at a time, and ends what it began before it leaves."""

    def __init__(self, pool: ThreadPoolExecutor, seen: list[Delivery], done: set[bytes | None]) -> None:
        self._pool, self._seen, self._done = pool, seen, done
        self._leaving = threading.Event()
        self._begun: list[Future[None]] = []

    def __call__(self, deliveries: Sequence[Delivery]) -> None:
        self._seen.extend(deliveries)
        self._begun.extend([self._pool.submit(self._work, delivery) for delivery in deliveries])

    def _work(self, delivery: Delivery) -> None:
        if self._leaving.is_set() or not delivery.start():
            delivery.drop()
            return
        self._leaving.wait(0.005)
        self._done.add(delivery.message.body)
        delivery.ack()

    def finish(self) -> None:
        self._leaving.set()
        wait(list(self._begun))


@pytest.mark.hazard("H34")
def test_rebalances_that_drain_make_no_suspects(kafka_servers: str, unique: str) -> None:
    partitions, count = 4, 2_000
    topic_with(kafka_servers, unique, count, partitions)
    topic = topic_of(kafka_servers, unique)
    stop = threading.Event()
    seen: list[Delivery] = []
    done: set[bytes | None] = set()

    def member(number: int) -> None:
        while not stop.is_set():
            with ThreadPoolExecutor(4) as pool:
                worker = Worker(pool, seen, done)
                subscription = topic.subscribe(f"storm-{number}", worker, 50)
                stop.wait(1.0 + number)
                subscription.pause()
                worker.finish()
                subscription.close(5)

    members = [threading.Thread(target=member, args=(number,)) for number in range(3)]
    for thread in members:
        thread.start()
    try:
        eventually(lambda: len(done) == count, "all records")
    finally:
        stop.set()
        for thread in members:
            thread.join()
    assert suspects(seen) == []
    assert {text for _, text in tools.marks(kafka_servers, unique, unique).values()} == {"left"}
