"""`idemq status`: what is processed, what waits, and what is to leave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime

import typer
from rich.table import Table
from sqlalchemy import Connection

from idemq.cli.choosing import Json
from idemq.cli.harmless import one_line
from idemq.cli.loading import AppName, Database, load
from idemq.cli.tables import age, fields_of, print_json, print_table, until
from idemq.ledger import clock
from idemq.status import Leaving, Status, leaving
from idemq.status import status as status_of

_SIGNS = {"exact": "", "estimate": "~", "at least": ">="}


def status(app: AppName, as_json: Json = False) -> None:
    """Show for each consumer what is processed, waiting and dead, and what is to leave.

    Processed are the ids that are not forgotten yet; of very many the number is estimated (~) or a lower
    bound (>=). Suspects are waiting messages that may have ended a process. What is to leave for a broker or
    effect that is not declared waits: this app does not send it.
    """
    database = Database(app, load(app))
    declared = database.app

    def look(connection: Connection) -> tuple[list[Status], list[Leaving], datetime]:
        consumers = status_of(connection, schema=database.schema)
        targets = leaving(
            connection, brokers=declared.brokers, effects=declared.effects, schema=database.schema
        )
        return consumers, targets, clock(connection)

    consumers, targets, now = database.do(look)
    consumers = [replace(each, consumer=database.renamed(each.consumer)) for each in consumers]
    if as_json:
        print_json(
            {
                "consumers": [fields_of(each) for each in consumers],
                "leaving": [fields_of(each) for each in targets],
            }
        )
        return
    if consumers:
        _print_consumers(consumers, now)
    else:
        typer.echo("No consumer has ever run on this database.")
    if targets:
        typer.echo()
        _print_leaving(targets, now)


def _print_consumers(found: Sequence[Status], now: datetime) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("consumer", no_wrap=True)
    for heading in ("processed", "parked", "suspects", "dead", "oldest waiting", "next due"):
        table.add_column(heading, justify="right")
    rows = []
    for each in found:
        cells = [one_line(each.consumer), f"{_SIGNS[each.precision]}{each.processed:,}"]
        cells += [f"{count:,}" for count in (each.parked, each.suspects, each.dead)]
        rows.append([*cells, age(now, each.oldest_waiting), until(now, each.next_due)])
    print_table(table, rows)


def _print_leaving(found: Sequence[Leaving], now: datetime) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("leaving by", no_wrap=True)
    for heading in ("waiting", "sending", "in doubt", "failed", "oldest waiting"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    rows = []
    for each in found:
        counts = (each.waiting, each.sending, each.in_doubt, each.failed)
        cells = [f"{each.kind} {one_line(each.name)}", *(f"{count:,}" for count in counts)]
        rows.append([*cells, age(now, each.oldest_waiting), "" if each.declared else "not declared"])
    print_table(table, rows)
