"""The relay with real brokers and databases: what was planned arrives, and nothing else."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, create_engine, delete, select
from sqlalchemy.orm import Session

from idemq import App, AsyncEffects, AsyncOutbox, Effects, NotSent, Outbox, Refused, schema
from idemq.broker import Broker, Source
from idemq.drivers import begin, url_for
from idemq.embedded import Embedded
from idemq.errors import SetupError
from idemq.kafka import Kafka
from idemq.lanes import Feed
from idemq.message import Message, message_id
from idemq.outgoing import FAILED, IN_DOUBT, WAITING
from idemq.rabbitmq import RabbitMQ
from idemq.worker import Worker
from tests import core_tools
from tests.core_tools import Shop
from tests.servers import eventually

TABLE = schema.table("idemq_outgoing")


@dataclass
class Scene:
    """An app over the shop's database, and a look at what waits there."""

    shop: Shop
    engine: Engine
    app: App

    def rows(self) -> list[Any]:
        with self.engine.connect() as connection:
            return list(connection.execute(select(TABLE).order_by(TABLE.c.seq)))

    def write(self, do: Callable[[Connection], object]) -> Any:
        with self.engine.connect() as connection, begin(connection):
            return do(connection)

    @contextmanager
    def relaying(self, *consumers: str) -> Iterator[Worker]:
        """A worker with the app's relay and these consumers; stopped in order at the end."""
        feeds = []
        for name in consumers:
            declared = self.app.consumers[name]
            numbers = declared.concurrency, declared.prefetch, self.shop.number(name)
            feed = Feed(declared.consumer, declared.source, *numbers)
            feeds.append((feed, self.app.engine_for(declared.consumer)))
        worker = Worker(feeds, leaving=self.app.leaving())
        ended: list[bool] = []
        thread = threading.Thread(target=lambda: ended.append(worker.run(30.0)))
        thread.start()
        try:
            yield worker
        finally:
            worker.stop()
            thread.join()
        assert (ended, worker.failure) == ([True], None)


@contextmanager
def scene_of(shop: Shop, brokers: Sequence[Broker] = ()) -> Iterator[Scene]:
    engine = create_engine(url_for(shop.url_of_driver(), asynchronous=False))
    with engine.begin() as connection:
        connection.execute(delete(TABLE))
    used = shop.new_engine()
    yield Scene(shop, engine, App(used, brokers=brokers))
    engine.dispose()
    if isinstance(used, Engine):
        used.dispose()


def received(source: Source, count: int) -> list[Message]:
    """The messages that are in the queue or topic: at least `count`, or it fails."""
    seen: list[Message] = []

    def deliver(deliveries: Sequence[Any]) -> None:
        for delivery in deliveries:
            seen.append(delivery.message)
            if delivery.start():
                delivery.ack()

    subscription = source.subscribe("test", deliver, 100)
    try:
        eventually(lambda: len(seen) >= count, f"{count} messages")
    finally:
        subscription.close(10.0)
    return seen


@pytest.fixture(params=["embedded", "rabbitmq", "kafka"])
def broker(request: pytest.FixtureRequest, tmp_path: Path, unique: str) -> tuple[Broker, Source]:
    """A broker, and a queue or topic of it with the name `unique`, which is there."""
    if request.param == "embedded":
        embedded = Embedded(tmp_path / "broker.db")
        embedded.declare(unique)
        return embedded, embedded.queue(unique)
    if request.param == "rabbitmq":
        rabbit = RabbitMQ(request.getfixturevalue("rabbitmq_url"))
        queue = rabbit.queue(unique, declare=True, arguments={"x-expires": 600_000})
        queue.check()
        return rabbit, queue
    kafka = Kafka(request.getfixturevalue("kafka_servers"))
    topic = kafka.topic(unique, group=unique, declare=True, partitions=3)
    topic.check()
    return kafka, topic


SYNC = core_tools.on(("sqlite", "pysqlite"), ("postgres", "psycopg"), ("mariadb", "pymysql"))
ANY = core_tools.on(("sqlite", "pysqlite"), ("postgres", "asyncpg"), ("mariadb", "asyncmy"))


