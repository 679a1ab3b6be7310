"""What could wedge a relay, or have it take the one for the other: long queues, odd functions, odd askers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from idemq import App, Effects, Outbox
from idemq.broker import Destination
from idemq.drivers import is_contention
from idemq.embedded import Embedded
from idemq.errors import SetupError
from idemq.kafka import Kafka
from idemq.message import Message
from idemq.outgoing import Messages
from idemq.rabbitmq import RabbitMQ
from idemq.replies import Replies
from tests import core_tools
from tests.core_tools import Shop
from tests.servers import eventually
from tests.test_outgoing import (
    ERROR,
    NOBODY,
    A,
    B,
    Process,
    begun,
    bodies,
    engine,
    pick,
    plan,
    publish,
)  # fmt: skip
from tests.test_relay import SYNC, Provider, scene_of

__all__ = ["engine"]


@SYNC
def test_a_refused_message_with_many_behind_it_is_tried_again(engine: Engine) -> None:
    publish(engine, *(f"k{number}" for number in range(6)), key="k")
    messages, (first, *rest) = Messages("rabbit", A, None), pick(engine)
    with engine.connect() as connection:
        messages.unsent(connection, [(first, "no such queue", 0.3), *((row, None, 0.0) for row in rest)])
    # The others have been due for longer, and are more than one pick takes.
    picked: list[list[str]] = []

    def look() -> bool:
        picked.append(bodies(pick(engine, B, count=2)))
        return bool(picked[-1])

    eventually(look)
    assert picked[-1] == ["k0", "k1"]


@SYNC
def test_a_pick_takes_no_more_than_fits_in_memory(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("idemq.outgoing.MAX_BYTES", 2500)
    publish(engine, *(str(number) * 1000 for number in range(5)), key="k")
    publish(engine, "5" * 2000)
    sizes = [[body[0] for body in bodies(pick(engine))] for _ in range(3)]
    assert sizes == [["0", "1"], ["5"], []]


@core_tools.on(("postgres", "psycopg"), ("mariadb", "pymysql"))
def test_a_relay_waits_for_nobody_who_plans_or_decides_and_takes_his_time(engine: Engine) -> None:
    key = plan(engine)
    process, other = Process(engine, NOBODY), Process(engine, NOBODY, B)
    row = process.one()
    with begun(engine) as webhook, begun(engine) as slow:
        for broker in ("rabbit", "zebra"):
            Outbox(slow).publish(Destination(broker, ("", "q")), b"1", key="k")
        for broker in ("a", "rabbit"):
            with engine.connect() as connection:
                Messages(broker, A, None).reap(connection)
                assert Messages(broker, A, None).pick(connection, 10) == []
        assert Effects(webhook).confirm(key)
        for step in (("done", row), ("in_doubt", row, ERROR, 0.0)):
            with pytest.raises(DBAPIError) as caught:
                process.do(*step)
            assert is_contention(caught.value)
        process.do("renew", [row.seq])
        other.do("reap")
        webhook.rollback()
    assert process.do("done", row)


@SYNC
@pytest.mark.parametrize("there", [True, False], ids=["present", "absent"])
def test_a_look_up_may_be_async_though_the_effect_is_not(shop: Shop, there: bool) -> None:
    async def look(payload: dict[str, str], key: str) -> bool:
        await asyncio.sleep(0)
        return there

    with scene_of(shop) as scene:
        provider = Provider(TimeoutError())

        @scene.app.effect("sms", repeat=look, settle=0.0)
        def send(payload: dict[str, str], key: str) -> None:
            provider.call(payload, key)

        scene.write(lambda connection: Effects(connection).plan(send, {"to": "1"}))
        with scene.relaying():
            eventually(lambda: scene.rows() == [])
    assert len(provider.calls) == (1 if there else 2)


class Later:
    """What can be awaited, and is no coroutine."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call

    def __await__(self) -> Any:
        yield from asyncio.sleep(0).__await__()
        self._call()


