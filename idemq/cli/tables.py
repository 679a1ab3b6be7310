"""What the tables of all commands have in common."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, TypeVar
from uuid import UUID

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from idemq.audit import Entry
from idemq.cli.harmless import one_line, shown

T = TypeVar("T")

#: How many columns a table has where no terminal says it.
WIDTH = 160


def console() -> Console:
    """Highlights nothing and reads no markup, because what is printed comes from outside."""
    made = Console(highlight=False, markup=False, emoji=False)
    if not made.is_terminal:
        made.width = WIDTH
    return made


def print_table(table: Table, rows: Iterable[Sequence[str]]) -> None:
    """In a narrow terminal, columns without `no_wrap` are cut first; what is not to be folded is cut."""
    for cells in rows:
        pairs = zip(cells, table.columns, strict=True)
        table.add_row(*(Text(cell, no_wrap=column.overflow != "fold") for cell, column in pairs))
    console().print(table)


def print_facts(facts: Mapping[str, str], history: Sequence[tuple[str, str]]) -> None:
    """What is known of one thing, and what people did to it."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    print_table(table, ([name, one_line(fact, 1_024)] for name, fact in [*facts.items(), *history]))


def print_part(title: str, text: str) -> None:
    if text:
        out = console()
        out.print(Text(f"\n{title}", style="bold"))
        out.print(Text(text), soft_wrap=True)


def print_json(value: Any) -> None:
    """ASCII only: no terminal obeys anything in it."""
    typer.echo(json.dumps(value, indent=2))


def print_first(
    found: Sequence[T],
    limit: int,
    as_json: Callable[[T], Any] | None,
    as_table: Callable[[Sequence[T]], None],
) -> None:
    """The first `limit` of what was found; one more was asked for, to know whether there are more."""
    if as_json is not None:
        print_json([as_json(each) for each in found[:limit]])
    elif found:
        as_table(found[:limit])
        if len(found) > limit:
            typer.echo(f"These are the first {limit}; there are more: see --limit, or choose.")
    else:
        typer.echo("There are none.")


def plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    return str(value) if isinstance(value, UUID) else value


def fields_of(value: Any, *left_out: str) -> dict[str, Any]:
    """The fields of a dataclass with slots."""
    return {name: plain(getattr(value, name)) for name in value.__slots__ if name not in left_out}


def entries_as_json(history: Sequence[Entry]) -> list[dict[str, Any]]:
    return [{name: plain(each) for name, each in entry._asdict().items()} for entry in history]


def raised(error: str | None) -> str:
    """The line of a traceback that says what was raised: not its last one, where more lines follow."""
    lines = [line for line in shown(error or "").splitlines() if line.strip()]
    frames = [number for number, line in enumerate(lines) if line.startswith("  File ")]
    after = lines[frames[-1] + 1 :] if frames else lines
    said = [line for line in after if not line[0].isspace() and not line.startswith("Traceback")]
    return one_line((said or lines or [""])[0])


def moment(then: datetime | None) -> str:
    return "-" if then is None else then.isoformat(" ", "seconds")


def age(now: datetime, then: datetime | None) -> str:
    if then is None:
        return "-"
    seconds = max(0.0, (now - then) / timedelta(seconds=1))
    for unit, size in (("d", 86_400), ("h", 3_600), ("m", 60)):
        if seconds >= 2 * size:
            return f"{int(seconds // size)}{unit}"
    return f"{int(seconds)}s"


def until(now: datetime, then: datetime | None) -> str:
    if then is None:
        return "-"
    return "now" if then <= now else f"in {age(then, now)}"
