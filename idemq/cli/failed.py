"""`idemq dead`, `idemq parked`: what failed, what waits, and what to do about it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated

import typer
from sqlalchemy import Connection

from idemq import letters
from idemq.cli import failed_tables as tables
from idemq.cli.choosing import (
    By,
    Consumer,
    Json,
    Limit,
    Newer,
    Older,
    Raw,
    Reason,
    Shown,
    Yes,
    act,
    check_said,
    counted,
    matching,
    one,
    say,
    user,
    write,
)
from idemq.cli.loading import AppName, Database, Failure, load
from idemq.cli.tables import print_first, print_json
from idemq.failed_rows import Which
from idemq.ledger import clock

dead = typer.Typer(help="Dead letters: list, show, retry or drop them.", no_args_is_help=True)
parked = typer.Typer(help="Messages that wait to be tried again.", no_args_is_help=True)

Letter = Annotated[str, typer.Argument(metavar="ID", help="As `list` shows it; its beginning is enough.")]
Letters = Annotated[list[str] | None, typer.Argument(metavar="[ID]...", help="As `list` shows them.")]
All = Annotated[bool, typer.Option("--all", help="All dead letters of the app.")]
Why = Annotated[str | None, typer.Option("--why", help="The reason, for the record.")]
MustSayWhy = Annotated[str, typer.Option("--why", help="The reason, for the record.")]
Force = Annotated[
    bool,
    typer.Option("--force", help="Also those that broke their transaction: what they did is done again."),
]


@dead.command("list")
def list_dead(
    app: AppName,
    consumer: Consumer = None,
    reason: Reason = None,
    older_than: Older = None,
    newer_than: Newer = None,
    limit: Shown = 100,
    as_json: Json = False,
) -> None:
    """List the dead letters; their age is the time since they died."""
    which = Which(consumer=consumer, reason=reason, older_than=older_than, newer_than=newer_than)
    _list(Database(app, load(app)), letters.dead_letters, which, limit, as_json)


@parked.command("list")
def list_parked(
    app: AppName,
    consumer: Consumer = None,
    reason: Reason = None,
    older_than: Older = None,
    newer_than: Newer = None,
    limit: Shown = 100,
    as_json: Json = False,
) -> None:
    """List the messages that wait to be tried again; their age is the time since they first failed."""
    which = Which(consumer=consumer, reason=reason, older_than=older_than, newer_than=newer_than)
    _list(Database(app, load(app)), letters.parked, which, limit, as_json)


@parked.callback()
def _group() -> None:
    """Keeps `list` a command of its own."""


def _list(
    database: Database, read: Callable[..., list[letters.Letter]], which: Which, limit: int, as_json: bool
) -> None:
    which["limit"] = limit + 1  # to know whether there are more
    found, now = database.do(
        lambda connection: (
            read(connection, schema=database.schema, **which),
            clock(connection),
        ),
    )
    found = [replace(each, consumer=database.renamed(each.consumer)) for each in found]
    one = tables.as_json if as_json else None
    print_first(found, limit, one, lambda some: tables.print_letters(some, now))


@dead.command()
def show(app: AppName, letter: Letter, raw: Raw = None, as_json: Json = False) -> None:
    """Show one letter, dead or parked, with secrets masked; --raw gives the body as it is."""
    database = Database(app, load(app))

    def look(connection: Connection) -> tuple[letters.Letter | None, list[letters.Entry]]:
        pk = one(connection, database.schema, letter).pk
        found = letters.letter(connection, pk, schema=database.schema)
        return found, letters.history(connection, pk, schema=database.schema)

    found, history = database.do(look)
    if found is None or found.message is None:
        raise Failure(f"the letter {letter!r} has just been done or dropped")
    message, found = found.message, replace(found, consumer=database.renamed(found.consumer))
    if raw is not None:
        if message.body is None:
            raise Failure("this message has no body: it is a tombstone")
        write(message.body, raw)
    elif as_json:
        print_json(tables.as_json(found, history))
    else:
        tables.print_letter(found, message, history)


@dead.command()
def retry(
    app: AppName,
    ids: Letters = None,
    consumer: Consumer = None,
    reason: Reason = None,
    older_than: Older = None,
    newer_than: Newer = None,
    limit: Limit = None,
    every: All = False,
    force: Force = False,
    by: By = None,
    why: Why = None,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Have workers try dead letters again, under their old ids and with fresh counts.

    A conflict is refused, because its id belongs to another message. A letter without an id is judged anew.
    """
    which = Which(consumer=consumer, reason=reason, older_than=older_than, newer_than=newer_than, limit=limit)
    check_said(ids, every, which)
    database = Database(app, load(app))
    wanted = matching(database, ids, which)
    refused = [each for each in wanted if letters.refusal(each.reason, force=force)]
    chosen = [each for each in wanted if not letters.refusal(each.reason, force=force)]
    for kind, count in Counter(each.reason for each in refused).items():
        say(f"refused: {count} ({kind}): {letters.refusal(kind, force=force)}")
    name = by or user()
    done = act(
        database,
        "retry",
        chosen,
        yes,
        lambda connection, pks: letters.retry(
            connection, by=name, why=why, force=force, schema=database.schema, ids=pks
        ),
    )
    if as_json:
        print_json({"retried": done, "refused": [tables.match_as_json(each) for each in refused]})
    elif done:
        typer.echo(f"{counted(done)} handed to the workers.")
    if refused and ids:
        raise typer.Exit(1)


@dead.command()
def drop(
    app: AppName,
    why: MustSayWhy,
    ids: Letters = None,
    consumer: Consumer = None,
    reason: Reason = None,
    older_than: Older = None,
    newer_than: Newer = None,
    limit: Limit = None,
    every: All = False,
    by: By = None,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Delete dead letters for good.

    Their claims stay: a late copy of such a message is still absorbed, and does not come back as a letter.
    Only what had no claim (no id, unreadable, conflict) would.
    """
    which = Which(consumer=consumer, reason=reason, older_than=older_than, newer_than=newer_than, limit=limit)
    check_said(ids, every, which)
    database = Database(app, load(app))
    chosen = matching(database, ids, which)
    name = by or user()
    done = act(
        database,
        "drop",
        chosen,
        yes,
        lambda connection, pks: letters.drop(connection, by=name, why=why, schema=database.schema, ids=pks),
    )
    if as_json:
        print_json({"dropped": done})
    elif done:
        typer.echo(f"{counted(done)} dropped.")
