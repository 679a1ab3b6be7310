"""Handlers in loops that idemq does not run: a kombu Consumer, an aiokafka loop, any other."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kombu
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from sqlalchemy import URL, Engine, StaticPool, create_engine, insert, select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from idemq import Message, NotSettled, Reject, SchemaError, SetupError, kafka, rabbitmq, schema
from idemq.inplace import InPlace
from idemq.kombu_callback import Callback
from idemq.message import Ack, Dead
from tests.once_tools import Effect, prepared

PROCESSED, REPEATED = Ack(), Ack(duplicate=True)


@dataclass
class Payment:
    id: str


def pay(payment: Payment, session: Session) -> None:
    session.add(Effect(mark=payment.id))


async def pay_async(payment: Payment, session: AsyncSession) -> None:
    session.add(Effect(mark=payment.id))


def effects(engine: Engine) -> list[str]:
    with Session(engine) as session:
        return list(session.scalars(select(Effect.mark).order_by(Effect.seq)))


def reasons(engine: Engine) -> list[str]:
    table = schema.table("idemq_failed")
    with engine.connect() as connection:
        return list(connection.scalars(select(table.c.reason).order_by(table.c.seq)))


@pytest.fixture
def engine(postgres_url: URL) -> Iterator[Engine]:
    with prepared(postgres_url) as prepared_engine:
        yield prepared_engine


def message(id: str = "1", body: bytes = b'{"id": "1"}') -> Message:
    return Message(id=id, body=body)


def test_a_failing_handler_is_tried_in_place_until_it_succeeds(engine: Engine) -> None:
    tries: list[int] = []

    def sometimes(payment: Payment, session: Session) -> None:
        session.add(Effect(mark=payment.id))
        session.flush()
        tries.append(1)
        if len(tries) < 3:
            raise OSError("the provider is away")

    place = InPlace(sometimes, engine, "shop")
    assert place.run(message()) == PROCESSED
    assert place.run(message()) == REPEATED
    place.close()
    assert (len(tries), effects(engine)) == (3, ["1"])


def test_what_does_not_succeed_in_time_is_not_settled_and_leaves_nothing(engine: Engine) -> None:
    def never(payment: Payment, session: Session) -> None:
        session.add(Effect(mark=payment.id))
        raise OSError("the provider is away")

    place = InPlace(never, engine, "shop", give_up=0.3)
    with pytest.raises(NotSettled, match=r"'shop': not processed after \d+ attempts .*the provider is away"):
        place.run(message())
    place.close()
    assert (effects(engine), reasons(engine)) == ([], [])


def test_a_database_that_is_away_is_waited_for_and_then_not_settled() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        away = create_engine(f"postgresql+psycopg://x:x@127.0.0.1:{unused.getsockname()[1]}/x")
        place = InPlace(pay, away, "shop", give_up=0.2)
        with pytest.raises(NotSettled):
            place.run(message())
        place.close()


@pytest.mark.hazard("H56")
def test_missing_tables_are_named_at_once(tmp_path: Path) -> None:
    empty = create_engine(f"sqlite:///{tmp_path / 'empty.db'}")
    place = InPlace(pay, empty, "shop")
    with pytest.raises(SchemaError, match="`idemq db upgrade APP`"):
        place.run(message())
    place.close()
    empty.dispose()


def test_dead_letters_are_written_and_may_be_acknowledged(engine: Engine) -> None:
    def picky(payment: Payment) -> None:
        raise Reject("no")

    place = InPlace(picky, engine, "shop", id="payment-id")
    assert place.run(Message(body=b"{}", headers={"payment-id": "1"})) == Dead("unreadable")
    assert place.run(Message(body=b'{"id": "2"}', headers={"payment-id": "2"})) == Dead("rejected")
    assert place.run(Message(body=b'{"id": "3"}')) == Dead("no id")
    place.close()
    assert reasons(engine) == ["unreadable", "rejected", "no id"]


def test_ctrl_c_in_a_handler_is_the_callers_and_undoes_the_attempt(engine: Engine) -> None:
    def interrupted(payment: Payment, session: Session) -> None:
        session.add(Effect(mark=payment.id))
        session.flush()
        raise KeyboardInterrupt

    place = InPlace(interrupted, engine, "shop")
    with pytest.raises(KeyboardInterrupt):
        place.run(message())
    place.close()
    assert effects(engine) == []
    again = InPlace(pay, engine, "shop")
    assert again.run(message()) == PROCESSED
    again.close()


@pytest.mark.parametrize("option", ["id", "fingerprint"])
@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, GeneratorExit])
def test_what_is_no_exception_in_a_function_of_the_message_is_the_callers_and_settles_nothing(
    engine: Engine, error: type[BaseException], option: str
) -> None:
    """It may come from outside, by a signal handler or a time limit: no cause for a dead letter."""

    def interrupted(message: Message) -> str:
        raise error

    options: dict[str, Any] = {option: interrupted}
    place = InPlace(pay, engine, "shop", **options)
    with pytest.raises(error):
        place.run(message())
    with pytest.raises(error):
        asyncio.run(place.run_in_thread(message()))
    place.close()
    assert (effects(engine), reasons(engine)) == ([], [])
    again = InPlace(pay, engine, "shop")
    assert again.run(message()) == PROCESSED
    again.close()


def test_many_threads_may_share_a_place_and_its_connections_go_back(engine: Engine) -> None:
    place = InPlace(pay, engine, "shop")
    threads = [
        threading.Thread(target=lambda n=n: place.run(message(str(n % 5), b'{"id": "%d"}' % (n % 5))))
        for n in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(effects(engine)) == ["0", "1", "2", "3", "4"]
    place.close()
    assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]  # of a QueuePool
    assert place.run(message("1", b'{"id": "1"}')) == REPEATED
    assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]  # of a QueuePool


#: For what a type checker would refuse.
AnyPlace: Any = InPlace


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda sync, _: InPlace(pay_async, sync, "shop"), "its handler is async: give it an AsyncEngine"),
        (lambda _, other: InPlace(pay, other, "shop"), "its handler is sync: give it an Engine"),
        (lambda sync, _: InPlace(pay, sync, ""), "1 to 200 bytes"),
        (lambda sync, _: InPlace(pay, sync, "shop", give_up=-1), "give_up=-1"),
        (lambda sync, _: AnyPlace(pay, sync, "shop", give_up="1"), "give_up='1'"),
        (lambda sync, _: InPlace(pay, sync, "shop", idd="x"), "unknown option 'idd'; did you mean 'id'"),
        (lambda sync, _: AnyPlace(pay, sync, 7), "name is a text of 1 to 200 bytes"),
        (lambda sync, _: InPlace(pay, sync, "shop", wait=0), "wait=0 must be from 0.001"),
        (lambda sync, _: InPlace(pay, sync, "shop", wait="2"), "wait='2' must be from 0.001"),
        (lambda sync, _: InPlace(pay, sync, "shop", id=["a", ""]), "names no header"),
        (lambda sync, _: InPlace(pay, sync, "shop", id=pay_async), "plain functions, not async"),
        (lambda sync, _: InPlace(pay, sync, "shop", fingerprint="body"), "fingerprint= takes a function"),
        (lambda sync, _: InPlace(pay, sync, "shop", schema="a b"), "schema='a b' is no plain identifier"),
        (lambda *_: InPlace(pay, create_engine("sqlite://", poolclass=StaticPool), "shop"), "StaticPool"),
        (lambda _, other: rabbitmq.wrap(pay_async, other, "shop"), "must be sync"),
        (lambda _, other: kafka.process_sync(None, pay_async, other, "shop"), "await process"),
    ],
)
def test_wrong_set_up_is_refused_at_once(make: Callable[[Any, Any], object], said: str) -> None:
    sync, other = create_engine("sqlite:///x.db"), create_async_engine("sqlite+aiosqlite:///x.db")
    with pytest.raises(SetupError, match=said):
        make(sync, other)


# --- kombu


@dataclass
class Queue:
    connection: Any
    queue: Any
    callback: Callback

    def publish(self, body: Any, **properties: Any) -> None:
        with self.connection.Producer() as producer:
            producer.publish(body, routing_key=self.queue.name, **properties)

    def drain(self, until: Callable[[], bool]) -> None:
        """Like a user's program: a Consumer, and drain_events until done."""
        with (
            self.connection.channel() as channel,
            kombu.Consumer(
                channel,
                [self.queue],
                on_message=self.callback,
                on_decode_error=self.callback.undecodable,
                prefetch_count=10,
            ),
        ):
            end = time.monotonic() + 30
            while not until():
                assert time.monotonic() < end
                try:
                    self.connection.drain_events(timeout=0.2)
                except TimeoutError:
                    pass

    def left(self) -> int:
        with self.connection.channel() as channel:
            return int(self.queue.bind(channel).queue_declare(passive=True).message_count)


