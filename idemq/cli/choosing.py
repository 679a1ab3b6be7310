"""Which letters or effects a command is about, and the question before anything is done to them.

Guaranteed: what was counted and asked about is what it is done to, and nothing else.
"""

from __future__ import annotations

import getpass
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Annotated, Protocol, TypeVar
from uuid import UUID

import typer
from sqlalchemy import Connection

from idemq import letters
from idemq.cli.harmless import one_line
from idemq.cli.loading import Database, Failure
from idemq.errors import SetupError
from idemq.failed_rows import Which

Found = TypeVar("Found")

#: How many letters one transaction retries or drops.
AT_ONCE = 1_000

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def duration(text: str) -> timedelta:
    """`2h`, `7d`, `1h30m`."""
    if not re.fullmatch(r"(\d{1,6}[smhdw])+", text.strip()):
        raise typer.BadParameter(f"{text!r} is no duration: write 90s, 30m, 2h, 7d or 1h30m")
    parts = re.findall(r"(\d+)([smhdw])", text)
    return sum((timedelta(**{_UNITS[unit]: int(count)}) for count, unit in parts), timedelta())


Consumer = Annotated[str | None, typer.Option("--consumer", help="Of this consumer only.")]
Reason = Annotated[str | None, typer.Option("--reason", help='With this reason only, such as "rejected".')]
Older = Annotated[
    timedelta | None,
    typer.Option("--older-than", parser=duration, metavar="AGE", help="For longer than this: 2h, 7d."),
]
Newer = Annotated[
    timedelta | None,
    typer.Option("--newer-than", parser=duration, metavar="AGE", help="For less than this: 30m, 2h."),
]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="At most so many: those that came first.")]

Json = Annotated[bool, typer.Option("--json", help="For programs.")]
Shown = Annotated[int, typer.Option("--limit", min=1, help="At most so many: those that came first.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
By = Annotated[str | None, typer.Option("--by", help="Who does it, for the record; by default the user.")]
Raw = Annotated[
    Path | None,
    typer.Option("--raw", metavar="FILE", help="Write the body there, byte for byte; - is standard output."),
]


def only(found: Sequence[Found], keys: Sequence[UUID], prefix: str, none: str) -> Found:
    """What an id means that was given by its beginning. Raises `Failure` unless it is one thing."""
    if not found:
        raise Failure(none)
    if len(found) > 1:
        raise Failure(f"{prefix!r} is not unique: it begins {', '.join(map(str, keys))}")
    return found[0]


def one(connection: Connection, schema: str | None, prefix: str) -> letters.Letter:
    """The letter whose id begins with `prefix`. Raises `Failure` when there is none, or more than one."""
    found = letters.find(connection, prefix, schema=schema)
    none = f"there is no letter {prefix!r}; it may be done, or dropped"
    return only(found, [each.pk for each in found], prefix, none)


def those(connection: Connection, schema: str | None, prefixes: list[str]) -> list[UUID]:
    """The dead letters that the ids name. Raises `Failure` for one that is waiting."""
    found = [one(connection, schema, prefix) for prefix in prefixes]
    for each in found:
        if each.state != "dead":
            raise Failure(f"{each.pk} is not dead: it is waiting to be tried again ({each.reason})")
    return [each.pk for each in found]


class Do(Protocol):
    """Retries or drops the letters `pks`; how many it were."""

    def __call__(self, connection: Connection, pks: list[UUID]) -> int: ...


def check_said(ids: list[str] | None, every: bool, which: Which) -> None:
    """Raises `SetupError` unless it is said in one way which letters are meant."""
    filtered = any(value is not None for name, value in which.items() if name != "limit")
    if sum((bool(ids), filtered, every)) != 1:
        raise SetupError("say which: ids, or a filter such as --consumer or --reason, or --all")


def matching(database: Database, ids: list[str] | None, which: Which) -> list[letters.Match]:
    def match(connection: Connection) -> list[letters.Match]:
        if ids:
            which["ids"] = those(connection, database.schema, ids)
        return letters.matching(connection, schema=database.schema, **which)

    return database.do(match)


def act(
    database: Database,
    action: str,
    chosen: list[letters.Match],
    yes: bool,
    do: Do,
) -> int:
    """Ask, then do it to just the letters that were counted."""
    if not chosen:
        say(f"There is nothing to {action}.")
        return 0
    kinds = Counter((database.renamed(each.consumer), each.reason) for each in chosen)
    parts = [f"{one_line(name)}: {count} {reason}" for (name, reason), count in sorted(kinds.items())]
    say(f"{action} {counted(len(chosen))} ({'; '.join(parts)})")
    ask(yes)
    pks = [each.pk for each in chosen]
    done = 0
    for start in range(0, len(pks), AT_ONCE):
        done += database.do(partial(do, pks=pks[start : start + AT_ONCE]))
    if done < len(pks):
        say(f"{len(pks) - done} were not dead any more: somebody else was first")
    return done


def ask(yes: bool) -> None:
    """Raises `Failure` on a no, and `SetupError` where nobody can be asked; `yes` is the answer."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise SetupError("there is no terminal to ask at, so nothing was done: give --yes")
    if not typer.confirm("Go on?", err=True):
        raise Failure("nothing was done")


def user() -> str:
    """Who does it, if nothing else is said."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container often has no name for its user
        return f"uid {os.getuid()}"


def write(body: bytes, path: Path) -> None:
    """What --raw wants."""
    if str(path) == "-":
        sys.stdout.buffer.write(body)
        sys.stdout.buffer.flush()
        return
    try:
        path.write_bytes(body)
    except OSError as error:
        raise Failure(f"{path} cannot be written: {error.strerror}") from None


def counted(count: int) -> str:
    return f"{count:,} dead letter{'' if count == 1 else 's'}"


def say(words: str) -> None:
    typer.echo(words, err=True)
