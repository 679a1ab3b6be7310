"""The SQLite file of the embedded broker: opened only when it is one, and never across a fork.

SQLite keeps the locks of a file in the memory of its process. A forked child would inherit that memory but
not the locks, and could damage the file; so a file that was open
at the fork is refused to it.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from weakref import WeakSet

from idemq.errors import BrokerUnavailable, SetupError
from idemq.lockfile import exclusively

#: `PRAGMA application_id` of such a file: "idmq".
STAMP = 0x69646D71
#: `PRAGMA user_version`: the shape of the tables below.
SHAPE = 1
#: How long a writer waits for the other ones, in seconds.
BUSY = 30.0

_TABLES = (
    "CREATE TABLE queues (id INTEGER PRIMARY KEY, name BLOB NOT NULL UNIQUE)",
    # A consumer that may hold deliveries, alive while its lock file is locked.
    "CREATE TABLE owners (id INTEGER PRIMARY KEY AUTOINCREMENT, token BLOB NOT NULL UNIQUE,"
    " queue INTEGER NOT NULL)",
    # AUTOINCREMENT: a number is never given twice, so that a late acknowledgement meets no other message.
    "CREATE TABLE messages (seq INTEGER PRIMARY KEY AUTOINCREMENT, queue INTEGER NOT NULL,"
    " owner INTEGER, redelivered INTEGER NOT NULL DEFAULT 0, id BLOB, headers BLOB, content_type BLOB,"
    " content_encoding BLOB, sent_at INTEGER NOT NULL, body BLOB NOT NULL)",
    "CREATE INDEX messages_ready ON messages (queue, seq) WHERE owner IS NULL",
    "CREATE INDEX messages_held ON messages (owner) WHERE owner IS NOT NULL",
    f"PRAGMA application_id = {STAMP}",
    f"PRAGMA user_version = {SHAPE}",
)
_NAMES = {"queues", "owners", "messages"}

#: The open connections of this process, and the files that were open when it was forked.
_open: WeakSet[Connection] = WeakSet()
_forked: set[Path] = set()


def _after_fork_in_child() -> None:
    _forked.update(connection.path for connection in _open)


os.register_at_fork(after_in_child=_after_fork_in_child)


class Connection(sqlite3.Connection):
    """A connection that knows its file; made by `connect`. One thread at a time may use it."""

    path: Path
    _inode: tuple[int, int] | None = None

    def attach(self, path: Path) -> None:
        self.path, self._inode = path, _inode(path)
        _open.add(self)

    def is_current(self) -> bool:
        """Whether the file is still the one at its path: a removed one would swallow what is written."""
        refuse_fork(self.path)
        return self._inode == _inode(self.path)

    def close(self) -> None:
        _open.discard(self)
        super().close()


def connect(path: Path, *, create: bool = False, durable: bool = True) -> Connection:
    """Open the broker's file; `create` makes it when there is none.

    A commit is on the disk when it returns if `durable`, else at the latest with the next durable one. Raises
    `SetupError` for a file that is missing or is not a broker's, which is then left as it was.
    """
    refuse_fork(path)
    if path.is_dir():
        raise SetupError(f"{path} is a directory; the embedded broker needs the path of a file")
    if not create and not path.exists():
        raise SetupError(f"there is no embedded broker at {path}; declare a queue with declare=True first")
    if create and not path.parent.is_dir():
        raise SetupError(f"the directory {path.parent} for the embedded broker does not exist")
    with errors(path):
        connection = sqlite3.connect(
            f"{path.as_uri()}?mode={'rwc' if create else 'rw'}",
            uri=True, timeout=BUSY, isolation_level=None, check_same_thread=False, factory=Connection,
        )  # fmt: skip
        try:
            connection.attach(path)
            if not _is_ours(connection):
                if not create:
                    raise SetupError(f"{path} is empty; declare a queue with declare=True first")
                _make(connection)
            owners(path).mkdir(exist_ok=True)
            connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            connection.text_factory = bytes  # a damaged text must not fail a whole fetch
        except BaseException:
            connection.close()
            raise
    return connection


def owners(path: Path) -> Path:
    """The directory of the lock files, one for each consumer."""
    return path.with_name(path.name + "-owners")


def is_forked(path: Path) -> bool:
    """Whether this process was forked from one that had the file open."""
    return path in _forked


def refuse_fork(path: Path) -> None:
    if is_forked(path):
        raise SetupError(
            f"this process was forked while {path} was open, so it cannot use it: spawn processes instead"
            " (multiprocessing.get_context('spawn')), or close the broker before the fork"
        )


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """BEGIN IMMEDIATE to COMMIT: waits for the other writers at once, never half way."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


@contextmanager
def errors(path: Path) -> Iterator[None]:
    """Turn SQLite's errors into `SetupError` where somebody must act, else into `BrokerUnavailable`."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        name = getattr(error, "sqlite_errorname", None)
        if name is None:
            raise  # not the file's fault
        if name.startswith(("SQLITE_NOTADB", "SQLITE_CORRUPT")):
            raise SetupError(
                f"{path} is not the file of an embedded broker, or is damaged: {error}"
            ) from error
        if name.startswith(("SQLITE_READONLY", "SQLITE_PERM")) or not os.access(path, os.R_OK | os.W_OK):
            raise SetupError(f"no access to the embedded broker at {path}: {error}") from error
        raise BrokerUnavailable(f"the embedded broker at {path}: {error}") from error
    except OSError as error:
        if isinstance(error, PermissionError):
            raise SetupError(f"no access to the embedded broker at {path}: {error.strerror}") from error
        raise BrokerUnavailable(f"the embedded broker at {path}: {error.strerror}") from error


def _is_ours(connection: Connection) -> bool:
    """True for a broker's file, False for an empty one; anything else is refused."""
    connection.execute("BEGIN")  # one moment for all three: another process may be making the file
    try:
        found = {
            name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        }
        (stamp,) = connection.execute("PRAGMA application_id").fetchone()
        (shape,) = connection.execute("PRAGMA user_version").fetchone()
    finally:
        connection.execute("ROLLBACK")
    if stamp == STAMP and shape != SHAPE:
        raise SetupError(
            f"{connection.path} was made by another version of idemq (shape {shape}, not {SHAPE})"
        )
    foreign = sorted(name for name in found - _NAMES if not name.startswith("sqlite_"))
    if foreign or (found and stamp != STAMP) or stamp not in (0, STAMP):
        raise SetupError(
            f"{connection.path} is another SQLite database"
            + (f" (it has the table {foreign[0]!r})" if foreign else "")
            + "; the embedded broker needs a file of its own, never the application's"
        )
    return bool(stamp == STAMP)


def _make(connection: Connection) -> None:
    owners(connection.path).mkdir(exist_ok=True)
    with exclusively(owners(connection.path) / "setup"):
        if not _is_ours(connection):  # made by another process since we looked
            connection.execute("PRAGMA journal_mode = WAL")
            with transaction(connection):
                for statement in _TABLES:
                    connection.execute(statement)


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino
