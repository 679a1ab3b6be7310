"""The one row that a guard works on: its table, its key, and the transaction that it is worked on in.

Guaranteed: the key names at most one row, and what a refusal is told from was read under the row's lock, so
that it stays true until the caller's transaction ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import sqlalchemy
from sqlalchemy import (
    ClauseElement,
    Column,
    ColumnElement,
    Connection,
    Enum,
    Index,
    Integer,
    LargeBinary,
    Numeric,
    String,
    Table,
    UniqueConstraint,
    and_,
    case,
    select,
    update,
)
from sqlalchemy.orm import Mapper, Session, scoped_session
from sqlalchemy.types import TypeEngine

from idemq.errors import SetupError
from idemq.savepoints import begin

#: Whose transaction a guard works in.
Target = Connection | Session | scoped_session[Any]
#: A condition of SQL.
Condition = ColumnElement[bool]

#: Types of columns, and what they may be compared with.
_FITTING: tuple[tuple[type[TypeEngine[Any]], tuple[type, ...]], ...] = (
    (String, (str,)),
    (Integer, (int,)),
    (Numeric, (Decimal, int, float)),
    (LargeBinary, (bytes,)),
)


@dataclass(frozen=True, slots=True)
class Change:
    """What became of a conditional UPDATE."""

    applied: bool
    #: What was to be shown of the row as it stands; of a changed one only when the database returns it. None
    #: when nothing was applied: there is no such row.
    seen: tuple[Any, ...] | None


class GuardedRow:
    """One row of a Table or mapped class, in the transaction of a Connection or Session."""

    def __init__(self, target: Target, entity: Table | type[Any], key: Mapping[str, Any]) -> None:
        """Sends a Session's pending changes to the database, so that the guard sees them.

        Raises `SetupError` unless `key` is the whole primary key or a whole unique constraint.
        """
        self.table, self._columns, mapper = _described(entity)
        self.key = self.values(key)
        if frozenset(self.key) not in unique_sets(self.table):
            raise SetupError(
                f"{', '.join(key) or 'an empty key'} may name several rows of {self.table.name}: give all "
                "columns of its primary key or of a unique constraint (it must be declared on the Table)"
            )
        if absent := [name for name, value in key.items() if value is None]:
            raise SetupError(f"the key of a row may not be None: {', '.join(absent)}")
        self.where: Condition = and_(*(equals(column, value) for column, value in self.key.items()))
        self.session = session_of(target)
        if self.session is not None:
            self.session.flush()
            whose = {"mapper": mapper} if mapper is not None else {"clause": self.table}
            self.connection = self.session.connection(bind_arguments=whose)
        else:
            self.connection = connection_of(target)

    def column(self, name: str) -> Column[Any]:
        """A column by its name in the Table, or by the attribute's name in the mapped class."""
        if name not in self._columns:
            known = ", ".join(sorted(self._columns))
            raise SetupError(f"{self.table.name} has no column {name!r}; it has {known}")
        return self._columns[name]

    def values(self, named: Mapping[str, Any]) -> dict[Column[Any], Any]:
        return {self.column(name): value for name, value in named.items()}

    def changed(self, named: Mapping[str, Any], *taken: Column[Any]) -> dict[Column[Any], Any]:
        """Values to be written. Raises `SetupError` for columns of the key, and for those in `taken`."""
        values = self.values(named)
        for column in values:
            if column in self.key or column in taken:
                raise SetupError(f"{column.key!r} is given twice: take it out of values")
        return values

    def change(
        self,
        condition: Condition,
        values: Mapping[Column[Any], Any],
        *shows: ColumnElement[Any],
        returning: bool = False,
    ) -> Change:
        """Write `values` where `condition` holds: one UPDATE, and a second look when it touched nothing.

        The look takes the row's lock and decides: the condition may have become true meanwhile, and a driver
        without CLIENT.FOUND_ROWS does not count a row that had the values already. `returning`: show also
        what is there after the change.
        """
        begin(self.connection)
        returned = shows if returning and self.connection.dialect.update_returning else ()
        change = self._update(condition, values, returned)
        if change.applied:
            return change
        holds = case((condition, 1), else_=0)
        # As much of a lock as an UPDATE takes: rows that refer to this one can still be inserted.
        look = select(holds, *shows).where(self.where).with_for_update(key_share=True)
        found = self.connection.execute(look).first()
        if found is None or not found[0]:
            return Change(False, tuple(found[1:]) if found is not None else None)
        change = self._update(condition, values, returned)
        if not change.applied and self.connection.dialect.name not in ("mysql", "mariadb"):
            raise SetupError(f"a trigger or a row policy keeps the guard from the row of {self.table.name}")
        return Change(True, change.seen)

    def _update(
        self,
        condition: Condition,
        values: Mapping[Column[Any], Any],
        returned: Sequence[ColumnElement[Any]],
    ) -> Change:
        statement = update(self.table).where(self.where, condition).values(dict(values))
        if returned:
            seen = self.connection.execute(statement.returning(*returned)).first()
            return Change(seen is not None, tuple(seen) if seen is not None else None)
        return Change(self.connection.execute(statement).rowcount > 0, None)  # the count of an UPDATE

    def refresh(self) -> None:
        """Have the Session's object of this row, if it holds one, show what the database has.

        Read at once, because an expired attribute cannot be loaded in async code, and under the row's lock,
        because a plain read may answer from an older snapshot.
        """
        if self.session is None:
            return
        held = {
            state.mapper.base_mapper
            for state in self.session.identity_map.all_states()
            if self.table in state.mapper.tables
        }
        if not held:
            return
        found = self.connection.execute(select(*self.table.primary_key.columns).where(self.where)).first()
        for mapper in held if found is not None else ():
            instance = self.session.identity_map.get(mapper.identity_key_from_primary_key(tuple(found or ())))
            if instance is None:
                continue
            state = sqlalchemy.inspect(instance)
            shown = [
                each.key for each in state.mapper.column_attrs if each.key in state.dict or not each.deferred
            ]
            self.session.refresh(instance, shown, with_for_update={"key_share": True})


