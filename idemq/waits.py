"""A bound on how long statements wait for the locks of other transactions; what was set before comes back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

from idemq.drivers import is_lock_timeout, kind_of
from idemq.errors import LockTimeout, SetupError

_POSTGRESQL = """
WITH old AS MATERIALIZED (SELECT current_setting('lock_timeout') AS wait)
SELECT wait, set_config('lock_timeout', :wait, true) FROM old
"""


def check_wait(wait: object) -> None:
    """Raise `SetupError` when `wait` is no number of seconds up to an hour."""
    if isinstance(wait, bool) or not (isinstance(wait, int | float) and 0 <= wait <= 3600):
        raise SetupError(f"wait={wait!r} must be from 0 to 3600 seconds")


@contextmanager
def bounded(connection: Connection, wait: float, busy: str) -> Iterator[None]:
    """In the block a lock is waited for `wait` seconds at most, then `LockTimeout(busy)` is raised.

    MySQL and MariaDB wait for whole seconds, at least one; SQLite for the connection's busy timeout, because
    it has one lock, which the first write of a transaction takes. After `LockTimeout` roll back: the
    transaction, or a savepoint that was begun before.
    """
    restore = _bound(connection, wait)
    try:
        yield
    except DBAPIError as error:
        if kind_of(connection.dialect) in ("mysql", "mariadb") and not connection.invalidated:
            restore()  # it is the session's setting there, and outlives the transaction
        if is_lock_timeout(error):
            raise LockTimeout(busy) from error
        raise
    restore()


def _bound(connection: Connection, wait: float) -> Callable[[], object]:
    kind = kind_of(connection.dialect)
    if kind == "postgresql":
        # Local to the transaction: an error restores it, when transaction or savepoint is rolled back.
        milliseconds = max(1, round(wait * 1000))  # 0 would be no bound
        before = connection.scalar(text(_POSTGRESQL), {"wait": f"{milliseconds}ms"})
        restore = text("SELECT set_config('lock_timeout', :wait, true)")
        return lambda: connection.execute(restore, {"wait": before})
    if kind in ("mysql", "mariadb"):
        setting = text("SET SESSION innodb_lock_wait_timeout = :wait")
        before = connection.scalar(text("SELECT @@innodb_lock_wait_timeout"))
        connection.execute(setting, {"wait": max(1, math.ceil(wait))})
        return lambda: connection.execute(setting, {"wait": before})
    return lambda: None
