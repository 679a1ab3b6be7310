"""The sins: each does to the handler's transaction what it should not, or what looks like it and is allowed.

They are written for a sync Session and Connection; async handlers reach them through `run_sync`.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import URL, Connection, Engine, NullPool, Update, create_engine, text, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from idemq import schema


class Base(DeclarativeBase):
    """Tables of the handlers."""


class Effect(Base):
    """A part of a message's work. Nothing is unique, so that a double is seen."""

    __tablename__ = "effects"
    pk: Mapped[int] = mapped_column(primary_key=True)
    tag: Mapped[bytes]
    part: Mapped[bytes]


class Taken(Base):
    """Holds row 1: inserting it again is an error."""

    __tablename__ = "taken"
    pk: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)


class Lockable(Base):
    """Rows to lock."""

    __tablename__ = "lockable"
    tag: Mapped[bytes] = mapped_column(schema.Key(), primary_key=True)
    n: Mapped[int]


@dataclass(frozen=True, slots=True)
class Scene:
    """What a sin has in its hands."""

    session: Session
    connection: Connection
    tag: bytes
    #: `postgresql`, `mariadb` or `sqlite`.
    kind: str
    #: A sync URL of the same database.
    url: URL

    def write(self, part: str) -> None:
        self.session.add(Effect(tag=self.tag, part=part.encode()))
        self.session.flush()

    def sql(self, statement: str) -> None:
        self.session.execute(text(statement))

    @property
    def driver(self) -> Any:
        return self.connection.connection.dbapi_connection

    def driver_sql(self, statement: str) -> None:
        """Past SQLAlchemy, where no filter looks."""
        dialect = self.connection.dialect
        if dialect.is_async and dialect.driver != "asyncmy":
            self.driver.run_async(lambda raw: raw.execute(statement))
            return
        cursor = self.driver.cursor()
        cursor.execute(statement)
        cursor.close()


@dataclass(frozen=True, slots=True)
class Sin:
    name: str
    commit: Callable[[Scene], None]
    #: Not a sin at all: acknowledged at the first attempt.
    allowed: frozenset[str]
    kinds: frozenset[str]


SINS: dict[str, Sin] = {}
KINDS = ("postgresql", "mariadb", "sqlite")


def sin(
    *, allowed: tuple[str, ...] = (), kinds: tuple[str, ...] = KINDS
) -> Callable[[Callable[[Scene], None]], Callable[[Scene], None]]:
    def declare(function: Callable[[Scene], None]) -> Callable[[Scene], None]:
        SINS[function.__name__] = Sin(
            function.__name__, function, frozenset(allowed) & frozenset(kinds), frozenset(kinds)
        )
        return function

    return declare


@sin(allowed=KINDS)
def nothing(scene: Scene) -> None: ...


# Errors that are swallowed. Only PostgreSQL aborts the transaction for one.
@sin(allowed=("mariadb", "sqlite"))
def error_swallowed_in_core(scene: Scene) -> None:
    try:
        scene.sql("INSERT INTO taken VALUES (1)")
    except DBAPIError:
        pass


@sin()
def error_swallowed_in_a_flush(scene: Scene) -> None:
    scene.session.add(Taken(pk=1))
    try:
        scene.session.flush()
    except DBAPIError:
        pass


@sin()
def error_swallowed_and_the_session_rolled_back(scene: Scene) -> None:
    error_swallowed_in_a_flush(scene)
    scene.session.rollback()


@sin(allowed=("mariadb", "sqlite"))
def error_swallowed_inside_a_savepoint(scene: Scene) -> None:
    with scene.connection.begin_nested():
        error_swallowed_in_core(scene)


@sin(kinds=("postgresql", "mariadb"))
def deadlock_swallowed(scene: Scene) -> None:
    try:
        deadlock(scene)
    except DBAPIError:
        pass


@sin(kinds=("mariadb",))
def changed_row_swallowed(scene: Scene) -> None:
    try:
        changed_row(scene)
    except DBAPIError:
        pass


@sin(kinds=("sqlite",))
def insert_or_rollback_swallowed(scene: Scene) -> None:
    try:
        scene.sql("INSERT OR ROLLBACK INTO taken VALUES (1)")
    except DBAPIError:
        pass


# SQLAlchemy's own methods.
@sin(allowed=KINDS)
def session_commit(scene: Scene) -> None:
    scene.session.commit()


@sin(allowed=KINDS)
def session_begin_as_context(scene: Scene) -> None:
    scene.session.commit()
    with scene.session.begin():
        scene.sql("SELECT 1")


