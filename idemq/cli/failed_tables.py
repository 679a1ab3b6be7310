"""How letters and the overview look: tables for people, plain values for programs."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from rich.console import Console
from rich.table import Table
from rich.text import Text

from idemq.cli.harmless import body, one_line, shown, values
from idemq.letters import Entry, Letter, Match
from idemq.message import Message
from idemq.status import Status

#: How many columns a table has where no terminal says it.
WIDTH = 160

#: How many digits of a letter's key a table shows: enough to name one among many millions.
DIGITS = 12

_SIGNS = {"exact": "", "estimate": "~", "at least": ">="}


def print_letters(letters: Sequence[Letter], now: datetime) -> None:
    waiting = letters[0].state == "waiting"
    table = Table(box=None, pad_edge=False)
    for heading in ("id", "consumer"):
        table.add_column(heading, no_wrap=True)
    table.add_column("message id", overflow="ellipsis", no_wrap=True, max_width=40)
    table.add_column("reason", no_wrap=True)
    for heading in ("attempts", "crashes" if waiting else "copies", "age", *(["due"] if waiting else [])):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("error", overflow="ellipsis", no_wrap=True)
    for each in letters:
        cells = [str(each.pk)[:DIGITS], one_line(each.consumer), one_line(each.id or "-"), each.reason]
        if waiting:
            due = "held" if each.held else _until(now, each.not_before)
            cells += [str(each.attempts), str(each.crashes), _age(now, each.first_at), due]
        else:
            cells += [str(each.attempts), str(each.copies), _age(now, each.last_at)]
        table.add_row(*(Text(cell) for cell in [*cells, _last_line(each.error)]))
    _console().print(table)


def print_letter(letter: Letter, message: Message, history: Sequence[Entry]) -> None:
    console = _console()
    facts = {
        "id": str(letter.pk),
        "consumer": letter.consumer,
        "message id": letter.id or "-",
        "state": f"{letter.state} ({letter.reason})",
        "attempts": f"{letter.attempts}, and {letter.crashes} crashes",
        "copies": str(letter.copies),
        "first failed": _moment(letter.first_at),
        "last change": _moment(letter.last_at),
        "sent": _moment(letter.sent_at),
        "due": "somebody runs it" if letter.held else _moment(letter.not_before),
        "content": f"{message.content_type or '-'}, {message.content_encoding or 'not encoded'}",
    }
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, fact in facts.items():
        table.add_row(name, Text(one_line(fact, 1_024)))
    for entry in history:
        words = f"{_moment(entry.at)} by {entry.who}, was {entry.reason}: {entry.why or '(no reason given)'}"
        table.add_row(entry.action, Text(one_line(words, 1_024)))
    console.print(table)
    key = {} if message.key is None else {"key": message.key}
    for title, fields in (
        ("origin", message.origin),
        ("headers", message.headers),
        ("properties", {**key, **message.properties}),
    ):
        _print_part(console, title, "\n".join(f"{name}: {each}" for name, each in values(fields).items()))
    _print_part(console, f"body ({letter.size or 0:,} bytes)", body(message.body))
    _print_part(console, "error", shown(letter.error or ""))


def print_status(found: Sequence[Status], now: datetime) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("consumer", no_wrap=True)
    for heading in ("processed", "parked", "suspects", "dead", "oldest waiting", "next due"):
        table.add_column(heading, justify="right")
    for each in found:
        cells = [one_line(each.consumer), f"{_SIGNS[each.precision]}{each.processed:,}"]
        cells += [f"{count:,}" for count in (each.parked, each.suspects, each.dead)]
        oldest = "-" if each.oldest_waiting is None else _age(now, each.oldest_waiting)
        table.add_row(*(Text(cell) for cell in [*cells, oldest, _until(now, each.next_due)]))
    _console().print(table)


def as_json(value: Letter | Status, history: Sequence[Entry] = ()) -> dict[str, Any]:
    """Secrets are masked here too, and a body that is no text is dumped in part: `show --raw` gives it."""
    fields = {name: _plain(getattr(value, name)) for name in value.__slots__ if name != "message"}
    if isinstance(value, Letter):
        fields["origin"] = _plain(values(value.origin))
        fields["error"] = None if value.error is None else shown(value.error)
        if (message := value.message) is not None:
            fields["headers"] = _plain(values(message.headers))
            fields["properties"] = _plain(values(message.properties))
            fields["key"] = _plain(values({"name": message.key})["name"])
            fields["content_type"] = message.content_type
            fields["content_encoding"] = message.content_encoding
            fields["body"] = None if message.body is None else body(message.body)
            fields["history"] = [
                {name: _plain(each) for name, each in entry._asdict().items()} for entry in history
            ]
    return fields


def match_as_json(match: Match) -> dict[str, Any]:
    return {name: _plain(each) for name, each in match._asdict().items()}


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    return str(value) if isinstance(value, UUID) else value


def _print_part(console: Console, title: str, text: str) -> None:
    if text:
        console.print(Text(f"\n{title}", style="bold"))
        console.print(Text(text), soft_wrap=True)


def _last_line(error: str | None) -> str:
    lines = shown(error or "").strip().splitlines()
    return one_line(lines[-1] if lines else "")


def _moment(moment: datetime | None) -> str:
    return "-" if moment is None else moment.isoformat(" ", "seconds")


def _age(now: datetime, then: datetime) -> str:
    seconds = max(0.0, (now - then) / timedelta(seconds=1))
    for unit, size in (("d", 86_400), ("h", 3_600), ("m", 60)):
        if seconds >= 2 * size:
            return f"{int(seconds // size)}{unit}"
    return f"{int(seconds)}s"


def _until(now: datetime, then: datetime | None) -> str:
    if then is None:
        return "-"
    return "now" if then <= now else f"in {_age(then, now)}"


def _console() -> Console:
    """Highlights nothing and reads no markup, because what is printed comes from outside."""
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = WIDTH
    return console
