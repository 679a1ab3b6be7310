"""`idemq seen`: whether and when an id was processed."""

from __future__ import annotations

from typing import Annotated

import typer
from sqlalchemy import Connection, select

from idemq import names, schema
from idemq.cli.loading import AppName, Failure, load, with_connection
from idemq.errors import SchemaError
from idemq.message import key_of

Name = Annotated[str, typer.Argument(metavar="CONSUMER", help="The consumer's name, or one that it had.")]
Identifier = Annotated[str, typer.Argument(metavar="ID", help="The message id, exactly as published.")]


def seen(app: AppName, consumer: Name, identifier: Identifier) -> None:
    """Say whether and when a consumer processed a message id; exits with 1 when it did not."""
    loaded = load(app)

    def look(connection: Connection) -> str | None:
        with names.naming_missing_tables():
            return _look(connection, loaded.schema, consumer, identifier)

    try:
        words = with_connection(loaded, look)
    except SchemaError as error:
        raise SchemaError(str(error).replace(" APP`", f" {app}`")) from error
    typer.echo(words or f"{consumer} has not processed {identifier!r}, or has forgotten it")
    if words is None:
        raise typer.Exit(1)


def _look(connection: Connection, database_schema: str | None, consumer: str, identifier: str) -> str | None:
    number = names.find(connection, consumer, database_schema)
    if number is None:
        raise Failure(f"no consumer named {consumer!r} has ever run on this database")
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
    reason = connection.execute(
        select(failed.c.reason).where(failed.c.consumer == number, failed.c.identity == key)
    ).scalar()
    what = f"made {identifier!r} a dead letter ({reason})" if reason else f"processed {identifier!r}"
    sent = f", sent at {claim.sent_at.isoformat()}" if claim.sent_at else ""
    return f"{consumer} {what} at {claim.at.isoformat()}{sent}"
