"""`idemq doubt`: effects of which nobody knows what came, or that have failed, and what a person decides."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any

import typer
from rich.table import Table
from sqlalchemy import Connection

from idemq import doubt
from idemq.cli.choosing import By, Json, Older, Raw, Shown, Yes, ask, only, say, user, write
from idemq.cli.harmless import body, one_line, shown
from idemq.cli.loading import AppName, Database, Failure, load
from idemq.cli.tables import (
    age,
    entries_as_json,
    fields_of,
    moment,
    print_facts,
    print_first,
    print_json,
    print_part,
    print_table,
    raised,
    until,
)
from idemq.errors import SetupError
from idemq.ledger import clock

commands = typer.Typer(
    help="Effects in doubt, and failed ones: list, show or resolve them.", no_args_is_help=True
)

Name = Annotated[str | None, typer.Option("--effect", help="Of this effect only.")]
Effect = Annotated[str, typer.Argument(metavar="ID", help="As `list` shows it; its beginning is enough.")]
Reason = Annotated[str, typer.Option("--reason", help="How you know, for the record.")]
Done = Annotated[bool, typer.Option("--done", help="It has happened: it ends.")]
Resend = Annotated[bool, typer.Option("--resend", help="It has not happened: it is sent again.")]
GivenUp = Annotated[bool, typer.Option("--failed", help="It is given up: it ends.")]

_MEANING: dict[doubt.Decision, str] = {
    "done": "it has happened; it ends, and is not sent again",
    "resend": "it has not happened; it is sent again now, with the same key and payload",
    "failed": "it is given up; it ends, and is not sent again",
}


@commands.command("list")
def list_doubt(
    app: AppName, effect: Name = None, older_than: Older = None, limit: Shown = 100, as_json: Json = False
) -> None:
    """List the effects that are in doubt or failed; their age is the time since they were planned."""
    database = Database(app, load(app))

    def look(connection: Connection) -> tuple[list[doubt.Doubt], datetime]:
        more = limit + 1  # to know whether there are more
        found = doubt.in_doubt(
            connection, effect=effect, older_than=older_than, limit=more, schema=database.schema
        )
        return found, clock(connection)

    found, now = database.do(look)
    if effect is not None and not found and effect not in database.app.effects:
        raise SetupError(f"no effect named {effect!r} is declared, or in doubt")
    print_first(found, limit, _as_json if as_json else None, lambda some: _print_list(some, now))


@commands.command()
def show(app: AppName, effect: Effect, raw: Raw = None, as_json: Json = False) -> None:
    """Show one effect, in whatever state, with secrets masked; --raw gives its payload as it is."""
    database = Database(app, load(app))

    def look(connection: Connection) -> tuple[doubt.Doubt | None, list[doubt.Entry]]:
        key = _one(connection, database.schema, effect).key
        found = doubt.effect(connection, key, schema=database.schema)
        return found, doubt.history(connection, key, schema=database.schema)

    found, history = database.do(look)
    if found is None:
        raise Failure(f"the effect {effect!r} has just ended")
    if raw is not None:
        write(found.payload or b"", raw)
    elif as_json:
        print_json({**_as_json(found), "payload": body(found.payload), "history": entries_as_json(history)})
    else:
        _print_one(database, found, history)


@commands.command()
def resolve(
    app: AppName,
    effect: Effect,
    reason: Reason,
    done: Done = False,
    resend: Resend = False,
    failed: GivenUp = False,
    by: By = None,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Decide about an effect that is in doubt or failed: --done, --resend or --failed.

    Ask the provider first: to send again what has happened makes it happen twice. `--resend` says that
    nothing has got through, so that the lifetime of the provider's key counts from the next call.
    """
    said = dict(zip(doubt.DECISIONS, (done, resend, failed), strict=True))
    if sum(said.values()) != 1:
        raise SetupError("say what is the case: --done, --resend or --failed")
    (decision,) = (each for each in doubt.DECISIONS if said[each])
    database = Database(app, load(app))
    seen = database.do(lambda connection: _one(connection, database.schema, effect))
    if seen.state not in ("in doubt", "failed"):
        raise Failure(f"{seen.key} is neither in doubt nor failed: it is {_state(seen)}")
    say(f"{decision} {seen.key} ({one_line(seen.effect)}, {_state(seen)}): {_MEANING[decision]}")
    if decision == "resend" and seen.effect not in database.app.effects:
        say("this app does not declare the effect: it waits until one does")
    ask(yes)

    def decide(connection: Connection) -> str | None:
        options: Any = {"state": seen.state, "attempts": seen.attempts, "schema": database.schema}
        name = by or user()
        if doubt.resolve(connection, seen.key, decision, by=name, why=reason, **options):
            return None
        return _who_was_first(connection, database.schema, seen)

    if (other := database.do(decide)) is not None:
        raise Failure(f"nothing was done: {other}")
    if as_json:
        print_json({"key": str(seen.key), "resolved": decision})
    else:
        typer.echo(f"{seen.key}: {decision}.")


def _one(connection: Connection, schema: str | None, prefix: str) -> doubt.Doubt:
    found = doubt.find(connection, prefix, schema=schema)
    none = f"there is no effect {prefix!r}; it may be done, or resolved"
    return only(found, [each.key for each in found], prefix, none)


def _who_was_first(connection: Connection, schema: str | None, seen: doubt.Doubt) -> str:
    found = doubt.effect(connection, seen.key, schema=schema)
    if found is not None:
        return f"{seen.key} is {_state(found)} now"
    for entry in doubt.history(connection, seen.key, schema=schema)[-1:]:
        return f"{one_line(entry.who)} said of {seen.key} at {moment(entry.at)}: {entry.action}"
    return f"{seen.key} has been done meanwhile"


def _state(effect: doubt.Doubt) -> str:
    attempts = f"{effect.attempts} attempt{'' if effect.attempts == 1 else 's'}"
    return f"{effect.state}, {attempts}"


def _print_list(found: Sequence[doubt.Doubt], now: datetime) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("id", no_wrap=True, min_width=36)  # whole: keys of one moment begin alike
    for heading in ("effect", "state"):
        table.add_column(heading, no_wrap=True, max_width=40)
    for heading in ("attempts", "age", "looked at"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("error")
    rows = []
    for each in found:
        due = "by a person" if each.due is None else until(now, each.due)
        cells = [str(each.key), one_line(each.effect), each.state, str(each.attempts)]
        rows.append([*cells, age(now, each.planned_at), due, raised(each.error)])
    print_table(table, rows)


def _print_one(database: Database, found: doubt.Doubt, history: Sequence[doubt.Entry]) -> None:
    undeclared = "" if found.effect in database.app.effects else " (this app does not declare it)"
    facts = {
        "id": str(found.key),
        "effect": found.effect + undeclared,
        "state": found.state,
        "attempts": str(found.attempts),
        "planned": moment(found.planned_at),
        "first sent": moment(found.first_sending_at),
        "last change": moment(found.last_at),
        "looked at": "by a person" if found.due is None else moment(found.due),
    }
    acts = [
        (each.action, f"{moment(each.at)} by {each.who}: {each.why or '(no reason given)'}")
        for each in history
    ]
    print_facts(facts, acts)
    print_part(f"payload ({found.size or 0:,} bytes)", body(found.payload))
    print_part("error", shown(found.error or ""))


def _as_json(found: doubt.Doubt) -> dict[str, Any]:
    """Secrets are masked here too."""
    return {**fields_of(found, "payload"), "error": None if found.error is None else shown(found.error)}
