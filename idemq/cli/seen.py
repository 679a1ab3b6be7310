"""`idemq seen`: whether and when a message id was processed."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from sqlalchemy import Connection, Row, select

from idemq import names, schema
from idemq.cli.loading import AppName, Failure, load, with_connection
from idemq.message import key_of


def seen(
    app: AppName,
    consumer: Annotated[str, typer.Argument(help="The name of the consumer.")],
    id: Annotated[str, typer.Argument(help="The message id, as the publisher gave it.")],
) -> None:
    """Say whether and when a message id was processed; 1 when it was not."""
    loaded = load(app)
    row = with_connection(loaded, lambda connection: _find(connection, loaded.schema, consumer, id))
    if row is None:
        typer.echo("not seen")
    elif row.reason is None:
        typer.echo(f"processed at {row.at.isoformat(sep=' ')}")
        return
    else:
        typer.echo(f"not processed: {row.reason}, since {row.first_at.isoformat(sep=' ')}")
    raise typer.Exit(1)


def _find(
    connection: Connection, database_schema: str | None, consumer: str, identifier: str
) -> Row[*tuple[Any, ...]] | None:
    """The claim of the id, and the failure that owns it."""
    number = names.find(connection, consumer, database_schema)
    if number is None:
        raise Failure(f"no consumer {consumer!r} has run on this database")
    claims = schema.table("idemq_processed", database_schema)
    failures = schema.table("idemq_failed", database_schema)
    owner = (
        (failures.c.consumer == claims.c.consumer)
        & (failures.c.identity == claims.c.id)
        & failures.c.owns_claim
    )
    query = (
        select(claims.c.at, failures.c.reason, failures.c.first_at)
        .select_from(claims.outerjoin(failures, owner))
        .where(claims.c.consumer == number, claims.c.id == key_of(identifier))
    )
    return connection.execute(query).one_or_none()
