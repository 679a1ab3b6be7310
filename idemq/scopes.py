"""The part of a transaction in which a block runs, on a Connection or a Session that is not idemq's.

A scope opens a savepoint where a transaction is open already, refuses the commit of what is around it, and
undoes either itself or, after a breach, the whole transaction.
"""

from __future__ import annotations

from typing import Protocol

from sqlalchemy import Connection, Engine, StaticPool, event
from sqlalchemy.engine import RootTransaction
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from idemq.drivers import in_autocommit, is_lock_timeout, kind_of, refuse_autocommit, status_reader
from idemq.errors import BrokeTransaction, InFlight, SetupError

#: SQLite has one writer at a time, and does not say what it works on.
OTHER_WRITER = "another writer, perhaps of the same id, held the SQLite file for longer than the busy timeout"


class Scope(Protocol):
    """The part of a transaction in which a block runs: a savepoint, or the whole transaction."""

    connection: Connection
    root: RootTransaction
    #: What the block did to the transaction that it may not do; sticky.
    broken: str | None

    @property
    def intact(self) -> bool: ...
    def flush(self) -> None:
        """Send what is pending; savepoints that the block left open become part of it."""

    def release(self) -> None:
        """Stop watching; the caller may do as it likes."""

    def keep(self) -> None:
        """The block's work becomes part of the transaction around it."""

    def undo(self) -> None:
        """Nothing of the block stays. May raise when the block had ended its own savepoint."""

    def undo_all(self) -> None:
        """Nothing of the whole transaction stays, whatever state it is in."""


class ConnectionScope:
    """A block on a Connection; `session`, when there is one, is bound to it and ends with the block."""

    def __init__(self, connection: Connection, session: Session | None = None) -> None:
        inside = connection.in_transaction()
        self.connection, self.session = connection, session
        self.broken: str | None = None
        try:
            begin(connection)
            self._savepoint = connection.begin_nested() if inside else None
        except BaseException:
            if not inside:
                connection.rollback()
            raise
        self.root = _root(connection)

    @property
    def intact(self) -> bool:
        own = self._savepoint is None or self._savepoint.is_active
        return own and self.root.is_active and self.connection.get_transaction() is self.root

    def flush(self) -> None:
        if self.session is not None:
            self.session.flush()
            return
        while (inner := self.connection.get_nested_transaction()) not in (None, self._savepoint):
            inner.commit()

    def release(self) -> None:
        """Nothing: the guard watches the connection."""

    def keep(self) -> None:
        if self._savepoint is not None:
            self._savepoint.commit()

    def undo(self) -> None:
        if self.session is not None:
            self.session.close()
        if not self.intact:
            raise BrokeTransaction("the transaction of the block is gone")
        if self._savepoint is None:
            self.root.rollback()
            return
        while (inner := self.connection.get_nested_transaction()) is not self._savepoint:
            if inner is None:
                raise BrokeTransaction("the savepoint of the block is gone")
            inner.rollback()
        self._savepoint.rollback()

    def undo_all(self) -> None:
        if self.session is not None:
            self.session.close()
        _cut(self.connection)
        self.root.rollback()


class SessionScope:
    """A block on the caller's Session."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.broken: str | None = None
        bind = session.get_bind()
        inside = session.in_transaction() or (isinstance(bind, Connection) and bind.in_transaction())
        connection = session.connection()
        try:
            begin(connection)
            self._savepoint = session.begin_nested() if inside else None  # flushes what came before
            session.connection()  # a session sends SAVEPOINT when its connection is first asked for
        except BaseException:
            if not inside:
                session.rollback()
            raise
        self.connection, self.root = connection, _root(connection)
        self._transaction = session.get_transaction()
        event.listen(session, "before_commit", self._refuse_session)
        event.listen(session, "after_begin", self._look)

    def _refuse_session(self, session: Session) -> None:
        """Called for savepoints too: the block's own ones pass."""
        if session.get_nested_transaction() in (None, self._savepoint):
            self._refuse("the block may not commit the session; the caller does, after it")

    def _look(self, _session: Session, _transaction: object, connection: Connection) -> None:
        if connection is not self.connection:
            self._refuse(
                "the session used a second connection in the block, which does not commit with the claim"
            )

    def _refuse(self, why: str) -> None:
        self.broken = why  # also when the block swallows the error
        raise BrokeTransaction(why)

    @property
    def intact(self) -> bool:
        own = self._savepoint is None or self._savepoint.is_active
        same = self._session.get_transaction() is self._transaction
        return own and same and self.root.is_active and self.connection.get_transaction() is self.root

    def flush(self) -> None:
        self._session.flush()
        while (inner := self._session.get_nested_transaction()) not in (None, self._savepoint):
            inner.commit()

    def release(self) -> None:
        if event.contains(self._session, "before_commit", self._refuse_session):
            event.remove(self._session, "before_commit", self._refuse_session)
            event.remove(self._session, "after_begin", self._look)

    def keep(self) -> None:
        if self._savepoint is not None:
            self._savepoint.commit()

    def undo(self) -> None:
        if self._savepoint is not None:
            self._savepoint.rollback()  # also after a failed flush, when it is no longer active
            if not self.root.is_active:
                raise BrokeTransaction("the transaction of the block is gone")
        else:
            self._session.rollback()
            if not self.connection.closed and status_reader(self.connection)():
                raise BrokeTransaction("the driver is still in a transaction")

    def undo_all(self) -> None:
        _cut(self.connection)
        self._session.rollback()


def refuse_shared(engine: Engine) -> None:
    """Raise `SetupError` when all threads would work in one transaction."""
    if isinstance(engine.pool, StaticPool):
        raise SetupError("a StaticPool gives all threads one transaction; give the engine another pool")


def begin(connection: Connection) -> None:
    """Have the connection in a transaction, also where SQLAlchemy's or SQLite's driver has not begun yet.

    Raises `InFlight` when SQLite's other writer, who may be the twin, does not end within the busy timeout.
    """
    _refuse_autocommit(connection)
    if not connection.in_transaction():
        connection.begin()
    if kind_of(connection.dialect) == "sqlite" and not status_reader(connection)():
        try:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        except DBAPIError as error:
            if is_lock_timeout(error):
                raise InFlight(OTHER_WRITER) from error
            raise


def _refuse_autocommit(connection: Connection) -> None:
    if in_autocommit(connection):
        raise SetupError(
            "the connection's isolation level is AUTOCOMMIT: claim and work would not commit together; "
            "use one without it"
        )
    refuse_autocommit(connection)


def _root(connection: Connection) -> RootTransaction:
    transaction = connection.get_transaction()
    assert transaction is not None
    return transaction


def _cut(connection: Connection) -> None:
    """Let the server roll back whatever state the connection is in."""
    if not connection.closed and not connection.invalidated:
        connection.invalidate()