@core_tools.on(("postgres", "psycopg"))
def test_what_is_planned_anywhere_arrives_once_under_its_id_and_in_the_order_of_its_key(
    shop: Shop, broker: tuple[Any, Source], unique: str
) -> None:
    to, source = broker
    with scene_of(shop, [to]) as scene:

        def plan(connection: Connection) -> list[str]:
            outbox = Outbox(connection)
            return [
                outbox.publish(to.to(unique), {"n": number}, key=f"k{number % 5}", headers={"h": "x"})
                for number in range(300)
            ]

        ids = scene.write(plan)
        with scene.relaying():
            eventually(lambda: scene.rows() == [])
        seen = received(source, 300)
    found = [message_id(each, None) for each in seen]
    assert sorted(found) == sorted(ids)
    places = [ids.index(id) for id in found]
    for key in range(5):
        of_key = [place for place in places if place % 5 == key]
        assert of_key == sorted(of_key)
    assert {each.headers["h"] for each in seen} == {"x"}
    assert [each.body for each in seen] == [b'{"n":%d}' % place for place in places]


@ANY
def test_a_handler_publishes_what_its_transaction_commits(shop: Shop, tmp_path: Path) -> None:
    broker = Embedded(tmp_path / "broker.db")
    broker.declare("orders")
    broker.declare("created")
    failed: list[str | None] = []

    def fail_once(message: Message) -> None:
        if message.id == "2" and not failed:
            failed.append(message.id)
            raise RuntimeError("after it has published")

    def order(message: Message, outbox: Outbox) -> None:
        outbox.publish(broker.to("created"), message.body, headers={"order": message.id})
        fail_once(message)

    async def order_async(message: Message, outbox: AsyncOutbox) -> None:
        await outbox.publish(broker.to("created"), message.body, headers={"order": message.id})
        fail_once(message)

    with scene_of(shop, [broker]) as scene:
        handler: Callable[..., object] = order_async if shop.asynchronous else order
        scene.app.consumer("orders", broker.queue("orders"))(handler)
        for id in ("1", "2", "3", "1"):
            broker.publish("orders", id.encode(), id=id)
        with scene.relaying("orders"):
            eventually(lambda: broker.depth("orders") == (0, 0))
            eventually(lambda: broker.depth("created")[0] == 3)
            eventually(lambda: scene.rows() == [])
        seen = received(broker.queue("created"), 3)
    assert failed == ["2"]
    assert sorted(str(each.headers["order"]) for each in seen) == ["1", "2", "3"]


@core_tools.on(("sqlite", "pysqlite"))
@pytest.mark.hazard("H13")
def test_what_cannot_be_routed_stays_and_holds_only_its_own_key(
    shop: Shop, rabbitmq_url: str, unique: str, caplog: pytest.LogCaptureFixture
) -> None:
    rabbit = RabbitMQ(rabbitmq_url)
    queue = rabbit.queue(unique, declare=True, arguments={"x-expires": 600_000})
    queue.check()
    nowhere = f"{unique}-missing"
    with scene_of(shop, [rabbit]) as scene:

        def plan(connection: Connection) -> None:
            outbox = Outbox(connection)
            outbox.publish(rabbit.to(nowhere), b"lost?", key="k", id="lost?")
            outbox.publish(rabbit.to(unique), b"behind", key="k", id="behind")
            outbox.publish(rabbit.to(unique), b"free", key="other", id="free")

        scene.write(plan)
        with scene.relaying():
            eventually(lambda: [row.state for row in scene.rows() if row.error] == [WAITING])
            eventually(lambda: len(scene.rows()) == 2)
            assert "does not take message 'lost?'" in caplog.text
            missing = rabbit.queue(nowhere, declare=True, arguments={"x-expires": 600_000})
            missing.check()
            eventually(lambda: scene.rows() == [])
        assert [each.id for each in received(queue, 2)] == ["free", "behind"]
        assert [each.id for each in received(missing, 1)] == ["lost?"]


@SYNC
def test_messages_wait_while_their_broker_is_away(shop: Shop, tmp_path: Path) -> None:
    away = RabbitMQ("amqp://guest:guest@127.0.0.1:1//", name="away", connect_timeout=1)
    broker = Embedded(tmp_path / "broker.db")
    broker.declare("q")
    with scene_of(shop, [away, broker]) as scene:

        def plan(connection: Connection) -> None:
            Outbox(connection).publish(away.to("q"), b"1")
            Outbox(connection).publish(broker.to("q"), b"2")

        scene.write(plan)
        with scene.relaying():
            eventually(lambda: broker.depth("q")[0] == 1)
            eventually(lambda: [row.attempts > 1 for row in scene.rows()] == [True])
        assert [(row.target, row.state) for row in scene.rows()] == [(b"away", WAITING)]


