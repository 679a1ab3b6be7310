"""The judge. Knows nothing of idemq but its two tables; run as a program of its own.

    python -m prove.checker PUBLISHED DATABASE [--left N]

PUBLISHED lists the messages that the broker confirmed, one a line with kind and key, in the order of their
confirmation, copies included. Prints one JSON object:

lost       published, no effect and no row in the table of failures
double     more than one effect
torn       an effect without its claim, or a claim with neither effect nor row
stray      an effect of something never published
dead       dead letters
blamed     dead letters of messages that are not to die, with a wrong reason, or a second one of a message
spared     messages that are to die, and have no dead letter or an effect
parked     messages that still wait to be tried again
disorder   effects that came after an effect of a message of their key that was published later
leftovers  transactions left open, and messages that the broker still holds

Exits with 1 when anything is not as it should be.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg

#: The kinds of messages that are to die, and the reason that their dead letters give.
DIE = {"rejected": "rejected", "exits": "crashed", "garbled": "crashed"}

WAITING, DEAD = 1, 2

WRONG = ("lost", "double", "torn", "stray", "blamed", "spared", "parked", "disorder", "leftovers")


def judge(lines: list[tuple[UUID, str, str]], database: str) -> dict[str, Any]:
    with psycopg.connect(database) as connection:
        applied = [row[0] for row in connection.execute("SELECT id FROM effects ORDER BY seq")]
        claims = {row[0] for row in connection.execute("SELECT id FROM idemq_processed")}
        rows = connection.execute("SELECT identity, state, reason FROM idemq_failed").fetchall()
        open_transactions = connection.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
            "AND pid <> pg_backend_pid() AND state LIKE 'idle in transaction%'"
        ).fetchone()
    assert open_transactions is not None
    effects = Counter(applied)
    kinds = {identifier: kind for identifier, kind, _ in lines}
    expected = set(kinds)
    failed = {identity for identity, _, _ in rows}
    letters = [(identity, reason) for identity, state, reason in rows if state == DEAD]
    dead = Counter(identity for identity, _ in letters)
    to_die = {identity for identity, kind in kinds.items() if kind in DIE}
    return {
        "messages": len(expected),
        "copies": len(lines) - len(expected),
        "effects": effects.total(),
        "lost": len(expected - set(effects) - failed),
        "double": sum(count > 1 for count in effects.values()),
        "torn": len(set(effects) - claims) + len(claims - set(effects) - failed),
        "stray": len(set(effects) - expected),
        "dead": len(letters),
        "blamed": sum(reason != DIE.get(kinds.get(identity, "")) for identity, reason in letters)
        + sum(count - 1 for count in dead.values()),
        "spared": len(to_die - set(dead)) + len(to_die & set(effects)),
        "parked": sum(state == WAITING for _, state, _ in rows),
        "disorder": _disorder(lines, applied),
        "leftovers": open_transactions[0],
    }


def _disorder(lines: list[tuple[UUID, str, str]], applied: list[UUID]) -> int:
    """A message's place is that of its first copy."""
    keys = {identifier: key for identifier, _, key in lines}
    place = {identifier: number for number, identifier in enumerate(keys)}
    newest: dict[str, int] = {}
    late = 0
    for identifier in applied:
        if (key := keys.get(identifier)) is not None:
            late += place[identifier] < newest.get(key, -1)
            newest[key] = max(place[identifier], newest.get(key, -1))
    return late


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("published", type=Path)
    parser.add_argument("database")
    parser.add_argument("--left", type=int, default=0, help="messages that the broker still holds")
    arguments = parser.parse_args()
    lines = [line.split() for line in arguments.published.read_text().splitlines()]
    verdict = judge([(UUID(identifier), kind, key) for identifier, kind, key in lines], arguments.database)
    verdict["leftovers"] += arguments.left
    sys.stdout.write(json.dumps(verdict) + "\n")
    sys.exit(1 if any(verdict[name] for name in WRONG) or not verdict["messages"] else 0)


if __name__ == "__main__":
    main()
