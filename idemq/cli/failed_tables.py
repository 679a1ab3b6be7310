"""How letters look: tables for people, plain values for programs."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from rich.table import Table

from idemq.audit import Entry
from idemq.cli.harmless import body, one_line, shown, values
from idemq.cli.tables import (
    age,
    entries_as_json,
    fields_of,
    moment,
    plain,
    print_facts,
    print_part,
    print_table,
    raised,
    until,
)
from idemq.letters import Letter, Match
from idemq.message import Message

#: How many digits of a letter's key a table shows: enough to name one among many millions.
DIGITS = 12


def print_letters(letters: Sequence[Letter], now: datetime) -> None:
    waiting = letters[0].state == "waiting"
    table = Table(box=None, pad_edge=False)
    for heading in ("id", "consumer"):
        table.add_column(heading, no_wrap=True)
    table.add_column("message id", overflow="ellipsis", no_wrap=True, max_width=40)
    table.add_column("reason", no_wrap=True)
    for heading in ("attempts", "crashes" if waiting else "copies", "age", *(["due"] if waiting else [])):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("error")
    rows = []
    for each in letters:
        cells = [str(each.pk)[:DIGITS], one_line(each.consumer), one_line(each.id or "-"), each.reason]
        if waiting:
            due = "held" if each.held else until(now, each.not_before)
            cells += [str(each.attempts), str(each.crashes), age(now, each.first_at), due]
        else:
            cells += [str(each.attempts), str(each.copies), age(now, each.last_at)]
        rows.append([*cells, raised(each.error)])
    print_table(table, rows)


def print_letter(letter: Letter, message: Message, history: Sequence[Entry]) -> None:
    facts = {
        "id": str(letter.pk),
        "consumer": letter.consumer,
        "message id": letter.id or "-",
        "state": f"{letter.state} ({letter.reason})",
        "attempts": f"{letter.attempts}, and {letter.crashes} crashes",
        "copies": str(letter.copies),
        "first failed": moment(letter.first_at),
        "last change": moment(letter.last_at),
        "sent": moment(letter.sent_at),
        "due": "somebody runs it" if letter.held else moment(letter.not_before),
        "content": f"{message.content_type or '-'}, {message.content_encoding or 'not encoded'}",
    }
    acts = [
        (
            each.action,
            f"{moment(each.at)} by {each.who}, was {each.reason}: {each.why or '(no reason given)'}",
        )
        for each in history
    ]
    print_facts(facts, acts)
    key = {} if message.key is None else {"key": message.key}
    for title, fields in (
        ("origin", message.origin),
        ("headers", message.headers),
        ("properties", {**key, **message.properties}),
    ):
        print_part(title, "\n".join(f"{name}: {each}" for name, each in values(fields).items()))
    print_part(f"body ({letter.size or 0:,} bytes)", body(message.body))
    print_part("error", shown(letter.error or ""))


def as_json(letter: Letter, history: Sequence[Entry] = ()) -> dict[str, Any]:
    """Secrets are masked here too, and a body that is no text is dumped in part: `show --raw` gives it."""
    fields = fields_of(letter, "message")
    fields["origin"] = plain(values(letter.origin))
    fields["error"] = None if letter.error is None else shown(letter.error)
    if (message := letter.message) is not None:
        fields["headers"] = plain(values(message.headers))
        fields["properties"] = plain(values(message.properties))
        fields["key"] = plain(values({"name": message.key})["name"])
        fields["content_type"] = message.content_type
        fields["content_encoding"] = message.content_encoding
        fields["body"] = None if message.body is None else body(message.body)
        fields["history"] = entries_as_json(history)
    return fields


def match_as_json(match: Match) -> dict[str, Any]:
    return {name: plain(each) for name, each in match._asdict().items()}
