"""The Session that a handler gets: bound to the claim's connection, and unable to reach another one."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

from idemq.errors import SetupError

#: A sessionmaker of the user's, of either kind.
Maker = sessionmaker[Any] | async_sessionmaker[Any]

#: What idemq decides, whatever the user's sessionmaker says. `rollback_only`: a handler's commit() only
#: flushes, and its rollback() ends the claim as well. `binds`: a routed table would be written on another
#: connection. `close_resets_only`: a thread that outlives its handler finds the session closed.
_OURS: dict[str, Any] = {"join_transaction_mode": "rollback_only", "binds": {}, "close_resets_only": False}


class Sessions:
    """Makes sessions from the user's sessionmaker, or plain ones. Raises `SetupError` for an unsafe one."""

    def __init__(self, maker: Maker | None = None) -> None:
        options = dict(maker.kw) if maker is not None else {}
        self._sync_class: type[Session] = options.pop("sync_session_class", None) or Session
        self._async_class: type[AsyncSession] = AsyncSession
        if maker is not None and issubclass(maker.class_, AsyncSession):  # of either kind of sessionmaker
            self._async_class = maker.class_
            if self._sync_class is Session:
                self._sync_class = maker.class_.sync_session_class
        elif maker is not None:
            self._sync_class = maker.class_
        if self._sync_class.get_bind is not Session.get_bind:
            raise SetupError(
                f"session=: {self._sync_class.__name__} overrides get_bind, and could write outside the "
                "transaction of the claim; give idemq a session class without it"
            )
        if options.get("twophase"):
            raise SetupError(
                "session=: twophase=True commits apart from the claim; give idemq one without it"
            )
        self._options = {**options, **_OURS}
        self._options.pop("bind", None)

    def provides(self, wanted: type[Any]) -> bool:
        """Whether the sessions are instances of the class that a handler asks for."""
        return issubclass(self._sync_class, wanted) or issubclass(self._async_class, wanted)

    def on(self, connection: Connection) -> Session:
        return self._sync_class(bind=connection, **self._options)

    def on_async(self, connection: AsyncConnection) -> AsyncSession:
        return self._async_class(bind=connection, sync_session_class=self._sync_class, **self._options)