class Provider:
    """What the effect calls: it counts, and answers as it is told to, in this order."""

    def __init__(self, *answers: BaseException | None) -> None:
        self.answers = list(answers)
        self.calls: list[tuple[Any, str]] = []

    def call(self, payload: Any, key: str) -> None:
        self.calls.append((payload, key))
        answer = self.answers.pop(0) if self.answers else None
        if answer is not None:
            raise answer


def plan_sms(scene: Scene, provider: Provider, **options: Any) -> str:
    """An effect over the provider, planned once; its key."""

    def send(payload: dict[str, str], key: str) -> None:
        provider.call(payload, key)

    async def send_async(payload: dict[str, str], key: str) -> None:
        provider.call(payload, key)

    function = send_async if scene.shop.asynchronous else send
    scene.app.effect("sms", **options)(function)
    return str(scene.write(lambda connection: Effects(connection).plan(function, {"to": "1"})))


@ANY
def test_an_effect_happens_once_with_its_key(shop: Shop) -> None:
    with scene_of(shop) as scene:
        provider = Provider()
        key = plan_sms(scene, provider)
        with scene.relaying():
            eventually(lambda: scene.rows() == [])
    assert provider.calls == [({"to": "1"}, key)]


@ANY
def test_what_was_not_sent_is_sent_again(shop: Shop) -> None:
    with scene_of(shop) as scene:
        provider = Provider(NotSent("no route"), NotSent("no route"))
        key = plan_sms(scene, provider)
        with scene.relaying():
            eventually(lambda: scene.rows() == [])
    assert provider.calls == [({"to": "1"}, key)] * 3


