"""The tables of idemq, as SQLAlchemy metadata.

`metadata` is for users who run their own Alembic migrations. Everything that identifies something is stored
and compared as bytes: text keys would be equal under MySQL's collations where they are not.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any
from uuid import UUID

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Dialect,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    SmallInteger,
    String,
    Table,
    Text,
    UniqueConstraint,
    Uuid,
)
from sqlalchemy.dialects import mysql, postgresql
from sqlalchemy.types import TypeDecorator, TypeEngine

from idemq.errors import SetupError


class Key(TypeDecorator[bytes]):
    """16 bytes: `uuid` on PostgreSQL, BINARY(16) on MySQL and MariaDB, BLOB on SQLite; `bytes` in Python."""

    impl = LargeBinary(16)
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        if dialect.name == "postgresql":
            return dialect.type_descriptor(Uuid())
        if dialect.name in ("mysql", "mariadb"):
            return dialect.type_descriptor(mysql.BINARY(16))
        return dialect.type_descriptor(LargeBinary(16))

    def process_bind_param(self, value: bytes | None, dialect: Dialect) -> Any:
        return UUID(bytes=value) if value is not None and dialect.name == "postgresql" else value

    def process_result_value(self, value: Any, dialect: Dialect) -> bytes | None:
        return value.bytes if isinstance(value, UUID) else value


def span(prefix: str) -> tuple[bytes, bytes] | None:
    """The first and the last key that begin with these hexadecimal digits; None where that is no key."""
    digits = prefix.replace("-", "").lower()
    if not digits or len(digits) > 32 or not set(digits) <= set("0123456789abcdef"):
        return None
    return bytes.fromhex(digits.ljust(32, "0")), bytes.fromhex(digits.ljust(32, "f"))


class Time(TypeDecorator[datetime]):
    """A moment in UTC with microseconds; aware in Python, naive UTC in databases without time zones."""

    impl = DateTime
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        if dialect.name in ("mysql", "mariadb"):
            return dialect.type_descriptor(mysql.DATETIME(fsp=6))
        return dialect.type_descriptor(DateTime(timezone=dialect.name == "postgresql"))

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None or dialect.name == "postgresql":
            return value
        return value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return value.replace(tzinfo=UTC) if value is not None and value.tzinfo is None else value


#: When a claim was made. Seconds are enough for retention, and PostgreSQL's index keeps equal values once: 8
#: bytes a row instead of 22.
Second = Time().with_variant(postgresql.TIMESTAMP(timezone=True, precision=0), "postgresql")
#: A text that identifies something: compared as bytes on every database.
Name = LargeBinary(255).with_variant(mysql.VARBINARY(255), "mysql", "mariadb")
#: Bodies; LargeBinary alone would be cut off at 65,535 bytes on MySQL.
Body = LargeBinary().with_variant(mysql.LONGBLOB(), "mysql", "mariadb")
#: Headers, properties and results.
Blob = LargeBinary().with_variant(mysql.MEDIUMBLOB(), "mysql", "mariadb")
#: Error texts.
LongText = Text().with_variant(mysql.MEDIUMTEXT(charset="utf8mb4"), "mysql", "mariadb")
#: SQLite numbers rows only in an INTEGER primary key.
Serial = BigInteger().with_variant(Integer(), "sqlite")


def build(schema: str | None = None) -> MetaData:
    """The tables, in the database schema `schema` (None: the connection's default).

    Raises `SetupError` when `schema` is not a plain identifier.
    """
    if schema is not None and not re.fullmatch("[A-Za-z_][A-Za-z0-9_]{0,62}", schema):
        raise SetupError(
            f"schema={schema!r} is no plain identifier: use letters, digits and _ only, no digit first, "
            "at most 63 of them"
        )
    metadata = MetaData(schema=schema)
    options: dict[str, Any] = {"mysql_engine": "InnoDB", "mariadb_engine": "InnoDB"}
    _heart(metadata, options)
    _failures(metadata, options)
    _audit(metadata, options)
    _leaving(metadata, options)
    _small(metadata, options)
    return metadata


def _heart(metadata: MetaData, options: dict[str, Any]) -> None:
    Table(
        "idemq_consumers",
        metadata,
        Column("id", Integer, primary_key=True, autoincrement=True),
        Column("horizon", Time),  # the newest sent_at that pruning has forgotten
        Column("keep", BigInteger),  # how long ids are remembered, in seconds
        sqlite_autoincrement=True,  # a number is never given to a second consumer
        **options,
    )
    Table(
        "idemq_consumer_names",
        metadata,
        Column("name", Name, primary_key=True),
        Column("consumer", Integer, nullable=False),
        ForeignKeyConstraint(
            ["consumer"], [_in(metadata, "idemq_consumers.id")], name="idemq_consumer_names_consumer"
        ),
        **options,
    )
    Table(
        "idemq_processed",
        metadata,
        # The order of the columns leaves no padding between them.
        Column("consumer", Integer, nullable=False, autoincrement=False),
        Column("id", Key, nullable=False),
        Column("fingerprint", Integer),
        Column("sent_at", Time),
        Column("at", Second, nullable=False),
        Column("result", Blob),
        # Which attempt wrote the row; PostgreSQL has xmin for that, and leaves it null.
        Column("token", LargeBinary(8).with_variant(mysql.BINARY(8), "mysql", "mariadb")),
        # The id first: time-ordered ids of all consumers are then added at one end of the index, which keeps
        # it dense (41 bytes a row, against 62 with the consumer first and three consumers; PostgreSQL).
        PrimaryKeyConstraint("id", "consumer"),
        Index("idemq_processed_at", "at"),
        **options,
    )


def _failures(metadata: MetaData, options: dict[str, Any]) -> None:
    Table(
        "idemq_failed",
        metadata,
        Column("seq", Serial, primary_key=True, autoincrement=True),  # arrival order within a lane
        Column("pk", Key, nullable=False),
        Column("consumer", Integer, nullable=False),
        Column("identity", Key, nullable=False),
        Column("owns_claim", Boolean, nullable=False),
        Column("state", SmallInteger, nullable=False),  # 1 waiting, 2 dead
        Column("reason", String(40), nullable=False),
        Column("lane", Key),
        Column("not_before", Time),
        Column("attempts", Integer, nullable=False, default=0),
        Column("starts", Integer, nullable=False, default=0),
        Column("crashes", Integer, nullable=False, default=0),
        Column("alone", Boolean, nullable=False, default=False),
        Column("owner", Key),
        Column("lease_until", Time),
        Column("copies", Integer, nullable=False, default=1),
        Column("fingerprint", Integer),
        Column("sent_at", Time),
        Column("body", Body),
        Column("headers", Blob),
        Column("properties", Blob),
        Column("origin", Blob),
        Column("error", LongText),
        Column("first_at", Time, nullable=False),
        Column("last_at", Time, nullable=False),
        UniqueConstraint("pk", name="idemq_failed_pk"),
        UniqueConstraint("consumer", "identity", name="idemq_failed_identity"),
        Index("idemq_failed_due", "consumer", "state", "not_before"),
        Index("idemq_failed_lane", "consumer", "lane", "seq"),
        sqlite_autoincrement=True,
        **options,
    )


def _audit(metadata: MetaData, options: dict[str, Any]) -> None:
    Table(
        "idemq_audit",
        metadata,
        Column("seq", Serial, primary_key=True, autoincrement=True),
        Column("at", Time, nullable=False),
        Column("who", LongText, nullable=False),
        Column("action", String(20), nullable=False),  # "retry", "drop"; "done", "resend", "failed"
        Column("consumer", Integer, nullable=False),  # 0: an effect
        # The dead letter or effect that it was done to; the row itself may be gone.
        Column("pk", Key, nullable=False),
        Column("identity", Key, nullable=False),
        Column("reason", String(40), nullable=False),
        Column("why", LongText),
        Index("idemq_audit_identity", "consumer", "identity"),
        Index("idemq_audit_pk", "pk"),
        sqlite_autoincrement=True,
        **options,
    )


def _leaving(metadata: MetaData, options: dict[str, Any]) -> None:
    Table(
        "idemq_outgoing",
        metadata,
        Column("seq", Serial, primary_key=True, autoincrement=True),  # the order within a lane
        Column("pk", Key, nullable=False),  # message id or provider key
        Column("kind", SmallInteger, nullable=False),  # 1 message to publish, 2 effect to run
        Column("state", SmallInteger, nullable=False),  # 1 waiting, 2 sending, 3 in doubt, 4 failed
        Column("target", Name, nullable=False),  # the broker's or the effect's name
        Column("destination", Blob),
        Column("lane", Key),
        Column("body", Body),
        Column("headers", Blob),
        Column("properties", Blob),
        Column("attempts", Integer, nullable=False, default=0),
        Column("not_before", Time),
        Column("first_sending_at", Time),
        Column("owner", Key),
        Column("lease_until", Time),
        Column("error", LongText),
        Column("at", Time, nullable=False),
        Column("last_at", Time, nullable=False),
        UniqueConstraint("pk", name="idemq_outgoing_pk"),
        Index("idemq_outgoing_due", "target", "state", "not_before"),
        Index("idemq_outgoing_lane", "lane", "seq"),
        sqlite_autoincrement=True,
        **options,
    )


def _small(metadata: MetaData, options: dict[str, Any]) -> None:
    Table(
        "idemq_lanes",
        metadata,
        Column("consumer", Integer, primary_key=True, autoincrement=False),
        Column("lane", Key, primary_key=True),
        Column("generation", BigInteger, nullable=False),
        Column("owner", Key),
        Column("at", Time, nullable=False),
        **options,
    )
    Table(
        "idemq_tokens",
        metadata,
        Column("digest", Key, primary_key=True),
        Column("scope", Name, nullable=False),
        Column("expires_at", Time),
        **options,
    )


def _in(metadata: MetaData, name: str) -> str:
    return f"{metadata.schema}.{name}" if metadata.schema else name


@lru_cache
def tables(schema: str | None = None) -> MetaData:
    """`build`, once for each schema."""
    return build(schema)


def table(name: str, schema: str | None = None) -> Table:
    """One of idemq's tables."""
    return tables(schema).tables[f"{schema}.{name}" if schema else name]


#: For the user's own Alembic: `target_metadata = [Base.metadata, idemq.schema.metadata]`.
metadata = tables()