@sin()
def session_rollback(scene: Scene) -> None:
    scene.session.rollback()


@sin()
def connection_commit(scene: Scene) -> None:
    scene.connection.commit()


@sin()
def connection_rollback(scene: Scene) -> None:
    scene.connection.rollback()


@sin()
def connection_close(scene: Scene) -> None:
    scene.connection.close()


@sin()
def connection_invalidate(scene: Scene) -> None:
    scene.connection.invalidate()


@sin()
def transaction_commit(scene: Scene) -> None:
    transaction = scene.connection.get_transaction()
    assert transaction is not None
    transaction.commit()


@sin()
def transaction_rollback(scene: Scene) -> None:
    transaction = scene.connection.get_transaction()
    assert transaction is not None
    transaction.rollback()


@sin(allowed=KINDS)  # SQLAlchemy refuses it inside a transaction
def autocommit_option(scene: Scene) -> None:
    scene.connection.execution_options(isolation_level="AUTOCOMMIT")


# Texts.
@sin()
def text_commit(scene: Scene) -> None:
    scene.sql("COMMIT")


@sin()
def text_rollback(scene: Scene) -> None:
    scene.sql("ROLLBACK")


@sin()
def text_begin(scene: Scene) -> None:
    scene.sql("BEGIN")


@sin()
def text_commit_and_begin(scene: Scene) -> None:
    for statement in ("commit", "begin"):
        try:
            scene.sql(statement)
        except Exception:  # the worst handler: goes on whatever it is told
            pass


@sin()
def text_rollback_and_begin(scene: Scene) -> None:
    for statement in ("rollback", "begin"):
        try:
            scene.sql(statement)
        except Exception:  # as above
            pass


@sin()
def text_commit_after_comments(scene: Scene) -> None:
    scene.sql("/* a; b */ -- it's\n commit /* ; */ ;")


@sin()
def text_insert_then_commit(scene: Scene) -> None:
    scene.connection.exec_driver_sql(
        "INSERT INTO lockable VALUES ('00000000-0000-0000-0000-000000000000', 1); COMMIT"
    )


@sin(kinds=("postgresql", "mariadb"))
def procedure_that_commits(scene: Scene) -> None:
    scene.sql("CALL committing()")


@sin(kinds=("postgresql",))
def do_block_that_commits(scene: Scene) -> None:
    scene.sql("DO $$ BEGIN COMMIT; END $$")


@sin(kinds=("mariadb",))
def execute_immediate_commit(scene: Scene) -> None:
    scene.sql("EXECUTE IMMEDIATE 'COMMIT'")


@sin(kinds=("mariadb",))
def set_autocommit(scene: Scene) -> None:
    scene.sql("SET NAMES utf8mb4, @@session.autocommit = 1")


@sin(allowed=("postgresql", "sqlite"))
def create_table(scene: Scene) -> None:
    scene.sql(f"CREATE TABLE d{uuid.uuid4().hex} (n int)")


@sin(allowed=("postgresql",), kinds=("postgresql", "mariadb"))
def truncate(scene: Scene) -> None:
    scene.sql("TRUNCATE TABLE emptied")


# The driver itself.
@sin()
def driver_commit(scene: Scene) -> None:
    scene.driver.commit()


@sin()
def driver_rollback(scene: Scene) -> None:
    scene.driver.rollback()


@sin()
def driver_text_commit(scene: Scene) -> None:
    scene.driver_sql("COMMIT")


@sin()
def driver_text_rollback(scene: Scene) -> None:
    scene.driver_sql("ROLLBACK")


@sin(kinds=("mariadb", "sqlite"))
def driver_autocommit(scene: Scene) -> None:
    if scene.kind == "sqlite":
        scene.driver.isolation_level = None
    else:
        scene.driver.autocommit(True)


@sin()
def driver_close(scene: Scene) -> None:
    scene.driver.close()


# What is not in the transaction at all.
@sin(kinds=("postgresql", "mariadb"))
def another_engine(scene: Scene) -> None:
    engine = create_engine(scene.url, poolclass=NullPool)
    with Session(engine) as session, session.begin():
        session.add(Effect(tag=scene.tag, part=b"elsewhere"))


@sin()
def claim_deleted(scene: Scene) -> None:
    processed = schema.table("idemq_processed")
    scene.session.execute(processed.delete().where(processed.c.id == scene.tag))


# Allowed.
@sin(allowed=KINDS)
def savepoint_kept(scene: Scene) -> None:
    with scene.session.begin_nested():
        scene.sql("SELECT 1")


