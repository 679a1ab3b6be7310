"""One-time tokens: `issue` one, and of everybody who redeems it exactly one is told True.

    token = issue(session, f"checkout {user.id}", lifetime=900)      # with the form; then commit
    ...
    if not redeem(session, f"checkout {user.id}", token):            # when the form comes back
        return "this form was sent already"
    session.add(Order(...))                                          # one transaction with the redeeming

The DELETE of the token's row decides; nothing is looked up before it. For Redis see `idemq.redis_tokens`.
"""

from __future__ import annotations

import secrets
from datetime import timedelta
from hashlib import blake2b
from typing import Any

from sqlalchemy import Connection, Engine, delete, insert, or_, select, text
from sqlalchemy.orm import Session, scoped_session

from idemq import names
from idemq import schema as tables
from idemq.drivers import kind_of, refuse_autocommit
from idemq.errors import SetupError
from idemq.ledger import NOW, WAIT, clock
from idemq.waits import bounded, check_wait

_Target = Session | scoped_session[Any] | Connection

#: Bytes of randomness in a token: nobody guesses one.
RANDOM = 24
#: Ten years; what lives longer needs no lifetime.
LONGEST = 3650 * 86_400


def issue(target: _Target, scope: str, *, lifetime: float | None = None, schema: str | None = None) -> str:
    """A new token for `scope` (1 to 255 bytes), to be redeemed once within `lifetime` seconds (None: ever).

    Written in the caller's transaction, and good for others once that is committed. The table holds only a
    digest: who can read it can redeem nothing. Raises `SetupError` for bad arguments and `SchemaError` where
    idemq's tables are missing; `schema` is the database schema that they are in.
    """
    connection, table, raw_scope = _connection(target), _table(schema), scope_bytes(scope)
    check_lifetime(lifetime)
    token = secrets.token_urlsafe(RANDOM)
    with names.naming_missing_tables():
        expires = None if lifetime is None else clock(connection) + timedelta(seconds=lifetime)
        row = {"digest": digest(token), "scope": raw_scope, "expires_at": expires}
        connection.execute(insert(table).values(row))
    return token


def redeem(
    target: _Target, scope: str, token: str | None, *, wait: float = WAIT, schema: str | None = None
) -> bool:
    """True for one caller: the token was there, for this scope, not expired, and is now deleted.

    False for every other: redeemed before, of another scope (it stays good for its own), expired by the
    database's clock (on PostgreSQL the beginning of the transaction), never issued, or None.

    It happens in the caller's transaction: a rollback gives the token back. Who comes while another
    transaction has redeemed the token and is still open waits for its end, `wait` seconds at most (see
    `idemq.waits.bounded`), then `LockTimeout` is raised: roll back. Other errors are the database's: after a
    deadlock or a failed serialization (possible above READ COMMITTED) run the whole transaction again. On
    MySQL and MariaDB a refused redeem keeps a lock on the gap where the token was: end the transaction before
    you issue another one.
    """
    check_wait(wait)
    connection, table, raw_scope = _connection(target), _table(schema), scope_bytes(scope)
    if token is None:
        return False
    unexpired = or_(table.c.expires_at.is_(None), table.c.expires_at > _moment(connection))
    statement = delete(table).where(table.c.digest == digest(token), table.c.scope == raw_scope, unexpired)
    busy = f"the token is being redeemed by somebody else, and the wait of {wait} s ran out"
    with names.naming_missing_tables(), bounded(connection, wait, busy):
        deleted = connection.execute(statement).rowcount  # of the DELETE
    return deleted == 1


def purge(engine: Engine, *, batch: int = 1000, schema: str | None = None) -> int:
    """Delete the expired tokens, `batch` of them in one transaction, and say how many there were.

    Goes through the table once, so that it takes no lock on tokens that are good.
    """
    if not isinstance(engine, Engine):
        raise SetupError(f"purge() takes an Engine, not {type(engine).__name__}: each batch is committed")
    if type(batch) is not int or not 1 <= batch <= 10_000:
        raise SetupError(f"batch={batch!r} must be a whole number from 1 to 10,000")
    table, last, count = _table(schema), None, 0
    while True:
        with names.naming_missing_tables(), engine.begin() as connection:
            expired = table.c.expires_at <= _moment(connection)
            # A look-up before the delete is right here alone: what is expired never becomes good again.
            page = select(table.c.digest).where(expired).order_by(table.c.digest).limit(batch)
            if last is not None:
                page = page.where(table.c.digest > last)
            found = connection.scalars(page).all()
            if found:
                gone = delete(table).where(table.c.digest.in_(found), expired)
                count += connection.execute(gone).rowcount  # of the DELETE
        if len(found) < batch:
            return count
        last = found[-1]


def digest(token: str) -> bytes:
    """What is stored in the place of a token."""
    return blake2b(token.encode("utf-8", "surrogatepass"), digest_size=16, person=b"idemq token").digest()


def scope_bytes(scope: str) -> bytes:
    """Raises `SetupError` for a scope that is no text of 1 to 255 bytes."""
    raw = scope.encode("utf-8", "surrogatepass") if isinstance(scope, str) else b""
    if not 1 <= len(raw) <= 255:
        raise SetupError(f"scope={scope!r}: a scope is a text of 1 to 255 bytes; name what, and whose it is")
    return raw


def check_lifetime(lifetime: object) -> None:
    """Raise `SetupError` when `lifetime` is neither None nor a number of seconds."""
    if lifetime is None:
        return
    if isinstance(lifetime, bool) or not (isinstance(lifetime, int | float) and 0.001 <= lifetime <= LONGEST):
        raise SetupError(f"lifetime={lifetime!r} must be None, or from 0.001 to {LONGEST:,} seconds")


def _connection(target: _Target) -> Connection:
    if isinstance(target, Session | scoped_session):
        target = target.connection()
    if not isinstance(target, Connection):
        raise SetupError(
            f"tokens: {type(target).__name__} is no sync Session or Connection of SQLAlchemy; "
            "call async ones through run_sync, and of an Engine give a Connection with your transaction"
        )
    refuse_autocommit(target)
    return target


def _table(schema: str | None) -> Any:
    return tables.table("idemq_tokens", schema)


def _moment(connection: Connection) -> Any:
    return text(NOW[kind_of(connection.dialect)])
