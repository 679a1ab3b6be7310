"""Handlers: what a function asks for by its annotations, read once, when it is declared."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_type_hints

import msgspec
from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
from sqlalchemy.orm import Session

from idemq.effects import AsyncEffects, Effects
from idemq.errors import SetupError
from idemq.message import Message
from idemq.outbox import AsyncOutbox, Outbox
from idemq.payload import Decoder, decoder_for

Kind = Literal["message", "session", "connection", "payload", "outbox", "effects"]

#: What a handler may ask for, as sync and as async handlers know it.
_TWINS: tuple[tuple[Kind, type[Any], type[Any]], ...] = (
    ("session", Session, AsyncSession),
    ("connection", Connection, AsyncConnection),
    ("outbox", Outbox, AsyncOutbox),
    ("effects", Effects, AsyncEffects),
)


@dataclass(frozen=True, slots=True)
class Handler:
    """A declared handler function and what it wants, by parameter name."""

    function: Callable[..., Any]
    asynchronous: bool
    wants: Mapping[str, Kind]
    decoder: Decoder | None
    #: The session classes that it asks for (more than one would be odd, but harmless).
    session_classes: tuple[type[Any], ...] = ()

    @property
    def wants_session(self) -> bool:
        return bool(self.session_classes)

    @property
    def plans(self) -> bool:
        """It may write what the relay is to send."""
        return not {"outbox", "effects"}.isdisjoint(self.wants.values())

    def arguments(
        self, schema: str | None, message: Message, payload: Any, session: Any, connection: Any
    ) -> dict[str, Any]:
        """The keyword arguments of one call; what is planned goes into the tables of `schema`."""
        given = {"message": message, "payload": payload, "session": session, "connection": connection}
        for kind, *classes in _TWINS:
            if kind in ("outbox", "effects") and kind in self.wants.values():
                given[kind] = classes[self.asynchronous](connection, schema=schema)
        return {name: given[kind] for name, kind in self.wants.items()}


def read(function: Callable[..., Any], consumer: str) -> Handler:
    """Read the signature of `function`. Raises `SetupError` naming the consumer and the parameter."""
    target: Any = function
    bound: set[str] = set()
    while isinstance(target, functools.partial):
        bound |= set(target.keywords)
        target = target.func
    if not inspect.isroutine(target):  # an object with __call__
        target = type(target).__call__
    if inspect.isgeneratorfunction(target) or inspect.isasyncgenfunction(target):
        raise SetupError(f"consumer {consumer!r}: the handler is a generator; it must return when it is done")
    asynchronous = inspect.iscoroutinefunction(target)
    try:
        hints = get_type_hints(target)
    except NameError as error:
        raise SetupError(
            f"consumer {consumer!r}: the handler's annotation {error.name!r} cannot be found; "
            "import it at the top of the module, not under TYPE_CHECKING"
        ) from None
    except Exception as error:
        raise SetupError(f"consumer {consumer!r}: the handler's annotations: {error}") from None
    wants: dict[str, Kind] = {}
    payload: Any = None
    for parameter in inspect.signature(function).parameters.values():
        left_alone = parameter.name not in hints and parameter.default is not parameter.empty
        if left_alone or parameter.name in bound:
            continue
        kind = _kind(parameter, hints.get(parameter.name), asynchronous, consumer)
        if kind == "payload":
            if payload is not None:
                raise _wrong(consumer, parameter, "is a second payload; a handler takes at most one")
            payload = hints[parameter.name]
        wants[parameter.name] = kind
    sessions = tuple(hints[name] for name, kind in wants.items() if kind == "session")
    try:
        decoder = decoder_for(payload) if payload is not None else None
    except Exception as error:
        raise SetupError(f"consumer {consumer!r}: {payload!r} cannot be decoded: {error}") from None
    return Handler(function, asynchronous, wants, decoder, sessions)


def _kind(parameter: inspect.Parameter, hint: Any, asynchronous: bool, consumer: str) -> Kind:
    if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
        raise _wrong(consumer, parameter, "cannot be passed by name")
    if hint is None:
        raise _wrong(consumer, parameter, "has no annotation; say what the handler wants")
    if hint is Message:
        return "message"
    for wanted, sync, twin in _TWINS:
        if isinstance(hint, type) and issubclass(hint, sync | twin):
            right, how = (twin, "an async") if asynchronous else (sync, "a sync")
            if not issubclass(hint, right):
                raise _wrong(consumer, parameter, f"must be {right.__name__} in {how} handler")
            return wanted
    if _is_payload(hint):
        return "payload"
    raise _wrong(
        consumer,
        parameter,
        f"is annotated {hint!r}; a handler may ask for Message, Session or Connection (AsyncSession or "
        "AsyncConnection when it is async), Outbox or Effects, and one dataclass, msgspec.Struct, "
        "TypedDict or pydantic model",
    )


def _is_payload(hint: Any) -> bool:
    plain = typing.get_origin(hint) or hint
    return isinstance(plain, type) and (
        dataclasses.is_dataclass(plain)
        or issubclass(plain, msgspec.Struct)
        or typing.is_typeddict(plain)
        or hasattr(plain, "model_validate_json")
    )


def _wrong(consumer: str, parameter: inspect.Parameter, what: str) -> SetupError:
    return SetupError(f"consumer {consumer!r}: the handler's parameter {parameter.name!r} {what}")
