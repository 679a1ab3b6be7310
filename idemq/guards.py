"""Business rules that hold whatever order messages arrive in, and however often: one row, one decision.

    from idemq import guards

    match guards.transition(session, Order, {"id": 7}, "state", to=PAID, allowed_from=[CREATED]).outcome:
        case Outcome.APPLIED: ...
        case Outcome.ALREADY_SO: ...    # a repeat: success, nothing changed
        case Outcome.REFUSED: ...       # the order is somewhere else; nothing changed

Each takes a sync Connection or Session, works in its transaction and never ends it: what was applied counts
when the caller commits. Rows are named by a Table or mapped class and a key, which must be the primary key or
a unique constraint of it; columns by their names in the Table, or the attributes' names in the class. The
database decides, in one statement; only when that touched no row, a second one says why, under the row's
lock: the answer stays true until the transaction ends.

A Session is flushed first, and its object of that row, if it holds one, is read again afterwards. From async
code: `await session.run_sync(lambda sync: guards.decrement(sync, Stock, ...))`, with an AsyncSession or an
AsyncConnection.

All raise `SetupError` for a key that may name several rows, an unknown column, a value of another type than
the column's, and other mistakes of the caller; database errors pass through. SQLite has one writer at a time:
a guard has the transaction begin with the file's write lock when it has not begun, and raises `LockTimeout`
when another writer holds that for longer than the busy timeout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from enum import Enum
from typing import Any, Literal, NoReturn, TypeVar, overload

from sqlalchemy import Connection, Integer, Row, Table, and_, case, or_, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, scoped_session

from idemq.errors import SetupError
from idemq.guarded_rows import GuardedRow, Target, comparable, connection_of, equals, session_of
from idemq.ledger import WAIT
from idemq.savepoints import begin, undo, violated, within
from idemq.upserts import insert_or_meet

_T = TypeVar("_T")


class _Answer:
    """Every answer would be true in an `if`, the refusals too."""

    __slots__ = ()

    def __bool__(self) -> NoReturn:
        raise TypeError(f"{self!r} is neither true nor false: compare the outcome with one of guards.Outcome")


class Outcome(_Answer, Enum):
    """What a guard answers. Not a truth value: compare it."""

    #: The row was not there, and is now.
    INSERTED = "inserted"
    #: The row was there, and has the new values.
    UPDATED = "updated"
    #: The condition held, and the row has the new values.
    APPLIED = "applied"
    #: There is no row with this key. Nothing changed.
    MISSING = "missing"
    #: What is stored is the same version or a newer one. Nothing changed.
    STALE = "stale"
    #: The condition did not hold. Nothing changed.
    REFUSED = "refused"
    #: The row is in the wanted state, as after a first call. Nothing changed.
    ALREADY_SO = "already so"
    #: Less than asked for is left above the floor. Nothing changed.
    NOT_ENOUGH = "not enough"


@dataclass(frozen=True, slots=True)
class Transition(_Answer):
    """The answer of `transition`."""

    outcome: Literal[Outcome.APPLIED, Outcome.ALREADY_SO, Outcome.REFUSED, Outcome.MISSING]
    #: The state that the row is in now; None when it is missing.
    state: Any


@dataclass(frozen=True, slots=True)
class Decrement(_Answer):
    """The answer of `decrement`."""

    outcome: Literal[Outcome.APPLIED, Outcome.NOT_ENOUGH, Outcome.MISSING]
    #: What is left now. None when the row is missing; after a decrement that was applied, also on MySQL and
    #: MariaDB, whose UPDATE returns nothing.
    rest: Any


def upsert(
    target: Target, row: Table | type[Any], key: Mapping[str, Any], values: Mapping[str, Any]
) -> Literal[Outcome.INSERTED, Outcome.UPDATED]:
    """Insert the row, or give the one that is there these values.

    UPDATED also when it had them already. Whoever inserts at the same time is waited for; of all that commit,
    one is told INSERTED. On MySQL and MariaDB the row that is updated is found by *any* unique constraint:
    `SetupError` is raised when another one than the key's has columns among the given ones. A column's
    `onupdate` is not applied there.
    """
    guarded = GuardedRow(target, row, key)
    inserted = insert_or_meet(guarded, guarded.changed(values))
    guarded.refresh()
    return Outcome.INSERTED if inserted else Outcome.UPDATED


def update_if_newer(
    target: Target,
    row: Table | type[Any],
    key: Mapping[str, Any],
    *,
    version: tuple[str, Any],
    values: Mapping[str, Any],
) -> Literal[Outcome.APPLIED, Outcome.STALE, Outcome.MISSING]:
    """Write `values` and the version, unless the stored version is the same or newer (STALE).

    `version` is a column and the new value. A stored None is older than everything. The column must keep the
    value exactly: a time that is rounded when it is stored can be newer than itself.
    """
    guarded = GuardedRow(target, row, key)
    name, value = version
    column = guarded.column(name)
    if value is None:
        raise SetupError(f"version: the new value of {name!r} may not be None")
    changes = {**guarded.changed(values, column), column: value}
    change = guarded.change(or_(column.is_(None), column < comparable(column, value)), changes)
    if not change.applied and change.seen is None:
        return Outcome.MISSING
    guarded.refresh()
    return Outcome.APPLIED if change.applied else Outcome.STALE


def compare_and_set(
    target: Target,
    row: Table | type[Any],
    key: Mapping[str, Any],
    *,
    expected: Mapping[str, Any],
    values: Mapping[str, Any],
) -> Literal[Outcome.APPLIED, Outcome.REFUSED, Outcome.MISSING]:
    """Write `values` if the columns in `expected` have these values (None: are null), all of them."""
    guarded = GuardedRow(target, row, key)
    changes = guarded.changed(values)
    if not expected or not changes:
        raise SetupError("compare_and_set needs at least one column in expected, and one in values")
    condition = and_(*(equals(column, value) for column, value in guarded.values(expected).items()))
    change = guarded.change(condition, changes)
    if not change.applied and change.seen is None:
        return Outcome.MISSING
    guarded.refresh()
    return Outcome.APPLIED if change.applied else Outcome.REFUSED


def transition(
    target: Target,
    row: Table | type[Any],
    key: Mapping[str, Any],
    column: str,
    *,
    to: Any,
    allowed_from: Sequence[Any],
    values: Mapping[str, Any] | None = None,
) -> Transition:
    """Move the state in `column` to `to` if it is one of `allowed_from`, and write `values` with it.

    A row that is in `to` already is ALREADY_SO, one in any other state is REFUSED: both change nothing.
    """
    guarded = GuardedRow(target, row, key)
    state = guarded.column(column)
    if isinstance(allowed_from, str) or not allowed_from or to in allowed_from:
        raise SetupError("allowed_from must be a list of states, not empty and without the one in `to`")
    changes = {**guarded.changed(values or {}, state), state: to}
    allowed = or_(*(equals(state, each) for each in allowed_from))
    already = case((equals(state, to), 1), else_=0)
    change = guarded.change(allowed, changes, state, already)
    if not change.applied and change.seen is None:
        return Transition(Outcome.MISSING, None)
    guarded.refresh()
    if change.seen is None:
        return Transition(Outcome.APPLIED, to)
    current, same = change.seen
    return Transition(Outcome.ALREADY_SO if same else Outcome.REFUSED, current)


def decrement(
    target: Target,
    row: Table | type[Any],
    key: Mapping[str, Any],
    column: str,
    *,
    by: int | float | Decimal,
    floor: int | float | Decimal = 0,
) -> Decrement:
    """Take `by` from the number in `column`, unless less than `floor` would be left (NOT_ENOUGH).

    Called twice it takes twice: call it in the transaction of a claim (a handler's, or `once`). A null is
    NOT_ENOUGH.
    """
    guarded = GuardedRow(target, row, key)
    number = guarded.column(column)
    if isinstance(by, bool) or not math.isfinite(by) or by <= 0:
        raise SetupError(f"decrement: by={by!r} must be more than 0")
    if isinstance(number.type, Integer) and not (isinstance(by, int) and isinstance(floor, int)):
        raise SetupError(f"decrement: {column!r} holds whole numbers, so by and floor must be int")
    # Not `number - by >= floor`: an unsigned number below zero is an error.
    amount: Any = by
    least = amount + floor  # a Decimal and a float raise TypeError
    change = guarded.change(number >= least, {number: number - by}, number, returning=True)
    if not change.applied and change.seen is None:
        return Decrement(Outcome.MISSING, None)
    guarded.refresh()
    rest = change.seen[0] if change.seen is not None else None
    return Decrement(Outcome.APPLIED if change.applied else Outcome.NOT_ENOUGH, rest)


@overload
def locked(
    target: Session | scoped_session[Any], row: type[_T], key: Mapping[str, Any], *, wait: float = WAIT
) -> _T | None: ...
@overload
def locked(target: Target, row: Table, key: Mapping[str, Any], *, wait: float = WAIT) -> Row[Any] | None: ...
@overload
def locked(
    target: Connection, row: type[Any], key: Mapping[str, Any], *, wait: float = WAIT
) -> Row[Any] | None: ...
def locked(target: Target, row: Table | type[Any], key: Mapping[str, Any], *, wait: float = WAIT) -> Any:
    """The row, as it is now, under `SELECT ... FOR UPDATE`; None when there is none, and nothing is locked.

    Given a Session and a mapped class: the object, with its columns read again. The lock lives until the
    caller's transaction ends; what is done under it must still be checked (by the row's state, say), because
    a lock alone makes nothing idempotent. `wait` is in seconds (whole ones on MySQL and MariaDB, at least
    one). Raises `LockTimeout` when somebody else held the lock for longer: the transaction is as it was
    before and can be used on.

    SQLite locks no rows: the transaction takes the file's write lock, by BEGIN IMMEDIATE when it has not
    begun. Where it has, and another writer has written since its first read, `LockTimeout` comes at once and
    only a new transaction helps.
    """
    guarded = GuardedRow(target, row, key)
    query = select(guarded.table).where(guarded.where).with_for_update()
    found = within(guarded.connection, guarded.table, wait, lambda: guarded.connection.execute(query).first())
    if found is None or guarded.session is None or isinstance(row, Table):
        return found
    identity = tuple(found._mapping[each] for each in guarded.table.primary_key.columns)
    # A plain read might not see a row that is newer than the transaction's snapshot.
    instance = guarded.session.get(row, identity, with_for_update={"of": row})
    guarded.refresh()
    return instance


@dataclass(slots=True)
class AlreadyDone:
    """What `already_done` tells."""

    #: The block's row was there already: nothing of the block's work is left. Set when the block ends.
    done_before: bool = False


@contextmanager
def already_done(target: Target, *constraints: str) -> Iterator[AlreadyDone]:
    """A block whose violation of one of these unique constraints means: this was done before.

        with guards.already_done(session, "orders_number") as attempt:
            session.add(Order(number=message.number))
        if attempt.done_before: ...

    The violation is swallowed and the block's own work undone, by a savepoint: the transaction around it can
    be used on. Any other error undoes the block's work too, and goes on. A constraint or unique index is
    named as in the database (a primary key is PRIMARY on MySQL and MariaDB); on SQLite, where many have no
    name, `"orders.number"` names its columns (`"orders.shop, orders.number"`). Constraints that are checked
    by COMMIT are out of reach. In async code the whole block goes into the function given to run_sync.
    """
    if not constraints:
        raise SetupError("already_done: name at least one unique constraint")
    session = session_of(target)
    connection = session.connection() if session is not None else connection_of(target)
    begin(connection)
    savepoint = (session or connection).begin_nested()  # flushes what came before the block
    attempt = AlreadyDone()
    try:
        yield attempt
        savepoint.commit()  # flushes what is pending
    except IntegrityError as error:
        if not undo(savepoint) or violated(connection, error).isdisjoint(constraints):
            raise
        attempt.done_before = True
    except BaseException:
        undo(savepoint)
        raise