@SYNC
@pytest.mark.hazard("H47")
@pytest.mark.parametrize(
    ("answer", "state"),
    [
        (RuntimeError("500"), IN_DOUBT),
        (TimeoutError("no answer"), IN_DOUBT),
        (SystemExit(1), IN_DOUBT),
        (Refused("no such number"), FAILED),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_nobody_knows_is_in_doubt_and_what_was_refused_has_failed(
    shop: Shop, answer: BaseException, state: int
) -> None:
    with scene_of(shop) as scene:
        provider = Provider(answer)
        plan_sms(scene, provider)
        with scene.relaying():
            eventually(lambda: [row.state for row in scene.rows()] == [state])
    assert len(provider.calls) == 1


@SYNC
def test_a_provider_that_knows_the_key_is_called_again_with_it(shop: Shop) -> None:
    with scene_of(shop) as scene:
        provider = Provider(TimeoutError(), TimeoutError())
        key = plan_sms(scene, provider, repeat="provider-key", key_lifetime=3600)
        with scene.relaying():
            eventually(lambda: scene.rows() == [])
    assert [each for _, each in provider.calls] == [key] * 3


@ANY
@pytest.mark.parametrize("there", [True, False], ids=["present", "absent"])
def test_a_look_up_resolves_a_doubt(shop: Shop, there: bool) -> None:
    asked: list[str] = []
    answers = [None, RuntimeError("the provider is away"), there]

    def look(payload: dict[str, str], key: str) -> bool | None:
        asked.append(key)
        answer = answers.pop(0) if answers else there
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def look_async(payload: dict[str, str], key: str) -> bool | None:
        return look(payload, key)

    with scene_of(shop) as scene:
        provider = Provider(TimeoutError())
        key = plan_sms(scene, provider, repeat=look_async if shop.asynchronous else look, settle=0.0)
        with scene.relaying():
            eventually(lambda: scene.rows() == [])
    assert asked == [key] * 3
    assert [each for _, each in provider.calls] == [key] * (1 if there else 2)


@SYNC
@pytest.mark.hazard("H49")
def test_an_effect_of_a_handler_that_fails_does_not_happen(shop: Shop, tmp_path: Path) -> None:
    broker = Embedded(tmp_path / "broker.db")
    broker.declare("payments")
    provider, failures = Provider(), [RuntimeError("after planning"), None]
    with scene_of(shop) as scene:

        @scene.app.effect("sms")
        def send(payload: dict[str, str], key: str) -> None:
            provider.call(payload, key)

        @scene.app.consumer("payments", broker.queue("payments"))
        def pay(message: Message, effects: Effects, session: Session) -> None:
            effects.plan(send, {"to": message.id or ""})
            if (failure := failures.pop(0)) is not None:
                raise failure

        broker.publish("payments", b"", id="1")
        broker.publish("payments", b"", id="1")
        with scene.relaying("payments"):
            eventually(lambda: broker.depth("payments") == (0, 0) and provider.calls)
            eventually(lambda: scene.rows() == [])
    assert [payload for payload, _ in provider.calls] == [{"to": "1"}]


@dataclass
class Newer:
    to: str
    country: str


@core_tools.on(("sqlite", "pysqlite"))
def test_a_payload_that_no_longer_fits_its_effect_is_not_sent(shop: Shop) -> None:
    provider = Provider()
    with scene_of(shop) as scene, scene_of(shop) as newer:
        plan_sms(scene, provider)

        @newer.app.effect("sms")
        def send(payload: Newer, key: str) -> None:
            provider.call(payload, key)

        with newer.relaying():
            eventually(lambda: [row.state for row in newer.rows()] == [FAILED])
        assert "country" in newer.rows()[0].error
    assert provider.calls == []


@pytest.mark.hazard("H47")
@core_tools.on(("sqlite", "pysqlite"))
def test_a_payload_that_no_longer_fits_says_nothing_of_a_call_whose_outcome_nobody_knows(shop: Shop) -> None:
    """It may have got through, so it is in doubt and not failed."""
    provider = Provider(*[RuntimeError("no answer")] * 100)
    by_key: dict[str, Any] = {"repeat": "provider-key", "key_lifetime": 3600}
    with scene_of(shop) as scene, scene_of(shop) as newer:
        plan_sms(scene, provider, **by_key)
        with scene.relaying():
            eventually(lambda: provider.calls)

        @newer.app.effect("sms", **by_key)
        def send(payload: Newer, key: str) -> None: ...

        with newer.relaying():
            eventually(lambda: "country" in newer.rows()[0].error)
        assert [(row.state, row.not_before) for row in newer.rows()] == [(IN_DOUBT, None)]


def _takes_one(payload: dict[str, str]) -> None: ...
def _says_nothing(payload, key):  # type: ignore[no-untyped-def]  # that is what is wrong with it
    ...
def _right(payload: dict[str, str], key: str) -> None: ...


@pytest.mark.parametrize(
    ("function", "options", "words"),
    [
        (_takes_one, {}, "two arguments"),
        (_says_nothing, {}, "annotate 'payload'"),
        (_right, {"repeat": "provider-key"}, "needs key_lifetime="),
        (_right, {"repeat": "provider-key", "key_lifetime": 60}, "more than 120"),
        (_right, {"key_lifetime": 3600}, "without repeat='provider-key'"),
        (_right, {"repeat": "always"}, "repeat= takes"),
        (_right, {"settle": -1}, "settle=-1"),
        (_right, {"concurrency": 0}, "concurrency=0"),
        (_right, {"retry": 3}, "tenacity"),
        (_right, {"name": ""}, "1 to 255 bytes"),
    ],
)
def test_mistakes_in_declaring_an_effect_are_named(
    function: Callable[..., Any], options: dict[str, Any], words: str
) -> None:
    app = App("sqlite:///shop.db")
    with pytest.raises(SetupError, match=words):
        app.effect(options.pop("name", "sms"), **options)(function)


def test_mistakes_in_using_outbox_and_effects_are_named(tmp_path: Path) -> None:
    app = App("sqlite:///shop.db")
    queue = Embedded(tmp_path / "broker.db").queue("q")
    app.effect("sms")(_right)
    with pytest.raises(SetupError, match="declared twice"):
        app.effect("sms")
    with pytest.raises(SetupError, match=r"App\(brokers="):

        @app.consumer("a", queue)
        def publishes(outbox: Outbox) -> None: ...

    with pytest.raises(SetupError, match="must be AsyncEffects in an async handler"):

        @app.consumer("b", queue)
        async def plans(effects: Effects) -> None: ...

    with pytest.raises(SetupError, match="must be Effects in a sync handler"):

        @app.consumer("c", queue)
        def plans_sync(effects: AsyncEffects) -> None: ...

    with pytest.raises(SetupError, match="--only relay"):
        app.consumer("relay", queue)
    with pytest.raises(SetupError, match="the same name"):
        App("sqlite:///shop.db", brokers=[Embedded(tmp_path / "1"), Embedded(tmp_path / "2")])
    with pytest.raises(SetupError, match="Connection or Session"):
        Effects("shop")  # type: ignore[arg-type]  # that is what is refused
    engine = create_engine("sqlite://")
    with engine.connect() as connection, pytest.raises(SetupError, match="is no effect"):
        Effects(connection).plan(_takes_one, {})  # type: ignore[arg-type]  # the same
    engine.dispose()
