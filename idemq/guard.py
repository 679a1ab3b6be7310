"""The guard of a transaction that is lent to a handler: refuse what would end it, notice what did.

`Guard.verify()` raises `BrokeTransaction` unless claim and work are still in one open, unbroken transaction.
What it cannot see (another engine, a deleted claim row) is listed in docs/guard.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextvars import ContextVar
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import ExceptionContext, RootTransaction
from sqlalchemy.exc import DBAPIError

from idemq.drivers import error_code, kind_of, note_transaction, status_reader
from idemq.errors import BrokeTransaction
from idemq.ledger import Claim

_QUOTED = r"|'(?:[^'\\]|''|\\.)*'|\"(?:[^\"\\]|\"\"|\\.)*\"|`[^`]*`"
_PLAIN = r"|'[^']*'|\"[^\"]*\""
#: PostgreSQL's comments nest; three levels are looked into.
_COMMENT = r"/\*(?:[^/*]|/(?!\*)|\*(?!/)|{})*\*/"
_NESTED = _COMMENT.format(_COMMENT.format(_COMMENT.format(r"(?!)")))
#: What may hide a keyword or a semicolon: comments, strings, quoted names. MySQL's executable comments
#: `/*! ... */` are code, so only their markers are taken away; its plain strings know backslashes.
_MYSQL = re.compile(r"--(?=\s|$)[^\n]*|\#[^\n]*|/\*(?!M?!).*?\*/|/\*M?!\d*|\*/" + _QUOTED, re.DOTALL)
_POSTGRESQL = re.compile(
    rf"--[^\n]*|{_NESTED}|\$((?:[A-Za-z_]\w*)?)\$.*?\$\1\$|\b[eE]'(?:[^'\\]|''|\\.)*'{_PLAIN}", re.DOTALL
)
_SQLITE = re.compile(rf"--[^\n]*|/\*.*?\*/|`[^`]*`|\[[^\]]*\]{_PLAIN}", re.DOTALL)
_HIDING = {"postgresql": _POSTGRESQL, "mysql": _MYSQL, "mariadb": _MYSQL, "sqlite": _SQLITE}

#: What a deeper comment leaves behind may stand before the keyword.
_ENDING = re.compile(
    r"[\s*/]*(?:COMMIT|END|ABORT|BEGIN|START\s+TRANSACTION|PREPARE\s+TRANSACTION"
    r"|ROLLBACK(?!\s+(?:WORK\s+|TRANSACTION\s+)?TO\b))\b",
    re.IGNORECASE,
)
#: Statements that commit by themselves on MySQL and MariaDB, or run a text that may.
_ENDING_MYSQL = re.compile(
    r"[\s*/]*(?:(?:(?:CREATE|DROP)(?!\s+(?:OR\s+REPLACE\s+)?TEMPORARY\b)|ALTER|RENAME|TRUNCATE|LOCK|UNLOCK"
    r"|CALL|GRANT|REVOKE|ANALYZE\s+(?:\w+\s+)?TABLE|OPTIMIZE|REPAIR|CHECK|FLUSH|RESET|CACHE|LOAD\s+INDEX"
    r"|INSTALL|UNINSTALL|XA|PREPARE|EXECUTE|SET\s+PASSWORD|CHANGE|STOP|START)\b"
    r"|SET\b.*?(?:@@|(?<![@\w]))(?:\w+\s*\.\s*)?autocommit\s*:?=)",
    re.IGNORECASE | re.DOTALL,
)
_SET_STATEMENT = re.compile(r"[\s*/]*SET\s+STATEMENT\b[^;]*?\bFOR\b", re.IGNORECASE)
_ROUTINE = re.compile(
    r"\s*CREATE\s+(?:OR\s+REPLACE\s+)?(?:(?:TEMP|TEMPORARY|CONSTRAINT)\s+)?(?:TRIGGER|FUNCTION|PROCEDURE)\b",
    re.IGNORECASE,
)
_BEGIN = re.compile(r"\bBEGIN\b", re.IGNORECASE)
_END = re.compile(r"\s*END\b", re.IGNORECASE)


def ends_transaction(sql: str, kind: str) -> bool:
    """Whether one of the statements in `sql` would end (or start) a transaction on this kind of database."""
    mysql = kind in ("mysql", "mariadb")
    defining = False
    for statement in _HIDING[kind].sub(" ", sql).split(";"):
        if defining:
            defining = not _END.match(statement)
        elif _ENDING.match(statement) or (mysql and _ENDING_MYSQL.match(_inner(statement))):
            return True
        else:
            defining = _begins_definition(statement)
    return False


def _inner(statement: str) -> str:
    """What MariaDB's `SET STATEMENT ... FOR` runs."""
    while prefix := _SET_STATEMENT.match(statement):
        statement = statement[prefix.end() :]
    return statement