@pytest.fixture
def queue(rabbitmq_url: str, unique: str, engine: Engine) -> Iterator[Callable[..., Queue]]:
    made: list[Queue] = []
    with kombu.Connection(rabbitmq_url) as connection:
        kombu_queue = kombu.Queue(unique, durable=True)
        with connection.channel() as channel:
            kombu_queue.bind(channel).declare()

        def make(handler: Callable[..., Any], **options: Any) -> Queue:
            callback = rabbitmq.wrap(handler, engine, "shop", **options)
            made.append(Queue(connection, kombu_queue, callback))
            return made[-1]

        yield make
        for each in made:
            each.callback.close()
        with connection.channel() as channel:
            kombu_queue.bind(channel).delete()


def test_a_redelivered_message_has_one_effect_and_is_acknowledged(
    queue: Callable[..., Queue], engine: Engine
) -> None:
    failing = queue(pay_then_fail, give_up=0)
    failing.publish({"id": "1"}, message_id="1")
    with pytest.raises(NotSettled):
        failing.drain(lambda: False)
    assert effects(engine) == []  # and the closed channel has given the message back
    shop = queue(pay)
    shop.publish({"id": "2"}, message_id="2")
    shop.publish({"id": "2"}, message_id="2")
    shop.publish({"id": "3"}, message_id="3", compression="gzip")
    shop.drain(lambda: len(effects(engine)) == 3 and shop.left() == 0)
    assert sorted(effects(engine)) == ["1", "2", "3"]
    assert shop.left() == 0