class Sender:
    """A provider's client, whose ways of being called are many."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def method(self, payload: dict[str, str], key: str) -> None:
        self.calls.append(payload["to"])

    async def async_method(self, payload: dict[str, str], key: str) -> None:
        await asyncio.sleep(0)
        self.calls.append(payload["to"])

    def with_client(self, payload: dict[str, str], key: str, client: str) -> None:
        self.calls.append(payload["to"])

    def returns_a_coroutine(self, payload: dict[str, str], key: str) -> Any:
        return self.async_method(payload, key)

    def returns_an_awaitable(self, payload: dict[str, str], key: str) -> Any:
        return Later(lambda: self.calls.append(payload["to"]))

    def __call__(self, payload: dict[str, str], key: str) -> None:
        self.calls.append(payload["to"])


class AsyncSender(Sender):
    async def __call__(self, payload: dict[str, str], key: str) -> None:  # type: ignore[override]  # async
        await self.async_method(payload, key)


KINDS: dict[str, Callable[[Sender], Callable[..., Any]]] = {
    "method": lambda sender: sender.method,
    "async method": lambda sender: sender.async_method,
    "partial": lambda sender: partial(sender.with_client, client="c"),
    "coroutine": lambda sender: sender.returns_a_coroutine,
    "awaitable": lambda sender: sender.returns_an_awaitable,
    "object": lambda sender: sender,
}


@core_tools.on(("sqlite", "pysqlite"))
@pytest.mark.parametrize("kind", [*KINDS, "async object"])
def test_whatever_can_be_called_can_be_an_effect(shop: Shop, kind: str) -> None:
    sender = AsyncSender() if kind == "async object" else Sender()
    function = KINDS.get(kind, KINDS["object"])(sender)
    with scene_of(shop) as scene:
        scene.app.effect("sms")(function)
        scene.write(lambda connection: Effects(connection).plan(function, {"to": "1"}))
        with scene.relaying():
            eventually(lambda: scene.rows() == [])
    assert sender.calls == ["1"]


def test_what_cannot_be_told_from_others_is_no_effect() -> None:
    @dataclass
    class Unhashable:
        url: str

        def __call__(self, payload: dict[str, str], key: str) -> None: ...

    with pytest.raises(SetupError, match="give it a function"):
        App("sqlite:///shop.db").effect("sms")(Unhashable("u"))


def test_a_function_is_one_effect_only() -> None:
    def send(payload: dict[str, str], key: str) -> None: ...

    App("sqlite:///shop.db").effect("sms")(send)
    App("sqlite:///other.db").effect("sms")(send)
    with pytest.raises(SetupError, match="is the effect 'sms' already"):
        App("sqlite:///third.db").effect("text")(send)


def test_a_payload_type_that_is_none_is_refused() -> None:
    def send(payload: list[str] | tuple[str, ...], key: str) -> None: ...

    def nothing(payload: dict[bytes | str, list[str] | tuple[str, ...]], key: str) -> None: ...

    app = App("sqlite:///shop.db")
    with pytest.raises(SetupError, match="payload"):
        app.effect("a")(send)
    with pytest.raises(SetupError, match="payload"):
        app.effect("b")(nothing)


@SYNC
@pytest.mark.parametrize("where", [b"\xff\xfe", b"\xed\xa0\x80", 5, ["x"]], ids=repr)
def test_a_strange_reply_to_is_the_askers_mistake(engine: Engine, tmp_path: Path, where: Any) -> None:
    embedded = Embedded(tmp_path / "broker.db")
    embedded.declare("answers")
    rabbit, kafka = RabbitMQ("amqp://guest:guest@127.0.0.1:1//"), Kafka("127.0.0.1:1")
    for broker in (embedded, rabbit, kafka):
        with begun(engine) as connection:
            replies = Replies(broker, 1, None)
            for headers in ({"reply-to": where}, {"reply-to": "answers", "correlation-id": where}):
                replies.first(connection, b"k" * 16, Message(body=b"?", headers=headers, id="q1"), "yes")
    with engine.connect() as connection:
        picked = Messages(embedded.name, A, None).pick(connection, 10)
    batch = [(row.address, row.message) for row in picked]
    publisher = embedded.publisher()
    assert len(publisher.publish(batch, 10.0)) in (1, 2)  # it is told for each of them, and raises for none
    publisher.close()
