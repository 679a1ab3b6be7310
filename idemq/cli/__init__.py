"""The `idemq` command.

Every group of commands is a module here, and joins in below; what only one command needs is imported inside
it. What may go wrong for a user ends in one line on standard error: an `IdemqError` or a `Failure`. A
traceback is a bug.
"""

from __future__ import annotations

from collections.abc import Sequence

import typer

from idemq.cli import db, demo, doubt, failed, overview, run, seen
from idemq.cli.loading import Failure
from idemq.errors import IdemqError, SetupError

root = typer.Typer(
    help="Idempotent message consumers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
root.add_typer(db.commands, name="db")
root.command()(run.run)
root.command()(overview.status)
root.add_typer(failed.dead, name="dead")
root.add_typer(failed.parked, name="parked")
root.add_typer(doubt.commands, name="doubt")
root.command()(seen.seen)
root.command()(demo.demo)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and exit: 0 done, 1 it failed or found a problem, 2 it was called or set up wrongly."""
    try:
        root(args=arguments, prog_name="idemq")
    except (IdemqError, Failure) as error:
        typer.echo(f"idemq: {error}", err=True)
        raise SystemExit(2 if isinstance(error, SetupError) else 1) from None