def pay_then_fail(payment: Payment, session: Session) -> None:
    session.add(Effect(mark=payment.id))
    session.flush()
    raise OSError("away")


@pytest.mark.hazard("H11")
def test_what_kombu_cannot_read_becomes_a_dead_letter_with_its_bytes(
    queue: Callable[..., Queue], engine: Engine
) -> None:
    shop = queue(pay)
    shop.publish(b"\x00not gzip", message_id="1", headers={"compression": "application/x-gzip"})
    shop.publish(b"{no json", message_id="2", content_type="application/json", content_encoding="utf-8")
    shop.publish(b"\x80\x04.", message_id="3", content_type="application/x-python-serialize")
    shop.drain(lambda: len(reasons(engine)) == 3)
    assert reasons(engine) == ["unreadable"] * 3
    with engine.connect() as connection:
        table = schema.table("idemq_failed")
        bodies = list(connection.scalars(select(table.c.body).order_by(table.c.seq)))
    assert bodies == [b"\x00not gzip", b"{no json", b"\x80\x04."]
    assert shop.left() == 0


def test_a_handler_gets_what_the_amqp_message_says(queue: Callable[..., Queue], engine: Engine) -> None:
    seen: list[Message] = []

    def look(given: Message) -> None:
        seen.append(given)

    shop = queue(look)
    shop.publish({"id": "1"}, message_id="m1", headers={"h": 1}, timestamp=1_700_000_000, type="t")
    shop.drain(lambda: bool(seen))
    (one,) = seen
    assert (one.id, one.body, one.headers, one.properties["type"]) == ("m1", b'{"id": "1"}', {"h": 1}, "t")
    assert one.sent_at is not None
    assert one.sent_at.timestamp() == 1_700_000_000
    assert one.origin["routing_key"] == shop.queue.name


