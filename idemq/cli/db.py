"""`idemq db`: makes, verifies or prints the tables."""

from __future__ import annotations

from typing import Annotated

import typer

from idemq.cli.loading import AppName, engine_of, load, with_connection

commands = typer.Typer(help="Make, check or print the tables.", no_args_is_help=True)

Strict = Annotated[
    bool,
    typer.Option("--strict", help="PostgreSQL: let the database refuse commits that idemq did not ask for."),
]


@commands.command()
def upgrade(app: AppName, strict: Strict = False) -> None:
    """Make the tables, or bring them to the newest version; a second run changes nothing."""
    from idemq import migrate

    loaded = load(app)
    with_connection(loaded, lambda connection: migrate.upgrade(connection, loaded.schema, strict))
    _report(app)


@commands.command()
def check(app: AppName) -> None:
    """Say what is wrong with the tables and with the database's settings; 1 when idemq cannot rely on it."""
    _report(app)


@commands.command()
def sql(app: AppName, strict: Strict = False) -> None:
    """Print the statements that make the tables in an empty database; nothing connects to it."""
    from idemq import migrate

    loaded = load(app)
    typer.echo(migrate.sql(engine_of(loaded).dialect.name, loaded.schema, strict))


def _report(app: str) -> None:
    from idemq import migrate

    loaded = load(app)
    problems, warnings, strict = with_connection(
        loaded,
        lambda connection: (
            migrate.check(connection, loaded.schema),
            migrate.durability(connection),
            migrate.has_strict(connection, loaded.schema),
        ),
    )
    for problem in problems:
        typer.echo(f"problem: {problem.replace(' APP`', f' {app}`')}")
    for warning in warnings:
        typer.echo(warning if warning.startswith("note:") else f"warning: {warning}")
    if problems:
        raise typer.Exit(1)
    typer.echo(f"the tables are right{', and commits are strict' if strict else ''}")
