"""What a `once` block is given: whether there is work to do, where to do it, and the answer to keep."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager, AbstractContextManager
from types import TracebackType
from typing import Any, Never, TypeVar

import msgspec
from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
from sqlalchemy.orm import Session

from idemq.block import Block
from idemq.errors import SetupError
from idemq.packing import MAX_RESULT_BYTES as MAX_RESULT_BYTES
from idemq.packing import result_bytes
from idemq.scopes import ConnectionScope
from idemq.sessions import Sessions

Entered = TypeVar("Entered")


class WithBlock(AbstractContextManager[Entered]):
    """What `once` returns: a `with` block and, unlike those of contextlib, no decorator."""

    def __init__(self, block: AbstractContextManager[Entered]) -> None:
        self._block = block

    def __enter__(self) -> Entered:
        return self._block.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return self._block.__exit__(kind, error, trace)

    def __call__(self, *_: object) -> Never:
        _refuse_to_decorate()


class AsyncWithBlock(AbstractAsyncContextManager[Entered]):
    """`WithBlock` for `async with`."""

    def __init__(self, block: AbstractAsyncContextManager[Entered]) -> None:
        self._block = block

    async def __aenter__(self) -> Entered:
        return await self._block.__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return await self._block.__aexit__(kind, error, trace)

    def __call__(self, *_: object) -> Never:
        _refuse_to_decorate()


def _refuse_to_decorate() -> Never:
    raise SetupError(
        "once() is no decorator: its one id would be that of every call, and the function could not see "
        "work.fresh. Write `with once(target, consumer, message_id) as work:` where the id is at hand"
    )


class Work:
    """What a `once` block is given: whether there is work to do, and the answer to keep."""

    def __init__(self, block: Block) -> None:
        #: True: nobody has done this before; do it here. False: it is done already, so do nothing.
        self.fresh = block.fresh
        self._stored = block.stored
        self._open = block.fresh

    @property
    def result(self) -> Any:
        """The first answer as a repeat reads it: through JSON, also in the first call; None without one."""
        return None if self._stored is None else msgspec.json.decode(self._stored)

    @result.setter
    def result(self, value: Any) -> None:
        self._require_open("work.result can be set")
        self._stored = result_bytes(value)

    def _require_open(self, what: str) -> None:
        if not self._open:
            raise SetupError(f"{what} only inside the block, and only where work.fresh is true")

    def close(self) -> bytes | None:
        """The block has ended; returns what is to be stored."""
        self._open = False
        return self._stored


class EngineWork(Work):
    """The work of `once(engine, ...)`: with a transaction of its own."""

    def __init__(self, block: Block, scope: ConnectionScope) -> None:
        super().__init__(block)
        self._scope = scope

    @property
    def connection(self) -> Connection:
        """The connection that the claim was made on. Only where `fresh` is true."""
        self._require_open("work.connection is there")
        return self._scope.connection

    @property
    def session(self) -> Session:
        """A Session on that connection, flushed at the end of the block. Only where `fresh` is true."""
        self._require_open("work.session is there")
        if self._scope.session is None:
            self._scope.session = Sessions().on(self._scope.connection)
        return self._scope.session


class AsyncEngineWork(Work):
    """The work of `once(async_engine, ...)`."""

    def __init__(self, block: Block, scope: ConnectionScope, connection: AsyncConnection) -> None:
        super().__init__(block)
        self._scope = scope
        self._connection = connection
        self._session: AsyncSession | None = None

    @property
    def connection(self) -> AsyncConnection:
        """The connection that the claim was made on. Only where `fresh` is true."""
        self._require_open("work.connection is there")
        return self._connection

    @property
    def session(self) -> AsyncSession:
        """An AsyncSession on that connection, flushed at the end of the block. Only where `fresh` is true."""
        self._require_open("work.session is there")
        if self._session is None:
            self._session = Sessions().on_async(self._connection)
            self._scope.session = self._session.sync_session
        return self._session
