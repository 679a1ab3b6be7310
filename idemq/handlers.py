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

from idemq.errors import SetupError
from idemq.message import Message
from idemq.payload import Decoder, decoder_for

Kind = Literal["message", "session", "connection", "payload"]

_TWINS: dict[type[Any], type[Any]] = {
    Session: AsyncSession,
    Connection: AsyncConnection,
    AsyncSession: Session,
    AsyncConnection: Connection,
}


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

    def arguments(self, **given: Any) -> dict[str, Any]:
        """The keyword arguments of one call; `given` by kind."""
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
    for base, twin in _TWINS.items():
        if isinstance(hint, type) and issubclass(hint, base):
            if asynchronous != base.__name__.startswith("Async"):
                kind = "async" if asynchronous else "sync"
                raise _wrong(consumer, parameter, f"must be {twin.__name__} in an {kind} handler")
            return "session" if base in (Session, AsyncSession) else "connection"
    if _is_payload(hint):
        return "payload"
    raise _wrong(
        consumer,
        parameter,
        f"is annotated {hint!r}; a handler may ask for Message, Session or Connection (AsyncSession or "
        "AsyncConnection when it is async) and one dataclass, msgspec.Struct, TypedDict or pydantic model",
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
