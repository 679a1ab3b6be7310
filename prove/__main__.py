"""`make prove`: real processes on real servers, killed, poisoned and cut off; and the core broken on purpose.

kills     SIGKILLs at random while messages and copies arrive; also with a broken core, which must be noticed
failures  the same with handlers that fail twice or reject, and with copies of 20 % of the messages
poison    messages that end the process which works on them, in the handler or in the payload's decoder
replay    messages that go dead for a reason, and get through with `idemq dead retry` once it is mended
order     messages of 64 keys, workers killed and frozen: per key in order; also with a core that forgets it
outbox    the relay killed at each step of publishing; also with one that deletes before the confirm
effects   a text message gateway with faults, and the relay killed at each step of an effect: one text each,
          by the gateway's own log, or a person is asked; also with a core that sends again when in doubt
outage    PostgreSQL killed and away for a while, RabbitMQ restarted, while messages arrive

Exits with 1 when a message was lost, doubled, wrongly dead or left waiting, or a broken core was not noticed.
LONG=1 runs the full figures. SEED=n repeats a schedule. ONLY=Kafka runs one broker, ONLY=poison one
scenario, ONLY="Kafka poison" one run. The history is left in `.prove/history.json`.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
from rich.console import Console
from rich.table import Table
from sqlalchemy import URL, make_url

from prove.brokers import Broker, File, Kafka, RabbitMQ
from prove.fire import table
from prove.outage import Outage, own_postgres, own_rabbitmq
from prove.plans import EMBEDDED, SCENARIOS, Scene, scenes
from tests import servers

SHOWN = (
    *("messages", "copies", "kills", "hits", "lost", "double", "torn", "stray"),
    *("dead", "blamed", "spared", "parked", "disorder", "leftovers"),
)

Show = Callable[[Mapping[str, object]], None]


def main() -> None:
    console = Console()
    home = Path(os.environ.get("PROVE_HOME", ".prove")).resolve()
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    history: list[dict[str, Any]] = []
    with ExitStack() as stack:
        try:
            database = make_url(stack.enter_context(servers.server("postgres")))
            brokers: dict[str, Broker] = {
                "RabbitMQ": RabbitMQ(stack.enter_context(servers.server("rabbitmq"))),
                "Kafka": Kafka(stack.enter_context(servers.server("kafka"))),
            }
            chosen = _chosen(brokers)
            brokers[EMBEDDED] = File(home / "broker.db")
            for scene in chosen:
                history.append(_run(console, home, database, brokers[scene.broker], scene))
                (home / "history.json").write_text(json.dumps(history, indent=1))
        except servers.Unavailable as reason:
            console.print(f"make prove needs real servers: {reason}")
            sys.exit(1 if servers.required() else 0)
    for broker in dict.fromkeys(entry["broker"] for entry in history):
        console.print(_table(broker, [entry for entry in history if entry["broker"] == broker]))
    sys.exit(0 if _proven(console, history) else 1)


def _chosen(brokers: dict[str, Broker]) -> list[Scene]:
    only = os.environ.get("ONLY", "")
    every = scenes(brokers, int(os.environ.get("SEED", "1")), long=os.environ.get("LONG") == "1")
    chosen = [scene for scene in every if only in scene.label]
    if not chosen:
        sys.exit(f"ONLY={only}: there is no such run")
    return chosen


def _run(console: Console, home: Path, database: URL, broker: Broker, scene: Scene) -> dict[str, Any]:
    with console.status(scene.label) as status:

        def show(facts: Mapping[str, object]) -> None:
            status.update(f"{scene.label}: {', '.join(f'{name} {fact}' for name, fact in facts.items())}")

        play = _play_outage if SCENARIOS[scene.scenario] is Outage else _play
        verdict = play(scene, broker, database, home / uuid4().hex[:8], show)
    if outcomes := verdict.pop("outcomes", ()):
        console.print(table(outcomes, f"{scene.label}: {verdict['kills']} kills"))
    known = {"broker": scene.broker, "scenario": scene.scenario, "control": scene.plan.control}
    more = {name: value for name, value in verdict.items() if name not in SHOWN}
    console.print(f"{scene.label}: {', '.join(f'{name} {value}' for name, value in more.items())}")
    return {**known, "seed": scene.plan.seed, **verdict}


def _play(scene: Scene, broker: Broker, server: URL, directory: Path, show: Show) -> dict[str, Any]:
    with _database(server) as database:
        return SCENARIOS[scene.scenario](scene.plan, broker, database, directory, show).execute()


def _play_outage(scene: Scene, _broker: Broker, _server: URL, directory: Path, show: Show) -> dict[str, Any]:
    with (
        own_postgres() as (postgres, server),
        own_rabbitmq() as (rabbitmq, url),
        _database(server) as database,
    ):
        outage = Outage(scene.plan, RabbitMQ(url), database, directory, show)
        outage.postgres, outage.rabbitmq = postgres, rabbitmq
        return outage.execute()


@contextmanager
def _database(server: URL) -> Iterator[URL]:
    name = f"prove_{uuid4().hex[:8]}"
    admin = server.set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(admin, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
    try:
        yield server.set(database=name)
    finally:
        with psycopg.connect(admin, autocommit=True) as connection:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


def _table(broker: str, entries: list[dict[str, Any]]) -> Table:
    """One column for each run: it stays readable in 80 columns."""
    table = Table("", *(entry["scenario"] for entry in entries), title=f"{broker}, PostgreSQL")
    table.add_row("core", *(f"broken: {e['control']}" if e["control"] else "idemq" for e in entries))
    for name in SHOWN:
        table.add_row(name, *(f"{entry[name]:,}" for entry in entries))
    table.add_row("verdict", *("red" if entry["red"] else "green" for entry in entries))
    return table


def _proven(console: Console, history: list[dict[str, Any]]) -> bool:
    wrong = [entry for entry in history if entry["red"] != bool(entry["control"])]
    for entry in wrong:
        what = "a broken core was not noticed" if entry["control"] else "something is not as it should be"
        console.print(f"WRONG: {entry['broker']} {entry['scenario']} {entry['control']}: {what}")
    if wrong:
        return False
    whole = [entry for entry in history if not entry["control"]]
    for what, name in (("messages", "messages"), ("kills", "kills")):
        if count := sum(entry[name] for entry in whole):
            console.print(f"0 failures in {count:,} {what} bounds the rate below {3 / count:.1e} (95 %)")
    return True


if __name__ == "__main__":
    main()
