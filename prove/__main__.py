"""`make prove`: kill loops on RabbitMQ and Kafka with PostgreSQL, also with the core broken on purpose.

Exits with 1 when a message was lost or doubled, or when a broken core was not noticed. LONG=1 multiplies the
figures by ten. SEED=n repeats a schedule, ONLY=Kafka runs one broker.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
from rich.console import Console
from rich.table import Table
from sqlalchemy import URL, make_url

from prove.brokers import Broker, Kafka, RabbitMQ
from prove.controls import CONTROLS
from prove.loop import Plan, Run
from tests import servers

SHOWN = ("kills", "hits", "messages", "copies", "lost", "double", "torn", "dead", "leftovers")


def main() -> None:
    console = Console()
    only = os.environ.get("ONLY", "")
    times = 10 if os.environ.get("LONG") == "1" else 1
    seed = int(os.environ.get("SEED", "1"))
    home = Path(os.environ.get("PROVE_HOME", ".prove")).resolve()
    shutil.rmtree(home, ignore_errors=True)
    history: list[dict[str, Any]] = []
    with ExitStack() as stack:
        try:
            database = make_url(stack.enter_context(servers.server("postgres")))
            brokers: dict[str, Broker] = {
                "RabbitMQ": RabbitMQ(stack.enter_context(servers.server("rabbitmq"))),
                "Kafka": Kafka(stack.enter_context(servers.server("kafka"))),
            }
        except servers.Unavailable as reason:
            console.print(f"make prove needs real servers: {reason}")
            sys.exit(1 if servers.required() else 0)
        for label, broker in brokers.items():
            if only not in label:
                continue
            plan = _plan(broker, times, seed)
            history.append(_run(console, home, database, label, broker, plan))
            for control in CONTROLS:
                small = replace(plan, messages=1500, kills=30, control=control)
                history.append(_run(console, home, database, label, broker, small))
    (home / "history.json").write_text(json.dumps(history, indent=1))
    console.print(_table(history))
    wrong = [entry for entry in history if entry["red"] != bool(entry["control"])]
    for entry in wrong:
        what = "a broken core was not noticed" if entry["control"] else "messages were lost or doubled"
        console.print(f"WRONG: {entry['broker']} {entry['control']}: {what}")
    messages, kills = (sum(e[key] for e in history if not e["control"]) for key in ("messages", "kills"))
    console.print(
        f"0 failures in {messages:,} messages bounds the rate below {3 / messages:.1e} a message, and in "
        f"{kills:,} kills below {3 / kills:.1e} a kill (95 %)."
        if not wrong
        else "not proven"
    )
    sys.exit(1 if wrong else 0)


def _plan(broker: Broker, times: int, seed: int) -> Plan:
    if broker.kills_all:
        return Plan(20_000 * times, 300 * times, workers=3, after=(0.0, 0.6), seed=seed)
    return Plan(20_000 * times, 300 * times, workers=5, after=(0.0, 0.3), seed=seed)


def _run(
    console: Console, home: Path, database: URL, label: str, broker: Broker, plan: Plan
) -> dict[str, Any]:
    what = f"{label}{', ' + plan.control if plan.control else ''}"
    name = f"prove_{uuid4().hex[:8]}"
    admin = database.set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(admin, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
        try:
            with console.status(what) as status:
                run = Run(
                    plan,
                    broker,
                    database.set(database=name),
                    home / name,
                    show=lambda facts: status.update(f"{what}: {facts}"),
                )
                verdict = run.execute()
        finally:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)")
    entry = {"broker": label, "control": plan.control, "seed": plan.seed, **verdict}
    console.print(f"{what}: {'red' if verdict['red'] else 'green'} after {verdict['seconds']} s")
    return entry


def _table(history: list[dict[str, Any]]) -> Table:
    """One column for each run: it stays readable in 80 columns."""
    table = Table("", *(entry["broker"] for entry in history), title="SIGKILLs, PostgreSQL")
    table.add_row("core", *(f"broken: {e['control']}" if e["control"] else "idemq" for e in history))
    for name in SHOWN:
        table.add_row(name, *(f"{entry[name]:,}" for entry in history))
    table.add_row("verdict", *("red" if entry["red"] else "green" for entry in history))
    return table


if __name__ == "__main__":
    main()
