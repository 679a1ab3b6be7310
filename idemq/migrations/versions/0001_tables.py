"""All tables of idemq."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic.operations import Operations
from sqlalchemy.dialects import mysql, postgresql

revision = "0001"
down_revision = None

_MYSQL = ("mysql", "mariadb")
_KEY = sa.Uuid().with_variant(mysql.BINARY(16), *_MYSQL).with_variant(sa.LargeBinary(16), "sqlite")
_TIME = sa.DateTime(timezone=True).with_variant(mysql.DATETIME(fsp=6), *_MYSQL)
_SECOND = _TIME.with_variant(postgresql.TIMESTAMP(timezone=True, precision=0), "postgresql")
_NAME = sa.LargeBinary(255).with_variant(mysql.VARBINARY(255), *_MYSQL)
_BODY = sa.LargeBinary().with_variant(mysql.LONGBLOB(), *_MYSQL)
_BLOB = sa.LargeBinary().with_variant(mysql.MEDIUMBLOB(), *_MYSQL)
_TEXT = sa.Text().with_variant(mysql.MEDIUMTEXT(charset="utf8mb4"), *_MYSQL)
_SERIAL = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade(op: Operations, schema: str | None) -> None:
    _heart(op, schema)
    _failures(op, schema)
    _audit(op, schema)
    _leaving(op, schema)
    _small(op, schema)


def _heart(op: Operations, schema: str | None) -> None:
    _create(
        op,
        schema,
        "idemq_consumers",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("horizon", _TIME),
        sa.Column("keep", sa.BigInteger),
        sqlite_autoincrement=True,
    )
    target = f"{schema}.idemq_consumers.id" if schema else "idemq_consumers.id"
    _create(
        op,
        schema,
        "idemq_consumer_names",
        sa.Column("name", _NAME, primary_key=True),
        sa.Column("consumer", sa.Integer, nullable=False),
        sa.ForeignKeyConstraint(["consumer"], [target], name="idemq_consumer_names_consumer"),
    )
    _create(
        op,
        schema,
        "idemq_processed",
        sa.Column("consumer", sa.Integer, nullable=False, autoincrement=False),
        sa.Column("id", _KEY, nullable=False),
        sa.Column("fingerprint", sa.Integer),
        sa.Column("sent_at", _TIME),
        sa.Column("at", _SECOND, nullable=False),
        sa.Column("result", _BLOB),
        sa.Column("token", sa.LargeBinary(8).with_variant(mysql.BINARY(8), *_MYSQL)),
        sa.PrimaryKeyConstraint("id", "consumer"),
        indexes={"idemq_processed_at": ["at"]},
    )


def _failures(op: Operations, schema: str | None) -> None:
    _create(
        op,
        schema,
        "idemq_failed",
        sa.Column("seq", _SERIAL, primary_key=True, autoincrement=True),
        sa.Column("pk", _KEY, nullable=False),
        sa.Column("consumer", sa.Integer, nullable=False),
        sa.Column("identity", _KEY, nullable=False),
        sa.Column("owns_claim", sa.Boolean, nullable=False),
        sa.Column("state", sa.SmallInteger, nullable=False),
        sa.Column("reason", sa.String(40), nullable=False),
        sa.Column("lane", _KEY),
        sa.Column("not_before", _TIME),
        *(sa.Column(name, sa.Integer, nullable=False) for name in ("attempts", "starts", "crashes")),
        sa.Column("alone", sa.Boolean, nullable=False),
        sa.Column("owner", _KEY),
        sa.Column("lease_until", _TIME),
        sa.Column("copies", sa.Integer, nullable=False),
        sa.Column("fingerprint", sa.Integer),
        sa.Column("sent_at", _TIME),
        sa.Column("body", _BODY),
        *(sa.Column(name, _BLOB) for name in ("headers", "properties", "origin")),
        sa.Column("error", _TEXT),
        sa.Column("first_at", _TIME, nullable=False),
        sa.Column("last_at", _TIME, nullable=False),
        sa.UniqueConstraint("pk", name="idemq_failed_pk"),
        sa.UniqueConstraint("consumer", "identity", name="idemq_failed_identity"),
        indexes={
            "idemq_failed_due": ["consumer", "state", "not_before"],
            "idemq_failed_lane": ["consumer", "lane", "seq"],
        },
        sqlite_autoincrement=True,
    )


def _audit(op: Operations, schema: str | None) -> None:
    _create(
        op,
        schema,
        "idemq_audit",
        sa.Column("seq", _SERIAL, primary_key=True, autoincrement=True),
        sa.Column("at", _TIME, nullable=False),
        sa.Column("who", _TEXT, nullable=False),
        sa.Column("action", sa.String(20), nullable=False),
        sa.Column("consumer", sa.Integer, nullable=False),
        *(sa.Column(name, _KEY, nullable=False) for name in ("pk", "identity")),
        sa.Column("reason", sa.String(40), nullable=False),
        sa.Column("why", _TEXT),
        indexes={"idemq_audit_identity": ["consumer", "identity"], "idemq_audit_pk": ["pk"]},
        sqlite_autoincrement=True,
    )


def _leaving(op: Operations, schema: str | None) -> None:
    _create(
        op,
        schema,
        "idemq_outgoing",
        sa.Column("seq", _SERIAL, primary_key=True, autoincrement=True),
        sa.Column("pk", _KEY, nullable=False),
        *(sa.Column(name, sa.SmallInteger, nullable=False) for name in ("kind", "state")),
        sa.Column("target", _NAME, nullable=False),
        sa.Column("destination", _BLOB),
        sa.Column("lane", _KEY),
        sa.Column("body", _BODY),
        *(sa.Column(name, _BLOB) for name in ("headers", "properties")),
        sa.Column("attempts", sa.Integer, nullable=False),
        *(sa.Column(name, _TIME) for name in ("not_before", "first_sending_at")),
        sa.Column("owner", _KEY),
        sa.Column("lease_until", _TIME),
        sa.Column("error", _TEXT),
        *(sa.Column(name, _TIME, nullable=False) for name in ("at", "last_at")),
        sa.UniqueConstraint("pk", name="idemq_outgoing_pk"),
        indexes={
            "idemq_outgoing_due": ["target", "state", "not_before"],
            "idemq_outgoing_lane": ["lane", "seq"],
        },
        sqlite_autoincrement=True,
    )


def _small(op: Operations, schema: str | None) -> None:
    _create(
        op,
        schema,
        "idemq_lanes",
        sa.Column("consumer", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("lane", _KEY, primary_key=True),
        sa.Column("generation", sa.BigInteger, nullable=False),
        sa.Column("owner", _KEY),
        sa.Column("at", _TIME, nullable=False),
    )
    _create(
        op,
        schema,
        "idemq_tokens",
        sa.Column("digest", _KEY, primary_key=True),
        sa.Column("scope", _NAME, nullable=False),
        sa.Column("expires_at", _TIME),
    )


def _create(
    op: Operations,
    schema: str | None,
    name: str,
    *parts: sa.Column[Any] | sa.Constraint,
    indexes: dict[str, list[str]] | None = None,
    **options: Any,
) -> None:
    """Make the table and its indexes, except what is there already.

    MySQL commits every statement of this kind by itself, so an upgrade that was killed is taken up where it
    stopped.
    """
    existing: set[str | None] = set()
    found = False
    if not op.get_context().as_sql:
        inspector = sa.inspect(op.get_bind())
        if found := inspector.has_table(name, schema=schema):
            existing = {index["name"] for index in inspector.get_indexes(name, schema=schema)}
    if not found:
        options |= {"mysql_engine": "InnoDB", "mariadb_engine": "InnoDB"}
        op.create_table(name, *parts, schema=schema, **options)
    for index, columns in (indexes or {}).items():
        if index not in existing:
            op.create_index(index, name, columns, schema=schema)
