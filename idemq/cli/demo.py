"""`idemq demo`: shows the story of `idemq.demo` in the terminal."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from idemq.demo import MESSAGES, PROCESSES, Demo, Outcome, gateway, wait_until_done
from idemq.errors import SetupError

Seed = Annotated[int, typer.Option(help="Repeats the same choice of copies and victim.")]
Keep = Annotated[Path | None, typer.Option(help="Work in this directory and leave everything there.")]


def demo(seed: Seed = 1, keep: Keep = None) -> None:
    """Show that each customer gets one text: 1,000 payments, some delivered twice, a worker killed."""
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        if any(keep.iterdir()):
            raise SetupError(f"--keep {keep}: the directory is not empty; give a new one")
        _run(keep.resolve(), seed)
        return
    with tempfile.TemporaryDirectory(prefix="idemq-demo-") as directory:
        _run(Path(directory), seed)


def _run(directory: Path, seed: int) -> None:
    console = Console()
    story = Demo(directory, seed)
    with gateway(directory / "gateway.log") as port:
        console.print(f"Publishing {MESSAGES} settled payments, some of them more than once ...")
        story.prepare(port)
        console.print(
            f"{story.copies} deliveries wait. Starting {PROCESSES} workers; one is killed half way."
        )
        columns = (TextColumn("{task.description:>9}"), BarColumn(), MofNCompleteColumn())
        with story.workers(), Progress(*columns, console=console) as progress:
            receipts = progress.add_task("receipts", total=MESSAGES)
            texts = progress.add_task("texts", total=MESSAGES)

            def show(receipts_now: int, texts_now: int) -> None:
                progress.update(receipts, completed=receipts_now)
                progress.update(texts, completed=texts_now)

            killed = wait_until_done(story, show)
    outcome = story.outcome(killed)
    console.print(_table(outcome))
    if outcome.asked_again:
        console.print(
            "The killed worker was sending, and nobody knew whether those texts had left. They were asked "
            "for again under the same key, and the provider sent none twice."
        )
    _resolve(console, story)
    left = story.outcome(killed)
    console.print(f"In doubt: {left.in_doubt}. Texts sent: {left.texts:,}, for {left.messages:,} payments.")
    if left.in_doubt or outcome.in_doubt != 1 or left.lost or left.double:
        raise typer.Exit(1)


def _resolve(console: Console, story: Demo) -> None:
    """What a person does about the text abroad."""
    console.print(
        "The provider for abroad knows no keys. It took a text and dropped the connection, so that one is "
        "not sent again by itself. A person looks into the provider's log, and decides:"
    )
    for command, printed in story.doubt():
        console.print(f"$ {command}", style="bold", markup=False, highlight=False, soft_wrap=True)
        console.print(printed.rstrip(), markup=False, highlight=False, soft_wrap=True)


def _table(outcome: Outcome) -> Table:
    table = Table("counted", "", "where", title="One text each")
    rows = (
        ("messages", outcome.messages, "the publisher's list"),
        ("deliveries", outcome.deliveries, "the publisher's list: some go out twice"),
        ("duplicates skipped", outcome.deliveries - outcome.receipts, "deliveries that made no receipt"),
        ("workers killed", 1, f"process {outcome.killed}, SIGKILL"),
        ("receipts", outcome.receipts, "the shop's table"),
        ("texts sent", outcome.texts, "the providers' log"),
        ("asked again", outcome.asked_again, "the providers' log: no second text"),
        ("in doubt", outcome.in_doubt, "the shop's database: a person decides"),
        ("lost", outcome.lost, "payments without a receipt or a text"),
        ("double", outcome.double, "payments with two receipts or two texts"),
    )
    for name, count, where in rows:
        table.add_row(name, f"{count:,}", where)
    return table