def _begins_definition(statement: str) -> bool:
    """The statements from here to END belong to a definition; nothing is run.

    Two searches, because one pattern for all words takes time by the square of the length.
    """
    routine = _ROUTINE.match(statement)
    return routine is not None and _BEGIN.search(statement, routine.end()) is not None


_remembered = lru_cache(2048)(ends_transaction)
#: MySQL's errors that undo the whole transaction: a deadlock, a full lock table, a row that changed since the
#: snapshot (MariaDB with `innodb_snapshot_isolation`). The timeout does so only when it is configured to.
_UNDOING, _LOCK_TIMEOUT = (1213, 1206, 1020), 1205
#: Drivers whose connections have a method `autocommit`, which commits.
_SWITCHES = ("pymysql", "asyncmy")
#: Texts longer than this are not worth keeping; they are looked at each time.
_LONG = 4096

#: Whom the running thread or task works for. Threads start without it and tasks inherit it, so that one which
#: the handler left running is told from the attempt that has the connection now.
_working_for: ContextVar[object] = ContextVar("idemq_working_for", default=None)


class Guard:
    """Watches one `Connection` that is lent to handlers, one attempt after another."""

    def __init__(
        self, connection: Connection, *, strict: bool = False, trigger: bool = False, exclusive: bool = True
    ) -> None:
        """`strict` adds the check that notices a driver-level rollback followed by more work, for a round
        trip; `trigger` says that the strict constraint trigger is installed (PostgreSQL). `exclusive` refuses
        threads and tasks that do not belong to the attempt; a connection of the caller's own is used as the
        caller likes (a web framework enters a block in one thread and runs it in another)."""
        self._connection, self._exclusive = connection, exclusive
        self._kind = kind_of(connection.dialect)
        self._in_transaction = status_reader(connection)
        self._strict, self._trigger = strict, trigger
        # A savepoint that is gone at the end tells of every other transaction. On SQLite it costs no round
        # trip, and nothing else sees what the driver does by itself.
        self._sentinel = connection.dialect.driver == "pysqlite" or (strict and self._kind != "postgresql")
        self._transaction: RootTransaction | None = None
        self._claim: Claim | None = None
        self._broken: str | None = None
        self._suspect: str | None = None
        self._seen: DBAPIError | None = None
        pooled = connection.connection
        self._shadows = self._make_shadows({pooled.dbapi_connection, pooled.driver_connection})
        self._user: object = self
        self.hold()
        _watch_errors(connection.engine)
        event.listen(connection, "before_cursor_execute", self._before)
        event.listen(connection, "commit", self._before_commit)

    def end(self) -> None:
        """Stop watching; the connection is the caller's again."""
        self.take_back()
        event.remove(self._connection, "before_cursor_execute", self._before)
        event.remove(self._connection, "commit", self._before_commit)

    def hold(self) -> None:
        """The running thread or task is the one that owns the connection between attempts."""
        if self._exclusive:
            _working_for.set(self)

    def lend(self, transaction: RootTransaction, claim: Claim) -> None:
        """From here to `verify` or `take_back`, the transaction is the handler's to use and not to end."""
        self._broken = self._suspect = self._seen = None
        self._transaction, self._claim = transaction, claim
        note_transaction(self._connection)
        if self._sentinel:
            self._connection.exec_driver_sql("SAVEPOINT idemq_guard")
        self._user = object()
        if self._exclusive:
            _working_for.set(self._user)
        _lent[self._connection] = self
        for namespace, shadows in self._shadows:
            namespace.update(shadows)

    def take_back(self) -> None:
        """The handler is done: threads and tasks that it left running are refused from here on."""
        if self._user is not self:
            self._user = self
            self.hold()
            _lent.pop(self._connection, None)
            for namespace, shadows in self._shadows:
                for name in shadows:
                    namespace.pop(name, None)

    def verify(self) -> None:
        """Take the connection back and raise `BrokeTransaction` unless its transaction is still whole."""
        self.take_back()
        connection, transaction = self._connection, self._transaction
        if self._broken is not None:
            raise BrokeTransaction(self._broken)
        if connection.closed or connection.invalidated or transaction is None:
            raise BrokeTransaction("the handler closed the connection")
        if not transaction.is_active or connection.get_transaction() is not transaction:
            raise BrokeTransaction("the handler rolled the transaction back or committed it")
        if not self._in_transaction():
            raise BrokeTransaction("the transaction was ended, or a database error was swallowed")
        if self._suspect is not None:
            self._ask(self._suspect)
        if self._sentinel or self._strict or self._trigger:
            self._verify_strictly()

    def saw(self, error: BaseException) -> bool:
        """Whether `error` is the last one that the lent connection met."""
        return error is self._seen

    def suspect(self, error: DBAPIError) -> None:
        """A database error is only a suspicion: the handler may have recovered by a savepoint of its own."""
        self._seen = error
        if self._kind == "sqlite":  # ON CONFLICT ROLLBACK; later work would begin anew
            if not self._in_transaction():
                self._broken = "a database error rolled the transaction back, and was swallowed"
        elif self._kind == "postgresql" or (code := error_code(error)) == _LOCK_TIMEOUT:
            self._suspect = "a database error was swallowed, and its transaction is undone"
        elif code in _UNDOING:
            self._broken = "a deadlock rolled the whole transaction back, and the error was swallowed"

    def _ask(self, suspicion: str) -> None:
        if self._connection.dialect.driver.startswith("psycopg"):  # its status has told already
            return
        question = "SELECT 1" if self._kind == "postgresql" else "SELECT @@innodb_rollback_on_timeout"
        try:
            answer = self._connection.exec_driver_sql(question).scalar()
        except DBAPIError as error:
            raise BrokeTransaction(suspicion) from error
        if answer and self._kind != "postgresql":
            raise BrokeTransaction(suspicion)

    def _verify_strictly(self) -> None:
        connection = self._connection
        try:
            if self._kind == "postgresql" and self._claim is not None:
                done = ", set_config('idemq.done', pg_current_xact_id()::text, true)" if self._trigger else ""
                query = f"SELECT pg_current_xact_id_if_assigned()::text{done}"
                if connection.exec_driver_sql(query).scalar() != self._claim.xid:
                    raise BrokeTransaction("the handler's work is in another transaction than its claim")
            elif self._sentinel:
                connection.exec_driver_sql("RELEASE SAVEPOINT idemq_guard")
        except DBAPIError as error:
            raise BrokeTransaction("the transaction of the claim is gone") from error

    def _before(self, _connection: object, _cursor: object, sql: str, *_: object) -> None:
        if self._exclusive and _working_for.get() is not self._user:
            self._refuse("the connection was used by a thread or task that does not belong to the attempt")
        if self._user is not self:
            look = _remembered if len(sql) < _LONG else ends_transaction
            if look(sql, self._kind):
                self._refuse(f"the handler may not end its transaction: {sql.strip()[:60]!r} was not sent")

    def _before_commit(self, _connection: object) -> None:
        # Raising here leaves the driver in its transaction: the connection is thrown away, which undoes it.
        if self._user is not self:
            self._refuse("the handler may not commit the transaction it was lent")
        if self._exclusive and _working_for.get() is not self:
            self._refuse("a thread or task that the handler left running committed")

    def _refuse(self, why: str) -> None:
        self._broken = why  # also when the handler swallows the error
        raise BrokeTransaction(why)

    def _make_shadows(self, raw_connections: set[Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """Refuse `commit` and its like on every object that leads to the driver and allows that.

        The driver's rollback and close go through, because a Session recovers from a failed flush by the one
        and a pool throws a connection away by the other; both undo claim and work together. They are
        remembered: what comes after them would be in another transaction than the claim.
        """

        def refusing(what: str) -> Callable[..., None]:
            return lambda *_, **__: self._refuse(f"the handler may not {what} the connection it was lent")

        def noting(original: Callable[..., Any]) -> Callable[..., Any]:
            def ending(*arguments: Any, **options: Any) -> Any:
                self._broken = self._broken or "the handler rolled the transaction back"
                return original(*arguments, **options)

            return ending

        commit = {"commit": refusing("commit")}
        ours = {**commit, "rollback": refusing("roll back"), "close": refusing("close")}
        shadows = [(self._connection.__dict__, ours)]
        if self._connection.dialect.driver in _SWITCHES:
            commit["autocommit"] = refusing("switch autocommit on")
        for raw in raw_connections:
            if hasattr(raw, "__dict__"):
                noted = {"rollback": noting(raw.rollback), "close": noting(raw.close)}
                shadows.append((raw.__dict__, {**commit, **noted}))
        return shadows


_lent: WeakKeyDictionary[Connection, Guard] = WeakKeyDictionary()
_watched: WeakSet[Engine] = WeakSet()


def is_lent(connection: Connection) -> bool:
    """A guard watches the connection's transaction now."""
    return connection in _lent


def _watch_errors(engine: Engine) -> None:
    if engine not in _watched:
        _watched.add(engine)
        event.listen(engine, "handle_error", _suspect)


def _suspect(context: ExceptionContext) -> None:
    guard = _lent.get(context.connection) if context.connection is not None else None
    if guard is not None and isinstance(context.sqlalchemy_exception, DBAPIError):
        guard.suspect(context.sqlalchemy_exception)
