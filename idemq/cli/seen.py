"""`idemq seen`: whether and when an id was processed."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Annotated

import typer
from sqlalchemy import Connection, select

from idemq import names, schema
from idemq.cli.harmless import one_line
from idemq.cli.loading import AppName, Database, Failure, load
from idemq.errors import SetupError
from idemq.failures import WAITING
from idemq.message import key_of

#: PostgreSQL keeps the time of a claim in whole seconds, rounded.
ROUNDED = timedelta(seconds=1)

Name = Annotated[str, typer.Argument(metavar="CONSUMER", help="The consumer's name, or one that it had.")]
Identifier = Annotated[str, typer.Argument(metavar="ID", help="The message id, exactly as published.")]


def seen(app: AppName, consumer: Name, identifier: Identifier) -> None:
    """Say whether and when a consumer processed a message id; exits with 1 when it did not."""
    database = Database(app, load(app))
    words = database.do(lambda connection: _look(connection, database.schema, consumer, identifier))
    typer.echo(words or f"{consumer} has not processed {identifier!r}, or has forgotten it")
    if words is None:
        raise typer.Exit(1)


def _look(connection: Connection, database_schema: str | None, consumer: str, identifier: str) -> str | None:
    try:
        number = names.wanted(connection, consumer, database_schema)
    except SetupError as error:  # it may run yet
        raise Failure(str(error)) from error
    key = key_of(identifier)
    processed = schema.table("idemq_processed", database_schema)
    failed = schema.table("idemq_failed", database_schema)
    claim = connection.execute(
        select(processed.c.at, processed.c.sent_at).where(
            processed.c.consumer == number, processed.c.id == key
        )
    ).first()
    if claim is None:
        return None
    row = connection.execute(
        select(failed.c.state, failed.c.reason).where(failed.c.consumer == number, failed.c.identity == key)
    ).first()
    sent = f", sent at {claim.sent_at.isoformat()}" if claim.sent_at else ""
    if row is not None and row.state == WAITING:
        return f"{identifier!r} is waiting to be tried again by {consumer} ({row.reason}){sent}"
    if row is not None:
        what = f"made {identifier!r} a dead letter ({row.reason})"
    elif dropped := _dropped(connection, database_schema, number, key, claim.at):
        return f"{consumer} had made {identifier!r} {dropped}{sent}"
    else:
        what = f"processed {identifier!r}"
    return f"{consumer} {what} at {claim.at.isoformat()}{sent}"


def _dropped(
    connection: Connection, database_schema: str | None, number: int, key: bytes, at: datetime
) -> str:
    """Who dropped the dead letter to which the claim of `at` belongs; nothing was processed then."""
    audit = schema.table("idemq_audit", database_schema)
    query = (
        select(audit.c.at, audit.c.who, audit.c.reason)
        .where(audit.c.consumer == number, audit.c.identity == key, audit.c.action == "drop")
        .where(audit.c.at >= at - ROUNDED)
    )
    for row in connection.execute(query):
        return f"a dead letter ({row.reason}), dropped by {one_line(row.who)} at {row.at.isoformat()}"
    return ""