def equals(column: Column[Any], value: Any) -> Condition:
    """The column has this value, or is null when it is None."""
    return column.is_(None) if value is None else column == comparable(column, value)


def comparable(column: Column[Any], value: Any) -> Any:
    """`value`. Raises `SetupError` for one of another type than the column's: some databases would convert.

    On MySQL and MariaDB the number 0 equals every text that does not begin with a digit.
    """
    for kind, fitting in _FITTING:
        if isinstance(column.type, kind) and not isinstance(column.type, Enum):
            if not isinstance(value, (*fitting, ClauseElement)) and not hasattr(value, "__clause_element__"):
                raise SetupError(f"{column.key!r} must be compared with {fitting[0].__name__}, not {value!r}")
            break
    return value


def session_of(target: Target) -> Session | None:
    if isinstance(target, scoped_session):
        found: Session = target()
        return found
    return target if isinstance(target, Session) else None


def connection_of(target: Target) -> Connection:
    if isinstance(target, Connection):
        return target
    raise SetupError(
        f"a guard works in the transaction of a Session or Connection, not of {target!r}; from async code "
        "call it through run_sync"
    )


def unique_sets(table: Table) -> set[frozenset[Column[Any]]]:
    """The sets of columns that tell rows of the table apart."""
    return {frozenset(columns) for columns in _unique_columns(table) if columns}


def _unique_columns(table: Table) -> Iterator[list[Column[Any]]]:
    yield list(table.primary_key.columns)
    for constraint in table.constraints:
        if isinstance(constraint, UniqueConstraint):
            yield list(constraint.columns)
    for index in table.indexes:
        if (
            index.unique
            and not _partial(index)
            and all(isinstance(each, Column) for each in index.expressions)
        ):
            yield list(index.columns)


def _partial(index: Index) -> bool:
    return any(
        name.endswith("_where") and index.dialect_kwargs[name] is not None for name in index.dialect_kwargs
    )


def _described(entity: Table | type[Any]) -> tuple[Table, dict[str, Column[Any]], Mapper[Any] | None]:
    if isinstance(entity, Table):
        return entity, dict(entity.c.items()), None
    mapper: Any = sqlalchemy.inspect(entity, raiseerr=False)
    if not isinstance(mapper, Mapper):
        raise SetupError(f"{entity!r} is neither a Table nor a mapped class")
    table = mapper.persist_selectable
    if not isinstance(table, Table):
        raise SetupError(
            f"{entity.__name__} is kept in several tables: give the Table that the guard works on"
        )
    columns = {each.key: each.columns[0] for each in mapper.column_attrs}
    return table, {name: column for name, column in columns.items() if isinstance(column, Column)}, mapper