# --- Kafka


async def _send(servers: str, topic: str, *payments: str) -> None:
    async with AIOKafkaProducer(bootstrap_servers=servers) as producer:
        for payment in payments:
            headers = [("payment-id", payment.encode())]
            await producer.send_and_wait(topic, b'{"id": "%s"}' % payment.encode(), headers=headers)


def _consumer(servers: str, topic: str) -> AIOKafkaConsumer:
    return AIOKafkaConsumer(
        topic,
        bootstrap_servers=servers,
        group_id=topic,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
    )


@pytest.mark.parametrize("asynchronous", [True, False], ids=["async handler", "sync handler in a thread"])
def test_records_that_are_read_again_have_one_effect(
    kafka_servers: str, unique: str, engine: Engine, asynchronous: bool
) -> None:
    async def read(target: Any, commit: bool) -> list[Any]:
        verdicts: list[Any] = []
        async with _consumer(kafka_servers, unique) as consumer:
            while len(verdicts) < 3:
                record = await asyncio.wait_for(consumer.getone(), 60)
                handler = pay_async if asynchronous else pay
                verdicts.append(await kafka.process(record, handler, target, "shop", id="payment-id"))
                if commit:
                    await consumer.commit()
        return verdicts

    async def main() -> None:
        target: Any = create_async_engine(engine.url) if asynchronous else engine
        await _send(kafka_servers, unique, "1", "2", "1")
        assert await read(target, False) == [PROCESSED, PROCESSED, REPEATED]
        assert await read(target, True) == [REPEATED, REPEATED, REPEATED]
        if isinstance(target, AsyncEngine):
            await kafka.release(target)
            await target.dispose()
        else:
            kafka.release(target)

    asyncio.run(main())
    assert effects(engine) == ["1", "2"]
    assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]  # of a QueuePool


@dataclass
class Record:
    """What `process_sync` reads of any client's record."""

    value: bytes
    headers: list[tuple[str, bytes]]
    key: bytes | None = None
    timestamp: int = 1_700_000_000_000
    topic: str = "payments"
    partition: int = 0
    offset: int = 0


def test_a_loop_without_asyncio_and_a_handler_that_changes(engine: Engine) -> None:
    record = Record(b'{"id": "1"}', [("payment-id", b"1")])
    assert kafka.process_sync(record, pay, engine, "shop", id=["payment-id"]) == PROCESSED
    for _ in range(30):  # a closure for each record
        verdict = kafka.process_sync(record, _closure(), engine, "shop", id=["payment-id"])
        assert verdict == REPEATED
    assert engine.pool.checkedout() == 1  # type: ignore[attr-defined]  # of a QueuePool
    kafka.release(engine)
    assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]  # of a QueuePool


def _closure() -> Callable[..., None]:
    def handler(payment: Payment) -> None:
        raise AssertionError("a repeat is not handled")

    return handler


def test_a_cancelled_call_waits_for_its_attempt_and_begins_no_other(engine: Engine) -> None:
    inside, leave = threading.Event(), threading.Event()
    tries: list[int] = []

    def slow(payment: Payment, session: Session) -> None:
        tries.append(1)
        inside.set()
        assert leave.wait(90)
        session.execute(insert(Effect).values(mark=payment.id))
        raise OSError("away")

    async def main() -> None:
        record = Record(b'{"id": "1"}', [("payment-id", b"1")])
        task = asyncio.create_task(kafka.process(record, slow, engine, "shop", id="payment-id"))
        assert await asyncio.to_thread(inside.wait, 60)
        task.cancel()
        asyncio.get_running_loop().call_later(0.1, leave.set)
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    kafka.release(engine)
    assert (len(tries), effects(engine)) == (1, [])
