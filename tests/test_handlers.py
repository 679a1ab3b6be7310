from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypedDict, TypeVar

import msgspec
import pydantic
import pytest
from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
from sqlalchemy.orm import Session

from idemq.errors import SetupError
from idemq.handlers import read
from idemq.message import Message, Release
from idemq.payload import decode
from tests.core_tools import PROCESSED, Shop, message, on

if TYPE_CHECKING:
    from decimal import Decimal

T = TypeVar("T")


@dataclass
class Payment:
    id: int


class Sms(msgspec.Struct):
    id: int


class Refund(TypedDict):
    id: int


class Order(pydantic.BaseModel):
    id: int


@dataclass
class Envelope(Generic[T]):
    data: T


def payment(given: Payment, session: Session) -> None: ...
def sms(given: Sms, connection: Connection, raw: Message) -> None: ...
def refund(given: Refund) -> None: ...
def order(given: Order) -> None: ...
def envelope(given: Envelope[Payment]) -> None: ...


@pytest.mark.parametrize(
    ("function", "body", "expected"),
    [
        (payment, b'{"id": 1}', Payment(1)),
        (sms, b'{"id": 1}', Sms(1)),
        (refund, b'{"id": 1}', {"id": 1}),
        (order, b'{"id": 1}', Order(id=1)),
        (envelope, b'{"data": {"id": 1}}', Envelope(Payment(1))),
    ],
)
def test_a_payload_is_decoded_into_the_type_that_is_asked_for(
    function: Callable[..., Any], body: bytes, expected: object
) -> None:
    handler = read(function, "shop")
    assert handler.decoder is not None
    assert decode(Message(body=body), handler.decoder) == expected


class Service:
    def method(self, given: Payment, session: Session) -> None: ...
    def __call__(self, given: Payment, session: Session) -> None: ...


def with_mode(given: Payment, session: Session, *, mode: str) -> None: ...


@pytest.mark.parametrize(
    "function",
    [Service().method, Service(), functools.partial(with_mode, mode="fast"), functools.partial(Service())],
    ids=["method", "object", "partial", "partial of an object"],
)
def test_handlers_may_be_methods_objects_and_partials(function: Callable[..., Any]) -> None:
    assert dict(read(function, "shop").wants) == {"given": "payload", "session": "session"}


def generator(given: Message) -> Iterator[None]:
    yield


async def async_generator(given: Message) -> AsyncIterator[None]:
    yield


def positional(given: Message, /) -> None: ...
def anything(*given: Message) -> None: ...
def unannotated(given) -> None: ...  # type: ignore[no-untyped-def]  # the mistake under test
def unknown(amount: int) -> None: ...
def invisible(amount: Decimal) -> None: ...
def two(first: Payment, second: Sms) -> None: ...
def wants_async(session: AsyncSession) -> None: ...
def wants_async_connection(connection: AsyncConnection) -> None: ...
async def wants_sync(session: Session) -> None: ...
async def wants_sync_connection(connection: Connection) -> None: ...
def optional(session: Session | None) -> None: ...


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (generator, ["generator"]),
        (async_generator, ["generator"]),
        (positional, ["'given'", "by name"]),
        (anything, ["'given'", "by name"]),
        (unannotated, ["'given'", "no annotation"]),
        (unknown, ["'amount'", "int"]),
        (invisible, ["'Decimal'", "TYPE_CHECKING"]),
        (two, ["'second'", "at most one"]),
        (wants_async, ["'session'", "must be Session"]),
        (wants_async_connection, ["'connection'", "must be Connection"]),
        (wants_sync, ["'session'", "must be AsyncSession"]),
        (wants_sync_connection, ["'connection'", "must be AsyncConnection"]),
        (optional, ["'session'"]),
    ],
)
def test_what_a_handler_may_not_ask_for_is_named(function: Callable[..., Any], words: list[str]) -> None:
    with pytest.raises(SetupError) as caught:
        read(function, "shop")
    assert all(word in str(caught.value) for word in ["'shop'", *words]), caught.value


@on(("sqlite", "pysqlite"), ("postgres", "psycopg"))
def test_a_coroutine_that_nobody_awaits_is_never_acknowledged(shop: Shop) -> None:
    async def work() -> None: ...

    attempts = shop.attempts(lambda given, session: work())
    verdict = attempts(message())
    assert isinstance(verdict, Release)
    assert verdict.failed
    assert "async def" in verdict.cause
    assert shop.claims() == 0
    assert shop.attempts(lambda given, session: None)(message()) == PROCESSED