@sin(allowed=KINDS)
def savepoint_rolled_back(scene: Scene) -> None:
    nested = scene.session.begin_nested()
    scene.session.add(Effect(tag=scene.tag, part=b"undone"))
    scene.session.flush()
    nested.rollback()


@sin(allowed=KINDS)
def savepoint_of_the_connection_rolled_back(scene: Scene) -> None:
    nested = scene.connection.begin_nested()
    scene.write("undone")
    nested.rollback()


@sin(allowed=KINDS)
def error_recovered_by_a_savepoint(scene: Scene) -> None:
    try:
        with scene.session.begin_nested():
            scene.session.add(Taken(pk=1))
    except DBAPIError:
        pass


@sin(allowed=KINDS)
def savepoint_in_text(scene: Scene) -> None:
    scene.sql("SAVEPOINT mine")
    scene.write("undone")
    scene.sql("ROLLBACK TO SAVEPOINT mine")
    scene.sql("SAVEPOINT other")
    scene.sql("RELEASE SAVEPOINT other")


@sin(allowed=KINDS)
def error_recovered_by_a_savepoint_in_text(scene: Scene) -> None:
    scene.sql("SAVEPOINT mine")
    error_swallowed_in_core(scene)
    scene.sql("ROLLBACK TO mine")


@sin(allowed=("mariadb",), kinds=("mariadb",))
def temporary_table(scene: Scene) -> None:
    scene.sql("CREATE TEMPORARY TABLE t (n int)")
    scene.sql("INSERT INTO t VALUES (1)")
    scene.sql("DROP TEMPORARY TABLE t")


@sin(allowed=KINDS)
def words_that_look_like_an_ending(scene: Scene) -> None:
    scene.sql("SELECT '; commit', 1 AS rollback_note /* ; commit */ -- ; rollback\n")


def changed_row(scene: Scene) -> None:
    """MariaDB's error 1020, which undoes the whole transaction and is easily taken for one of a statement."""
    tag = uuid.uuid4().bytes
    engine = create_engine(scene.url, poolclass=NullPool)
    with Session(engine) as session, session.begin():
        session.add(Lockable(tag=tag, n=0))
    scene.sql("SET SESSION innodb_snapshot_isolation = ON")
    scene.sql("SELECT count(*) FROM lockable")
    with engine.begin() as connection:
        connection.execute(_touch(tag))
    scene.session.execute(_touch(tag))


def deadlock(scene: Scene) -> None:
    """A real one, in which the handler's transaction is the victim."""
    mine, theirs = uuid.uuid4().bytes, uuid.uuid4().bytes
    engine = create_engine(scene.url, poolclass=NullPool)
    with Session(engine) as session, session.begin():
        # InnoDB rolls back whoever changed less: so the other transaction changes more.
        extra = [Lockable(tag=uuid.uuid4().bytes, n=0) for _ in range(10)]
        tags = [each.tag for each in extra]
        session.add_all([Lockable(tag=mine, n=0), Lockable(tag=theirs, n=0), *extra])
    scene.session.execute(_touch(mine))
    other = _OtherSide(engine, scene.kind, mine, [*tags, theirs])
    other.start()
    try:
        assert other.locked.wait(90)
        if scene.kind == "postgresql":
            # The victim is who looks for a circle while it is closed: we, as soon as the other side waits.
            scene.sql("SET LOCAL deadlock_timeout = '10ms'")
            waits = text("SELECT count(*) FROM pg_locks WHERE pid = :pid AND NOT granted")
            while not scene.session.execute(waits, {"pid": other.pid}).scalar():
                pass
        scene.session.execute(_touch(theirs))
    finally:
        other.join(30)


class _OtherSide(threading.Thread):
    """Locks `tags`, then waits for `mine`, until the handler's transaction is undone."""

    def __init__(self, engine: Engine, kind: str, mine: bytes, tags: list[bytes]) -> None:
        super().__init__(daemon=True)
        self._engine, self._kind, self._mine, self._tags = engine, kind, mine, tags
        self.locked = threading.Event()
        self.pid = 0

    def run(self) -> None:
        with self._engine.connect() as connection:
            if self._kind == "postgresql":
                connection.exec_driver_sql("SET deadlock_timeout = '60s'")
                self.pid = connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
            for tag in self._tags:  # by its key, each: a scan would lock the whole table
                connection.execute(_touch(tag))
            self.locked.set()
            connection.execute(_touch(self._mine))
            connection.rollback()


def _touch(tag: bytes) -> Update:
    return update(Lockable).where(Lockable.tag == tag).values(n=Lockable.n + 1)
