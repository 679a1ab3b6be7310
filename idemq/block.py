"""A guarded block in a transaction that is not a handler's: claim, work, flush, guard, permission to commit.

Guaranteed: `Block.finish` returns only when claim and work are together in one open transaction, ready for
the COMMIT of whoever owns it; in every other case nothing of either is left in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID
from weakref import WeakKeyDictionary

from sqlalchemy import ColumnElement, Connection, Engine, select, update
from sqlalchemy.exc import DBAPIError, IntegrityError

from idemq import names, options, schema
from idemq.drivers import is_transient, kind_of
from idemq.errors import BrokeTransaction, Conflict, SetupError
from idemq.guard import Guard, is_lent
from idemq.ledger import WAIT, Claim, Ledger
from idemq.message import Message, encoded, fingerprint_of, key_of, message_id
from idemq.scopes import Scope, begin

Id = str | UUID | int
Body = bytes | str | None

_BODILESS = Message(body=None)
_ledgers: WeakKeyDictionary[Engine, dict[tuple[str | None, float], Ledger]] = WeakKeyDictionary()
_triggers: WeakKeyDictionary[Engine, dict[str | None, bool]] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class Request:
    """Whose claim of what, and how."""

    consumer: str
    key: bytes
    fingerprint: int | None
    wait: float
    schema: str | None
    strict: bool = False


def request_of(
    consumer: str, identifier: Id, body: Body, wait: float, database_schema: str | None, strict: bool
) -> Request:
    """Raises `NoId` for an empty or overlong id, and `SetupError` for what else is wrong."""
    options.check(consumer, (), {"wait": wait})
    schema.tables(database_schema)  # refuses a name that is no plain identifier
    key = key_of(message_id(_BODILESS, lambda _: identifier))
    content = encoded(body) if isinstance(body, str) else body
    if not isinstance(content, bytes | bytearray | memoryview | None):
        raise SetupError(f"once({consumer!r}): body= takes bytes or a text, not {type(body).__name__}")
    fingerprint = None if content is None else fingerprint_of(content)
    return Request(consumer, key, fingerprint, wait, database_schema, strict)


class Block:
    """The claim, and then the guarded work of one `once`, on a sync Connection."""

    def __init__(self, scope: Scope, request: Request, number: int | None = None) -> None:
        """Claims. Raises `Conflict`, `InFlight` and `SchemaError`; nothing of the block is left then.

        `number` is the consumer's, where it is known; else it is looked up in this transaction.
        """
        self._scope, self._request = scope, request
        self._guard: Guard | None = None
        connection = scope.connection
        #: What an earlier call stored as its result.
        self.stored: bytes | None = None
        try:
            with names.naming_missing_tables():
                self.number = number or names.number_of(connection, request.consumer, request.schema)
                self.claim = claim_in(connection, request, self.number)
            self.fresh = self.claim.state == "fresh"
            if self.fresh:
                self._watch(connection)
            else:
                self.stored = self._first_result()
                self._release()
                scope.undo()  # it holds locks, and the claim's bound on waiting
        except BaseException as error:
            self.fail(error)
            raise

    def _watch(self, connection: Connection) -> None:
        if is_lent(connection):  # inside another block or a handler, whose guard refuses the same things
            return
        trigger = has_trigger(connection, self._request.schema)
        if trigger:  # what an earlier block of this transaction was permitted counts no more
            connection.exec_driver_sql("SELECT set_config('idemq.done', '', true)")
        self._guard = Guard(connection, strict=self._request.strict, trigger=trigger, exclusive=False)
        self._guard.lend(self._scope.root, self.claim)

    def finish(self, result: bytes | None) -> None:
        """The block has ended well. Raises `BrokeTransaction` when claim and work are not together."""
        scope = self._scope
        try:
            if scope.broken is None and scope.intact:
                scope.flush()
            if self._guard is not None:
                self._guard.verify()
            if scope.broken is not None or not scope.intact:
                raise BrokeTransaction(scope.broken or "the block ended the transaction that it was in")
            if result is not None:
                self._store(result)
            self._release()
            scope.keep()
        except BaseException as error:
            self.fail(error)
            raise

    def fail(self, error: BaseException) -> None:
        """Undo claim and work together; after a breach the whole transaction. Raises nothing of its own."""
        self._release()
        try:
            if self._scope.broken is None and not isinstance(error, BrokeTransaction):
                self._scope.undo()
                return
        except Exception:
            pass  # the block's own savepoint is gone
        try:
            self._scope.undo_all()
        except Exception:
            pass  # the connection is gone, and the server rolls back

    def is_committed(self, connection: Connection) -> bool:
        """Whether others see this block's claim, asked on another connection, outside a transaction."""
        begin(connection)
        try:
            claim = claim_in(connection, self._request, self.number)
            return claim.state == "duplicate" and claim.token == self.claim.token
        finally:
            connection.rollback()

    def _release(self) -> None:
        if self._guard is not None:
            self._guard.end()
            self._guard = None
        self._scope.release()

    def _first_result(self) -> bytes | None:
        connection = self._scope.connection
        table = schema.table("idemq_processed", self._request.schema)
        query = select(table.c.result).where(*self._row())
        if kind_of(connection.dialect) in ("mysql", "mariadb"):
            query = query.with_for_update(read=True)  # a plain read could answer from an older snapshot
        return connection.execute(query).scalar_one_or_none()

    def _store(self, result: bytes) -> None:
        table = schema.table("idemq_processed", self._request.schema)
        statement = update(table).where(*self._row()).values(result=result)
        if self._scope.connection.execute(statement).rowcount != 1:  # of an UPDATE
            raise BrokeTransaction("the row of the claim is gone")

    def _row(self) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
        table = schema.table("idemq_processed", self._request.schema)
        return table.c.consumer == self.number, table.c.id == self._request.key


def claim_in(connection: Connection, request: Request, number: int) -> Claim:
    """Claim in the connection's transaction. Raises `Conflict` and `InFlight`."""
    ledger = ledger_of(connection, request.schema, request.wait)
    claim = ledger.claim(connection, number, request.key, request.fingerprint, None)
    if claim.state == "conflict":
        raise Conflict
    return claim


def ledger_of(connection: Connection, database_schema: str | None, wait: float) -> Ledger:
    """The claim statement for this schema and wait, made once for each engine."""
    ledgers = _ledgers.setdefault(connection.engine, {})
    ledger = ledgers.get((database_schema, wait))
    if ledger is None:
        ledger = ledgers[database_schema, wait] = Ledger(connection.dialect, database_schema, wait)
    return ledger


def has_trigger(connection: Connection, database_schema: str | None) -> bool:
    """The strict trigger is installed; asked once for each engine."""
    if connection.dialect.name != "postgresql":
        return False
    known = _triggers.setdefault(connection.engine, {})
    if database_schema not in known:
        from idemq.migrate import has_strict  # Alembic takes a while to import

        known[database_schema] = has_strict(connection, database_schema)
    return known[database_schema]


def registered(connection: Connection, consumer: str, database_schema: str | None) -> int:
    """The consumer's number, known to be committed: new names get a transaction of their own.

    Raises `SchemaError` where the tables are missing.
    """
    with names.naming_missing_tables():
        return _registered(connection, consumer, database_schema)


def _registered(connection: Connection, consumer: str, database_schema: str | None) -> int:
    numbers, name = names.remembered(connection), (database_schema, consumer)
    if name in numbers:
        return numbers[name]
    ledger_of(connection, database_schema, WAIT).check(connection)
    for tries in range(5):
        begin(connection)
        try:
            number = names.register(connection, consumer, (), database_schema)
            connection.commit()
            numbers[name] = number
            break
        except DBAPIError as error:  # somebody else registers it at the same time
            connection.rollback()
            if tries == 4 or not (isinstance(error, IntegrityError) or is_transient(error)):
                raise
    return numbers[name]
