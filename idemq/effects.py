"""Effects: calls to somebody else's system, which no transaction covers.

    @app.effect("send-sms", repeat="provider-key", key_lifetime=24 * 3600)
    def send_sms(sms: Sms, key: str) -> None:
        gateway.send(sms.phone, sms.text, idempotency_key=key)

    @app.consumer("receipts", payments)
    def receipt(event: PaymentSettled, effects: Effects) -> None:
        effects.plan(send_sms, Sms(event.phone, "Thank you"))

Planning writes a row in the handler's transaction; the relay calls the function after the commit. That a call
was begun is committed before it is made, so a crash leaves an effect in doubt and never a silent repeat.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_type_hints
from uuid import UUID
from weakref import WeakKeyDictionary

import msgspec
from sqlalchemy import Connection, delete, select
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
from sqlalchemy.orm import Session
from tenacity import BaseRetrying

from idemq import outgoing, schema
from idemq.drivers import kind_of
from idemq.effect_rows import Repeats
from idemq.errors import SetupError
from idemq.message import Message
from idemq.outgoing import EFFECT, plan
from idemq.payload import Decoder, decoder_for
from idemq.retry import Policy, policy

#: Says whether the provider has an effect: True, False, or None for "cannot tell".
LookUp = Callable[[Any, str], bool | Awaitable[bool | None] | None]

#: Seconds after which a look-up that finds nothing is believed.
SETTLE = 60.0


@dataclass(frozen=True, slots=True)
class Effect:
    """A declared effect."""

    name: str
    function: Callable[..., Any]
    decoder: Decoder
    look_up: LookUp | None
    repeats: Repeats
    policy: Policy
    concurrency: int


_declared: WeakKeyDictionary[Callable[..., Any], Effect] = WeakKeyDictionary()


def declare(
    name: str,
    function: Callable[..., Any],
    *,
    repeat: Literal["provider-key"] | LookUp | None,
    key_lifetime: float | None,
    settle: float,
    retry: BaseRetrying | None,
    concurrency: int,
) -> Effect:
    """Check what `App.effect` was given. Raises `SetupError` naming the effect and the option."""
    if not isinstance(name, str) or not 0 < len(name.encode()) <= 255:
        raise SetupError(f"effect {name!r}: a name is a text of 1 to 255 bytes")
    if type(concurrency) is not int or not 1 <= concurrency <= 1000:
        raise SetupError(f"effect {name!r}: concurrency={concurrency!r} must be a whole number up to 1,000")
    by_key = repeat == "provider-key"
    if repeat is not None and not by_key and not callable(repeat):
        raise SetupError(f"effect {name!r}: repeat= takes 'provider-key', a look-up function, or None")
    if by_key and not _seconds(key_lifetime, 2 * outgoing.LEASE):
        raise SetupError(
            f"effect {name!r}: repeat='provider-key' needs key_lifetime=, the seconds for which the provider "
            f"remembers a key, more than {2 * outgoing.LEASE:.0f}; not {key_lifetime!r}"
        )
    if not by_key and key_lifetime is not None:
        raise SetupError(f"effect {name!r}: key_lifetime= says nothing without repeat='provider-key'")
    if not _seconds(settle, 0.0):
        raise SetupError(f"effect {name!r}: settle={settle!r} must be seconds from 0 up")
    look_up = repeat if callable(repeat) else None
    _one_effect(name, function)
    _check_calls(name, function, look_up or function)
    effect = Effect(
        name,
        function,
        _decoder(name, function),
        look_up,
        Repeats(key_lifetime, settle if look_up is not None else None),
        policy(name, retry),
        concurrency,
    )
    _declared[function] = effect
    return effect


def _one_effect(name: str, function: Callable[..., Any]) -> None:
    try:
        other = _declared.get(function)
    except TypeError as error:
        raise SetupError(f"effect {name!r}: give it a function: {error}") from None
    if other is not None and other.name != name:
        raise SetupError(
            f"effect {name!r}: its function is the effect {other.name!r} already; give each one its own"
        )


def _check_calls(name: str, *functions: Callable[..., Any]) -> None:
    for function in functions:
        try:
            inspect.signature(function).bind(None, "")
        except TypeError:
            raise SetupError(
                f"effect {name!r}: {function!r} must take two arguments, the payload and the key (a str)"
            ) from None
        routine = _routine(function)
        if inspect.isgeneratorfunction(routine) or inspect.isasyncgenfunction(routine):
            raise SetupError(f"effect {name!r}: {function!r} is a generator: it must not yield")


def _routine(function: Callable[..., Any]) -> Any:
    routine: Any = function
    while isinstance(routine, partial):
        routine = routine.func
    return routine if inspect.isroutine(routine) else type(routine).__call__  # an object with __call__


def _seconds(value: object, least: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value < float("inf")


def _decoder(name: str, function: Callable[..., Any]) -> Decoder:
    """Of the type of its first parameter; the second is the key."""
    parameters = inspect.signature(function).parameters.values()
    needed = [each for each in parameters if each.default is each.empty]
    try:
        kind = get_type_hints(_routine(function))[needed[0].name]
    except (KeyError, NameError):
        raise SetupError(
            f"effect {name!r}: annotate {needed[0].name!r} with the payload's type, imported at the top"
        ) from None
    try:
        return decoder_for(kind)
    except Exception as error:
        raise SetupError(f"effect {name!r}: the payload {kind!r} cannot be decoded: {error}") from None


def effect_of(function: Callable[..., Any]) -> Effect:
    """The effect that a function was declared as."""
    effect = _declared.get(function)
    if effect is None:
        raise SetupError(f"{function!r} is no effect: declare it with @app.effect(name)")
    return effect


class Effects:
    """Plans effects in the transaction of a Connection or Session: they happen if that commits.

    A handler that has a parameter of this type gets one; elsewhere: `Effects(session)`.
    """

    def __init__(self, target: Connection | Session, *, schema: str | None = None) -> None:
        if not isinstance(target, Connection | Session):
            raise SetupError(f"Effects() takes a Connection or Session, not {type(target).__name__}")
        self._target, self._schema = target, schema

    def plan(self, function: Callable[[Any, str], Any], payload: Any) -> UUID:
        """Have the declared effect happen after the commit; its key, which the function is given as text.

        `payload` is kept as JSON, and is what every attempt gets. Raises `SetupError` for a function that is
        no effect, and `TypeError` or `ValueError` for a payload that it could not be called with.
        """
        effect = effect_of(function)
        body = msgspec.json.encode(
            payload.model_dump(mode="json") if hasattr(payload, "model_dump") else payload
        )
        effect.decoder(body)
        target = self._target
        connection = target.connection() if isinstance(target, Session) else target
        return plan(connection, EFFECT, effect.name, Message(body=body), schema_name=self._schema)

    def confirm(self, key: UUID | str) -> bool:
        """The effect is known to have happened, a webhook says so: it is not tried, or asked for, again.

        False: there is no such effect any more, because somebody else knew it before.
        """
        table = schema.table("idemq_outgoing", self._schema)
        target = self._target
        connection = target.connection() if isinstance(target, Session) else target
        pk = (key if isinstance(key, UUID) else UUID(key)).bytes
        this = (table.c.pk == pk) & (table.c.kind == EFFECT)
        if kind_of(connection.dialect) in ("mysql", "mariadb"):
            # By its number, as the relay does it: whoever locks two indexes in another order is a deadlock.
            seq = connection.scalar(select(table.c.seq).where(this))
            this = this if seq is None else table.c.seq == seq
        return connection.execute(delete(table).where(this)).rowcount > 0


class AsyncEffects:
    """`Effects` for an AsyncConnection or AsyncSession."""

    def __init__(self, target: AsyncConnection | AsyncSession, *, schema: str | None = None) -> None:
        if not isinstance(target, AsyncConnection | AsyncSession):
            raise SetupError(
                f"AsyncEffects() takes an AsyncConnection or AsyncSession, not {type(target).__name__}"
            )
        self._target, self._schema = target, schema

    async def plan(self, function: Callable[[Any, str], Any], payload: Any) -> UUID:
        """`Effects.plan`."""
        return await self._target.run_sync(
            lambda target: Effects(target, schema=self._schema).plan(function, payload)
        )

    async def confirm(self, key: UUID | str) -> bool:
        """`Effects.confirm`."""
        return await self._target.run_sync(lambda target: Effects(target, schema=self._schema).confirm(key))
